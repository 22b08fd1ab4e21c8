"""Memory of a defense beyond plain training, counted tensor by tensor, as multiples of the trainable weights."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils.data import DataLoader

from hftlight import SafetyModule
from hftlight.defenses import EWC, KL, L2SP, LDIFS, Booster, ConstrainedSFT, Lisa
from hftlight.engine import Stage
from tests.helpers.buffers import LiveBytes
from tests.helpers.contract import data_module, model_of
from tests.helpers.quadratic import OneBatch, quiet_trainer

WIDTH, LAYERS = 256, 16
BATCHES = [{"x": torch.ones(1, WIDTH)}]


class Wide(LightningModule):
    """Many weights and almost no activations, so that the count measures buffers of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def loss(self, batch):
        h = batch["x"]
        for layer in self.layers:
            h = layer(h).tanh()
        return h.square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Between(Callback):
    """Record the bytes that are alive after a step."""

    def __init__(self, live):
        self.live = live

    def on_train_batch_end(self, *arguments):
        self.bytes = self.live.now


def buffers(callbacks):
    """Return the peak bytes during four steps and the bytes alive after them, as multiples of the weights."""
    module = Wide()
    with LiveBytes() as count:
        between = Between(count)
        trainer = quiet_trainer(max_steps=4, callbacks=[*callbacks, between])
        trainer.fit(module, DataLoader(OneBatch(BATCHES[0], 4), batch_size=None))
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    return count.peak / size, between.bytes / size


@pytest.mark.parametrize(
    ("make", "at_the_peak", "held"),
    [
        pytest.param(lambda: Booster(streams={"harmful": BATCHES}), 3, 0, id="booster"),
        pytest.param(lambda: L2SP(), 2, 1, id="l2_sp"),
        pytest.param(lambda: EWC(samples=1, streams={"alignment": BATCHES}), 3, 2, id="ewc"),
        pytest.param(lambda: Lisa(2, 2, streams={"alignment": BATCHES}), 2, 1, id="lisa"),
    ],
)
def test_buffers_beyond_plain_training(make, at_the_peak, held):
    plain, between = buffers([])
    defended, defended_between = buffers([make()])
    assert 0.99 < plain < 1.2  # the gradient itself
    assert at_the_peak - 0.5 < defended - plain <= at_the_peak + 0.01
    assert abs(defended_between - between - held) < 0.1


def added_parameters(defense, model):
    """Return the number of parameters that the aligned model adds to those of the trained model."""
    before, added = count(model), []

    class Count(Callback):
        def on_train_batch_end(self, trainer, pl_module, *arguments):
            added.append(count(pl_module) + sum(map(count, pl_module.reference().copies)) - before)

    trainer = quiet_trainer(max_steps=2, max_epochs=-1, callbacks=[defense, Count()], use_distributed_sampler=False)
    trainer.fit(SafetyModule(model, lr=0.1, optimizer="sgd"), data_module(Stage.FINETUNING))
    return added[-1]


def count(model, trained=False):
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


@pytest.mark.parametrize("make", [KL, LDIFS, lambda: ConstrainedSFT(online=True)], ids=["kl", "ldifs", "constrained"])
def test_the_aligned_model_is_a_second_model_only_where_all_weights_train(make):
    lora, full = model_of("lora"), model_of("full")
    assert added_parameters(make(), lora) == count(lora, trained=True)  # a copy of the adapter
    assert added_parameters(make(), full) == count(full)
    fresh = model_of("lora")
    for name, p in fresh.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    assert added_parameters(make(), fresh) == 0  # the adapter is switched off
