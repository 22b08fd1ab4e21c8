"""Meter: seconds per optimizer step and peak memory of a stage."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

MIB = 2**20


class Meter(Callback):
    """Seconds per optimizer step and peak memory of a stage. Both survive a restart.

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
