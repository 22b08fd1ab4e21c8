"""Checkpoints that survive a kill: written to a temporary file, flushed, renamed, and checked before use."""

import os
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint format, written atomically."""

    @override
    def save_checkpoint(
        self, checkpoint: Mapping[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        with temporary.open("wb") as file:
            torch.save(dict(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)


class StepCheckpoint(ModelCheckpoint):
    """A checkpoint right after an optimizer step, never between the micro-batches of the next step.

    After a resume, Lightning would write the resumed step once more, after the first micro-batch of the next step. That
    checkpoint would have another name and lack the gradient accumulated so far.
    """

    _seen = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._seen = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._seen:
            self._seen = trainer.global_step
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def keep_two(folder: Path, every: int) -> ModelCheckpoint:
    """Return the callback that keeps the last two checkpoints, one every ``every`` optimizer steps."""
    return StepCheckpoint(
        dirpath=folder,
        filename="{step:08d}",
        auto_insert_metric_name=False,
        monitor="step",
        mode="max",
        save_top_k=2,
        every_n_train_steps=every,
        save_on_train_epoch_end=False,
    )


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, or None. Broken ones are named on standard error and removed."""
    for path in sorted(folder.glob("*.ckpt"), key=_step, reverse=True):
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is None:
                    return path
        except (zipfile.BadZipFile, OSError):
            pass
        print(
            f"hftlight: checkpoint {path.name} is incomplete; hftlight resumes from the one before it.", file=sys.stderr
        )
        path.unlink()
    return None


def _step(path: Path) -> int:
    digits = re.findall(r"\d+", path.stem)
    return int(digits[0]) if digits else -1
