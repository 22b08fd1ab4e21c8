"""Weights that move inside a ``with`` block and are restored bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from hftlight.engine.step.passes import Pass, gradient
from hftlight.engine.step.vectors import Vector, local, trainable, unit


@contextmanager
def moved(module: nn.Module, direction: Vector, distance: float) -> Iterator[None]:
    """Run the block at the weights ``w + distance * direction``, then restore ``w``.

    The weights are restored from a copy, also after an exception: adding and later subtracting would leave part of them
    changed. The direction is released once it is applied. A caller without another reference to the direction therefore
    pays for one buffer, the copy.

    Args:
        module: module whose trainable parameters move.
        direction: parameter name -> tensor of that parameter's shape; parameters without an entry do not move.
        distance: factor of the direction; equals the L2 length of the move if the direction is a unit vector.

    Raises:
        KeyError: if the direction names a parameter that is not trainable.
        TypeError: if a parameter is stored in 16 bits, because rounding would lose most of a small move.
    """
    parameters = trainable(module)
    moving = {name: parameters[name] for name in direction}
    for name, parameter in moving.items():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise TypeError(
                f"moved: trainable weights must be float32 or float64, got {parameter.dtype} in {name!r}: a small move"
                " rounds away there. Keep the trained weights in float32 (precision 'bf16-mixed' or a LoRA adapter)."
            )
    targets = [local(parameter.detach()) for parameter in moving.values()]
    saved = [target.clone() for target in targets]
    try:
        with torch.no_grad():
            torch._foreach_add_(targets, [local(d) for d in direction.values()], alpha=distance)
        del direction  # frees its memory during the block, unless the caller holds a reference
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(targets, saved)


def shifted_gradient(module: LightningModule, shift_batch: Any, length: float, batch: Any = None) -> tuple[Pass, Pass]:
    r"""Return the gradient g of a batch at w, and a gradient at :math:`w + \rho\, g / \|g\|_2`.

    A negative length lowers the loss of ``shift_batch``, as one attack step does. A positive length raises it.

    Args:
        module: a LightningModule with ``loss(batch)``, attached to a Trainer.
        shift_batch: the batch whose gradient gives the direction.
        length: :math:`\rho`, L2 length of the shift over all trainable weights; negative against the gradient.
        batch: the batch of the second gradient; None means ``shift_batch``.

    Returns:
        Loss and gradient of ``shift_batch`` at w, and loss and gradient of ``batch`` at the shifted weights.
    """
    here = gradient(module, shift_batch)
    with moved(module, unit(here.grad, here.norm), length):
        return here, gradient(module, shift_batch if batch is None else batch)
