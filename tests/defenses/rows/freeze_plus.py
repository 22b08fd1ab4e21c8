"""FreezePlus's row."""

import torch

from hftlight.defenses import FreezePlus
from tests.helpers.contract import Row, Slow

SCU, UCU, RU, CU, SAMPLES = 0.2, 0.2, 0.15, 0.4, 6


class SlowFreezePlus(Slow):
    """Units are sorted into groups by plain loops, and each entry is kept by a mask that is written out by name."""

    def begin(self):
        safe, useful = self.ranks("alignment"), self.ranks("task")
        units = list(safe)
        n = len(units)
        places = sorted(range(n), key=lambda i: (useful[units[i]] - safe[units[i]], i))
        critical, rest = places[: int(SCU * n)], sorted(places[int(SCU * n) : n - int(UCU * n)])
        total = [safe[unit] + useful[unit] for unit in units]
        complex_units = sorted(sorted(rest, key=lambda i: total[i])[int(RU * n) :], key=lambda i: (-total[i], i))
        top = complex_units[: int(CU * len(complex_units))]
        self.chosen = {units[i] for i in critical + top}
        self.start = {name: p.detach().clone() for name, p in self.weights}

    def ranks(self, stream):
        """Return the rank of each unit (layer, kind, number) within its layer and kind."""
        rows = [self._cut(stream, k, 1) for k in self.numbers(stream)]
        result = {}
        for number, layer in enumerate(m for m in self.model.modules() if hasattr(m, "self_attn")):
            for kind, reader, owner in (
                ("mlp", layer.mlp.down_proj, list(range(32))),
                ("attention", layer.self_attn.o_proj, [*range(8), *range(8)]),
            ):
                weight = self.effective(reader)
                if weight is None:
                    continue
                tokens = []
                for row in rows:
                    inputs = []
                    handle = reader.register_forward_pre_hook(lambda _, args, into=inputs: into.append(args[0]))
                    with torch.no_grad():
                        self.model.eval()(input_ids=row["input_ids"], attention_mask=row["attention_mask"])
                    handle.remove()
                    self.model.train()
                    tokens += [inputs[0][0, t] for t, label in enumerate(row["labels"][0].tolist()) if label != -100]
                spread = torch.stack(tokens).var(dim=0, unbiased=False)
                scores = [0.0] * (max(owner) + 1)
                for column, unit in enumerate(owner):
                    scores[unit] += float(spread[column]) * float((weight[:, column] ** 2).sum())
                for unit, score in enumerate(scores):
                    result[number, kind, unit] = sum(other < score for other in scores) / (len(scores) - 1)
        return result

    def numbers(self, stream):
        """Return the numbers of the scored rows: the second half of the safety rows begins with a new batch of four."""
        return [0, 1, 2, 4, 5, 6] if stream == "alignment" else range(SAMPLES)

    def effective(self, layer):
        """Return the weight that a layer applies, or None if it is not trained."""
        if hasattr(layer, "lora_A"):
            return (layer.base_layer.weight + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight).data
        return layer.weight.data if layer.weight.requires_grad else None

    def keeps(self, name, p):
        """Return the mask of the entries of a parameter that keep their values."""
        if "layers." not in name:
            return torch.zeros_like(p, dtype=torch.bool)
        number = int(name.split("layers.")[1].split(".")[0])
        channels = torch.tensor([(number, "attention", unit) in self.chosen for unit in range(8)])
        hidden = torch.tensor([(number, "mlp", unit) in self.chosen for unit in range(32)])
        mask = torch.zeros(1, 1, dtype=torch.bool)
        if "v_proj" in name:
            mask = channels.any().view(1, 1) if "lora_A" in name else channels[:, None]
        elif "o_proj" in name:
            mask = channels.any().view(1, 1) if "lora_B" in name else channels.repeat(2)[None]
        elif "gate_proj" in name or "up_proj" in name:
            mask = hidden[:, None]
        elif "down_proj" in name:
            mask = hidden[None]
        return mask.expand(p.shape) if p.dim() == 2 else torch.zeros_like(p, dtype=torch.bool)

    def edit(self, step, grads):
        return [g.masked_fill(self.keeps(name, p), 0) for (name, p), g in zip(self.weights, grads, strict=True)]

    def after(self, step):
        with torch.no_grad():
            for name, p in self.weights:
                p.copy_(torch.where(self.keeps(name, p), self.start[name], p))


ROW = Row(
    make=lambda: FreezePlus(SCU, UCU, RU, CU, samples=SAMPLES, safety="alignment", utility="task"),
    neutral=lambda: FreezePlus(scu=0.0, cu=0.0, safety="alignment", utility="task"),
    bad=[
        ({"scu": -0.1}, "scu"),
        ({"scu": 1.3}, "write 0.013"),
        ({"ucu": float("nan")}, "ucu"),
        ({"ru": 2.0}, "ru"),
        ({"cu": 6}, "write 0.06"),
        ({"scu": 0.5, "ucu": 0.5, "ru": 0.1}, "no unit is in two groups"),
        ({"complex_epochs": -1}, "complex_epochs"),
        ({"complex_epochs": 0.5}, "whole number"),
        ({"estimator": "magnitude"}, "estimator"),
        ({"units": "all"}, "units"),
        ({"samples": 0}, "samples"),
        ({"utility": "refusals"}, "two different streams"),
    ],
    slow=SlowFreezePlus,
    refuses={
        "StochasticWeightAveraging": "averages weights after they moved",
        "EMAWeightAveraging": "averages weights after they moved",
    },
)
