"""The base model, loaded once per process: lent for a stage or a measurement, and kept only if it is as loaded."""

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
from hftlight.model_files import model_hash, model_path, stands_on
from hftlight.models.load import load_adapter, load_model

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per entry


@dataclass
class _Kept:
    """A base model and what it was when it was loaded."""

    key: tuple[Any, ...]
    model: nn.Module
    sums: dict[str, int]
    state: dict[str, Any]


_kept: list[_Kept] = []  # one at most, so that there are never two bases in memory because of it


def keeps_base(config: RunConfig) -> bool:
    """Tell whether a run leaves its base as it was: adapters in one process, the base neither trained nor in 4 bits."""
    return config.tuning == "lora" and config.strategy != "fsdp2" and config.devices * config.num_nodes == 1


def device_of(config: RunConfig) -> str:
    """Return the device that a run computes on, which decides the last bits: ``cpu``, ``mps``, or a GPU's name."""
    if config.accelerator != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "mps" if config.accelerator != "cpu" and torch.backends.mps.is_available() else "cpu"


def base_dtype(config: RunConfig) -> torch.dtype:
    """Return the type of the frozen weights: bfloat16 under a bf16 precision with adapters, else float32."""
    frozen = config.tuning != "full" and config.strategy != "fsdp2"
    return torch.bfloat16 if frozen and config.precision.startswith("bf16") else torch.float32


def on_device(model: nn.Module, config: RunConfig) -> Any:
    """Move a model to the device that a run computes on, and return it."""
    return model.cuda() if config.accelerator != "cpu" and torch.cuda.is_available() else model


def drop_base() -> None:
    """Let go of the base model, before another one is loaded beside it."""
    if _kept:
        _kept.clear()
        gc.collect()  # a Trainer that is gone may still hold it in a cycle


@contextmanager
def lent_model(name: str, dtype: torch.dtype, keep: bool, four_bit: bool = False) -> Iterator[nn.Module]:
    """Yield what ``load_model`` returns; with ``keep`` its base is the one of the block before, or stays for the next.

    The block may move the model, hook it and put adapters around it, and takes hooks and adapters off again. Weights
    that it changed, such as those that an adapter was merged into, are read from their file again. A base that is then
    not as it was loaded, or whose block ended in an exception, is forgotten and loaded again next time.

    Args:
        name: as ``load_model`` takes it.
        dtype: type of the weights.
        keep: whether the base may stay in memory.
        four_bit: load in 4 bits; such a base never stays.

    Raises:
        InputError: as ``load_model``.
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
            _kept.append(_Kept(key, model, _sums(model), _state(model)))
            del model
        kept = _kept.pop()
        yield kept.model
        if _as_loaded(kept, path):
            _kept.append(kept)


def _as_loaded(kept: _Kept, path: Path) -> bool:
    """Bring a base into the state in which it was loaded, and tell whether that worked."""
    model = kept.model.cpu().eval()
    flags = kept.state["requires_grad"]
    for name, p in model.named_parameters():
        p.grad = None
        p.requires_grad_(flags.get(name, True))
    if _state(model) != kept.state:
        return False
    changed = {name for name, total in _sums(model).items() if total != kept.sums[name]}
    if changed:
        _read_again(model, changed, path)
    return all(_sum(p) == kept.sums[name] for name, p in _tensors(model).items() if name in changed)


def _read_again(model: nn.Module, names: set[str], path: Path) -> None:
    """Copy weights from a model's files; those that have another name there stay as they are."""
    tensors = _tensors(model)
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored, torch.no_grad():
            for name in names & set(stored.keys()):
                tensors[name].copy_(stored.get_tensor(name))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _sums(model: nn.Module) -> dict[str, int]:
    return {name: _sum(t) for name, t in _tensors(model).items()}


def _sum(tensor: Tensor) -> int:
    """Return the sum of a tensor's bits read as integers, modulo 2^64: one pass, and any usual change shows."""
    return int(tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64))


def _state(model: Any) -> dict[str, Any]:
    """Return everything about a model but its weights: layers, hooks, modes, settings."""
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
