"""The gradient at shifted weights, on quadratics: H(w - c) at w, and at w plus a length along a unit vector."""

import pytest
import torch
from lightning.pytorch import Callback
from torch.testing import assert_close

from hftlight.engine import shifted_gradient
from tests.helpers.quadratic import Quadratic, fit

W = torch.tensor([1.0, -2.0], dtype=torch.float64)
ZERO = torch.zeros_like(W)
H = torch.diag(torch.tensor([3.0, 0.5], dtype=torch.float64))
G = torch.diag(torch.tensor([1.0, 7.0], dtype=torch.float64))


class Taking(Callback):
    """Take both gradients once, before the optimizer moves."""

    def __init__(self, length, second=None):
        self.length, self.second = length, second

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before = pl_module.w
        self.passes = shifted_gradient(pl_module, (H, ZERO), self.length, self.second)
        self.after = pl_module.w


def flat(taken):
    return torch.cat([taken.grad["first"], taken.grad["rest"]])


@pytest.mark.parametrize("length", [-0.2, 0.3])
@pytest.mark.parametrize("second", [None, (G, ZERO)])
def test_the_sign_of_the_length_is_the_direction_of_the_shift(length, second):
    taking = Taking(length, second)
    fit(Quadratic(W, lr=0.1), {"alignment": (G, ZERO)}, [taking])
    here, there = taking.passes
    u = H @ W / (H @ W).norm()
    assert_close(flat(here), H @ W, rtol=0, atol=1e-12)
    assert_close(flat(there), (H if second is None else G) @ (W + length * u), rtol=0, atol=1e-12)
    assert (there.loss > here.loss) == (length > 0) or second is not None
    assert torch.equal(taking.before, taking.after)
