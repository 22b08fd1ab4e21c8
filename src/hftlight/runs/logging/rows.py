"""Curves as rows of a file, and the names of curves and scores in every logger."""

import json
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from typing_extensions import override

HIDDEN = ("epoch",)  # metrics of Lightning that are not logged
COLUMNS = ("steps", "seconds", "seconds_per_step", "relative_to_sft", "peak_memory_mib")


class RowsLogger(Logger):
    """A logger that writes curves as rows ``{"step", "name", "value"}``, one JSON object per line.

    Steps are optimizer steps, counted from 1.

    Args:
        path: the file. Existing rows up to step ``resumed_at`` stay; later ones are dropped and logged again.
        resumed_at: optimizer steps in the resumed checkpoint; 0 starts a new file.
    """

    def __init__(self, path: Path, resumed_at: int) -> None:
        super().__init__()
        # Read the old rows before the file is opened, which empties it.
        resumed = [r for r in whole_rows(path) if r["step"] <= resumed_at] if resumed_at else []
        self.file = path.open("w", encoding="utf-8")
        self._write(resumed)

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
        at = (step or 0) + 1  # Lightning counts steps from 0
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
    """Return the complete rows of a file, without a last line that a killed process left incomplete."""
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
    """Return the logged name of each score of one model.

    A score is named ``eval/METRIC`` if the deciding judge gave it, and ``eval/METRIC/JUDGE`` otherwise. A score of one
    category or language is named ``eval/METRIC/GROUP``.

    Args:
        rows: the scores. For each metric, the deciding judge's score comes first.
    """
    deciding: dict[str, Any] = {}
    names = []
    for row in rows:
        group, judge = row.get("group"), row.get("judge")
        further = judge if deciding.setdefault(row["metric"], judge) != judge else None
        names.append("/".join(str(part) for part in ("eval", row["metric"], group, further) if part))
    return names


def named(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the final values of one stage by the names that every logger and dashboard uses.

    A curve keeps its logged name, such as ``train/loss``, and contributes its last value. A score is named
    ``eval/METRIC``, and the ends of its interval ``eval/METRIC_low`` and ``eval/METRIC_high``. A cost is named
    ``cost/COLUMN``. Scores of single categories and languages are left out; metrics.jsonl and the report hold them.

    Args:
        rows: rows of metrics.jsonl of one arm and stage.
    """
    rows = list(rows)
    scores = [row for row in rows if row["kind"] == "score" and not row.get("group")]
    values = {row["name"]: row["value"] for row in rows if row["kind"] == "curve"}  # the last value of a name wins
    for name, row in zip(score_names(scores), scores, strict=True):
        values |= {name: row["value"], f"{name}_low": row.get("low"), f"{name}_high": row.get("high")}
    for row in rows:
        if row["kind"] == "cost":
            values |= {f"cost/{column}": row.get(column) for column in COLUMNS}
    return {name: float(value) for name, value in values.items() if value is not None}
