"""Directions in weight space, and models that stand elsewhere along them inside a ``with`` block."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hftlight.engine.step.simulation import draws
from hftlight.engine.weights.lora import has_adapter, lora_updates
from hftlight.engine.weights.lowrank import LowRank
from hftlight.engine.weights.stored import Weights, displacement, plain_name
from hftlight.errors import InputError
from hftlight.models.base import checksums


class Direction(Protocol):
    """A direction in weight space. It is computed tensor by tensor and never held whole."""

    def of(self, name: str, weight: Tensor) -> Tensor | None:
        """Return the displacement of one weight at coefficient 1, on the weight's device, or None for no displacement.

        Args:
            name: plain name of the weight.
            weight: W as the model uses it. A LoRA update is included, at least in float32.
        """


def gaussian(weight: Tensor, seed: int, number: int, name: str, others: Sequence[int] = ()) -> Tensor:
    r"""Return a random direction of one tensor, with the tensor's Frobenius norm.

    With the entries of z drawn from a standard normal distribution,

    .. math:: d = \frac{z}{\|z\|_F} \|W\|_F

    z depends on the seed, the number and the tensor's name alone. It is drawn on the CPU in float32, so that it depends
    neither on the order of the tensors nor on the device or type of the model. The components of z along the
    directions ``others`` are removed first. Directions that are orthogonal in each tensor are orthogonal as a whole.

    Args:
        weight: W, of any shape.
        seed: seed of all directions.
        number: number of the direction.
        name: plain name of the tensor.
        others: numbers of earlier directions, orthogonal to each other.

    Returns:
        d, of W's shape, at least in float32, on W's device. Zero if W is zero, or too small to be orthogonal.
    """

    def drawn(which: int) -> Tensor:
        generator = torch.Generator().manual_seed(draws(seed, which, name).getrandbits(48))
        return torch.randn(weight.shape, generator=generator)

    z = drawn(number)
    for place, other in enumerate(others):
        d = gaussian(z, seed, other, name, others[:place])
        z -= ((z * d).sum() / (d * d).sum().clamp_min(torch.finfo(d.dtype).tiny)) * d
    dtype = torch.promote_types(weight.dtype, torch.float32)
    length, norm = torch.linalg.vector_norm(z), torch.linalg.vector_norm(weight, dtype=dtype)
    # What rounding leaves of a tensor that has no orthogonal direction is noise.
    nothing = bool(others) and length < 1e-4 * weight.numel() ** 0.5
    return torch.zeros_like(weight, dtype=dtype) if nothing or not length else z.to(norm).mul_(norm / length.to(norm))


def norm_weights(model: nn.Module) -> set[str]:
    """Return the plain names of the weights of norms.

    A weight is a norm's if its name contains "norm", or its module's class name does, as GPT-2's ``ln_f``.
    """
    return {
        plain_name(f"{stem}.{own}" if stem else own)
        for stem, module in model.named_modules()
        for own, _ in module.named_parameters(recurse=False)
        if "norm" in type(module).__name__.lower() or "norm" in f"{stem}.{own}".lower()
    }


@dataclass(frozen=True)
class RandomDirection:
    """A random direction with the norm of each tensor.

    Norm weights do not move. Embeddings and the output layer do.

    Attributes:
        seed: seed of all directions.
        number: number of the direction.
        still: plain names of the weights that do not move, from ``norm_weights``.
        others: numbers of the directions that it is orthogonal to.
    """

    seed: int
    number: int
    still: frozenset[str] = field(default=frozenset(), repr=False)
    others: tuple[int, ...] = ()

    def of(self, name: str, weight: Tensor) -> Tensor | None:
        """Return the displacement of one weight, as ``Direction.of`` does."""
        return None if name in self.still else gaussian(weight, self.seed, self.number, name, self.others)


@dataclass(frozen=True, eq=False)
class Displacement:
    """The direction from one model to another: at coefficient 1 the start has become the end.

    Attributes:
        start: weights of the model at coefficient 0.
        end: weights of the model at coefficient 1.
    """

    start: Weights
    end: Weights

    def of(self, name: str, weight: Tensor) -> Tensor | None:
        """Return the displacement of one weight, as ``Direction.of`` does."""
        matrix = self._matrix(name)
        return None if matrix is None else matrix.rows().to(weight.device)

    def thin(self, names: Sequence[str]) -> dict[str, LowRank] | None:
        """Return the displacement of each weight that moves as its factors, or None if it is not known as factors.

        That is so if both models are LoRA adapters on one base model, or one is an adapter on the other.
        """
        found = {name: matrix for name in names if (matrix := self._matrix(name)) is not None}
        thin = {name: matrix for name, matrix in found.items() if isinstance(matrix, LowRank)}
        return thin if len(thin) == len(found) else None

    def _matrix(self, name: str) -> Any:
        try:
            return displacement(self.end, self.start, name)
        except ValueError as error:
            raise InputError(f"A path between two models needs equal shapes. {error}") from error


def random_direction(model: nn.Module, seed: int, number: int, others: tuple[int, ...] = ()) -> RandomDirection:
    """Return a ``RandomDirection`` of a model."""
    return RandomDirection(seed, number, frozenset(norm_weights(model)), others)


Moves = Sequence[tuple[float | Tensor, Direction]]  # coefficient and direction


def movable(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights and floating buffers of a model by plain name.

    A tied weight occurs once. Only buffers that are saved are included.

    The factors of a LoRA adapter are no weights of their own: they are a part of the weights under them.

    Raises:
        InputError: if a weight is quantized, since it cannot take a small displacement.
    """
    found, seen = dict[str, Tensor](), set[int]()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if ".lora_" in name or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if isinstance(tensor, nn.Parameter) and not tensor.is_floating_point():
            raise InputError(
                f"{plain_name(name)} is stored as {tensor.dtype}. A landscape moves weights of 16 or 32 bits. Load the"
                " model without quantization (--tuning lora)."
            )
        if tensor.is_floating_point():
            found[plain_name(name)] = tensor.detach()
    return found


@contextmanager
def moved_to(model: nn.Module, moves: Moves) -> Iterator[None]:
    r"""Run the block with the model at :math:`\theta + \sum_i a_i d_i`, then restore its weights bit for bit.

    Every weight is computed from its pristine copy, at least in float32, and rounded once to its type. Nothing
    accumulates over blocks. Displacements that are known as factors of low rank leave the weights as they are: they
    act through the outputs of their layers.

    Args:
        model: a causal LM, or a LoRA model around one.
        moves: a_i and d_i. A coefficient may be a tensor ``[batch]``, one number per row of a batch, if the direction
            is known as factors.

    Raises:
        InputError: if a weight is quantized, a displacement does not fit, or a coefficient per row has no factors.
        RuntimeError: if a weight is not as it was after the block. The model is then of no use.

    Cost: a copy of the weights that move densely. A displacement in factors costs no copy.
    """
    moves = [(a, d) for a, d in moves if isinstance(a, Tensor) or a != 0]
    weights = movable(model)
    layers = _layers(model)
    thin = [_thin(layers, d, list(weights)) for _, d in moves]
    before = checksums(model)
    saved: dict[str, Tensor] = {}
    with ExitStack() as stack:
        try:
            for (a, _), factors in zip(moves, thin, strict=True):
                for name, matrix in (factors or {}).items():
                    stack.callback(_hook(layers[name], a, matrix).remove)
            _write(model, weights, [move for move, f in zip(moves, thin, strict=True) if f is None], saved)
            yield
        finally:
            for name, tensor in saved.items():
                weights[name].copy_(tensor)
            if checksums(model) != before:
                raise RuntimeError("moved_to: the weights did not come back as they were. Load the model again.")


def _write(model: nn.Module, weights: Mapping[str, Tensor], moves: Moves, saved: dict[str, Tensor]) -> None:
    """Write the moved weights, and put a pristine copy of each into ``saved``."""
    if any(isinstance(a, Tensor) for a, _ in moves):
        raise InputError("A coefficient per row needs a direction between LoRA adapters on one base model.")
    updates = lora_updates(model) if moves and has_adapter(model) else {}
    with torch.no_grad():
        for name, weight in weights.items() if moves else ():
            update = updates.get(name)
            effective = weight
            if update is not None:
                low = update.factors()
                low = LowRank(low.a.T, low.b.T, low.scale) if update.layer.fan_in_fan_out else low
                effective = weight + low.rows().to(torch.promote_types(weight.dtype, torch.float32))
            steps = [(a, step) for a, d in moves if (step := d.of(name, effective)) is not None]
            if steps:
                saved[name] = weight.clone()
                # In float32 this is the weight itself, which then moves in place.
                total = weight.to(torch.promote_types(weight.dtype, steps[0][1].dtype))
                for a, step in steps:
                    total.add_(step, alpha=a)  # type: ignore[arg-type]
                if total is not weight:
                    weight.copy_(total)


def _thin(layers: Mapping[str, nn.Module], direction: Direction, names: Sequence[str]) -> dict[str, LowRank] | None:
    """Return the factors of a direction, or None if there are none, or a layer other than a linear one moves."""
    factors = direction.thin(names) if isinstance(direction, Displacement) else None
    linear = all(isinstance(layers.get(name), nn.Linear | Conv1D) for name in factors or ())
    return factors if linear else None


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the module of each weight by the weight's plain name."""
    modules = ((name, m) for name, m in model.named_modules() if ".lora_" not in name)
    return {f"{plain_name(name)}.weight": m for name, m in modules if "weight" in m._parameters}


def _hook(layer: nn.Module, coefficient: float | Tensor, matrix: LowRank) -> Any:
    """Add ``coefficient * x W^T`` to the output of a layer, where W has low rank, and return the handle."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    # Conv1D stores its weight as [in, out] and computes x W.
    first, second = (matrix.b, matrix.a) if isinstance(layer, Conv1D) else (matrix.a.T, matrix.b.T)
    first, second = (t.to(weight.device, weight.dtype) for t in (first, second))
    if isinstance(coefficient, Tensor):
        coefficient = coefficient.to(weight.device, weight.dtype)[:, None, None]
    factor = coefficient * matrix.scale

    def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + factor * ((args[0] @ first) @ second)

    return layer.register_forward_hook(after)
