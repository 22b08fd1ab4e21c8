"""A LightningModule whose losses are quadratics, so that every gradient is known in closed form."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Quadratic(LightningModule):
    """Loss ``(w - c)' A (w - c) / 2`` of a batch ``(A, c)``. The weights are two tensors of different shapes."""

    def __init__(self, start: Tensor, lr: float) -> None:
        super().__init__()
        self.first = nn.Parameter(start[:1].clone())
        self.rest = nn.Parameter(start[1:].clone())
        self.lr = lr
        self.passes = 0

    @property
    def w(self) -> Tensor:
        return torch.cat([self.first, self.rest]).detach()

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.passes += 1
        matrix, centre = batch
        shift = torch.cat([self.first, self.rest]) - centre
        return shift @ matrix @ shift / 2

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def quiet_trainer(**options: Any) -> Trainer:
    """Return a Trainer on the CPU that writes and prints nothing."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**defaults, **options})


class OneBatch(torch.utils.data.Dataset):
    """The same batch, repeated ``length`` times."""

    def __init__(self, batch: Any, length: int) -> None:
        self.batch, self.length = batch, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.batch


def fit(model, streams, callbacks, steps=1, micro_batches=1, **options):
    """Train on ``streams["alignment"]``. Each defense gets one batch of every side stream that it needs."""
    main = DataLoader(OneBatch(streams["alignment"], steps * micro_batches), batch_size=None)
    for callback in callbacks:
        for name in getattr(callback, "streams", ()):
            callback._loaders.setdefault(name, [streams[name]])
    quiet_trainer(max_steps=steps, accumulate_grad_batches=micro_batches, callbacks=callbacks, **options).fit(
        model, main
    )
    return model
