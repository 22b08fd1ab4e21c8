"""An extra forward-backward pass in the precision of the training step.

The pass restores the weights' ``.grad`` and the random state.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.tensor import DTensor

from hftlight.engine.step.order import rank_and_world
from hftlight.engine.step.vectors import Vector, norm, trainable


@dataclass(frozen=True)
class Pass:
    """Loss and gradient of one extra pass.

    Attributes:
        loss: mean loss in nats over the batch's response tokens; 0-d, detached; mean over ranks.
        grad: gradient of the loss by parameter name; zeros for a parameter that the loss does not depend on.
    """

    loss: Tensor
    grad: Vector

    @cached_property
    def norm(self) -> Tensor:
        """L2 norm of the gradient over all trainable parameters together, 0-d."""
        return norm(self.grad)


@dataclass(frozen=True)
class Passes:
    """Work of a defense beside the stage's own forward and backward pass.

    Attributes:
        forward: number of forward passes; a fraction if a pass is not run every time.
        backward: number of backward passes, likewise.
        per: ``"step"`` for once per optimizer step, ``"batch"`` for once per micro-batch.
        shared: name of work that several defenses need and that runs once for all of them.
        projected: whether each forward pass also projects the hidden states of all layers onto the vocabulary.
    """

    forward: float
    backward: float = 0.0
    per: Literal["step", "batch"] = "step"
    shared: str = ""
    projected: bool = False


class HasPasses(Protocol):
    """A defense, as far as ``count_passes`` reads it."""

    @property
    def passes(self) -> tuple[Passes, ...]:
        """Work beside the stage's own passes."""


def count_passes(defenses: Iterable[HasPasses], accumulate: int = 1) -> tuple[float, float]:
    """Return the forward and the backward passes of one optimizer step, the stage's own included.

    Args:
        defenses: the stage's defenses; work that they share counts once.
        accumulate: micro-batches per optimizer step.
    """
    work = [p for d in defenses for p in d.passes]
    # Shared work counts once, at its largest cost: the sort puts the largest last, and it overwrites the others.
    once = {p.shared: p for p in sorted(work, key=lambda p: p.forward) if p.shared}
    forward = backward = float(accumulate)
    for p in [p for p in work if not p.shared] + list(once.values()):
        times = accumulate if p.per == "batch" else 1
        forward, backward = forward + times * p.forward, backward + times * p.backward
    return forward, backward


def gradient(module: LightningModule, batch: Any, loss: Callable[[Any], Tensor] | None = None) -> Pass:
    """Return loss and gradient of ``module.loss(batch)``, or of another loss, at the current weights.

    The pass runs under the precision of the training step, on the module itself and not on a strategy's wrapper.
    ``.grad`` and the random state of the CPU and of the module's device are restored, also after an exception. Two
    passes in a row therefore draw the same dropout masks. Gradients are averaged over ranks; sharded parameters give
    sharded gradients. Under a loss scaler the pass is scaled too, and the gradient is returned unscaled. An overflow
    makes the scaler skip the coming optimizer step.

    Args:
        module: a LightningModule with ``loss(batch)``, attached to a Trainer.
        batch: argument of that method, on the module's device.
        loss: function of the batch that returns another loss, 0-d. None means ``module.loss``.

    Raises:
        RuntimeError: if the loss does not depend on any trainable parameter.
    """
    objective: Callable[[Any], Tensor] = module.loss if loss is None else loss  # type: ignore[assignment]
    parameters = trainable(module)
    plugin = module.trainer.precision_plugin
    scaler = getattr(plugin, "scaler", None)
    with _set_aside(parameters), same_random_state(module.device):
        with torch.enable_grad(), plugin.forward_context():
            value = objective(batch)
        if not value.requires_grad:
            raise RuntimeError(f"{type(module).__name__}.loss(batch) does not depend on any trainable parameter.")
        (scaler.scale(value) if scaler is not None else value).backward()
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad.detach() for name, p in parameters.items()}
    value = value.detach()
    if rank_and_world()[1] > 1:
        value = _mean_over_ranks([value.clone()])[0]
        # The backward pass has averaged sharded gradients (DTensor) already; only plain tensors are averaged here.
        plain = {name: g for name, g in grads.items() if not isinstance(g, DTensor)}
        grads |= zip(plain, _mean_over_ranks(list(plain.values())), strict=True)
    if scaler is not None:
        _unscale(module, scaler, grads)
    return Pass(value, grads)


def add_to_grad(module: nn.Module, term: Vector) -> None:
    """Add ``term`` to ``.grad`` of the parameters that it names.

    A missing ``.grad`` counts as zero.
    """
    parameters = trainable(module)
    with torch.no_grad():
        present = {name: g for name in term if (g := parameters[name].grad) is not None}
        if present:
            torch._foreach_add_(list(present.values()), [term[name] for name in present])
        for name in term.keys() - present.keys():
            parameters[name].grad = term[name].to(parameters[name].dtype)


@contextmanager
def _set_aside(parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Run the block without any ``.grad``, then restore the previous ``.grad`` tensors."""
    before = [p.grad for p in parameters.values()]
    try:
        for p in parameters.values():
            p.grad = None
        yield
    finally:
        for p, grad in zip(parameters.values(), before, strict=True):
            p.grad = grad


@contextmanager
def same_random_state(device: torch.device) -> Iterator[None]:
    """Run the block, then restore the random state of the CPU and of ``device``."""
    if device.type in ("cpu", "meta"):
        with torch.random.fork_rng(devices=[]):
            yield
    else:
        with torch.random.fork_rng(devices=[device], device_type=device.type):
            yield


def _unscale(module: LightningModule, scaler: Any, grads: Vector) -> None:
    """Divide the gradients by the loss scale in place.

    If an entry is not finite on any rank, the scaler skips the coming optimizer step.
    """
    overflow = torch.zeros((), device=module.device)
    inverse = 1.0 / torch.as_tensor(scaler.get_scale(), device=module.device)
    torch._amp_foreach_non_finite_check_and_unscale_(list(grads.values()), overflow, inverse)
    if rank_and_world()[1] > 1:
        dist.all_reduce(overflow, dist.ReduceOp.MAX)
    # The scaler skips an optimizer's step if one of the optimizer's flags is set.
    for optimizer in module.trainer.strategy.optimizers:
        for flag in scaler._found_inf_per_device(optimizer).values():
            flag.copy_(torch.maximum(flag, overflow.to(flag.device)))


def _mean_over_ranks(tensors: list[Tensor]) -> list[Tensor]:
    """Return the mean over ranks of each tensor, with one collective per data type."""
    result: dict[int, Tensor] = {}
    for dtype in {t.dtype for t in tensors}:
        group = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        flat = _flatten_dense_tensors([tensors[i] for i in group])
        dist.all_reduce(flat)
        flat /= rank_and_world()[1]
        parts = _unflatten_dense_tensors(flat, [tensors[i] for i in group])
        result.update(zip(group, parts, strict=True))
    return [result[i] for i in range(len(tensors))]
