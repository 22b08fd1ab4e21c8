"""ALRIGHT's row, and the DPO loss of the slow loops."""

import copy

import torch
from torch.nn import functional as F

from hftlight.defenses.finetuning.alright import ALRIGHT, on_preferences
from tests.helpers.contract import Row, Slow

LAM, BETA = 0.5, 0.3


def log_probs(model, batch):
    """Return the log-probability of each row's answer, token by token."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    result = []
    for scores, labels in zip(logits, batch["labels"], strict=True):
        places = (labels[1:] != -100).nonzero().flatten().tolist()
        result.append(sum(torch.log_softmax(scores[t], -1)[labels[t + 1]] for t in places))
    return torch.stack(result)


class SlowTurns(Slow):
    """Plain SGD that trains step by step on one of two streams."""

    def begin(self):
        self.aligned, self.counts = copy.deepcopy(self.model).eval(), {"task": 0, "pairs": 0}
        self.choice = ""

    def chosen(self, step):
        return "pairs" if on_preferences(0, step, LAM) else "task"

    def batch_for(self, step, micro, batch):
        if micro == 0:
            if self.choice:
                self.counts[self.choice] += 1
            self.choice = self.chosen(step)
        return self.main_like(self.choice, self.counts[self.choice] * self.accumulate + micro)

    def preference_loss(self, batch):
        own = log_probs(self.model, batch)
        with torch.no_grad():
            fixed = log_probs(self.aligned, batch)
        gain = own - fixed
        return F.softplus(-BETA * (gain[0::2] - gain[1::2])).mean()

    def loss(self, batch):
        return self.preference_loss(batch) if "pairs" in batch else super().loss(batch)


ROW = Row(
    make=lambda: ALRIGHT(LAM, BETA),
    neutral=lambda: ALRIGHT(lam=0.0),
    bad=[
        ({"lam": 5}, "write 0.05"),
        ({"lam": -0.1}, "lam"),
        ({"lam": float("nan")}, "lam"),
        ({"beta": 0.0}, "beta"),
        ({"beta": float("inf")}, "beta"),
    ],
    slow=SlowTurns,
)
