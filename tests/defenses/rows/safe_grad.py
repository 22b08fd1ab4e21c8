"""SafeGrad's row."""

import copy

import torch

from hftlight.defenses.finetuning.safe_grad import SafeGrad
from tests.defenses.rows.kl import response_logits
from tests.helpers.contract import Row, Slow

RHO, TEMPERATURE = 4.0, 2.0


class SlowSafeGrad(Slow):
    def begin(self):
        self.aligned = copy.deepcopy(self.model).eval()

    def edit(self, step, grads):
        batch = self.side["alignment"][step]
        with torch.no_grad():
            q = torch.softmax(response_logits(self.aligned, batch) / TEMPERATURE, -1)
        logits = response_logits(self.model, batch)
        # The divergence's gradient in its closed form, which is exactly zero at the aligned model. A rounding error
        # would have a direction of its own, along which the first step would be projected.
        slope = torch.softmax(logits.detach() / TEMPERATURE, -1) - q
        pull = self.gradient_of((slope * logits).sum() / TEMPERATURE / len(logits))
        u, a = (torch.cat([g.flatten() for g in part]) for part in (grads, pull))
        if float(u @ a) < 0:
            u = u - (u @ a) / (a @ a) * a
        total = (u + RHO * a).split([g.numel() for g in grads])
        return [t.view_as(g) for t, g in zip(total, grads, strict=True)]


ROW = Row(
    make=lambda: SafeGrad(RHO, TEMPERATURE),
    neutral=lambda: SafeGrad(rho=0.0, project=False),
    bad=[
        ({"rho": -1.0}, "rho"),
        ({"rho": float("nan")}, "rho"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
    ],
    slow=SlowSafeGrad,
)
