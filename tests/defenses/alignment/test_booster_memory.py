"""Booster holds three buffers of the trainable size beyond plain training, counted tensor by tensor."""

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from hftlight.defenses import Booster
from tests.helpers.buffers import LiveBytes
from tests.helpers.quadratic import OneBatch, quiet_trainer

WIDTH, LAYERS = 256, 16


class Wide(LightningModule):
    """Many weights and next to no activations, so that what is counted is buffers of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def loss(self, batch):
        for layer in self.layers:
            batch = layer(batch).tanh()
        return batch.square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def peak(callbacks):
    """Return the peak of new bytes over two steps, as a multiple of the trainable weights."""
    module = Wide()
    trainer = quiet_trainer(max_steps=2, callbacks=callbacks)
    with LiveBytes() as count:
        trainer.fit(module, DataLoader(OneBatch(torch.ones(1, WIDTH), 2), batch_size=None))
    return count.peak / sum(p.numel() * p.element_size() for p in module.parameters())


def test_three_buffers_beyond_plain_training():
    plain = peak([])
    booster = peak([Booster(streams={"harmful": [torch.ones(1, WIDTH)]})])
    assert 0.99 < plain < 1.2  # the gradient itself
    assert 2.5 < booster - plain <= 3.0
