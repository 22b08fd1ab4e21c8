"""The base model, cached once per process for stages and measurements while its state is as loaded."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hftlight.config import RunConfig
from hftlight.errors import InputError
from hftlight.model_files import model_hash, model_path, stands_on
from hftlight.models.load import load_adapter, load_model

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integer type by bytes per entry


@dataclass
class _Kept:
    """Cached base model, with its checksums and state at loading."""

    key: tuple[Any, ...]
    model: nn.Module
    sums: dict[str, int]
    state: dict[str, Any]


_kept: list[_Kept] = []  # at most one entry, so that the cache never holds two base models


def keeps_base(config: RunConfig) -> bool:
    """Return whether a run leaves its base model unchanged, so that it can stay in memory.

    That holds for adapters in one process, with a base model that is neither trained nor in 4 bits.
    """
    return config.tuning == "lora" and config.strategy != "fsdp2" and config.devices * config.num_nodes == 1


def device_of(config: RunConfig) -> str:
    """Return the device that a run computes on: ``cpu``, ``mps``, or a GPU's name.

    The device decides the last bits of a result.
    """
    if config.accelerator != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "mps" if config.accelerator != "cpu" and torch.backends.mps.is_available() else "cpu"


def base_dtype(config: RunConfig) -> torch.dtype:
    """Return the dtype of the base weights: bfloat16 for adapters in bf16 precision without FSDP2, else float32."""
    frozen = config.tuning != "full" and config.strategy != "fsdp2"
    return torch.bfloat16 if frozen and config.precision.startswith("bf16") else torch.float32


def check_accelerator(config: RunConfig) -> None:
    """Refuse an accelerator that this machine does not have.

    Raises:
        InputError: naming the option.
    """
    if config.accelerator == "gpu" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise InputError("--accelerator gpu: torch finds no GPU on this machine. Use --accelerator auto or cpu.")


def on_device(model: nn.Module, config: RunConfig) -> Any:
    """Move a model to the GPU if the run computes on one, and return the model."""
    return model.cuda() if config.accelerator != "cpu" and torch.cuda.is_available() else model


def drop_base() -> None:
    """Remove the base model from memory, so that another one can be loaded."""
    if _kept:
        _kept.clear()
        gc.collect()  # a finished Trainer may still refer to it in a cycle


@contextmanager
def lent_model(name: str, dtype: torch.dtype, keep: bool, four_bit: bool = False) -> Iterator[nn.Module]:
    """Yield the model that ``load_model`` returns, with its base model from the cache if possible.

    With ``keep``, the base model of the previous block is used again, and stays in memory for the next block.

    The block may move the model and add hooks and adapters. It must remove hooks and adapters again. Weights that the
    block changed, for example by merging an adapter, are read from their file again. If the base model then still
    differs from its loaded state, it is dropped and loaded again next time. An exception in the block also drops it.

    Args:
        name: as for ``load_model``.
        dtype: type of the weights.
        keep: whether the base model may stay in memory.
        four_bit: load in 4 bits; such a base model never stays.

    Raises:
        InputError: as for ``load_model``.
    """
    path = Path(model_path(name, weights=True))
    if not keep or four_bit:
        drop_base()
        yield load_model(name, dtype, four_bit)
    elif (base := stands_on(name)) is not None:
        with lent_model(base, dtype, keep) as model:
            yield load_adapter(model, path).merge_and_unload()
    else:
        key = (str(path.resolve()), dtype, model_hash(str(path)))  # a name and a link may lead to one folder
        if not _kept or _kept[0].key != key:
            drop_base()
            model = load_model(name, dtype)
            _kept.append(_Kept(key, model, checksums(model), _state(model)))
            del model
        # During the block the entry is not in the cache, so that an exception drops it.
        entry = _kept.pop()
        yield entry.model
        if _restore(entry, path):
            _kept.append(entry)


def _restore(entry: _Kept, path: Path) -> bool:
    """Restore a base model to its loaded state in place, and return whether that worked."""
    model = entry.model.cpu().eval()
    flags = entry.state["requires_grad"]
    for name, p in model.named_parameters():
        p.grad = None
        p.requires_grad_(flags.get(name, True))
    # Changed layers, hooks or settings cannot be restored. Changed weights can, from their file.
    if _state(model) != entry.state:
        return False
    changed = {name for name, total in checksums(model).items() if total != entry.sums[name]}
    if changed:
        _read_again(model, changed, path)
    return all(_sum(p) == entry.sums[name] for name, p in _tensors(model).items() if name in changed)


def _read_again(model: nn.Module, names: set[str], path: Path) -> None:
    """Copy weights from a model's files into the model, in place.

    Weights that have another name in the files stay unchanged.
    """
    tensors = _tensors(model)
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored, torch.no_grad():
            for name in names & set(stored.keys()):
                tensors[name].copy_(stored.get_tensor(name))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def checksums(model: nn.Module) -> dict[str, int]:
    """Return a checksum of each parameter and buffer of a model, by name. Models of equal checksums have equal bits."""
    return {name: _sum(t) for name, t in _tensors(model).items()}


def _sum(tensor: Tensor) -> int:
    """Return a checksum of a tensor: the sum of its bits read as integers, modulo 2^64.

    The sum takes one pass over the tensor and shows any usual change.
    """
    flat = tensor.detach().contiguous().flatten()
    size = tensor.element_size()
    # Eight bytes at a time are many times faster. They need a whole number of them at an address that they divide.
    whole = size * flat.numel() % 8 == 0 and size * flat.storage_offset() % 8 == 0
    return int(flat.view(torch.int64 if whole else INTEGERS[size]).sum(dtype=torch.int64))


def _state(model: Any) -> dict[str, Any]:
    """Return the layers, hooks, modes and settings of a model, but no values of its weights."""
    layers = {}
    for name, module in model.named_modules():
        values = vars(module)
        plain = {key: v for key, v in values.items() if isinstance(v, bool | int | float | str | None)}
        hooks = {key: len(v) for key, v in values.items() if key.endswith("_hooks")}
        layers[name] = (type(module), sorted(values), plain, hooks)
    return {
        "layers": layers,
        "tensors": {name: (t.dtype, tuple(t.shape), str(t.device)) for name, t in _tensors(model).items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "attention": getattr(model.config, "_attn_implementation", None),
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict() if getattr(model, "generation_config", None) else None,
    }
