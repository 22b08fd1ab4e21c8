"""Booster: align so that one simulated attack step gains little."""

from collections.abc import Mapping

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from hftlight.engine import Defense, Passes, Slot, Stage, Vector, add_to_grad, difference, shifted_gradient
from hftlight.engine.step.defense import Loader


def booster_term(harm: Vector, harm_stepped: Vector, lam: float) -> Vector:
    r"""Return :math:`\lambda (g - g')`, the term that Booster adds to the update gradient.

    Args:
        harm: harmful-loss gradient g at w; parameter name -> tensor of that parameter's shape.
        harm_stepped: the same gradient g' one simulated step away; same names and shapes.
        lam: regularizer weight, dimensionless.
    """
    term = difference(harm, harm_stepped)
    torch._foreach_mul_(list(term.values()), lam)
    return term


class Booster(Defense):
    r"""Penalize how far one simulated attack step would lower the harmful loss.

    Let f be the alignment loss and h the harmful loss, both mean nats per response token. At weights w the optimizer
    receives the gradient

    .. math:: \nabla f(w) + \lambda [\nabla h(w) - \nabla h(w - \alpha \nabla h(w) / \|\nabla h(w)\|_2)]

    The norm is one norm over all trainable parameters together. The simulated step is treated as a constant. The
    expression is therefore the gradient of :math:`f(w) + \lambda [h(w) - h(w - \alpha u)]` for a fixed direction u,
    without second derivatives.

    Args:
        lam: regularizer weight lambda, dimensionless, >= 0; 0 is plain alignment.
        alpha: length of the simulated step, L2 distance in weight space, > 0.
        streams: loader of the stream ``"harmful"`` (harmful prompts with harmful answers, the defender's own). It is
            needed only if the data module does not offer that stream.

    Raises:
        ValueError: if ``lam`` is negative or ``alpha`` is not positive.

    Cost: two more forward-backward passes per optimizer step. Three buffers have the size of the trainable weights. Two
    is the minimum; the third is the copy from which the weights are restored exactly.
    Source: Huang et al., "Booster", ICLR 2025, arXiv:2409.01586, the update rule.
    Differs: each optimizer step draws one harmful batch, also under gradient accumulation. The official code draws one
    per micro-batch and does not support accumulation. The weights are restored from a copy, not by adding the step
    back. Both harmful passes use the same dropout masks. The norm has no epsilon, and a zero vector has zero as its
    unit vector.
    """

    stage, slots, streams = Stage.ALIGNMENT, (Slot.GRADIENT,), ("harmful",)
    passes, claims = (Passes(2, 2),), ("simulated attack",)

    def __init__(self, lam: float = 5.0, alpha: float = 0.1, streams: Mapping[str, Loader] | None = None) -> None:
        if not lam >= 0:
            raise ValueError(f"Booster: lam must be >= 0 (0 turns it off), got {lam}.")
        if not alpha > 0:
            raise ValueError(f"Booster: alpha is a step length and must be > 0, got {alpha}.")
        super().__init__(streams)
        self.lam, self.alpha = lam, alpha

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.lam == 0:
            return
        batch = self.draw("harmful")
        here, stepped = shifted_gradient(pl_module, batch, -self.alpha)
        length = here.norm
        add_to_grad(pl_module, booster_term(here.grad, stepped.grad, self.lam))
        self.record(harmful_grad_norm=length, zero_gradients=(length == 0).float())
        pl_module.log_dict({"booster/harmful_loss": here.loss, "booster/stepped_loss": stepped.loss})
