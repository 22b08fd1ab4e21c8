"""L2SP on quadratics, where the whole path is known in closed form."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.testing import assert_close
from torch.utils.data import DataLoader

from hftlight.defenses.finetuning.ewc import EWC
from hftlight.defenses.finetuning.l2_sp import L2SP, l2_sp_term
from tests.helpers.quadratic import OneBatch, Quadratic, quiet_trainer

START = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
CURVATURE = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)
CENTRE = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
LR, LAM = 0.1, 0.4


def fit(defenses, steps, micro_batches=1, resume=None, **options):
    model = Quadratic(START, LR)
    loader = DataLoader(OneBatch((torch.diag(CURVATURE), CENTRE), steps * micro_batches), batch_size=None)
    trainer = quiet_trainer(max_steps=steps, accumulate_grad_batches=micro_batches, callbacks=defenses, **options)
    trainer.fit(model, loader, ckpt_path=resume)
    return model.w


def after(steps):
    """Return the weights: the limit (a m + 2 lam w_0) / (a + 2 lam) plus the remaining distance to it."""
    slope = CURVATURE + 2 * LAM
    rest = (CURVATURE * CENTRE + 2 * LAM * START) / slope
    return rest + (1 - LR * slope) ** steps * (START - rest)


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_the_path_is_the_closed_form(steps, micro_batches):
    defense = L2SP(LAM)
    assert_close(fit([defense], steps, micro_batches), after(steps), rtol=0, atol=1e-12)
    pulls = sum(float(torch.linalg.vector_norm(2 * LAM * (after(k) - START))) for k in range(steps))
    assert defense.summary() == {"calls": steps, "pull_norm": pytest.approx(pulls, abs=1e-12)}


def test_it_is_the_gradient_of_the_unhalved_penalty():
    w = {"a": START.clone().requires_grad_()}
    (expected,) = torch.autograd.grad(LAM * ((w["a"] - CENTRE) ** 2).sum(), [w["a"]])
    assert_close(l2_sp_term({"a": START}, {"a": CENTRE}, LAM)["a"], expected, rtol=0, atol=1e-15)


def test_clipping_sees_the_combined_gradient():
    model = fit([L2SP(LAM)], 2, gradient_clip_val=0.05)
    first = CURVATURE * (START - CENTRE)
    once = START - LR * 0.05 * first / first.norm()
    second = CURVATURE * (once - CENTRE) + 2 * LAM * (once - START)
    assert_close(model, once - LR * 0.05 * second / second.norm(), rtol=0, atol=1e-7)


def test_resumed_after_any_step_pulls_to_the_same_start(tmp_path):
    def run(folder, resume=None):
        checkpoints = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
        defense = L2SP(LAM)
        return fit([defense, checkpoints], 5, 2, resume, enable_checkpointing=True), defense.summary()

    expected, trace = run(tmp_path / "whole")
    for step in range(1, 5):
        resumed, again = run(tmp_path / f"from {step}", tmp_path / "whole" / f"step={step}.ckpt")
        assert torch.equal(resumed, expected), step
        assert again == trace, step


def test_a_second_fit_starts_from_where_it_starts():
    """In a second fit of a new model, the same instance keeps no state of the first fit."""
    defense = L2SP(LAM)
    fit([defense], 5)
    assert_close(fit([defense], 5), after(5), rtol=0, atol=1e-12)


def test_a_checkpoint_of_a_fit_that_never_started_is_forgotten(tmp_path):
    class Trip(Callback):
        def on_fit_start(self, trainer, pl_module):
            raise KeyError("trip")

    checkpoints = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    other = L2SP(LAM)
    quiet_trainer(max_steps=1, enable_checkpointing=True, callbacks=[other, checkpoints]).fit(
        Quadratic(CENTRE, LR), DataLoader(OneBatch((torch.diag(CURVATURE), CENTRE), 1), batch_size=None)
    )
    defense = L2SP(LAM)
    with pytest.raises(KeyError, match="trip"):
        fit([defense, Trip()], 5, resume=tmp_path / "step=1.ckpt")
    assert_close(fit([defense], 5), after(5), rtol=0, atol=1e-12)


def test_another_anchor_is_refused():
    ewc = EWC(1.0, streams={"alignment": [(torch.diag(CURVATURE), CENTRE)]})
    with pytest.raises(ValueError, match="L2SP and EWC both set the anchor that weights are pulled to"):
        fit([L2SP(LAM), ewc], 1)
    fit([L2SP(0.0), ewc], 1)
    fit([L2SP(LAM), EWC(0.0, streams={"alignment": [0]})], 1)
