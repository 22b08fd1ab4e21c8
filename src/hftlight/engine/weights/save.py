"""Writing of a repaired model, and the digest that identifies its weights."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hftlight.engine.step.order import rank_and_world
from hftlight.engine.step.vectors import local, whole
from hftlight.engine.weights.lora import has_adapter
from hftlight.engine.weights.shards import share
from hftlight.engine.weights.stored import (
    plain_name,
)
from hftlight.engine.weights.subject import Subject
from hftlight.files import new_folder, write_json

MARKER = "repair.json"


def repaired_state(subject: Subject) -> dict[str, Tensor]:
    """Return a repaired model's weights on the CPU of the first rank.

    The result holds the adapter's weights, or all weights by their plain names. Sharded weights are gathered one at a
    time, so every rank must call this. On the other ranks the result is empty.
    """
    model: Any = subject.model
    adapter, first = _thin(subject), rank_and_world()[0] == 0
    inner = model.get_base_model() if has_adapter(model) else model
    state: dict[str, Tensor] = {}
    copies: dict[Any, Tensor] = {}  # by address and shape, so that tied weights stay one tensor
    for name, tensor in (model if adapter else inner).state_dict().items():
        if (".lora_" in name) == adapter:
            full = whole(tensor.detach())
            if first:
                copy = copies.setdefault((local(tensor).data_ptr() or id(tensor), tensor.shape), full.cpu())
                state[name if adapter else plain_name(name)] = copy
    return state


def _thin(subject: Subject) -> bool:
    """Tell whether the user's whole update is still in an adapter."""
    return has_adapter(subject.model) and not subject.dense


def save_repaired(folder: Path, subject: Subject) -> None:
    """Write a repaired model so that plain transformers or PEFT can load it, and ``repair.json`` beside it.

    Sharded weights are gathered one at a time onto the CPU of the first rank, so every rank must call this.

    Args:
        folder: destination; an existing folder is replaced.
        subject: subject after ``apply``.
    """
    state = repaired_state(subject)
    if rank_and_world()[0] != 0:
        return
    model: Any = subject.model
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as place:
        if _thin(subject):
            _save_adapter(place, model, state)
        else:
            (model.get_base_model() if has_adapter(model) else model).save_pretrained(place, state_dict=state)
        write_json(place / MARKER, {"applied": subject.applied, **subject.report})


def write_adapter_config(settings: Any, folder: Path) -> None:
    """Write PEFT's configuration of an adapter with sets sorted, because their order differs between processes."""
    settings = copy.deepcopy(settings)
    for name, value in vars(settings).items():
        if isinstance(value, set):
            setattr(settings, name, sorted(value))
    settings.save_pretrained(str(folder))


def _save_adapter(folder: Path, model: Any, state: dict[str, Tensor]) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    (adapter,) = model.active_adapters
    settings = copy.deepcopy(model.peft_config[adapter])
    settings.inference_mode = True
    write_adapter_config(settings, folder)
    tensors = get_peft_model_state_dict(model, state_dict=state, adapter_name=adapter, save_embedding_layers=False)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "adapter_model.safetensors")


def repairs_of(folder: Path) -> list[str]:
    """Return the names of the repairs applied to the model in a folder, for ``Subject.applied``."""
    path = folder / MARKER
    return json.loads(path.read_text(encoding="utf-8"))["applied"] if path.is_file() else []


def weights_digest(model: nn.Module) -> str:
    """Return 16 hexadecimal digits that identify the weights that a repair may change.

    These are the adapter's weights, or all parameters without an adapter. Each rank hashes its own shards, so the
    digest depends on the number of ranks.
    """
    total = hashlib.sha256()
    adapter = has_adapter(model)
    for name, p in model.named_parameters():
        if not adapter or ".lora_" in name:
            # Hash a copy: numpy holds on to the memory that it views, and sharding could not free that memory.
            data = local(p.detach()).cpu().clone(memory_format=torch.contiguous_format).flatten()
            total.update(f"{plain_name(name)} {p.dtype} {tuple(p.shape)}".encode())
            total.update(data.view(torch.uint8).numpy().data)
    if rank_and_world()[1] > 1 and any(share(p).group is not None for p in model.parameters()):
        parts: list[Any] = [None] * rank_and_world()[1]
        dist.all_gather_object(parts, total.hexdigest())
        total = hashlib.sha256("".join(parts).encode())
    return total.hexdigest()[:16]
