"""A direction in weight space, named by weight, and the repair that moves a model along it."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from hftlight.engine.step.vectors import Vector, local, trainable, whole
from hftlight.engine.weights.lora import has_adapter, lora_updates
from hftlight.engine.weights.repair import Repair
from hftlight.engine.weights.shards import share
from hftlight.engine.weights.stored import plain_name
from hftlight.engine.weights.subject import Subject

A, B = " (A)", " (B)"  # ends of the names of an adapter's factors


def weight_names(module: nn.Module) -> dict[str, tuple[str, float]]:
    """Return the weight that each trainable parameter of a module belongs to, and the scale of the parameter there.

    An adapter's factors are named ``WEIGHT (A)`` and ``WEIGHT (B)``. B has the adapter's scale, so that the names and
    the scaled values stay valid when the adapter is written at scale 1.

    Args:
        module: the module, or a LightningModule with a model in its attribute ``model``.

    Raises:
        TypeError: if the adapter is not plain LoRA, or a parameter beside the adapter is trained.
    """
    model = getattr(module, "model", module)
    factors = {}
    if has_adapter(model):
        for name, update in lora_updates(model).items():
            factors[id(update.a)], factors[id(update.b)] = (f"{name}{A}", 1.0), (f"{name}{B}", update.scale)
    owners = {id(p): plain_name(name) for name, p in model.named_parameters()}
    result = {}
    for name, p in trainable(module).items():
        if factors and id(p) not in factors:
            raise TypeError(f"{plain_name(name)} is trained beside the adapter; a shift covers the adapter alone.")
        result[name] = factors.get(id(p), (owners.get(id(p), name), 1.0))
    return result


def by_weight(vector: Vector, module: nn.Module) -> dict[str, Tensor]:
    """Return a vector as whole CPU tensors, named and scaled as ``weight_names`` says.

    Under sharding every rank must call this.

    Args:
        vector: name of a trainable parameter of ``module`` -> tensor of that parameter's shape.
        module: as for ``weight_names``.

    Raises:
        TypeError: as for ``weight_names``.
    """
    names = weight_names(module)
    named = {name: (*names[name], value) for name, value in vector.items()}
    return {own: (scale * whole(value.detach())).cpu().contiguous() for own, scale, value in named.values()}


class Shift(Repair):
    """Move the weights along a direction that a defense found during the fine-tuning.

    A defense creates this repair. It acts before all other repairs of a list, so that they see the deployed weights.

    Args:
        length: factor of the direction, >= 0; 0 turns it off.
        output: as in ``Repair``.

    Attributes:
        direction: the direction by weight, as ``by_weight`` returns it. It must be set before ``apply``.

    Raises:
        ValueError: if ``length`` is negative.
    """

    repair_order = -10

    def __init__(self, length: float, output: str | None = None) -> None:
        if not 0 <= length < math.inf:
            raise ValueError(f"Shift: length must be >= 0 (0 turns it off), got {length}.")
        super().__init__(None, output)
        self.length = length
        self.direction: Mapping[str, Tensor] = {}

    @property
    @override
    def neutral(self) -> bool:
        return self.length == 0

    @override
    def identity(self) -> dict[str, Any]:
        """Return the hash of the direction; nothing while there is none."""
        total = hashlib.sha256()
        for name, value in sorted(self.direction.items()):
            total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            total.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
        return {"direction": total.hexdigest()[:16]} if self.direction else {}

    @override
    def edit(self, subject: Subject) -> None:
        if not self.direction:
            raise RuntimeError("Shift: no direction is known. Train with the defense that finds it first.")
        targets: dict[str, tuple[nn.Parameter, float]] = {}
        if has_adapter(subject.model):
            for name, update in lora_updates(subject.model).items():
                targets |= {f"{name}{A}": (update.a, 1.0), f"{name}{B}": (update.b, update.scale)}
        else:
            targets = {plain_name(name): (p, 1.0) for name, p in subject.model.named_parameters()}
        changed = 0
        for name, value in self.direction.items():
            if name not in targets:
                raise ValueError(f"Shift: the model has no {name}; give the model that the defense trained.")
            parameter, scale = targets[name]
            # Under "continue" the update is the trained adapter followed by the aligned one, which does not move.
            target, rows = local(parameter.detach()), share(parameter)
            start, stop = rows.start, min(rows.stop, len(value))
            step = (self.length / scale) * value[start:stop].to(target.device)
            part = target[: stop - start, : value.shape[1]] if target.dim() == 2 else target[: stop - start]
            new = (part.to(torch.promote_types(part.dtype, torch.float32)) + step).to(part.dtype)
            changed += int(rows.sum((new != part).sum())[0])
            part.copy_(new)
        norm = math.sqrt(sum(float(value.double().square().sum()) for value in self.direction.values()))
        subject.report |= {"length": self.length, "direction_norm": norm, "changed_entries": changed}
