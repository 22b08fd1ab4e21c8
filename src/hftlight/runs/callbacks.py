"""What every training stage of a run carries beside its defenses."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from hftlight.engine import norm, rank_and_world
from hftlight.errors import RunError
from hftlight.module import SafetyModule

MIB = 2**20


class StepSeed(Callback):
    """Seed dropout anew for every micro-batch, from (seed, number of the micro-batch, rank): nothing to restore."""

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
    """Stop before a gradient that is not finite reaches the weights; it stands behind the defenses.

    Args:
        where: name of the stage, for the message.
        checkpoints: folder of its checkpoints; None if it keeps none.
    """

    def __init__(self, where: str, checkpoints: Path | None) -> None:
        self.where, self.checkpoints = where, checkpoints

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return  # the loss scaler skips such steps itself, and lowers its scale
        total = norm({name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None})
        pl_module.log("train/grad_norm", total)
        if not torch.isfinite(total):
            good = "it keeps no checkpoints"
            if self.checkpoints is not None:
                kept = sorted(self.checkpoints.glob("*.ckpt"))
                good = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was due yet"
            raise RunError(
                f"{self.where}, step {trainer.global_step + 1}: the gradient norm is {float(total)}, so the loss"
                f" left the finite numbers. The weights of step {trainer.global_step} are untouched; {good}. Lower the"
                " learning rate, or look at the rows of this step."
            )


class Curves(Callback):
    """Hand logged values to the loggers at every so many optimizer steps, before a checkpoint of that step is written.

    A point of a curve is the last value that was logged since the point before. So a value that is logged now and then
    has a point where it was made, and a killed and resumed stage has the curves of an undisturbed one. Lightning itself
    repeats such a value until the pass over the data ends, and writes the points of a step behind its checkpoint.
    What is logged in ``on_train_epoch_end`` belongs to no step and is in no curve: log it at the end of a batch.

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


class Meter(Callback):
    """Seconds per optimizer step and peak memory of a stage, over restarts too.

    Args:
        on_step: called after every optimizer step with (step, latest loss in nats).
    """

    def __init__(self, on_step: Callable[[int, float | None], None] | None = None) -> None:
        self.on_step = on_step
        self.durations: list[float] = []
        self.peak_mib = 0.0
        self._process = psutil.Process()
        self._since: float | None = None
        self._step = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._sample(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        if self._since is not None:
            self.durations.append(time.perf_counter() - self._since)
        self._since, self._step = None, trainer.global_step
        if self.on_step is not None:
            loss = trainer.callback_metrics.get("train/loss")
            self.on_step(trainer.global_step, None if loss is None else float(loss))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"durations": list(self.durations), "peak_mib": self.peak_mib}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.durations, self.peak_mib = list(state_dict["durations"]), state_dict["peak_mib"]

    def cost(self) -> dict[str, float | int]:
        """Return steps, seconds in all, median seconds per step, and peak memory in MiB."""
        return {
            "steps": len(self.durations),
            "seconds": round(sum(self.durations), 3),
            "seconds_per_step": round(statistics.median(self.durations), 4) if self.durations else 0.0,
            "peak_memory_mib": round(self.peak_mib, 1),
        }

    def _sample(self, module: LightningModule) -> None:
        if module.device.type == "cuda":
            now = torch.cuda.max_memory_allocated(module.device)
        else:
            now = self._process.memory_info().rss
        self.peak_mib = max(self.peak_mib, now / MIB)


class Interrupted(Callback):
    """Remember a Ctrl-C, which Lightning turns into another exit status."""

    def __init__(self) -> None:
        self.seen = False

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.seen = isinstance(exception, KeyboardInterrupt)
