"""An extra forward-backward pass: the step's precision, its weights' ``.grad`` and the random state left as found."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    """What one extra pass found.

    Attributes:
        loss: mean loss in nats over the batch's response tokens; 0-d, detached; mean over ranks.
        grad: its gradient by parameter name; zeros where the loss does not depend on a parameter.
    """

    loss: Tensor
    grad: Vector

    @property
    def norm(self) -> Tensor:
        """L2 norm of the gradient over all trainable parameters together; 0-d."""
        return norm(self.grad)


@dataclass(frozen=True)
class Passes:
    """Work of a defense beside the stage's own forward and backward pass.

    Attributes:
        forward: forward passes; a fraction where they are not made every time.
        backward: backward passes, likewise.
        per: ``"step"`` for once per optimizer step, ``"batch"`` for once per micro-batch.
        shared: name of work that several defenses need and that is done once for all of them.
    """

    forward: float
    backward: float = 0.0
    per: Literal["step", "batch"] = "step"
    shared: str = ""


class HasPasses(Protocol):
    """What counting reads of a defense."""

    @property
    def passes(self) -> tuple[Passes, ...]:
        """Work beside the stage's own passes."""


def count_passes(defenses: Iterable[HasPasses], accumulate: int = 1) -> tuple[float, float]:
    """Return the forward and the backward passes of one optimizer step, the stage's own included.

    Args:
        defenses: the stage's defenses; work they share counts once.
        accumulate: micro-batches per optimizer step.
    """
    work = [p for d in defenses for p in d.passes]
    once = {p.shared: p for p in sorted(work, key=lambda p: p.forward) if p.shared}
    forward = backward = float(accumulate)
    for p in [p for p in work if not p.shared] + list(once.values()):
        times = accumulate if p.per == "batch" else 1
        forward, backward = forward + times * p.forward, backward + times * p.backward
    return forward, backward


def gradient(module: LightningModule, batch: Any) -> Pass:
    """Return loss and gradient of ``module.loss(batch)`` at the current weights.

    The pass runs under the precision of the training step, through the bare module. ``.grad`` and the random state of
    the CPU and of the module's device are put aside and come back, also after an exception; two passes in a row
    therefore draw the same dropout masks. Gradients are averaged over ranks; sharded parameters give sharded gradients.
    Under a loss scaler the pass is scaled likewise, and an overflow makes the scaler skip the coming optimizer step.

    Args:
        module: a LightningModule with ``loss(batch)``, attached to a Trainer.
        batch: whatever that method takes, on the module's device.

    Raises:
        RuntimeError: if the loss does not depend on any trainable parameter.
    """
    parameters = trainable(module)
    plugin = module.trainer.precision_plugin
    scaler = getattr(plugin, "scaler", None)
    with _set_aside(parameters), same_random_state(module.device):
        with torch.enable_grad(), plugin.forward_context():
            loss = module.loss(batch)  # type: ignore[operator]
        if not loss.requires_grad:
            raise RuntimeError(f"{type(module).__name__}.loss(batch) does not depend on any trainable parameter.")
        (scaler.scale(loss) if scaler is not None else loss).backward()
        found = {name: torch.zeros_like(p) if p.grad is None else p.grad.detach() for name, p in parameters.items()}
    loss = loss.detach()
    if rank_and_world()[1] > 1:
        loss = _mean_over_ranks([loss.clone()])[0]
        plain = {name: g for name, g in found.items() if not isinstance(g, DTensor)}
        found |= zip(plain, _mean_over_ranks(list(plain.values())), strict=True)
    if scaler is not None:
        _unscale(module, scaler, found)
    return Pass(loss, found)


def add_to_grad(module: nn.Module, term: Vector) -> None:
    """Add ``term`` to ``.grad`` of the parameters it names; a missing ``.grad`` counts as zero."""
    parameters = trainable(module)
    with torch.no_grad():
        present = {name: g for name in term if (g := parameters[name].grad) is not None}
        if present:
            torch._foreach_add_(list(present.values()), [term[name] for name in present])
        for name in term.keys() - present.keys():
            parameters[name].grad = term[name].to(parameters[name].dtype)


@contextmanager
def _set_aside(parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Run the block with no ``.grad``; afterwards the tensors that were there are there again."""
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
    """Run the block and put the random state of the CPU and of ``device`` back."""
    if device.type in ("cpu", "meta"):
        with torch.random.fork_rng(devices=[]):
            yield
    else:
        with torch.random.fork_rng(devices=[device], device_type=device.type):
            yield


def _unscale(module: LightningModule, scaler: Any, found: Vector) -> None:
    """Divide by the loss scale in place, and let the scaler skip the coming step where an entry is not finite."""
    overflow = torch.zeros((), device=module.device)
    inverse = 1.0 / torch.as_tensor(scaler.get_scale(), device=module.device)
    torch._amp_foreach_non_finite_check_and_unscale_(list(found.values()), overflow, inverse)
    if rank_and_world()[1] > 1:
        dist.all_reduce(overflow, dist.ReduceOp.MAX)
    for optimizer in module.trainer.strategy.optimizers:
        for flag in scaler._found_inf_per_device(optimizer).values():
            flag.copy_(torch.maximum(flag, overflow.to(flag.device)))


def _mean_over_ranks(tensors: list[Tensor]) -> list[Tensor]:
    """Return the mean over ranks of each tensor, one collective per data type."""
    result: dict[int, Tensor] = {}
    for dtype in {t.dtype for t in tensors}:
        group = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        flat = _flatten_dense_tensors([tensors[i] for i in group])
        dist.all_reduce(flat)
        flat /= rank_and_world()[1]
        parts = _unflatten_dense_tensors(flat, [tensors[i] for i in group])
        result.update(zip(group, parts, strict=True))
    return [result[i] for i in range(len(tensors))]
