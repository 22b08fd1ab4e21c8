"""SaLoRA's row: the adapter of the tests has values of its own, so it is trained further."""

import torch
from torch.nn import functional as F

from hftlight.defenses.finetuning.sa_lora import SaLoRA, as_text
from tests.helpers.contract import Row, Slow

SIZES = {"q_proj": 16, "v_proj": 8, "o_proj": 16}
DIRECTIONS = 2


def subspaces():
    """Return random orthonormal directions for each adapted layer of the tiny model, by its plain name."""
    rng, result = torch.Generator().manual_seed(3), {}
    for number in range(2):
        for name, size in SIZES.items():
            random = torch.randn(size, DIRECTIONS, generator=rng)
            result[f"model.layers.{number}.self_attn.{name}"] = torch.linalg.qr(random).Q
    return result


def selected(**options):
    """Return a defense with these directions."""
    defense = SaLoRA(**options)
    defense.selected = [
        {"layer": name, "safety_tokens": 9, "task_tokens": 9, "subspace": as_text(v)} for name, v in subspaces().items()
    ]
    return defense


class SlowSaLoRA(Slow):
    """Each layer computes its output with a dense projection, next to a frozen copy of the adapter."""

    def begin(self):
        directions = subspaces()
        for name, layer in self.model.named_modules():
            if hasattr(layer, "lora_A"):
                v = directions[name.removeprefix("base_model.model.")].double()
                layer.forward = self.projected(layer, torch.eye(len(v), dtype=torch.float64) - v @ v.T)

    @staticmethod
    def projected(layer, outside):
        a, b, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        start = (b @ a).detach().clone()

        def forward(x):
            update = start + outside @ (b @ a - start)
            return F.linear(x, layer.get_base_layer().weight + scale * update)

        return forward


ROW = Row(
    make=lambda: selected(),
    neutral=lambda: SaLoRA(safety_rank=0, init="fresh"),
    bad=[
        ({"safety_rank": -1}, "safety_rank"),
        ({"safety_rank": 1.5}, "safety_rank"),
        ({"task_rank": 0}, "task_rank"),
        ({"samples": 0}, "samples"),
        ({"task": "harmful"}, "task must be"),
        ({"init": "zero"}, "init"),
    ],
    slow=SlowSaLoRA,
    tunings=("lora",),
)
