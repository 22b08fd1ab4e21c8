"""SafeGrad: remove from the user's gradient what conflicts with staying close to the aligned model."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from hftlight.engine import Defense, Passes, Slot, Stage, Vector, add_to_grad, gradient, trainable
from hftlight.engine.divergence import divergence
from hftlight.engine.step.defense import Loader
from hftlight.engine.step.vectors import dot, norm, scaled


def surgery(task: Vector, alignment: Vector, rho: float, project: bool = True) -> tuple[Vector, Tensor]:
    r"""Return what SafeGrad adds to the task gradient, and the length of the part that it removes.

    With the task gradient u and the alignment gradient a, the result is

    .. math:: \Big(\frac{\max(0, -\langle u, a \rangle)}{\|a\|_2^2} + \rho\Big) a

    The inner product and the norm run over all parameters together. If both gradients conflict, u plus the first term
    is orthogonal to a. If a is zero, the result is zero.

    Args:
        task: u; parameter name -> tensor of that parameter's shape. A parameter without a task gradient may be missing.
        alignment: a; names and shapes of all trainable parameters.
        rho: weight of the alignment gradient, dimensionless.
        project: whether to remove the conflicting part.
    """
    length = norm(alignment)
    conflict = torch.zeros_like(length)
    if project and task:
        along = -dot(task, {name: alignment[name] for name in task}).to(length.dtype) / length
        conflict = torch.where(length > 0, along.clamp_min(0), conflict)
    factor = torch.where(length > 0, conflict / length, torch.zeros_like(length)) + rho
    return scaled(alignment, factor), conflict


class SafeGrad(Defense):
    r"""Project the user's gradient away from conflict with an alignment gradient, and add the latter.

    Let :math:`p_t` be the model's next-token distribution at the T response tokens of an alignment batch, and
    :math:`q_t` that of the aligned model. The alignment gradient is
    :math:`a = \nabla \frac1T \sum_t \mathrm{KL}(q_t \| p_t)`. With the gradient u of the user's loss, which includes
    the terms of other defenses on that loss, the optimizer receives

    .. math:: u + \Big(\frac{\max(0, -\langle u, a \rangle)}{\|a\|_2^2} + \rho\Big) a

    Only the predictions of the aligned model are needed as targets. The answers of the alignment rows merely say at
    which tokens they are compared.

    Args:
        rho: weight of the alignment gradient, dimensionless, >= 0; 0 only projects.
        temperature: divides both models' logits, dimensionless, > 0.
        project: whether the conflicting part of u is removed. Without it, the KL term alone remains.
        streams: loader of the stream ``"alignment"`` (harmful prompts with safe answers). It is needed only if the data
            module does not offer that stream.

    Raises:
        ValueError: if ``rho`` is negative or ``temperature`` is not positive.
        TypeError: if the module offers no aligned model.

    Cost: one more forward-backward pass per optimizer step, and one forward pass of the aligned model. Two buffers have
        the size of the trainable weights, and two that of the logits at response tokens. Under LoRA there is no second
        model.
    Source: Yi et al., "Gradient Surgery for Safe LLM Fine-Tuning", arXiv:2508.07172, with rho 1 and temperature 1. The
        official repository describes the algorithm, and its code could not be compared by execution.
    Differs: the projection covers all trainable parameters together, not each tensor. It acts once per optimizer step,
        on the mean over micro-batches and ranks, before other defenses change the gradient and before clipping. The
        update of AdamW may therefore still conflict, since it scales each entry. The alignment gradient is zero at the
        aligned model, so that the first step is plain fine-tuning unless there is dropout. The aligned model runs
        without dropout.
    """

    stage, slots = Stage.FINETUNING, (Slot.GRADIENT,)
    streams: tuple[str, ...] = ("alignment",)
    claims, acts_first = ("surgery of the user's gradient",), True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {"rho": 1.0, "temperature": 1.0}}

    def __init__(
        self,
        rho: float = 1.0,
        temperature: float = 1.0,
        project: bool = True,
        streams: Mapping[str, Loader] | None = None,
    ) -> None:
        if not 0 <= rho < math.inf:
            raise ValueError(f"SafeGrad: rho must be >= 0 (0 only projects), got {rho}.")
        if not 0 < temperature < math.inf:
            raise ValueError(f"SafeGrad: temperature must be > 0, got {temperature}.")
        self.rho, self.temperature, self.project = rho, temperature, project
        self.compares = project or rho > 0
        if not self.compares:
            self.streams = ()
        super().__init__(streams)
        self.passes = (Passes(2, 1),) if self.compares else ()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self.compares:
            return
        module: Any = pl_module

        def kl(batch: Any) -> Tensor:
            with module.reference().at_work() as aligned:
                fixed = module.run(aligned, batch).logits
            own = module.run(module.model, batch).logits
            return divergence(own / self.temperature, fixed / self.temperature) / len(own)

        here = gradient(pl_module, self.draw("alignment"), kl)
        task = {name: p.grad for name, p in trainable(pl_module).items() if p.grad is not None}
        term, removed = surgery(task, here.grad, self.rho, self.project)
        add_to_grad(pl_module, term)
        conflicts = (removed > 0).float()
        self.record(divergence=here.loss, conflicts=conflicts, removed=removed, alignment_grad_norm=here.norm)
        self.show({"safe_grad/divergence": here.loss, "safe_grad/conflict": conflicts, "safe_grad/removed": removed})
