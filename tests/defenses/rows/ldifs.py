"""LDIFS's row."""

import copy

import torch

from hftlight.defenses.finetuning.ldifs import LDIFS
from tests.helpers.contract import Row, Slow

LAM = 200.0


def features(model, batch):
    outputs = []
    layers = [m for name, m in model.named_modules() if name.endswith(("layers.0", "layers.1"))]

    def keep(module, args, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [m.register_forward_hook(keep) for m in layers]
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for handle in handles:
        handle.remove()
    return outputs


class SlowLDIFS(Slow):
    def begin(self):
        self.aligned = copy.deepcopy(self.model).eval()

    def loss(self, batch):
        with torch.no_grad():
            before = features(self.aligned, batch)
        total, count = 0, 0
        for now, then in zip(features(self.model, batch), before, strict=True):
            for row, real in enumerate(batch["attention_mask"].sum(1).tolist()):
                for t in range(real):
                    gap = now[row, t] / now[row, t].norm() - then[row, t] / then[row, t].norm()
                    total, count = total + (gap**2).mean(), count + 1
        return super().loss(batch) + LAM * total / count


ROW = Row(
    make=lambda: LDIFS(LAM, layers=[0, 1]),
    neutral=lambda: LDIFS(lam=0.0),
    bad=[
        ({"lam": -1.0}, "lam"),
        ({"lam": float("nan")}, "lam"),
        ({"layers": []}, "layers"),
        ({"layers": [-1]}, "layers"),
        ({"layers": [0.5]}, "layers"),
        ({"axis": "batch"}, "axis"),
        ({"variant": "vision"}, "variant"),
    ],
    slow=SlowLDIFS,
)
