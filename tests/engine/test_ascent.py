"""Ascent terms against their derivatives in closed form, and their mean over layers against the plain computation."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from hftlight.engine.ascent import Ascent, bounded, head_mean

DERIVATIVES = {
    "linear": lambda m, r: -1.0,
    "log": lambda m, r: -1 / (1 + m),
    "npo": lambda m, r: -2 / (1 + math.exp(-0.5 * (r - m))),
}


@pytest.mark.parametrize("form", DERIVATIVES)
@pytest.mark.parametrize("mean", [0.5, 3.0])
def test_the_derivative_by_the_mean_is_the_tabled_one(form, mean):
    m = torch.tensor(mean, dtype=torch.float64, requires_grad=True)
    Ascent(form, beta=0.5).of_mean(m, torch.tensor(1.0, dtype=torch.float64)).backward()
    assert_close(m.grad.item(), DERIVATIVES[form](mean, 1.0), rtol=0, atol=1e-12)


def test_npo_starts_at_two_over_beta_log_two():
    equal = torch.tensor(1.7, dtype=torch.float64)
    assert_close(Ascent("npo", beta=0.1).of_mean(equal, equal).item(), 20 * math.log(2), rtol=0, atol=1e-12)


def test_a_clamped_token_has_no_gradient():
    """Losses log(1 + e^-2), below the ceiling of 1, and log(1 + e^2), above it: only the first token learns."""
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    term = Ascent("clamped", ceiling=1.0)(logits, torch.tensor([0, 0]))
    term.backward()
    below = math.log1p(math.exp(-2))
    assert_close(term.item(), -(below + 1.0) / 2, rtol=0, atol=1e-12)
    p = 1 / (1 + math.exp(-2))
    assert_close(logits.grad, torch.tensor([[-(p - 1) / 2, -(1 - p) / 2], [0.0, 0.0]], dtype=torch.float64))


def test_a_loss_is_clamped_at_that_of_a_uniform_guess_by_default():
    logits = torch.tensor([[-30.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert_close(Ascent("clamped")(logits, torch.tensor([0])).item(), -math.log(4), rtol=0, atol=1e-12)


def test_entropy_of_a_uniform_guess_is_log_v_and_at_rest():
    logits = torch.zeros(3, 8, dtype=torch.float64, requires_grad=True)
    term = Ascent("entropy")(logits, torch.tensor([0, 1, 2]))
    term.backward()
    assert_close(term.item(), -math.log(8), rtol=0, atol=1e-12)
    assert_close(logits.grad, torch.zeros_like(logits), rtol=0, atol=1e-12)


def test_the_gradient_by_the_logits_agrees_with_finite_differences():
    torch.manual_seed(0)
    targets, reference = torch.tensor([1, 4, 0]), torch.tensor(2.0, dtype=torch.float64)
    for form in ("linear", "log", "clamped", "npo", "entropy"):
        logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, form=form: Ascent(form)(x, targets, reference), (logits,)), form


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("form", ["log", "clamped", "entropy"])
@pytest.mark.parametrize("chunk", [2, 256])
def test_the_mean_over_layers_equals_the_plain_computation(form, trained, chunk):
    """Three layers, five tokens; the term of the mean is a function that is not linear, as in RepNoise."""
    torch.manual_seed(1)
    head = nn.Linear(4, 7, dtype=torch.float64).requires_grad_(trained)
    hidden = torch.randn(3, 5, 4, dtype=torch.float64)
    targets, ascent, results = torch.randint(7, (5,)), Ascent(form, ceiling=1.9), []

    def plain(x):
        return ascent.per_token(head(x), targets.expand(3, 5)).mean()

    for mean in (plain, lambda x: head_mean(x, head, targets, ascent.per_token, chunk)):
        x = hidden.clone().requires_grad_()
        term = 3 * torch.log1p(mean(x))
        sources = [x, *(head.parameters() if trained else [])]
        results.append([term.detach(), *torch.autograd.grad(term, sources)])
    for naive, flat in zip(*results, strict=True):
        assert_close(flat, naive, rtol=0, atol=1e-12)


def test_no_logits_of_all_tokens_are_held():
    """The largest tensor that lives through the forward pass has J N d entries, and no tensor has N V."""
    hidden, sizes = torch.randn(2, 64, 8, requires_grad=True), []
    head = nn.Linear(8, 500).requires_grad_(False)

    def per_token(logits, targets):
        sizes.append(logits.numel())
        return F.cross_entropy(logits, targets, reduction="none")

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        value = head_mean(hidden, head, torch.zeros(64, dtype=torch.int64), per_token, chunk=16)
    value.backward()
    assert max(sizes) == 16 * 500
    assert hidden.grad.abs().sum() > 0


def test_hidden_states_without_gradient_still_count():
    head = nn.Linear(4, 7, dtype=torch.float64).requires_grad_(False)
    hidden, targets = torch.randn(2, 5, 4, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
    value = head_mean(hidden, head, targets, Ascent("linear").per_token)
    assert not value.requires_grad
    assert_close(value, Ascent("linear").per_token(head(hidden), targets.expand(2, 5)).mean(), rtol=0, atol=1e-12)


def test_a_bounded_ascent_keeps_its_direction_and_at_most_the_fraction():
    ascent = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}  # length 5
    alignment = {"a": torch.tensor([0.0, 2.0]), "b": torch.tensor([0.0])}  # length 2
    assert_close(bounded(ascent, alignment, 0.5)["a"], torch.tensor([0.6, 0.0]))  # 5 -> 1
    assert_close(bounded(ascent, alignment, 0.5)["b"], torch.tensor([0.8]))
    assert torch.equal(bounded(ascent, alignment, 10.0)["a"], ascent["a"])
    still = {name: torch.zeros_like(t) for name, t in ascent.items()}
    assert torch.equal(bounded(still, alignment, 0.5)["b"], torch.zeros(1))
    assert torch.equal(bounded(ascent, still, 0.5)["a"], torch.zeros(2))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"form": "cubic"}, "form must be one of"),
        ({"ceiling": 0.0}, "ceiling is a loss in nats per token and must be > 0"),
        ({"ceiling": math.nan}, "ceiling"),
        ({"beta": 0.0}, "beta must be > 0"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        Ascent(**arguments)


def test_npo_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="compares with a reference"):
        Ascent("npo").of_mean(torch.tensor(1.0))
