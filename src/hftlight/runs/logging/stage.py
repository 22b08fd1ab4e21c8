"""Where curves go: always a file of the stage, and what the user asked for besides."""

import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from typing_extensions import override

from hftlight.config import RunConfig
from hftlight.errors import InputError
from hftlight.folders import comparison_of
from hftlight.runs.logging.rows import HIDDEN, whole_rows
from hftlight.runs.logging.wandb import finish_wandb, in_short, start_wandb, warn


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
        for row in whole_rows(curves):
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
                warn(f"W&B failed while a stage was logged ({in_short(error)})", self.folder)


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
