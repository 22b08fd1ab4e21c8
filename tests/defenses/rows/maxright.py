"""MAXRIGHT's row."""

import torch

from hftlight.defenses.finetuning.maxright import MAXRIGHT
from tests.defenses.rows.alright import BETA, SlowTurns
from tests.helpers.contract import Row
from tests.helpers.tiny_lm import reference_loss

LAM, FLOOR, REFRESH = 0.4, 5.155, 3  # both streams are chosen in the first four steps


class SlowMAXRIGHT(SlowTurns):
    def begin(self):
        super().begin()
        self.drawn, self.window = 0, []
        self.measure()

    def measure(self):
        with torch.no_grad():
            task = float(reference_loss(self.model, self.main_like("task", self.drawn)))
            pairs = float(self.preference_loss(self.side["pairs"][self.drawn]))
        self.losses, self.drawn = {"task": task, "pairs": pairs}, self.drawn + 1

    def chosen(self, step):
        gaps = (1 - LAM) * (self.losses["task"] - FLOOR), LAM * self.losses["pairs"]
        return "pairs" if gaps[1] > gaps[0] else "task"

    def loss(self, batch):
        loss = super().loss(batch)
        self.window.append(float(loss.detach()))
        return loss

    def after(self, step):
        self.losses[self.choice] = sum(self.window) / len(self.window)
        self.window = []
        if (step + 1) % REFRESH == 0:
            self.measure()


ROW = Row(
    make=lambda: MAXRIGHT(LAM, BETA, task_floor=FLOOR, refresh=REFRESH),
    neutral=lambda: MAXRIGHT(lam=0.0),
    bad=[
        ({"lam": 5}, "write 0.05"),
        ({"beta": 0.0}, "beta"),
        ({"task_floor": -1.0}, "task_floor"),
        ({"pairs_floor": float("nan")}, "pairs_floor"),
        ({"refresh": 0}, "refresh"),
        ({"refresh": 2.5}, "refresh"),
    ],
    slow=SlowMAXRIGHT,
    per_micro_batch="a refresh measures one micro-batch, so its size decides which losses are compared",
)
