"""Simulated trainings inside a step: an optimizer of their own, and weights that come back bit for bit."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.adamw import adamw

from hftlight.engine.step.vectors import Vector, local, trainable


@contextmanager
def simulated(module: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Yield the trainable parameters by name, and restore weights, buffers and dropout when the block ends.

    The block may change the parameters in place. Dropout is off inside the block, in every submodule, while gradient
    checkpointing stays on. Everything is restored from copies, also after an exception. Sharded parameters are copied
    and restored shard by shard.

    Args:
        module: the module whose training is simulated.

    Raises:
        TypeError: if a trainable parameter is stored in 16 bits, because rounding would lose most of a small step.
    """
    parameters = trainable(module)
    for name, parameter in parameters.items():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise TypeError(
                f"simulated: trainable weights must be float32 or float64, got {parameter.dtype} in {name!r}: a small"
                " step rounds away there. Keep the trained weights in float32 (precision 'bf16-mixed' or a LoRA"
                " adapter)."
            )
    changing = [local(t.detach()) for t in (*parameters.values(), *module.buffers())]
    saved = [t.clone() for t in changing]
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        for part, mode in modes:
            if getattr(part, "gradient_checkpointing", False):
                part.training = mode  # of this module alone; a layer checkpoints itself only in training mode
        yield parameters
    finally:
        with torch.no_grad():
            for now, before in zip(changing, saved, strict=True):
                now.copy_(before)
        for part, mode in modes:
            part.training = mode


class InnerAdamW:
    """AdamW with moments of its own, which updates parameters in place and is thrown away with them.

    Args:
        parameters: the parameters by name; of sharded ones, this rank's shards are updated.
        lr: learning rate, >= 0.
        betas: decay rates of the moments, each in [0, 1).
        eps: added to the root of the second moment, > 0.
        weight_decay: decoupled decay, >= 0.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        lr: float,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        self.lr, self.betas, self.eps, self.weight_decay = lr, (betas[0], betas[1]), eps, weight_decay
        self._targets = {name: local(p.detach()) for name, p in parameters.items()}
        self._first = [torch.zeros_like(t) for t in self._targets.values()]
        self._second = [torch.zeros_like(t) for t in self._targets.values()]
        self._steps = [torch.zeros(()) for _ in self._targets]

    @torch.no_grad()
    def step(self, gradient: Vector) -> None:
        """Take one step along a gradient with the same names."""
        adamw(
            list(self._targets.values()),
            [local(gradient[name]) for name in self._targets],
            self._first,
            self._second,
            [],
            self._steps,
            foreach=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=self.lr,
            weight_decay=self.weight_decay,
            eps=self.eps,
            maximize=False,
        )


class InnerSGD:
    """Plain gradient descent, which updates parameters in place.

    Args:
        parameters: the parameters by name; of sharded ones, this rank's shards are updated.
        lr: learning rate, >= 0.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], lr: float) -> None:
        self.lr = lr
        self._targets = {name: local(p.detach()) for name, p in parameters.items()}

    @torch.no_grad()
    def step(self, gradient: Vector) -> None:
        """Take one step along a gradient with the same names."""
        steps = [local(gradient[name]) for name in self._targets]
        torch._foreach_add_(list(self._targets.values()), steps, alpha=-self.lr)


def draws(seed: int, step: int, name: str) -> random.Random:
    """Return random numbers that depend on the run's seed, the optimizer step and a name alone.

    All ranks get the same numbers, and a resumed step repeats them.
    """
    return random.Random(f"{name} {seed} {step}")
