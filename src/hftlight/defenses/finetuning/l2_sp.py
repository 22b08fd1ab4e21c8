"""L2SP: a pull back to the aligned weights."""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from hftlight.engine import (
    Defense,
    Slot,
    Stage,
    Vector,
    add_to_grad,
    difference,
    extend,
    norm,
    packed,
    placed,
    snapshot,
    trainable,
)


def l2_sp_term(weights: Vector, start: Vector, lam: float) -> Vector:
    r"""Return :math:`2 \lambda (w - w_0)`, the gradient of :math:`\lambda \|w - w_0\|_2^2`.

    Args:
        weights: w; parameter name -> tensor of that parameter's shape.
        start: the aligned weights w_0; same names and shapes.
        lam: penalty weight, nats per squared L2 distance.
    """
    term = difference(weights, start)
    torch._foreach_mul_(list(term.values()), 2 * lam)
    return term


class L2SP(Defense):
    r"""Penalize the squared distance to the aligned weights (L2 to the starting point).

    Let f be the user's loss (mean nats per response token) and :math:`w_0` the trainable weights at the start of
    fine-tuning. The optimizer receives the gradient

    .. math:: \nabla f(w) + 2 \lambda (w - w_0)

    Args:
        lam: penalty weight lambda, nats per squared L2 distance, >= 0; 0 is plain fine-tuning.

    Raises:
        ValueError: if ``lam`` is negative or not finite.

    Cost: no extra pass. Memory holds one copy of the trainable weights, and briefly a second one in each step.
    Source: Li et al., "Explicit Inductive Bias for Transfer Learning", ICML 2018, arXiv:1802.01483; as a baseline in
    the official LDIFS code, whose weight of 0.5 is the default here. The Lisa paper describes its EWC baseline in this
    form; the code of that baseline weighs by Fisher, see ``EWC``.
    Differs: the pull is added to the gradient once per optimizer step, before clipping, instead of to every loss. The
    result is the same, since weights do not move in between. The first source halves lambda. There is no L2 term for a
    new head, since there is no new head. Under LoRA the factors are pulled to their start values. In a new adapter, A
    is pulled to its random start and B to 0.
    """

    stage, slots = Stage.FINETUNING, (Slot.GRADIENT,)
    claims: tuple[str, ...] = ("anchor that weights are pulled to",)

    def __init__(self, lam: float = 0.5) -> None:
        if not 0 <= lam < math.inf:
            raise ValueError(f"L2SP: lam must be >= 0 nats per squared distance (0 turns it off), got {lam}.")
        super().__init__()
        self.lam = lam
        if lam == 0:
            self.claims = ()
        self._loaded: dict[str, Tensor] | None = None
        self._start: Vector = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "start": packed(self._start)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._loaded = state_dict["start"] or None  # empty in a checkpoint from before the first step

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._loaded, self._start = None, {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loaded, self._loaded = self._loaded, None
        # A resumed run keeps the start weights of the first run, not its current ones.
        if self.lam > 0:
            self._start = snapshot(pl_module) if loaded is None else placed(loaded, pl_module)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.lam == 0:
            return
        extend(self._start, pl_module)
        weights = {name: p.detach() for name, p in trainable(pl_module).items()}
        term = l2_sp_term(weights, self._start, self.lam)
        add_to_grad(pl_module, term)
        length = norm(term)
        self.record(pull_norm=length)
        pl_module.log("l2_sp/pull_norm", length)
