"""TAR's row."""

import copy
import math

import torch

from hftlight.defenses import TAR
from hftlight.engine.step.side_streams import halves
from hftlight.engine.step.simulation import draws
from tests.helpers.contract import Row, Slow, data_module
from tests.helpers.tiny_lm import reference_loss

SETTING = {"inner_steps": 3, "every": 2, "lam": 0.5, "growth": 0.3, "inner_lrs": [0.02, 0.05], "representation": 0.2}


class SlowTAR(Slow):
    """Whole copies of the model, torch's own AdamW, and entropies and distances token by token."""

    def begin(self):
        self.aligned = copy.deepcopy(self.model)
        self.kept, self.held_out = halves(data_module(self.stage).streams["harmful"], "harmful", 0.25)
        self.drawn = {"harmful": 0, "alignment": 0, "held out": 0}

    def next(self, name):
        number = self.drawn[name]
        self.drawn[name] += 1
        if name == "alignment":
            return self.side["alignment"][number]
        return (self.held_out if name == "held out" else self.kept).batch(number)

    def states(self, model, batch):
        layers, states = [m for m in model.modules() if hasattr(m, "self_attn")], []
        handles = [layer.register_forward_hook(lambda _, __, y: states.append(y)) for layer in layers]
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for handle in handles:
            handle.remove()
        return states

    def loss(self, batch):
        distances = []
        for now, before in zip(self.states(self.model, batch), self.states(self.aligned, batch), strict=True):
            apart = [
                (now[r, t] - before[r, t].detach()).norm()
                if not torch.equal(now[r, t], before[r, t])
                else now.sum() * 0
                for r, t in batch["attention_mask"].nonzero().tolist()
            ]
            distances.append(torch.stack(apart).mean())
        return reference_loss(self.model, batch) + SETTING["representation"] * torch.stack(distances).mean()

    def edit(self, step, grads):
        rng = draws(0, step, "tar/0")
        kind, lr = rng.choice(["harmful", "switch"]), rng.choice(SETTING["inner_lrs"])
        switch = math.floor(3 * rng.betavariate(6, 3)) if kind == "switch" else 0
        attacked = copy.deepcopy(self.model).eval()
        weights = [p for p in attacked.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.01)
        for i in range(3):
            batch = self.next("alignment" if i < switch else "harmful")
            for p, g in zip(weights, torch.autograd.grad(reference_loss(attacked, batch), weights), strict=True):
                p.grad = g
            optimizer.step()
            if i == 1:
                batch = self.next("held out")
                logits = attacked(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                entropies = []
                for r, t in (batch["labels"] != -100).nonzero().tolist():
                    p = torch.softmax(logits[r, t - 1], 0)
                    entropies.append(-(p * p.log()).sum())
                tamper = torch.autograd.grad(-torch.stack(entropies).mean(), weights)
                grads = [g + 0.5 * math.exp(-0.3) * h for g, h in zip(grads, tamper, strict=True)]
        return grads


ROW = Row(
    make=lambda: TAR(**SETTING),
    neutral=lambda: TAR(lam=0.0, representation=0.0),
    bad=[
        ({"inner_steps": 0}, "inner_steps"),
        ({"every": 9}, "every"),
        ({"tasks": 1.5}, "tasks"),
        ({"lam": -1.0}, "lam"),
        ({"growth": float("nan")}, "growth"),
        ({"tamper": "kl"}, "tamper"),
        ({"bound": 0.0}, "bound"),
        ({"positions": "prompt"}, "positions"),
        ({"attackers": []}, "attackers"),
        ({"attackers": "harmful"}, "attackers"),
        ({"inner_lrs": [0.0]}, "inner_lrs"),
        ({"inner_optimizer": "lion"}, "inner_optimizer"),
        ({"held_out": 25}, "held_out"),
        ({"representation": -0.1}, "representation"),
        ({"beta": 0.0}, "beta"),
    ],
    slow=SlowTAR,
    per_micro_batch="a switching attacker draws its alignment batches in the size of a micro-batch",
)
