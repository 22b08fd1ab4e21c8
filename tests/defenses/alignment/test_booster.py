"""Booster on quadratics, where every gradient is known in closed form."""

import pytest
import torch
from torch.testing import assert_close

from hftlight.defenses.alignment.booster import Booster, booster_term
from tests.helpers.quadratic import Quadratic, fit

W = torch.tensor([1.0, -2.0], dtype=torch.float64)
A = torch.eye(2, dtype=torch.float64)  # alignment loss |w|^2 / 2, gradient w
H = torch.diag(torch.tensor([3.0, 0.5], dtype=torch.float64))  # harmful loss w'Hw / 2, gradient Hw
STREAMS = {"alignment": (A, torch.zeros_like(W)), "harmful": (H, torch.zeros_like(W))}


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_one_step_matches_the_closed_form(micro_batches):
    """One step of SGD gives w - lr (w + lam alpha HHw/|Hw|).

    Booster's bracket is Hw - H(w - alpha Hw/|Hw|) = alpha HHw/|Hw|.
    """
    lr, lam, alpha = 0.1, 5.0, 0.2
    model = fit(Quadratic(W, lr), STREAMS, [Booster(lam, alpha)], micro_batches=micro_batches)
    expected = W - lr * (W + lam * alpha * H @ H @ W / (H @ W).norm())
    assert_close(model.w, expected, rtol=0, atol=1e-12)
    assert model.passes == micro_batches + 2


def test_the_papers_numbers():
    """Harmful Hessian diag(1, 4), w = (1, 1), alpha 0.1, lam 5. The total gradient is known to nine digits."""
    w = torch.ones(2, dtype=torch.float64)
    harm = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))
    streams = {"alignment": (A, torch.tensor([2.0, 0.0], dtype=torch.float64)), "harmful": (harm, torch.zeros_like(w))}
    model = fit(Quadratic(w, lr=1.0), streams, [Booster(lam=5.0, alpha=0.1)])
    total = w - model.w
    assert_close(total, torch.tensor([-0.878732187, 2.940285000], dtype=torch.float64), rtol=0, atol=1e-8)


def test_it_is_the_gradient_with_the_direction_held_fixed():
    """Finite differences of h(w) - h(w - alpha u) agree if u is constant, and disagree if u depends on w."""
    alpha, step = 0.1, 1e-6
    harm = lambda w: w @ H @ w / 2  # noqa: E731
    frozen = H @ W / (H @ W).norm()
    term = booster_term({"w": H @ W}, {"w": H @ (W - alpha * frozen)}, 1.0)["w"]

    def bracket(w, direction):
        return harm(w) - harm(w - alpha * direction)

    def slope(function):
        shifts = step * torch.eye(2, dtype=torch.float64)
        return torch.stack([(function(W + s) - function(W - s)) / (2 * step) for s in shifts])

    assert_close(term, slope(lambda w: bracket(w, frozen)), rtol=0, atol=1e-8)
    moving = slope(lambda w: bracket(w, H @ w / (H @ w).norm()))
    assert (term - moving).norm() > 1e-4


def test_zero_weight_is_plain_alignment():
    plain = fit(Quadratic(W, lr=0.1), STREAMS, [], steps=5)
    off = fit(Quadratic(W, lr=0.1), STREAMS, [Booster(lam=0.0)], steps=5)
    assert torch.equal(plain.w, off.w)
    assert plain.passes == off.passes


def test_a_harmful_loss_without_curvature_adds_nothing():
    """A harmful gradient of zero has no direction. Booster then adds zero and counts the step."""
    streams = {**STREAMS, "harmful": (torch.zeros_like(H), torch.zeros_like(W))}
    defense = Booster()
    model = fit(Quadratic(W, lr=0.1), streams, [defense], steps=2)
    assert_close(model.w, 0.81 * W, rtol=0, atol=1e-12)
    assert defense.summary() == {"calls": 2.0, "harmful_grad_norm": 0.0, "zero_gradients": 2.0}


def test_clipping_sees_the_combined_gradient():
    lr, lam, alpha, clip = 0.1, 5.0, 0.2, 0.05
    model = fit(Quadratic(W, lr), STREAMS, [Booster(lam, alpha)], gradient_clip_val=clip)
    combined = W + lam * alpha * H @ H @ W / (H @ W).norm()
    assert_close(model.w, W - lr * clip * combined / combined.norm(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"lam": -1.0}, "lam must be >= 0"), ({"alpha": 0.0}, "alpha is a step length"), ({"lam": float("nan")}, "lam")],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Booster(**arguments)
