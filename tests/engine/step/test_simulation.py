"""Simulated trainings: AdamW step for step against torch's own, and weights, buffers and modes that come back."""

import contextlib

import pytest
import torch
from torch import nn

from hftlight.engine.step.simulation import InnerAdamW, draws, simulated


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


def loss(module, x):
    return module(x).square().mean()


def test_five_steps_are_those_of_torch_bit_for_bit():
    x = torch.randn(8, 3, dtype=torch.float64)
    theirs, ours = model().eval(), model()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.05, betas=(0.8, 0.95), weight_decay=0.1, foreach=True)
    with simulated(ours) as parameters:
        inner = InnerAdamW(parameters, lr=0.05, betas=(0.8, 0.95), weight_decay=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            loss(theirs, x).backward()
            optimizer.step()
            grads = torch.autograd.grad(loss(ours, x), list(parameters.values()))
            inner.step(dict(zip(parameters, grads, strict=True)))
        pairs = zip(parameters.values(), theirs.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("fails", [False, True])
def test_weights_buffers_and_modes_come_back(fails):
    module, x = model(), torch.randn(8, 3, dtype=torch.float64)
    module[1].eval()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with contextlib.suppress(ZeroDivisionError), simulated(module) as parameters:
        assert not any(part.training for part in module.modules())
        module.train()
        loss(module, x)  # moves the running statistics
        InnerAdamW(parameters, lr=1.0).step({name: torch.ones_like(p) for name, p in parameters.items()})
        assert not torch.equal(module.state_dict()["2.running_mean"], before["2.running_mean"])
        assert not torch.equal(module.state_dict()["0.weight"], before["0.weight"])
        if fails:
            raise ZeroDivisionError
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert [part.training for part in module.modules()] == [True, True, False, True, True]


def test_weights_of_16_bits_are_refused():
    with pytest.raises(TypeError, match="float32 or float64"), simulated(nn.Linear(2, 2).to(torch.bfloat16)):
        pass


def test_draws_depend_on_seed_step_and_name_alone():
    assert draws(1, 2, "tar").random() == draws(1, 2, "tar").random()
    assert len({draws(*key).random() for key in [(1, 2, "tar"), (2, 1, "tar"), (1, 3, "tar"), (1, 2, "rat")]}) == 4
