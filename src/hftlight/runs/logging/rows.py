"""Curves and scores as rows of a file, and their names in every logger."""

import json
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from typing_extensions import override

HIDDEN = ("epoch",)
COLUMNS = ("steps", "seconds", "seconds_per_step", "relative_to_sft", "peak_memory_mib")


class RowsLogger(Logger):
    """Curves as rows ``{"step", "name", "value"}``, one JSON object per line; steps are optimizer steps, from 1.

    Args:
        path: the file; rows at or past the step from which a stage resumes are dropped, since they will be made again.
        resumed_at: optimizer steps that the resumed checkpoint holds.
    """

    def __init__(self, path: Path, resumed_at: int) -> None:
        super().__init__()
        kept = [r for r in whole_rows(path) if r["step"] <= resumed_at] if resumed_at else []
        self.file = path.open("w", encoding="utf-8")
        self._write(kept)

    @property
    @override
    def name(self) -> str:
        return "curves"

    @property
    @override
    def version(self) -> int:
        return 0

    @override
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        at = (step or 0) + 1
        self._write({"step": at, "name": k, "value": float(v)} for k, v in metrics.items() if k not in HIDDEN)

    @override
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        return None

    @override
    def finalize(self, status: str) -> None:
        self.file.flush()

    def _write(self, rows: Iterable[dict[str, Any]]) -> None:
        self.file.writelines(json.dumps(row) + "\n" for row in rows)
        self.file.flush()


def whole_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file whose last line a kill may have cut off."""
    if not path.is_file():
        return []
    rows = []
    for line in filter(None, path.read_text(encoding="utf-8").split("\n")):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def score_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the name of each score of one model: ``eval/METRIC``, and with a further judge ``eval/METRIC/JUDGE``.

    A score of one category or language has its group behind the metric.

    Args:
        rows: its scores, of each metric the one by the deciding judge first.
    """
    deciding: dict[str, Any] = {}
    names = []
    for row in rows:
        group, judge = row.get("group"), row.get("judge")
        further = judge if deciding.setdefault(row["metric"], judge) != judge else None
        names.append("/".join(str(part) for part in ("eval", row["metric"], group, further) if part))
    return names


def named(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return what one stage ended with, by the names that every logger and every dashboard uses.

    A curve has the name it was logged by, such as ``train/loss``, and counts with its last value. A score is called
    ``eval/METRIC``, the ends of its interval ``eval/METRIC_low`` and ``_high``; a cost ``cost/COLUMN``. Scores of
    single categories and languages are left to metrics.jsonl and the page.

    Args:
        rows: rows of metrics.jsonl of one arm and stage.
    """
    rows = list(rows)
    scores = [row for row in rows if row["kind"] == "score" and not row.get("group")]
    found = {row["name"]: row["value"] for row in rows if row["kind"] == "curve"}
    for name, row in zip(score_names(scores), scores, strict=True):
        found |= {name: row["value"], f"{name}_low": row.get("low"), f"{name}_high": row.get("high")}
    for row in rows:
        if row["kind"] == "cost":
            found |= {f"cost/{column}": row.get(column) for column in COLUMNS}
    return {name: float(value) for name, value in found.items() if value is not None}
