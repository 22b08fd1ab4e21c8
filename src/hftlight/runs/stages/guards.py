"""Callbacks of every training stage: seeds, curves, and a stop at a gradient that is not finite."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from hftlight.engine import norm, rank_and_world
from hftlight.errors import RunError
from hftlight.models.module import SafetyModule


class StepSeed(Callback):
    """Seed dropout for every micro-batch from (seed, number of the micro-batch, rank).

    A resumed stage then needs no random state from the checkpoint.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.batches = seed, 0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        rank, world = rank_and_world()
        torch.manual_seed((self.seed * 1_000_003 + self.batches * world + rank) % 2**63)
        self.batches += 1

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches = state_dict["batches"]


class FiniteGuard(Callback):
    """Stop before a gradient that is not finite reaches the weights. It runs after the defenses.

    Args:
        where: name of the stage, for the message.
        checkpoints: folder of the stage's checkpoints. None if it keeps none.
    """

    def __init__(self, where: str, checkpoints: Path | None) -> None:
        self.where, self.checkpoints = where, checkpoints

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return  # the loss scaler skips such steps and lowers its scale
        total = norm({name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None})
        pl_module.log("train/grad_norm", total)
        if not torch.isfinite(total):
            good = "the stage keeps no checkpoints"
            if self.checkpoints is not None:
                files = sorted(self.checkpoints.glob("*.ckpt"))
                good = f"the last good checkpoint is {files[-1]}" if files else "no checkpoint was due yet"
            raise RunError(
                f"{self.where}, step {trainer.global_step + 1}: the gradient norm is {float(total)}, so the loss"
                f" is not finite. The weights of step {trainer.global_step} are untouched; {good}. Lower the"
                " learning rate, or look at the rows of this step."
            )


class Curves(Callback):
    """Send logged values to the loggers every few optimizer steps, before that step's checkpoint is written.

    A point of a curve is the last value logged since the previous point. A value that is logged rarely therefore has
    points only at its own steps, and a resumed stage has the curves of an undisturbed one. Lightning itself repeats
    such a value until the epoch ends, and writes a step's points after its checkpoint. A value logged in
    ``on_train_epoch_end`` belongs to no step and reaches no curve. Log it at the end of a batch.

    Args:
        every: optimizer steps between two points, >= 1.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.values: dict[str, Any] = {}
        self._step = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(pl_module, SafetyModule):
            pl_module.curves = self.values

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(pl_module, SafetyModule):
            pl_module.curves = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self.values and (self._step % self.every == 0 or trainer.should_stop):
            for logger in trainer.loggers:
                logger.log_metrics(_plain(self.values), step=self._step - 1)  # Lightning counts steps from 0
            self.values.clear()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"values": _plain(self.values)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.values.clear()
        self.values |= state_dict["values"]


def _plain(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


class Interrupted(Callback):
    """Remember a Ctrl-C. Lightning turns it into ``SystemExit``."""

    def __init__(self) -> None:
        self.seen = False

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.seen = isinstance(exception, KeyboardInterrupt)
