"""Panacea on quadratics, where every gradient is known in closed form, and what it deploys."""

import copy

import pytest
import torch
from torch.testing import assert_close

from hftlight.defenses.finetuning.panacea import Panacea, panacea_term
from hftlight.engine.step.slots import in_order
from hftlight.engine.weights.repair import repairs_after
from hftlight.models.repaired import repair_model
from tests.helpers.contract import data_module, model_of, train, weights_of
from tests.helpers.quadratic import Quadratic, fit

W = torch.tensor([1.0, -2.0], dtype=torch.float64)
A = torch.eye(2, dtype=torch.float64)  # the user's loss |w|^2 / 2, gradient w
H = torch.diag(torch.tensor([3.0, 0.5], dtype=torch.float64))  # harmful loss w'Hw / 2, gradient Hw
STREAMS = {"alignment": (A, torch.zeros_like(W)), "harmful": (H, torch.zeros_like(W))}


def unit(vector):
    return vector / vector.norm()


def direction(defense):
    return torch.cat([defense.kept["first"], defense.kept["rest"]])


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_one_step_matches_the_closed_form(micro_batches):
    """The bracket is H(w + rho u) - Hw = rho Hu with u = Hw/|Hw|, so a step gives w - lr (w - lam rho Hu)."""
    lr, lam, rho = 0.1, 5.0, 0.2
    model = fit(Quadratic(W, lr), STREAMS, [Panacea(rho, lam)], micro_batches=micro_batches)
    expected = W - lr * (W - lam * rho * H @ unit(H @ W))
    assert_close(model.w, expected, rtol=0, atol=1e-12)
    assert model.passes == micro_batches + 2


def test_the_term_lowers_the_harmful_loss_at_w_less_than_at_the_shift():
    term = panacea_term({"w": torch.tensor([1.0])}, {"w": torch.tensor([4.0])}, 0.5)
    assert_close(term["w"], torch.tensor([-1.5]))


def test_the_shift_of_the_last_step_belongs_to_the_weights_before_it():
    defense = Panacea(rho=0.2, lam=0.0)
    fit(Quadratic(W, 0.1), STREAMS, [defense])
    assert_close(direction(defense), unit(H @ W), rtol=0, atol=1e-12)


def test_refresh_takes_the_mean_gradient_at_the_final_weights():
    """Two batches of harmful losses with the matrices H and A have the mean gradient (H + A) w / 2."""
    defense = Panacea(rho=0.2, lam=0.0, refresh=2)
    defense._loaders["harmful"] = [STREAMS["harmful"], (A, torch.zeros_like(W))]
    model = fit(Quadratic(W, 0.1), STREAMS, [defense])
    assert_close(direction(defense), unit((H + A) @ model.w), rtol=0, atol=1e-12)
    assert model.passes == 1 + 2  # none of the harmful passes is one of a step


def test_the_shift_raises_the_harmful_loss():
    defense = Panacea(rho=0.2, lam=0.001)
    model = fit(Quadratic(W, 0.1), STREAMS, [defense], steps=3)
    shifted = model.w + 0.2 * direction(defense)
    assert float(shifted @ H @ shifted) > float(model.w @ H @ model.w)


def test_without_term_the_training_is_plain_and_takes_one_pass():
    plain = fit(Quadratic(W, 0.1), STREAMS, [], steps=5)
    off = fit(Quadratic(W, 0.1), STREAMS, [Panacea(rho=0.3, lam=0.0)], steps=5)
    assert torch.equal(plain.w, off.w)
    assert off.passes == 2 * plain.passes


def test_the_length_of_the_shift_changes_no_training_without_the_term():
    assert Panacea(lam=0.0, deployed=0.5).state_key == Panacea(lam=0.0, deployed=0.1).state_key
    assert (
        Panacea(lam=0.0, deployed=0.5).deployment().state_key != Panacea(lam=0.0, deployed=0.1).deployment().state_key
    )


@pytest.mark.parametrize(("bound", "factor"), [(1.0, 0), (2.6, -1), (9.0, None)])
def test_a_bound_on_the_gradient_turns_the_term_into_descent(bound, factor):
    """At w the harmful loss is 2.5, and 2.95 at the shift.

    A bound between both removes the shifted gradient alone, so that lam Hw is added to the user's gradient: descent on
    the harmful loss. A bound below both removes the whole term.
    """
    lr, lam, rho = 0.1, 0.5, 0.2
    model = fit(Quadratic(W, lr), STREAMS, [Panacea(rho, lam, bound=bound, bound_gradient=True)])
    bracket = rho * H @ unit(H @ W) if factor is None else factor * H @ W
    assert_close(model.w, W - lr * (W - lam * bracket), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_deployed_weights_are_the_trained_ones_plus_the_shift(tuning):
    defense = Panacea(rho=0.3, lam=2.0)
    module = train([defense], tuning)
    before, model = weights_of(module), copy.deepcopy(module.model)
    report = repair_model(defense.deployment(), model)
    after = weights_of(model)
    moved = {name.removeprefix("model."): w for name, w in before.items()}
    length = sum(float((after[name] - w).square().sum()) for name, w in moved.items()) ** 0.5
    assert length == pytest.approx(0.3, rel=1e-9)
    assert report["changed_entries"] > 0
    # Along the shift the harmful loss rises.
    batch = data_module(defense.stage).stream("harmful", 4).batch(0)
    shifted = train([], tuning, defense.stage, model=model, steps=1, lr=0.0)
    assert float(shifted.loss(batch)) > float(module.loss(batch))


def test_a_second_shift_is_refused():
    defense = Panacea(rho=0.3, lam=0.0)
    model = train([defense]).model
    repair_model(defense.deployment(), model)
    with pytest.raises(RuntimeError, match="Shift: this repair was applied to the model before"):
        repair_model(defense.deployment(), model)


def test_a_shift_without_training_is_refused():
    with pytest.raises(RuntimeError, match="Shift: no direction is known"):
        repair_model(Panacea().deployment(), model_of("lora"))


def test_trained_parameters_beside_the_adapter_are_refused():
    model = model_of("lora")
    model.get_input_embeddings().requires_grad_(True)
    with pytest.raises(TypeError, match=r"Panacea: .*embed_tokens.* is trained beside the adapter"):
        train([Panacea()], model=model)


def test_the_shift_comes_before_all_other_repairs():
    from hftlight.defenses import Rewind, SafeLoRA

    repairs = repairs_after(in_order([Rewind(), Panacea(), SafeLoRA()]))
    assert [type(r).__name__ for r in repairs] == ["Shift", "SafeLoRA", "Rewind"]
