"""Where curves go: always a file of the stage, and what the user asked for besides."""

import json
import os
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from typing_extensions import override

from hftlight.errors import InputError
from hftlight.files import read_rows

HIDDEN = ("epoch",)


class RowsLogger(Logger):
    """Curves as rows ``{"step", "name", "value"}``, one JSON object per line; steps are optimizer steps, from 1.

    Args:
        path: the file; rows at or past the step from which a stage resumes are dropped, since they will be made again.
        resumed_at: optimizer steps that the resumed checkpoint holds.
    """

    def __init__(self, path: Path, resumed_at: int) -> None:
        super().__init__()
        kept = [r for r in _whole_rows(path) if r["step"] <= resumed_at]
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


def user_logger(kind: str, run_folder: Path, arm: str, stage: str, config: dict[str, Any]) -> Logger | None:
    """Return the logger that ``--logger`` names for one stage of one arm, or None.

    Args:
        kind: ``"none"``, ``"csv"``, ``"wandb"`` or ``"tensorboard"``.
        run_folder: folder of the run; everything is written below it.
        arm: name of the arm.
        stage: name of the stage.
        config: the run's configuration, for W&B.

    Raises:
        InputError: if the package that the kind needs is missing.
    """
    if kind == "csv":
        return CSVLogger(str(run_folder / "csv"), name=arm, version=stage)
    if kind == "tensorboard":
        try:
            return TensorBoardLogger(str(run_folder / "tensorboard"), name=arm, version=stage)
        except ModuleNotFoundError as error:
            raise InputError("--logger tensorboard needs tensorboard: pip install 'hftlight[tensorboard]'.") from error
    if kind == "wandb":
        from lightning.pytorch.loggers import WandbLogger

        return WandbLogger(experiment=start_wandb(run_folder, arm, stage, config))
    return None


def start_wandb(run_folder: Path, arm: str, job: str, config: dict[str, Any]) -> Any:
    """Return a started W&B run: online with a key, offline without one or when W&B cannot be reached.

    Args:
        run_folder: folder of the run; its name is the group.
        arm: name of the arm.
        job: stage, or ``"summary"``.
        config: what W&B shows as the configuration.
    """
    import wandb

    run_folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "project": os.environ.get("WANDB_PROJECT", "hftlight"),
        "group": run_folder.name,
        "job_type": job,
        "name": f"{arm}/{job}",
        "dir": str(run_folder),
        "config": {**config, "arm": arm, "stage": job},
        "reinit": "finish_previous",
        "settings": wandb.Settings(console="off", init_timeout=30, silent=True),
    }
    mode = os.environ.get("WANDB_MODE")
    if mode is None and not wandb.api.api_key:
        mode = "offline"
    try:
        return wandb.init(mode=mode, **settings)  # type: ignore[arg-type]
    except (wandb.errors.CommError, wandb.errors.UsageError, TimeoutError) as error:
        print(f"hftlight: W&B cannot be reached ({type(error).__name__}); the run goes on offline in {run_folder}.")
        return wandb.init(mode="offline", **settings)


def replay(logger: Logger, curves: Path) -> None:
    """Send the curves of a finished stage to a logger, step by step."""
    steps: dict[int, dict[str, float]] = {}
    for row in read_rows(curves):
        steps.setdefault(row["step"], {})[row["name"]] = row["value"]
    for step, metrics in sorted(steps.items()):
        logger.log_metrics(metrics, step - 1)
    logger.finalize("success")
