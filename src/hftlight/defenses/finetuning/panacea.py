"""Panacea: fine-tune so that a shift of the weights, which raises the harmful loss, spares the user's task."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from hftlight.engine import Defense, Passes, Slot, Stage, Vector, add_to_grad, difference, gradient, shifted_gradient
from hftlight.engine.step.defense import Loader
from hftlight.engine.step.passes import Pass
from hftlight.engine.step.vectors import packed, placed, scaled, unit
from hftlight.engine.weights.shift import Shift, by_weight, weight_names


def panacea_term(harm: Vector, harm_shifted: Vector, lam: float) -> Vector:
    r"""Return :math:`-\lambda (g' - g)`, the term that Panacea adds to the update gradient.

    Args:
        harm: harmful-loss gradient g at w; parameter name -> tensor of that parameter's shape.
        harm_shifted: the same gradient g' at the shifted weights; same names and shapes.
        lam: weight of the term, dimensionless.
    """
    return scaled(difference(harm_shifted, harm), -lam)


class Panacea(Defense):
    r"""Deploy weights that are shifted toward a larger harmful loss, and train so that the task survives the shift.

    Let g be the user's loss and h the harmful loss, both mean nats per response token. At weights w the shift is
    :math:`e = \rho \nabla h(w) / \|\nabla h(w)\|_2`, with one norm over all trainable parameters together. The
    optimizer receives

    .. math:: \nabla g(w) - \lambda [\nabla h(w + e) - \nabla h(w)]

    After training, :math:`w + e` is deployed. A run saves w as the fine-tuned model, the direction of e beside it, and
    w + e as the repaired model. All three are measured or reusable. With ``lam=0`` the shift alone is at work.

    On your own Trainer, the model in memory stays w. ``repair_model(panacea.deployment("folder"), model)``
    writes w + e.

    Args:
        rho: length of the shift, L2 distance in weight space, >= 0; 0 shifts nothing.
        lam: weight lambda of the term, dimensionless, >= 0; 0 is plain fine-tuning, then a shift.
        deployed: length of the deployed shift, >= 0; None means ``rho``. It changes no training.
        refresh: number of harmful batches whose mean gradient at the final weights gives the deployed shift, >= 0. 0
            takes the shift of the last step, which belongs to the weights before the last update.
        bound: largest harmful loss that is reported, in nats per token, > 0.
        bound_gradient: whether a harmful loss above ``bound`` has no gradient, as in the official code.
        streams: loader of the stream ``"harmful"`` (harmful prompts with harmful answers, the defender's own). It is
            needed only if the data module does not offer that stream.

    Raises:
        ValueError: if an argument is out of range.
        TypeError: if parameters beside a LoRA adapter are trained.

    Cost: two more forward-backward passes per optimizer step; with ``lam=0`` one, or none with ``refresh``. Four
        buffers have the size of the trainable weights. Without ``refresh`` a checkpoint holds one of them.
    Source: Wang et al., "Panacea", NeurIPS 2025, arXiv:2501.18100. The official code cannot run as published, since a
        helper is undefined.
    Differs: harmful batches, one per optimizer step, also under gradient accumulation. Weights are restored from a
        copy, and both harmful passes use the same dropout masks. The norm has no epsilon. The official code clamps the
        harmful loss at 5, which removes the gradient above it, so that the term turns into descent on h. Here the clamp
        bounds the report only; ``presets["repo"]`` keeps it. ``refresh`` is an addition.
    """

    stage, slots, streams = Stage.FINETUNING, (Slot.GRADIENT,), ("harmful",)
    claims = ("shift of the deployed weights",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"rho": 1.0, "lam": 0.001},
        "repo": {"rho": 1.0, "lam": 0.001, "bound": 5.0, "bound_gradient": True},
    }

    def __init__(
        self,
        rho: float = 1.0,
        lam: float = 0.001,
        deployed: float | None = None,
        refresh: int = 0,
        bound: float = 5.0,
        bound_gradient: bool = False,
        streams: Mapping[str, Loader] | None = None,
    ) -> None:
        for name, value in (("rho", rho), ("lam", lam), ("deployed", 0.0 if deployed is None else deployed)):
            if not 0 <= value < math.inf:
                raise ValueError(f"Panacea: {name} must be >= 0 (0 turns it off), got {value}.")
        if not (refresh >= 0 and float(refresh).is_integer()):
            raise ValueError(f"Panacea: refresh counts batches and must be a whole number >= 0, got {refresh}.")
        if not bound > 0:
            raise ValueError(f"Panacea: bound must be > 0 nats per token, got {bound}.")
        super().__init__(streams)
        self.rho, self.lam, self.deployed, self.refresh = rho, lam, deployed, refresh
        self.bound, self.bound_gradient = bound, bound_gradient
        self._second = lam > 0 and rho > 0
        self._first = self._second or (self.length > 0 and refresh == 0)
        self.passes = (Passes(2, 2),) if self._second else (Passes(1, 1),) if self._first else ()
        self._harm: Vector = {}
        self._loaded: dict[str, Tensor] | None = None

    @property
    def length(self) -> float:
        """Length of the deployed shift."""
        return self.rho if self.deployed is None else self.deployed

    @property
    @override
    def state_key(self) -> str:
        return self.key_of({k: v for k, v in self.arguments().items() if k != "deployed"})

    @override
    def deployment(self, output: str | None = None) -> Shift:
        shift = Shift(self.length, output)
        shift.direction = self.kept or {}
        return shift

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "harm": packed(self._harm)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._loaded = state_dict["harm"]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._loaded, self._harm, self.kept = None, {}, None
            try:
                weight_names(pl_module)
            except TypeError as error:
                raise TypeError(f"Panacea: {error}") from error

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loaded, self._loaded = self._loaded, None
        self._harm = placed(loaded, pl_module) if loaded else {}

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self._first:
            return
        batch = self.draw("harmful")
        if self._second:
            here, there = shifted_gradient(pl_module, batch, self.rho)
            there = self._bounded(self._bounded(there, there), here)
            here = self._bounded(here, here)
            add_to_grad(pl_module, panacea_term(here.grad, there.grad, self.lam))
            self.show({"panacea/shifted_loss": there.loss.clamp(max=self.bound)})
        else:
            here = gradient(pl_module, batch)
            here = self._bounded(here, here)
        if self.refresh == 0:
            self._harm = here.grad
        self.record(harmful_grad_norm=here.norm)
        self.show({"panacea/harmful_loss": here.loss.clamp(max=self.bound)})

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # The checkpoint of the last step is written after this. A run that is killed after it trains no further.
        if trainer.global_step == trainer.estimated_stepping_batches:
            self._settle(pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.kept:  # a callback ended the training early
            self._settle(pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.kept and self._loaded:  # resumed at its end, so that no training started
            self.kept = by_weight(unit(self._loaded), pl_module)

    def _settle(self, pl_module: LightningModule) -> None:
        """Set ``kept`` to the direction of the shift."""
        if self.refresh and self.length > 0:
            for number in range(self.refresh):
                here = gradient(pl_module, self.draw("harmful"))
                grad = self._bounded(here, here).grad
                if number:
                    torch._foreach_add_(list(self._harm.values()), [grad[name] for name in self._harm])
                else:
                    self._harm = grad
        self.kept = by_weight(unit(self._harm), pl_module) if self._harm else None

    def _bounded(self, harm: Pass, measured: Pass) -> Pass:
        """Return a harmful pass, with a zero gradient if ``bound_gradient`` is set and a measured loss is too large."""
        if not self.bound_gradient:
            return harm
        return Pass(harm.loss, scaled(harm.grad, (measured.loss <= self.bound).to(harm.loss.dtype)))
