"""A weight that a callback unfreezes during training is pulled to its value before that step."""

import pytest
import torch
from lightning.pytorch import Callback
from torch.testing import assert_close
from torch.utils.data import DataLoader

from hftlight.defenses import EWC, L2SP, Lisa
from tests.helpers.quadratic import OneBatch, Quadratic, quiet_trainer
from tests.helpers.tiny_lm import PlainModule, tiny_lm, token_batch

W = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
A = torch.tensor([[2.0, 0.3, 0.1], [0.3, 1.0, 0.2], [0.1, 0.2, 3.0]], dtype=torch.float64)
C = torch.tensor([0.5, 0.5, -1.0], dtype=torch.float64)
LR, STRENGTH, LATE_AT = 0.1, 0.7, 2


class Later(Callback):
    """Train ``rest`` only from step ``LATE_AT`` on, also after a resume."""

    def on_train_start(self, trainer, pl_module):
        pl_module.rest.requires_grad_(trainer.global_step >= LATE_AT)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == LATE_AT:
            pl_module.rest.requires_grad_(True)


def slow(steps):
    """Return the weights after SGD with the pull STRENGTH (w - w_0) on the weights trained at each step."""
    w = W.clone()
    for step in range(steps):
        update = A @ (w - C) + STRENGTH * (w - W)
        if step < LATE_AT:
            update[1:] = 0
        w = w - LR * update
    return w


MAKES = {
    "l2_sp": lambda: L2SP(lam=STRENGTH / 2),
    "lisa": lambda: Lisa(align_steps=0, finetune_steps=10, proximal=STRENGTH, quiet=0.0, cycles=0),
}


def fit(make, steps, folder=None, resume=None):
    model = Quadratic(W, LR)
    trainer = quiet_trainer(max_steps=steps, callbacks=[Later(), make()])
    loader = DataLoader(OneBatch((A, C), 8), batch_size=None)
    trainer.fit(model, loader, ckpt_path=resume, weights_only=False)
    if folder is not None:
        trainer.save_checkpoint(folder / "at.ckpt")
    return model.w


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_the_pull_begins_with_the_first_step_of_a_weight(name, steps):
    # Lisa's pull begins with the second step of the run. In the first step w is w_0, so the pull is zero.
    assert_close(fit(MAKES[name], steps), slow(steps), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*resuming")
@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_resumed_run_keeps_the_values_of_the_start(name, at, tmp_path):
    fit(MAKES[name], at, tmp_path)
    assert_close(fit(MAKES[name], 6, resume=tmp_path / "at.ckpt"), slow(6), rtol=0, atol=1e-12)


def test_ewc_estimates_the_weight_of_the_pull_when_it_is_needed():
    """At the start F is not measured for a frozen weight.

    Once the weight trains, its pull is lam F (w - w_0), with F measured at that step.
    """

    class Head(Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.model.lm_head.weight.requires_grad_(False)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.model.lm_head.weight.requires_grad_(trainer.global_step >= LATE_AT)

    batches = [token_batch(seed) for seed in range(4)]
    torch.manual_seed(0)
    ewc, module = EWC(lam=1e3, samples=3, streams={"alignment": batches[:1]}), PlainModule(tiny_lm())
    start = module.model.lm_head.weight.detach().clone()
    quiet_trainer(max_steps=4, callbacks=[Head(), ewc]).fit(module, DataLoader(batches, batch_size=None))
    name = "model.lm_head.weight"
    assert torch.equal(ewc._start[name], start)
    assert ewc._diagonal[name].shape == start.shape
    assert ewc._diagonal[name].sum() > 0
    assert ewc.summary()["fisher_sum"] == pytest.approx(float(sum(f.sum() for f in ewc._diagonal.values())))
