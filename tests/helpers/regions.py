"""Streams and training of a random language model, and reference regions by plain loops and sorting."""

import copy
from typing import Any

import torch
from torch.utils.data import DataLoader

from hftlight import SafetyModule
from tests.helpers.quadratic import quiet_trainer
from tests.helpers.tiny_lm import reference_loss, token_batch

# Arguments that both Freeze and Rewind refuse, and a word of the error.
BAD: list[tuple[dict[str, Any], str]] = [
    ({"safety_ratio": -0.1}, "safety_ratio"),
    ({"safety_ratio": float("nan")}, "safety_ratio"),
    ({"safety_ratio": 5}, "write 0.05"),
    ({"utility_ratio": 1.1}, "utility_ratio"),
    ({"utility_ratio": float("nan")}, "utility_ratio"),
    ({"mode": "both"}, "mode"),
    ({"score": "magnitude"}, "score"),
    ({"unit": "column"}, "unit"),
    ({"samples": 0}, "samples"),
    ({"samples": 1.5}, "samples"),
    ({"samples": float("nan")}, "samples"),
    ({"samples": float("inf")}, "samples"),
    ({"keep_s": 3}, "keep_s"),
    ({"safety": ""}, "safety"),
    ({"utility": "refusals"}, "utility"),
]

SIDE = {"refusals": [token_batch(100), token_batch(101)], "task": [token_batch(200), token_batch(201)]}


def train(model, callbacks, steps=3, optimizer="adamw", lr=0.01, **options):
    """Train a language model on the batches of its first steps and return the module."""
    module = SafetyModule(model, lr=lr, optimizer=optimizer)
    batches = DataLoader([token_batch(k) for k in range(steps)], batch_size=None, shuffle=False)
    quiet_trainer(max_steps=steps, callbacks=callbacks, **options).fit(module, batches)
    return module


def endless(row):
    """Return a copy of a one-row batch without the label of its last response token, the end token."""
    labels = row["labels"].clone()
    labels[0, max(t for t, label in enumerate(labels[0].tolist()) if label != -100)] = -100
    return {**row, "labels": labels}


def slow_scores(model, name, batches, samples, score="snip"):
    """Return the scores of one layer's weight, its adapter included. Only this weight is trainable."""
    model = copy.deepcopy(model).requires_grad_(False).eval()
    layer = model.get_submodule(name)
    weight = getattr(layer, "base_layer", layer).weight
    effective = weight.clone()
    if hasattr(layer, "lora_A"):
        effective += layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    rows = [endless({k: t[i : i + 1] for k, t in batch.items()}) for batch in batches for i in range(3)][:samples]
    total = torch.zeros_like(weight)
    # SNIP: |W| times the sum of each row's absolute gradient.
    if score == "snip":
        weight.requires_grad_()
        for row in rows:
            total += torch.autograd.grad(reference_loss(model, row), weight)[0].abs()
        return effective.abs() * total
    # Wanda: |W| times the root mean square of the layer's inputs at labeled tokens.
    inputs = []
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        for row in rows:
            model(input_ids=row["input_ids"], attention_mask=row["attention_mask"])
    handle.remove()
    tokens = torch.cat([x[row["labels"] != -100] for x, row in zip(inputs, rows, strict=True)])
    return effective.abs() * tokens.square().mean(dim=0).sqrt()


def sorted_region(safety, utility, q, p):
    """Return S(q) minus U(p) by sorting, as a flat boolean list."""
    tops = []
    for scores, fraction in ((safety, q), (utility, p)):
        flat = scores.flatten().tolist()
        count = int(fraction * len(flat) + 1e-9)
        # The entries with the highest scores. Ties go to the lower index.
        tops.append(set(sorted(range(len(flat)), key=lambda i, flat=flat: (-flat[i], i))[:count]))
    return [i in tops[0] - tops[1] for i in range(safety.numel())]
