"""TVaccine's row: one of two layers is active, scored every 2 steps and drawn every 3 steps."""

import random

import torch

from hftlight.defenses.alignment.t_vaccine import TVaccine
from tests.defenses.rows.vaccine import RHO, SlowVaccine
from tests.helpers.contract import Row

PROBE, DRAW = 2, 3


class SlowTVaccine(SlowVaccine):
    """Layers drawn by comparing exponential waiting times.

    Frozen weights get a gradient of zero, so plain SGD does not move them.
    """

    def batch_for(self, step, micro, batch):
        if micro == 0 and step % PROBE == 0:
            slopes = self.slopes(self.side["harmful"][step // PROBE])
            self.scores = [float((slope**2).sum()) ** 0.5 for slope in slopes]
        if micro == 0 and step % DRAW == 0:
            generator = random.Random(f"0/layers/{step}")
            waits = [generator.expovariate(1.0) for _ in range(2)]
            self.chosen = [0 if waits[0] * self.scores[1] <= waits[1] * self.scores[0] else 1]
        return batch

    def edit(self, step, grads):
        other = f"layers.{1 - self.chosen[0]}.self_attn."
        return [torch.zeros_like(g) if other in name else g for (name, _), g in zip(self.weights, grads, strict=True)]


ROW = Row(
    make=lambda: TVaccine(RHO, layers=1, probe_every=PROBE, resample_every=DRAW, probe_batch=None),
    neutral=lambda: TVaccine(rho=0.0, layers=2),
    bad=[
        ({"rho": -1.0}, "rho"),
        ({"rho": float("nan")}, "rho"),
        ({"layers": 0}, "layers"),
        ({"layers": float("nan")}, "layers"),
        ({"probe_every": 0}, "probe_every"),
        ({"probe_every": 2.5}, "probe_every"),
        ({"resample_every": 0}, "resample_every"),
        ({"resample_every": float("nan")}, "resample_every"),
        ({"probe_batch": 0}, "probe_batch"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"smoothing": float("nan")}, "smoothing"),
        ({"selection": "best"}, "selection"),
        ({"freeze_scope": "model"}, "freeze_scope"),
        ({"dropout": "same"}, "dropout"),
        ({"sites": []}, "sites"),
    ],
    slow=SlowTVaccine,
    per_micro_batch="each micro-batch has its own direction and the whole budget, as in the paper",
)
