"""Weights of other models by name, read some rows at a time, and the displacement between two models."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hftlight.engine.step.vectors import local
from hftlight.engine.weights.lowrank import LowRank, combined
from hftlight.engine.weights.shards import share
from hftlight.files import folder_digest

BLOCK = 1 << 18  # entries of a matrix that are processed at one time on a CPU: what fits into a core's cache
BLOCK_ELSEWHERE = 1 << 22
REOPEN = 1 << 28  # bytes that are read from a model's files before they are closed and opened again
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


class Weights(Protocol):
    """A model's weights by plain name, such as ``model.layers.0.self_attn.q_proj.weight``."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return a weight's shape, or None if the model has no such weight."""

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows ``start`` to ``stop`` of a weight, in the type in which it is stored."""


@dataclass(frozen=True)
class Difference:
    """The matrix ``W - W'`` of two models, read in blocks of rows and never held whole.

    Attributes:
        model: the model of W.
        other: the model of W'.
        name: plain name of the weight.
    """

    model: Weights
    other: Weights
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix, ``(out, in)``."""
        shape = self.model.shape(self.name)
        assert shape is not None
        return shape

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return some rows of the difference, at least in float32."""
        rows, rows_other = (w.rows(self.name, start, stop) for w in (self.model, self.other))
        dtype = torch.promote_types(torch.promote_types(rows.dtype, rows_other.dtype), torch.float32)
        return rows.to(dtype) - rows_other.to(rows.device, dtype)

    def back(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Return ``V[start : start + len(x)]^T x`` and two sums of squares over these rows.

        Args:
            x: ``[rows, k]``; the computation uses its type and device.
            start: number of the first of these rows in the whole matrix.

        Returns:
            ``[in, k]``, and ``[squares of V, squares of the noise]``. The noise comes from rounding both weights to
            their stored types. Over shards, both results add up.
        """
        total, squares = x.new_zeros(x.shape[1], self.shape[1]), x.new_zeros(2)
        for at, block, noise in self._blocks(start, start + len(x), x):
            total.addmm_(x[at - start : at - start + len(block)].T, block)
            squares[0] += _squared_norm(block)
            squares[1] += noise
        return total.T, squares

    def forth(self, t: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows ``start`` to ``stop`` of the matrix times ``t``, where ``t`` is ``[in, k]``."""
        stop = self.shape[0] if stop is None else stop
        result, t = t.new_empty(stop - start, t.shape[1]), t.contiguous()
        for at, block, _ in self._blocks(start, stop, t, noise=False):
            torch.mm(block, t, out=result[at - start : at - start + len(block)])
        return result

    def _blocks(self, start: int, stop: int, like: Tensor, noise: bool = True) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield first row, values and squared rounding noise of each block.

        The next block overwrites the values.
        """
        entries = BLOCK if like.device.type == "cpu" else BLOCK_ELSEWHERE
        height = min(max(1, entries // self.shape[1]), stop - start)
        buffer, buffer_other = (like.new_empty(height, self.shape[1]) for _ in range(2))
        squares = like.new_zeros(())
        # Both buffers are reused for every block.
        for at in range(start, stop, height or 1):
            rows, rows_other = (w.rows(self.name, at, min(at + height, stop)) for w in (self.model, self.other))
            block, other = buffer[: len(rows)].copy_(rows), buffer_other[: len(rows)].copy_(rows_other)
            if noise:  # both weights have nearly the same norm, so one norm serves for both
                squares = (_rounding(rows.dtype) + _rounding(rows_other.dtype)) * _squared_norm(other)
            yield at, block.sub_(other), squares  # in place: the buffer now holds the difference


def _squared_norm(values: Tensor) -> Tensor:
    return torch.dot(values.flatten(), values.flatten())


def _rounding(dtype: torch.dtype) -> float:
    """Return the mean squared error of rounding to a type, relative to the squared value.

    The error is uniform over the spacing of the numbers, so its mean square is a twelfth of the spacing's mean square.
    The spacing's mean square is 0.541 (eps |w|)^2 for values spread over a power of two.
    """
    return 0.541 / 12 * torch.finfo(dtype).eps ** 2


def displacement(model: Weights, other: Weights, name: str) -> LowRank | Difference | None:
    """Return the displacement of ``model`` from ``other`` in one weight.

    None means that the weight is known not to have moved.

    Raises:
        ValueError: if one of the two models has no such weight, or the shapes differ.
    """
    if isinstance(model, Adapted) and model.under == other:
        return model.updates.get(name)
    # Two adapters on the same model: their updates are subtracted exactly, as factors.
    if isinstance(model, Adapted) and isinstance(other, Adapted) and model.under == other.under:
        terms = [(sign, w.updates[name]) for sign, w in ((1.0, model), (-1.0, other)) if name in w.updates]
        if len(terms) == 2 and (more := _beyond(model.updates[name], other.updates[name])) is not None:
            return more
        return combined(terms) if terms else None
    shapes = model.shape(name), other.shape(name)
    if None in shapes or shapes[0] != shapes[1]:
        raise ValueError(
            f"{name}: the aligned and the base model must both have this weight in one shape, got {shapes[0]} in"
            f" {model} and {shapes[1]} in {other}. Give the models before and after the alignment, neither resized nor"
            " quantized."
        )
    return Difference(model, other, name)


def _beyond(whole: LowRank, part: LowRank) -> LowRank | None:
    """Return the rest of a stacked update ``whole`` that begins with the update ``part``.

    None means that ``whole`` does not begin with ``part``. A subtraction would leave the rounding error of the common
    part.
    """
    rank = part.b.shape[1]
    same = torch.equal(whole.a[:rank], part.a) and torch.equal(whole.scale * whole.b[:, :rank], part.scale * part.b)
    return LowRank(whole.b[:, rank:], whole.a[rank:], whole.scale) if same else None


@dataclass(frozen=True, eq=False)
class FileWeights:
    """A model folder with safetensors files, as ``save_pretrained`` writes it.

    Only the requested rows are read. Two folders whose files have the same content are equal: a model may lie in a
    cache and, as a copy, beside an adapter.

    Raises:
        ValueError: if the folder holds no safetensors file.
    """

    folder: Path
    _files: dict[str, Path] = field(init=False, repr=False, compare=False)
    _open: dict[Path, Any] = field(init=False, repr=False, compare=False, default_factory=dict)
    _read: list[int] = field(init=False, repr=False, compare=False, default_factory=lambda: [0])  # bytes since opening

    def __post_init__(self) -> None:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            files = {n: self.folder / f for n, f in json.loads(index.read_text())["weight_map"].items()}
        elif (self.folder / "model.safetensors").is_file():
            path = self.folder / "model.safetensors"
            files = dict.fromkeys(self._handle(path).keys(), path)
        else:
            raise ValueError(
                f"{self.folder} holds no model.safetensors: weights are read from safetensors files only. Write the"
                " model with save_pretrained first."
            )
        object.__setattr__(self, "_files", files)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FileWeights):
            return NotImplemented
        return self.folder == other.folder or self._content == other._content

    def __hash__(self) -> int:
        return hash(FileWeights)  # equal folders need equal hashes, and a hash of the content would read every file

    @cached_property
    def _content(self) -> str:
        return folder_digest(self.folder, "*.safetensors")

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return a weight's shape, or None."""
        stored_name = self._find(name)
        return None if stored_name is None else tuple(self._slice(stored_name).get_shape())

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows of a weight, on the CPU."""
        stored_name = self._find(name)
        if stored_name is None:
            raise KeyError(f"{name} is not in {self.folder}.")
        rows: Tensor = self._slice(stored_name)[start:stop]
        # An open file keeps every page that was read in this process's memory.
        self._read[0] += rows.numel() * rows.element_size()
        if self._read[0] > REOPEN:
            self._open.clear()
            self._read[0] = 0
        return rows

    def _find(self, name: str) -> str | None:
        """Return a weight's name in the files, or None.

        Some files leave out the prefix of the base model.
        """
        if name in self._files:
            return name
        short = name.partition(".")[2]
        return short if short in self._files else None

    def _slice(self, name: str) -> Any:
        return self._handle(self._files[name]).get_slice(name)

    def _handle(self, path: Path) -> Any:
        from safetensors import safe_open

        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path]


@dataclass(frozen=True, eq=False)
class ModelWeights:
    """The weights of a model in memory, including those under its adapters.

    Of a sharded weight, only this rank's rows are available.
    """

    parameters: Mapping[str, Tensor] = field(repr=False)

    @classmethod
    def of(cls, model: nn.Module) -> "ModelWeights":
        """Return the weights of a model, with or without PEFT around it, without a copy."""
        return cls({plain_name(name): p.detach() for name, p in model.named_parameters() if ".lora_" not in name})

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return a weight's shape, or None.

        None is returned also for a quantized weight, because its rows cannot be read.
        """
        p = self.parameters.get(name)
        return None if p is None or not p.is_floating_point() else tuple(p.shape)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows of a weight as a view of its storage."""
        p = self.parameters[name]
        mine = share(p)
        stop = p.shape[0] if stop is None else stop
        if start < mine.start or stop > mine.stop:
            raise RuntimeError(
                f"{name}: this rank holds rows {mine.start} to {mine.stop}, not {start} to {stop}; read the others from"
                " the model's folder."
            )
        return local(p)[start - mine.start : stop - mine.start]


@dataclass(frozen=True)
class Adapted:
    """A model with known thin updates on top of it, such as one that was aligned with LoRA.

    Attributes:
        under: the model without the updates.
        updates: the added updates, by the name of the weight.
    """

    under: Weights
    updates: Mapping[str, LowRank] = field(repr=False)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return a weight's shape, or None."""
        return self.under.shape(name)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows of a weight with its update, added in at least float32 and not rounded back."""
        rows = self.under.rows(name, start, stop)
        if name not in self.updates:
            return rows
        update = self.updates[name].rows(start, stop)
        return rows.to(torch.promote_types(rows.dtype, torch.float32)).to(update.device) + update


def stored(model: str | Path) -> Weights:
    """Return the weights of a model on disk.

    An adapter is returned as ``Adapted`` on the weights of its base model.

    Args:
        model: a folder, a hub id, or a name that ``hftlight.model_files.model_path`` knows.

    Raises:
        ValueError: if the model is not available, has no safetensors files, or is an adapter other than plain LoRA.
    """
    from hftlight.model_files import ADAPTER_CONFIG, base_of, model_path

    folder = Path(model_path(str(model), weights=True))
    if not (folder / ADAPTER_CONFIG).is_file():
        return FileWeights(folder.resolve())
    return Adapted(stored(base_of(folder)), stored_updates(folder))


def stored_updates(folder: Path) -> dict[str, LowRank]:
    """Return the updates in a LoRA adapter folder by the name of their weight, in the layout of that weight.

    Raises:
        ValueError: as for ``stored_factors``.
    """
    from peft import PeftConfig

    settings: Any = PeftConfig.from_pretrained(str(folder))
    return {
        # Conv1D, as in GPT-2, stores its weight as [in, out].
        f"{plain_name(stem)}.weight": LowRank(m.a.T, m.b.T, m.scale) if settings.fan_in_fan_out else m
        for stem, m in stored_factors(folder).items()
    }


def stored_factors(folder: Path) -> dict[str, LowRank]:
    """Return a LoRA adapter folder's B ``[out, rank]`` and A ``[rank, in]`` by the layer's name in its file.

    Raises:
        ValueError: if the adapter is not plain LoRA on linear layers.
    """
    from peft import PeftConfig
    from safetensors.torch import load_file

    settings: Any = PeftConfig.from_pretrained(str(folder))
    file = folder / "adapter_model.safetensors"
    state = load_file(file) if file.is_file() else {}
    if why := _not_plain(settings, state):
        raise ValueError(
            f"{folder}: an adapter must be plain LoRA on linear layers, got {why}. Merge the adapter into its model"
            " and give the merged model."
        )
    factors = {}
    for name in state:
        stem, _, kind = name.rpartition(".lora_")
        if kind == "A.weight":
            a, b = state[name], state[f"{stem}.lora_B.weight"]
            factors[stem] = LowRank(b, a, _stored_scale(settings, stem, a.shape[0]))
    return factors


def _not_plain(settings: Any, state: Mapping[str, Tensor]) -> str:
    """Return what makes an adapter differ from plain LoRA ``W + scale * B A``, or an empty text."""
    if str(getattr(settings.peft_type, "value", settings.peft_type)) != "LORA":
        return f"{settings.peft_type}"
    if settings.use_dora:
        return "DoRA"
    if settings.init_lora_weights not in (True, False, None, "gaussian", "eva"):  # all others change the base model
        return f"init_lora_weights {settings.init_lora_weights!r}"
    if settings.layer_replication:
        return "layer_replication"
    odd = [name for name in state if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    return odd[0] if odd else "" if state else "no adapter_model.safetensors"


def _stored_scale(settings: Any, stem: str, rank: int) -> float:
    """Return a layer's scale from an adapter's configuration and its patterns."""
    import re

    alpha = settings.lora_alpha
    for pattern, value in settings.alpha_pattern.items():
        if re.match(rf"(.*\.)?({pattern})$", stem):
            alpha = value
            break
    return alpha / (rank**0.5 if settings.use_rslora else rank)


def plain_name(name: str) -> str:
    """Return a parameter's or module's name without the parts that PEFT and wrappers of the module add.

    The wrappers are those of compilation, sharding and checkpointing.
    """
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("base_model.model.").replace(".base_layer", "")
