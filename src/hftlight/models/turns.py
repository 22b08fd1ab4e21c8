"""TakesTurns: a defense whose steps train either on the user's data or, by DPO, on the defender's pairs."""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from hftlight.engine import ChoosesStreams, Passes, Slot, Stage
from hftlight.engine.preference import dpo_loss
from hftlight.models.module import Forward
from hftlight.models.preference import answer_log_probs


class TakesTurns(ChoosesStreams):
    """Train each optimizer step on one objective: the user's loss on ``task``, or the DPO loss on ``pairs``.

    All micro-batches of a step come from the chosen stream. The other stream waits, so that no batch is lost. A
    subclass implements ``choose``.

    Args:
        lam: share or weight of the DPO loss, in [0, 1]; 0 is plain fine-tuning.
        beta: strength of the preferences, per nat, > 0.

    Raises:
        ValueError: if an argument is out of range, or the Trainer has no StreamsDataModule.
    """

    stage, slots = Stage.FINETUNING, (Slot.STREAM, Slot.LOSS)
    claims, pauses = ("token weights",), True

    def __init__(self, lam: float, beta: float) -> None:
        who = type(self).__name__
        if not 0 <= lam <= 1:
            hint = f" If that is a percentage, write {lam / 100:g}." if 1 < lam <= 100 else ""
            raise ValueError(f"{who}: lam is the part of the preferences and must lie in [0, 1], got {lam}.{hint}")
        if not 0 < beta < math.inf:
            raise ValueError(f"{who}: beta is a strength per nat and must be > 0, got {beta}.")
        self.streams = ("pairs",) if lam > 0 else ()
        super().__init__()
        self.lam, self.beta = lam, beta
        self._counts = {}
        # A step on pairs adds the pass of the rejected answers, and the aligned model's on both answers.
        self.passes = (Passes(2 * lam, lam, per="batch"), Passes(lam, per="batch", shared="reference")) if lam else ()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        datamodule: Any = getattr(trainer, "datamodule", None)
        if stage == "fit" and not hasattr(datamodule, "follow"):
            raise ValueError(
                f"{type(self).__name__}: the steps train on different streams, so give the Trainer a StreamsDataModule."
            )

    @override
    def token_weights(self, forward: Forward) -> Tensor | None:
        """Return zeros for pairs, whose loss is the term below, and None for the user's rows."""
        return torch.zeros_like(forward.token_losses) if "rejected" in forward.batch else None

    @override
    def loss_term(self, forward: Forward) -> Tensor | None:
        if "rejected" not in forward.batch:
            self.measured(forward.token_losses.detach().mean(), "task")
            return None
        assert self._trainer is not None
        module: Any = self._trainer.lightning_module
        rejected = forward.batch["rejected"]
        with module.reference().at_work() as aligned, torch.no_grad():
            fixed = answer_log_probs(module.run(aligned, rejected))
        own = answer_log_probs(module.run(module.model, rejected))
        preferred, reference = answer_log_probs(forward), answer_log_probs(forward.reference)
        loss = dpo_loss(preferred, own, reference, fixed, self.beta).mean()
        self.measured(loss.detach(), "pairs")
        self.record(preference_loss=loss.detach())
        self.show({f"{type(self).__name__.lower()}/preference_loss": loss})
        return loss

    def measured(self, loss: Tensor, stream: str) -> None:
        """Receive the loss of a micro-batch, 0-d in nats, and the stream that it trains on."""

    @override
    def manifest(self) -> dict[str, Any]:
        counts = dict(self._counts)
        if self._choice:
            counts[self._choice] = counts.get(self._choice, 0) + 1
        return {**super().manifest(), "steps_on": counts}
