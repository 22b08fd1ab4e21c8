"""The divergence in closed form, with its gradient, and in blocks of a few rows."""

import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from hftlight.engine import divergence as module
from hftlight.engine.divergence import divergence


def logits(seed, rows=6, outcomes=5, dtype=torch.float64):
    return torch.randn(rows, outcomes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_two_outcomes():
    """For q = (4/5, 1/5) and p = (1/2, 1/2): 0.8 ln 1.6 + 0.2 ln 0.4, and 0.5 ln(5/8) + 0.5 ln(5/2)."""
    p, q = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0.8, 0.2]], dtype=torch.float64).log()
    forward = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    reverse = 0.5 * math.log(0.625) + 0.5 * math.log(2.5)
    assert float(divergence(p, q)) == pytest.approx(forward, abs=1e-14)
    assert float(divergence(p, q, "reverse")) == pytest.approx(reverse, abs=1e-14)


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float64, 1e-15), (torch.float32, 1e-7)])
def test_the_gradient_is_p_minus_q(dtype, precision):
    p, q = logits(0, dtype=dtype).requires_grad_(), logits(1, dtype=dtype)
    (3 * divergence(p, q)).backward()
    expected = 3 * (p.detach().double().softmax(-1) - q.double().softmax(-1))
    assert_close(p.grad.double(), expected, rtol=0, atol=3 * precision)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_both_gradients_are_those_of_the_value(direction):
    p, q = logits(0).requires_grad_(), logits(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda each: divergence(each, q, direction), [p])
    divergence(p, q, direction).backward()
    assert q.grad is None


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_aligned_model_value_and_gradient_are_exactly_zero(direction, dtype):
    p = (30 * logits(0, dtype=dtype)).requires_grad_()
    value = divergence(p, p.detach().clone(), direction)
    value.backward()
    assert float(value) == 0
    assert not p.grad.any()


class Sizes(TorchDispatchMode):
    """Record the size of the largest tensor that an operation creates, views excluded."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("entries", [1, 11, 25])
def test_a_few_rows_at_a_time_give_the_same(direction, entries, monkeypatch):
    p, q = logits(0).requires_grad_(), logits(1)
    whole = divergence(p, q, direction)
    (expected,) = torch.autograd.grad(whole, p)
    monkeypatch.setattr(module, "ENTRIES", entries)
    with Sizes() as sizes:
        parts = divergence(p, q, direction)
    assert sizes.largest <= max(entries, q.shape[1])  # no softmax is larger than ENTRIES or one row
    assert_close(parts, whole, rtol=0, atol=1e-14)
    (gradient,) = torch.autograd.grad(parts, p)
    assert torch.equal(gradient, expected)
