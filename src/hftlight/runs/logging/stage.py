"""Loggers of one stage: they send curves and scores to the logger that the user chose, beside the stage's own file."""

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
from hftlight.folders import arm_in_comparison, comparison_of, file_name
from hftlight.runs.logging.rows import HIDDEN, whole_rows
from hftlight.runs.logging.wandb import finish_wandb, in_short, start_wandb, warn


def labels_of(folder: Path, arm: str, stage: str, config: RunConfig) -> dict[str, Any]:
    """Return the labels of a stage's curves: comparison (or run), arm, task, attack, p, seed and stage."""
    return {
        "comparison": (comparison_of(folder) or folder).resolve().name,
        "arm": arm_in_comparison(folder, arm),
        "task": Path(config.data.task).stem,
        "attack": config.attack,
        "p": config.harmful_ratio,
        "seed": config.seed,
        "stage": stage,
    }


class StageLogger(Logger):
    """A logger that sends everything about one stage of one arm to one of Lightning's loggers.

    Steps are optimizer steps, counted from 1, as in metrics.jsonl. The first error of W&B is printed, and from then on
    nothing is sent to it; the run continues.

    Args:
        inner: Lightning's logger.
        folder: folder of the run.
        labels: labels of the stage, from ``labels_of``.

    Attributes:
        before: optimizer steps of the stage's earlier phases, 0 in the first phase.
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
        self._tolerate_wandb(lambda: self.inner.finalize(status))

    def send(self, metrics: Mapping[str, float], step: int) -> None:
        """Send the values that metrics have after ``step`` optimizer steps."""
        if metrics:
            self._tolerate_wandb(lambda: self.inner.log_metrics(dict(metrics), step))

    def replay(self, curves: Path) -> None:
        """Send the curves that a phase has logged earlier, before an interruption or in another run that shares it."""
        # Collect all values of one step, then send them together in the order of the steps.
        steps: dict[int, dict[str, float]] = {}
        for row in whole_rows(curves):
            steps.setdefault(row["step"], {})[row["name"]] = row["value"]
        for step, metrics in sorted(steps.items()):
            self.send(metrics, self.before + step)

    def close(self, exit_code: int = 0) -> None:
        """Write the remaining data and close the logger.

        Args:
            exit_code: 0 if the stage has ended normally, 1 after an error; W&B shows it.
        """
        self.finalize("success" if exit_code == 0 else "failed")
        if isinstance(self.inner, WandbLogger):
            finish_wandb(self.inner.experiment, self.folder, exit_code)

    def _tolerate_wandb(self, work: Callable[[], None]) -> None:
        """Do ``work``. An error of W&B is printed once and does not stop the run. Other loggers raise their errors."""
        if not isinstance(self.inner, WandbLogger):
            work()
        elif not self._failed:
            try:
                work()
            except Exception as error:  # no error of W&B may stop a run
                self._failed = True
                warn(f"W&B failed while a stage was logged ({in_short(error)})", self.folder)


def stage_logger(
    kind: str, folder: Path, labels: Mapping[str, Any], config: Mapping[str, Any], curves: Path | None = None
) -> StageLogger | None:
    """Return the logger that ``--logger`` names for one stage of one arm, or None for ``"none"``.

    Args:
        kind: ``"none"``, ``"csv"``, ``"wandb"`` or ``"tensorboard"``.
        folder: folder of the run; the logger writes all files below it.
        labels: labels of the stage, from ``labels_of``.
        config: the run's configuration, for W&B.
        curves: file with the curves that the stage has logged earlier, before an interruption or in another run that
            shares the stage. The logger receives them first.

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
        arm, stage = file_name(labels["arm"]), labels["stage"]
        shutil.rmtree(folder / kind / arm / stage, ignore_errors=True)  # ``replay`` sends its content again
        try:
            logger_class: Any = CSVLogger if kind == "csv" else TensorBoardLogger
            options = {} if kind == "csv" else {"default_hp_metric": False}
            inner = logger_class(str(folder / kind), name=arm, version=stage, **options)
        except ModuleNotFoundError as error:
            raise InputError('--logger tensorboard needs tensorboard: pip install "hftlight[tensorboard]".') from error
        inner.log_hyperparams(dict(labels))  # type: ignore[call-arg]
    logger = StageLogger(inner, folder, labels)
    if curves is not None:
        logger.replay(curves)
    return logger
