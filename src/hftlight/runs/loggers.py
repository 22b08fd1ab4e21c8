"""Where curves go: always a file of the stage, and what the user asked for besides."""

import json
import os
import shutil
import threading
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from typing_extensions import override

from hftlight.config import RunConfig
from hftlight.errors import InputError
from hftlight.folders import comparison_of

HIDDEN = ("epoch",)
SUMMARY = "summary"  # stage of the W&B run that says what came out
INIT_SECONDS, FINISH_SECONDS = 30.0, 60.0  # how long W&B is waited for
COLUMNS = ("steps", "seconds", "seconds_per_step", "relative_to_sft", "peak_memory_mib")
_lost = threading.Event()  # W&B did not answer this process: what follows is written offline at once


class RowsLogger(Logger):
    """Curves as rows ``{"step", "name", "value"}``, one JSON object per line; steps are optimizer steps, from 1.

    Args:
        path: the file; rows at or past the step from which a stage resumes are dropped, since they will be made again.
        resumed_at: optimizer steps that the resumed checkpoint holds.
    """

    def __init__(self, path: Path, resumed_at: int) -> None:
        super().__init__()
        kept = [r for r in _whole_rows(path) if r["step"] <= resumed_at] if resumed_at else []
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


def _whole_rows(path: Path) -> list[dict[str, Any]]:
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


def labels_of(folder: Path, arm: str, stage: str, config: RunConfig) -> dict[str, Any]:
    """Return what a stage's curves are found by: comparison (or run), arm, task, attack, p, seed and stage."""
    return {
        "comparison": (comparison_of(folder) or folder).resolve().name,
        "arm": arm,
        "task": Path(config.data.task).stem,
        "attack": config.attack,
        "p": config.harmful_ratio,
        "seed": config.seed,
        "stage": stage,
    }


class StageLogger(Logger):
    """Everything about one stage of one arm, sent to one of Lightning's loggers; W&B's errors are said and forgiven.

    Steps are optimizer steps, from 1, as in metrics.jsonl.

    Args:
        inner: where it goes.
        folder: folder of the run.
        labels: what the stage is found by.

    Attributes:
        before: optimizer steps of the stage's phases before this one, 0 in its first.
    """

    def __init__(self, inner: Logger, folder: Path, labels: Mapping[str, Any]) -> None:
        super().__init__()
        self.inner, self.folder, self.labels, self.before = inner, folder, labels, 0
        self._failed = False

    @property
    @override
    def name(self) -> str | None:
        return self.inner.name

    @property
    @override
    def version(self) -> int | str | None:
        return self.inner.version

    @override
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.send({k: v for k, v in metrics.items() if k not in HIDDEN}, self.before + (step or 0) + 1)

    @override
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        return None

    @override
    def finalize(self, status: str) -> None:
        self._forgiving(lambda: self.inner.finalize(status))

    def send(self, metrics: Mapping[str, float], step: int) -> None:
        """Send values that hold after ``step`` optimizer steps."""
        if metrics:
            self._forgiving(lambda: self.inner.log_metrics(dict(metrics), step))

    def replay(self, curves: Path) -> None:
        """Send what a phase has logged so far, before it was interrupted, or in another run that shares it."""
        steps: dict[int, dict[str, float]] = {}
        for row in _whole_rows(curves):
            steps.setdefault(row["step"], {})[row["name"]] = row["value"]
        for step, metrics in sorted(steps.items()):
            self.send(metrics, self.before + step)

    def close(self, exit_code: int = 0) -> None:
        """Write what is left; ``exit_code`` tells W&B whether the stage came to its end."""
        self.finalize("success" if exit_code == 0 else "failed")
        if isinstance(self.inner, WandbLogger):
            finish_wandb(self.inner.experiment, self.folder, exit_code)

    def _forgiving(self, work: Callable[[], None]) -> None:
        if not isinstance(self.inner, WandbLogger):
            work()
        elif not self._failed:
            try:
                work()
            except Exception as error:  # whatever it is, a run does not depend on W&B
                self._failed = True
                _say(f"W&B failed while a stage was logged ({_in_short(error)})", self.folder)


def stage_logger(
    kind: str, folder: Path, labels: Mapping[str, Any], config: Mapping[str, Any], curves: Path | None = None
) -> StageLogger | None:
    """Return the logger that ``--logger`` names for one stage of one arm, or None.

    Args:
        kind: ``"none"``, ``"csv"``, ``"wandb"`` or ``"tensorboard"``.
        folder: folder of the run; everything is written below it.
        labels: what the stage is found by.
        config: the run's configuration, for W&B.
        curves: what the stage has logged so far, before it was interrupted, or in another run that shares it.

    Raises:
        InputError: if the package that the kind needs is missing.
    """
    if kind == "none":
        return None
    inner: Logger
    if kind == "wandb":
        experiment = start_wandb(folder, labels, config)
        inner = DummyLogger() if experiment is None else WandbLogger(experiment=experiment)
    else:
        arm, stage = labels["arm"], labels["stage"]
        shutil.rmtree(folder / kind / arm / stage, ignore_errors=True)  # what was there is sent again
        try:
            made: Any = CSVLogger if kind == "csv" else TensorBoardLogger
            options = {} if kind == "csv" else {"default_hp_metric": False}
            inner = made(str(folder / kind), name=arm, version=stage, **options)
        except ModuleNotFoundError as error:
            raise InputError('--logger tensorboard needs tensorboard: pip install "hftlight[tensorboard]".') from error
        inner.log_hyperparams(dict(labels))  # type: ignore[call-arg]
    logger = StageLogger(inner, folder, labels)
    if curves is not None:
        logger.replay(curves)
    return logger


def start_wandb(folder: Path, labels: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """Return a started W&B run: online with a key, offline without one or where W&B fails; None if that fails too.

    Args:
        folder: the run's folder, or the comparison's.
        labels: comparison, stage and what else it is found by: group, job type, name, tags and columns in W&B.
        config: what W&B shows as the configuration besides.
    """
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    words = [f"{key}={v:g}" if key in ("p", "seed") else str(v) for key, v in labels.items() if key != "comparison"]
    wait = float(os.environ.get("WANDB_INIT_TIMEOUT") or INIT_SECONDS)
    mode = os.environ.get("WANDB_MODE")
    for attempt in ("as asked", "offline"):
        try:
            if mode is None and (_lost.is_set() or not wandb.api.api_key):
                mode = "offline"
            made = wandb.init(
                mode=mode if attempt == "as asked" else "offline",  # type: ignore[arg-type]
                project=os.environ.get("WANDB_PROJECT", "hftlight"),
                group=str(labels["comparison"])[:128],
                job_type=str(labels["stage"]),
                name="/".join(words)[:128],
                tags=list(dict.fromkeys(word[:64] for word in (str(labels["comparison"]), *words))),
                dir=str(folder),
                config={**config, **labels},
                reinit="create_new",
                settings=wandb.Settings(console="off", silent=True, init_timeout=wait, finish_timeout=FINISH_SECONDS),
            )
            made.define_metric("trainer/global_step")
            made.define_metric("*", step_metric="trainer/global_step")
            return made
        except Exception as error:  # whatever it is, a run does not depend on W&B
            _lost.set()
            refused = isinstance(error, wandb.errors.AuthenticationError)
            what = "refuses the key" if refused else "cannot be reached"
            if attempt == "offline" or mode == "offline":
                what = "cannot be started offline"
            _say(f"W&B {what} ({_in_short(error)})", folder)
            if mode == "offline":
                break
    return None


def finish_wandb(experiment: Any, folder: Path, exit_code: int = 0) -> None:
    """End a W&B run; what it does not take within ``FINISH_SECONDS`` stays on the disk, and nothing waits for it."""
    errors: list[Exception] = []

    def finish() -> None:
        try:
            experiment.finish(exit_code=exit_code)
        except Exception as error:  # said below; a run does not depend on W&B
            errors.append(error)

    thread = threading.Thread(target=finish, daemon=True)
    thread.start()
    thread.join(FINISH_SECONDS + 1)
    if thread.is_alive() or errors:
        _lost.set()
        said = _in_short(errors[0]) if errors else f"no answer within {FINISH_SECONDS:g} seconds"
        _say(f"W&B did not take everything ({said})", folder)


def wandb_summary(
    folder: Path,
    labels: Mapping[str, Any],
    config: Mapping[str, Any],
    values: Mapping[str, float],
    media: Callable[[], Mapping[str, Any]],
) -> None:
    """Write what came out as a W&B run of its own.

    Args:
        folder: the run's folder, or the comparison's.
        labels: as for ``start_wandb``.
        config: what W&B shows as the configuration besides.
        values: numbers by name.
        media: makes tables and pictures by name.
    """
    experiment = start_wandb(folder, labels, config)
    if experiment is None:
        return
    try:
        experiment.summary.update(dict(values))
        experiment.log(dict(media()))
    except Exception as error:  # whatever it is, a run does not depend on W&B
        _say(f"W&B failed while the summary was logged ({_in_short(error)})", folder)
    finish_wandb(experiment, folder)


def _say(what: str, folder: Path) -> None:
    print(f"hftlight: {what}; the run goes on offline in {folder}, `wandb sync` sends what lies in its wandb folder.")


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no message')}"
