"""TAR on quadratics, where an attack's weights are known in closed form. Its row compares steps on a language model."""

import math

import pytest
import torch
from torch.testing import assert_close

from hftlight import SafetyModule
from hftlight.defenses import TAR
from hftlight.defenses.alignment.tar import feature_distance, step_weights
from hftlight.engine import LoaderStream, Stage, count_passes
from hftlight.engine.step.side_streams import halves
from tests.helpers.contract import data_module, model_of, train
from tests.helpers.quadratic import Quadratic, fit, quiet_trainer

F64 = torch.float64
START, CENTRE = torch.tensor([1.0, 1.0], dtype=F64), torch.tensor([3.0, 0.0], dtype=F64)
A = torch.diag(torch.tensor([1.0, 4.0], dtype=F64))
STILL = (torch.zeros(2, 2, dtype=F64), torch.zeros(2, dtype=F64))  # an alignment loss without a gradient
PLAIN = {"attackers": ["harmful"], "inner_optimizer": "sgd", "tamper": "nll", "representation": 0.0}


def harmful():
    """Return batches of the attack loss w'Aw / 2. The held-out ones have minus the tamper loss |w - c|^2 / 2."""
    _, held_out = halves(LoaderStream(list(range(32)), "harmful"), "harmful", 0.25)
    out = set(held_out.source)
    assert 0 < len(out) < 16
    return [(-torch.eye(2, dtype=F64), CENTRE) if i in out else (A, torch.zeros(2, dtype=F64)) for i in range(32)]


def gradient_of(defense, lr=1.0):
    """Return what one step subtracts from the weights, and the model after it."""
    model = Quadratic(START, lr)
    fit(model, {"alignment": STILL, "harmful": STILL}, [defense])
    return (START - model.w) / lr, model


def test_the_references_example():
    """K = 4 and m = 2: weights 4 e^-1 and 4 at (I - eta A)^2 w and (I - eta A)^4 w, each minus c."""
    tar = TAR(4, 2, 4.0, 0.5, inner_lrs=[0.1], streams={"harmful": harmful()}, **PLAIN)
    update, model = gradient_of(tar)
    assert_close(update, torch.tensor([-12.598223905, 1.048146395], dtype=F64), rtol=0, atol=1e-8)
    kept = torch.eye(2, dtype=F64) - 0.1 * A
    expected = 4 * math.exp(-1) * (kept @ kept @ START - CENTRE) + 4 * (kept @ kept @ kept @ kept @ START - CENTRE)
    assert_close(update, expected, rtol=0, atol=1e-12)
    assert model.passes == 1 + 4 + 2
    assert count_passes([tar]) == (7, 7)


def test_one_inner_step_is_first_order_meta_learning():
    """G = lam (w - eta A w - c): the gradient at the attacked weights, taken as that at the present ones."""
    update, _ = gradient_of(TAR(1, 1, 0.7, inner_lrs=[0.1], streams={"harmful": harmful()}, **PLAIN))
    assert_close(update, 0.7 * (START - 0.1 * A @ START - CENTRE), rtol=0, atol=1e-12)


def test_several_attackers_share_the_weight():
    one, several = (
        gradient_of(TAR(1, 1, 0.7, tasks=t, inner_lrs=[0.1], streams={"harmful": harmful()}, **PLAIN))[0]
        for t in (1, 3)
    )
    assert_close(one, several, rtol=0, atol=1e-12)


def test_a_bound_on_the_tamper_loss_stops_its_gradient():
    """|w - eta A w - c|^2 / 2 is about 2.4, above minus any bound; with minus the loss the bound decides."""
    low = [(torch.eye(2, dtype=F64), CENTRE)] * 32  # the tamper loss is minus this, -2.4 after the attack
    settings = {**PLAIN, "inner_lrs": [1e-9], "streams": {"harmful": low}}
    free, stopped = (gradient_of(TAR(1, 1, 1.0, bound=b, **settings))[0] for b in (3.0, 2.0))
    assert_close(free, -(START - CENTRE), rtol=0, atol=1e-6)
    assert torch.equal(stopped, torch.zeros(2, dtype=F64))


def test_the_papers_weights_are_not_normalized():
    weights = step_weights(64, 4, 1.0, 0.0625)
    assert len(weights) == 16
    assert_close(sum(weights.values()), 4.438, rtol=0, atol=5e-4)
    assert_close(sum(step_weights(64, 1, 1.0, 0.0625).values()), 16.203, rtol=0, atol=5e-4)
    assert TAR(64, 4, 4.0).manifest()["sum_of_step_weights"] == pytest.approx(4 * 4.438, abs=2e-3)


def test_a_papers_step_takes_81_passes_and_one_of_the_aligned_model():
    assert count_passes([TAR(**TAR.presets["paper"])]) == (82, 81)


def test_the_distance_is_euclidean_per_token_and_still_at_the_start():
    now = torch.tensor([[[3.0, 4.0], [9.0, 9.0]], [[0.0, 0.0], [1.0, 0.0]]], requires_grad=True)
    mask = torch.tensor([[1, 0], [1, 1]])
    value = feature_distance(now, torch.zeros(2, 2, 2), mask)
    value.backward()
    assert_close(value.item(), (5 + 0 + 1) / 3)
    assert_close(now.grad, torch.tensor([[[0.2, 0.8 / 3], [0.0, 0.0]], [[0.0, 0.0], [1 / 3, 0.0]]]))


@pytest.mark.parametrize("tamper", ["dpo", "nll", "entropy"])
def test_every_tamper_loss_trains_and_leaves_its_trace(tamper):
    defense = TAR(2, 1, 0.1, tamper=tamper, positions="all", inner_lrs=[0.01], aligned_first=False)
    train([defense], steps=2)
    summary = defense.summary()
    assert summary["tamper_grad_norm"] > 0
    # Before the first step, DPO's loss of a model that equals its reference is about log 2.
    if tamper == "dpo":
        assert abs(summary["tamper_loss"] / 2 - math.log(2)) < 0.05


def test_no_attacker_trains_on_a_held_out_row():
    """Each id is drawn in one of the two parts only."""
    drawn = {"harmful": set(), "held out": set()}

    class Watching(TAR):
        def draw(self, name):
            batch = super().draw(name)
            drawn.setdefault(name, set()).update(batch["id"])
            return batch

    train([Watching(4, 1, 0.1, attackers=["harmful"], inner_lrs=[0.01])], steps=8)
    assert not drawn["harmful"] & drawn["held out"]
    everything = {e.id for e in data_module(Stage.ALIGNMENT).streams["harmful"].examples}
    assert drawn["harmful"] | drawn["held out"] == everything


def test_a_switching_attacker_begins_with_alignment_data():
    names = []

    class Watching(TAR):
        def draw(self, name):
            names.append(name)
            return super().draw(name)

    train([Watching(6, 6, 0.1, attackers=["switch"], inner_lrs=[0.01])], steps=3)
    steps = [names[k * 7 : k * 7 + 6] for k in range(3)]
    assert all(step == sorted(step) for step in steps)  # alignment, then harmful
    assert 0 < sum(step.count("alignment") for step in steps) < 18


def test_a_part_without_rows_is_refused():
    module = SafetyModule(model_of("lora"))
    data = data_module(Stage.ALIGNMENT)
    data._given["harmful"] = data._given["harmful"][:1]
    data._forget()
    with pytest.raises(ValueError, match="less than one batch"):
        quiet_trainer(max_steps=1, callbacks=[TAR()]).fit(module, data)
