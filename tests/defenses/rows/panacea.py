"""Panacea's row."""

import copy

import torch

from hftlight.defenses import Panacea
from tests.helpers.contract import Row, Slow
from tests.helpers.tiny_lm import reference_loss

RHO, LAM = 0.3, 2.0


class SlowPanacea(Slow):
    def edit(self, step, grads):
        batch = self.side["harmful"][step]
        here = self.gradient_of(reference_loss(self.model, batch))
        length = torch.sqrt(sum((g**2).sum() for g in here))
        there = copy.deepcopy(self.model)
        moved = [p for p in there.parameters() if p.requires_grad]
        with torch.no_grad():
            for p, g in zip(moved, here, strict=True):
                p.copy_(p + RHO * g / length)
        shifted = torch.autograd.grad(reference_loss(there, batch), moved)
        return [g - LAM * (s - h) for g, h, s in zip(grads, here, shifted, strict=True)]


ROW = Row(
    make=lambda: Panacea(RHO, LAM),
    neutral=lambda: Panacea(rho=0.0, lam=0.0),
    bad=[
        ({"rho": -1.0}, "rho"),
        ({"lam": float("nan")}, "lam"),
        ({"deployed": -0.1}, "deployed"),
        ({"refresh": 1.5}, "refresh"),
        ({"bound": 0.0}, "bound"),
    ],
    slow=SlowPanacea,
)
