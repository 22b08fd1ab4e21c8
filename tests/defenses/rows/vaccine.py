"""Vaccine's row."""

import torch

from hftlight.defenses.alignment.vaccine import Vaccine
from tests.helpers.contract import Row, Slow
from tests.helpers.tiny_lm import reference_loss

RHO = 0.05


class Added(torch.nn.Module):
    """An attention module that adds a tensor to its output. The tensor is zeros if none is set."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.tensor = inner, None

    def forward(self, *args, **kwargs):
        first, *rest = self.inner(*args, **kwargs)
        if self.tensor is None:
            self.tensor = torch.zeros_like(first, requires_grad=True)
        return (first + self.tensor, *rest)


class SlowVaccine(Slow):
    """Gradients at tensors of zeros, which wrappers around the attention modules add to the outputs."""

    def begin(self):
        self.added = []
        for layer in [m for m in self.model.modules() if hasattr(m, "self_attn")]:
            layer.self_attn = Added(layer.self_attn)
            self.added.append(layer.self_attn)
        self.chosen = range(len(self.added))

    def slopes(self, batch):
        for module in self.added:
            module.tensor = None
        loss = reference_loss(self.model, batch)
        return torch.autograd.grad(loss, [module.tensor for module in self.added])

    def micro_gradient(self, batch):
        slopes = self.slopes(batch)
        length = sum(float((slopes[i] ** 2).sum()) for i in self.chosen) ** 0.5
        for i, module in enumerate(self.added):
            module.tensor = slopes[i] * (RHO / length if i in self.chosen else 0.0)
        return self.gradient_of(reference_loss(self.model, batch))

    def run(self, clip=None):
        return {name.replace("self_attn.inner.", "self_attn."): t for name, t in super().run(clip).items()}


ROW = Row(
    make=lambda: Vaccine(RHO),
    neutral=lambda: Vaccine(rho=0.0),
    bad=[
        ({"rho": -1.0}, "rho"),
        ({"rho": float("nan")}, "rho"),
        ({"rho": float("inf")}, "rho"),
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"every_n_steps": 1.5}, "every_n_steps"),
        ({"every_n_steps": float("nan")}, "every_n_steps"),
        ({"budget": "per_row"}, "budget"),
        ({"dropout": "same"}, "dropout"),
        ({"sites": []}, "sites"),
        ({"sites": "self_attn"}, "sites"),
    ],
    slow=SlowVaccine,
    per_micro_batch="each micro-batch has its own direction and the whole budget, as in the paper",
)
