"""Freeze's row."""

import copy

import torch

from hftlight.defenses.finetuning.freeze import Freeze
from tests.helpers.contract import Row, Slow
from tests.helpers.regions import BAD
from tests.helpers.tiny_lm import reference_loss

Q, P, SAMPLES = 0.5, 0.25, 6


def first(scores, count):
    """Return the positions of the ``count`` largest scores. Of equal scores the earlier position ranks first."""
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


class SlowFreeze(Slow):
    """The mask from weight gradients of a copy, one data row at a time.

    Plain indexing freezes the entries of the mask, one by one.
    """

    def begin(self):
        self.lora = any("lora_" in name for name, _ in self.weights)
        self.frozen = {}
        safety, utility = self.scores("alignment"), self.scores("task")
        named = dict(self.model.named_parameters())
        for name, scores in safety.items():
            if self.lora:
                # Under an adapter, rows are ranked by the sum of their scores, otherwise single entries are ranked.
                tops = [([float(row.sum()) for row in s], f) for s, f in ((scores, Q), (utility[name], P))]
            else:
                tops = [(s.flatten().tolist(), f) for s, f in ((scores, Q), (utility[name], P))]
            region = first(tops[0][0], int(Q * len(tops[0][0]))) - first(tops[1][0], int(P * len(tops[1][0])))
            if not self.lora:
                self.freeze(name, named[name], region)
                continue
            b = name.replace("base_layer.weight", "lora_B.default.weight")
            a = name.replace("base_layer.weight", "lora_A.default.weight")
            rank = named[b].shape[1]
            self.freeze(b, named[b], {row * rank + k for row in region for k in range(rank)})
            self.freeze(a, named[a], set(range(named[a].numel())))

    def freeze(self, name, parameter, places):
        flat = parameter.detach().flatten()
        self.frozen[name] = {place: flat[place].clone() for place in sorted(places)}

    def scores(self, stream):
        """Return |W| times the sum of absolute gradients over the first rows of a stream, by weight name."""
        model = copy.deepcopy(self.model).requires_grad_(False).eval()
        named = dict(model.named_parameters())
        kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        ending = "base_layer.weight" if self.lora else "_proj.weight"
        weights = {n: p for n, p in named.items() if n.endswith(ending) and n.split(".")[-2 - self.lora] in kinds}
        effective = {}
        for name, weight in weights.items():
            weight.requires_grad_()
            effective[name] = weight.detach().clone()
            if self.lora:
                stem = name.replace("base_layer.weight", "")
                effective[name] += 2 * named[f"{stem}lora_B.default.weight"] @ named[f"{stem}lora_A.default.weight"]
        sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for number in range(SAMPLES):
            batch = self.side[stream][number // 4]
            row = {key: value[number % 4 : number % 4 + 1] for key, value in batch.items()}
            row["labels"] = row["labels"].clone()
            row["labels"][0, row["labels"][0].ne(-100).nonzero()[-1]] = -100  # the end token does not count
            grads = torch.autograd.grad(reference_loss(model, row), list(weights.values()))
            for name, grad in zip(weights, grads, strict=True):
                sums[name] += grad.abs()
        return {name: effective[name].abs() * sums[name] for name in weights}

    def edit(self, step, grads):
        edited = []
        for (name, _), grad in zip(self.weights, grads, strict=True):
            flat = grad.flatten().clone()
            for place in self.frozen.get(name, ()):
                flat[place] = 0
            edited.append(flat.view_as(grad))
        return edited

    def after(self, step):
        # Frozen entries get their values back in place.
        with torch.no_grad():
            for name, parameter in self.weights:
                for place, value in self.frozen.get(name, {}).items():
                    parameter.view(-1)[place] = value


ROW = Row(
    make=lambda: Freeze(Q, P, samples=SAMPLES, safety="alignment"),
    neutral=lambda: Freeze(0.0, safety="alignment"),
    bad=[
        *BAD,
        ({"score": "actsvd"}, "use Rewind"),
    ],
    slow=SlowFreeze,
    refuses={name: f"Freeze: {name} averages" for name in ("StochasticWeightAveraging", "EMAWeightAveraging")},
)
