"""MAXRIGHT: each step trains on whichever of the user's data and preferences is further from its best loss."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from hftlight.engine import Passes
from hftlight.models.preference import preference_loss
from hftlight.models.row_reader import as_found
from hftlight.models.turns import TakesTurns


def weighted_gaps(losses: Mapping[str, float], floors: Mapping[str, float], lam: float) -> dict[str, float]:
    r"""Return :math:`(1 - \lambda)(f - f^*)` for ``"task"`` and :math:`\lambda (g - g^*)` for ``"pairs"``.

    Args:
        losses: f and g in nats, by stream.
        floors: the best losses f* and g*, likewise.
        lam: lambda, in [0, 1].
    """
    weights = {"task": 1 - lam, "pairs": lam}
    return {name: weights[name] * (losses[name] - floors[name]) for name in weights}


class MAXRIGHT(TakesTurns):
    r"""Take each optimizer step on the objective with the larger weighted gap to its best loss.

    With the user's loss f, the DPO loss g of the defender's pairs as in ALRIGHT, and their best values, the step has
    the whole gradient of

    .. math:: \arg\max \{ (1 - \lambda)(f - f^*),\; \lambda (g - g^*) \}

    A tie goes to the user's loss. The losses are those last measured: a step renews the loss that it trains on, and
    every ``refresh`` steps both are measured anew, without a gradient.

    Args:
        lam: weight lambda of the preferences, in [0, 1]; 0 is plain fine-tuning.
        beta: strength of the preferences, per nat, > 0.
        task_floor: best loss f* of the user's data, in nats per response token, >= 0.
        pairs_floor: best loss g* of the preferences, in nats, >= 0.
        refresh: optimizer steps after which both losses are measured anew, >= 1.

    Raises:
        ValueError: if an argument is out of range, or the Trainer has no StreamsDataModule.

    Cost: a step on preferences has two forward-backward passes and two forward passes of the aligned model, and the
        losses decide the share of such steps. Every ``refresh`` steps there are three forward passes more, two of them
        on both answers. Each step reads one number on the host.
    Source: Fernando et al., "Understanding Forgetting in LLM Supervised Fine-Tuning and Preference Learning",
        arXiv:2410.15483, algorithm MAXRIGHT; official code heshandevaka/XRIGHT, with a refresh after 10 steps. The
        floors of ``pythia`` are those of its example, from runs on one objective each.
    Differs: losses are averaged over micro-batches and ranks before they are compared, and saved in checkpoints. A
        refresh takes the next batch of each stream, in the order of training. With both floors 0, losses of different
        units are compared, which is warned of. The reference is as in ALRIGHT.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"lam": 0.5, "beta": 0.1, "refresh": 10},
        "pythia": {"lam": 0.5, "beta": 0.1, "refresh": 10, "task_floor": 1.4980, "pairs_floor": 0.0647},
    }

    def __init__(
        self,
        lam: float = 0.5,
        beta: float = 0.1,
        task_floor: float = 0.0,
        pairs_floor: float = 0.0,
        refresh: int = 10,
    ) -> None:
        for name, value in (("task_floor", task_floor), ("pairs_floor", pairs_floor)):
            if not 0 <= value < math.inf:
                raise ValueError(f"MAXRIGHT: {name} is a loss in nats and must be >= 0, got {value}.")
        if not (isinstance(refresh, int) and refresh >= 1):
            raise ValueError(f"MAXRIGHT: refresh must be a whole number of optimizer steps >= 1, got {refresh}.")
        super().__init__(lam, beta)
        if lam:
            self.streams = ("task", "pairs")
            self.passes = (*self.passes, Passes(3 / refresh))
        self.task_floor, self.pairs_floor, self.refresh = task_floor, pairs_floor, refresh
        self._losses: dict[str, float] = {}
        self._window: list[Tensor] = []

    @override
    def choose(self, step: int) -> str:
        if not self.lam or not self._losses:  # Lightning's learning rate finder trains without the callbacks
            return "task"
        gaps = weighted_gaps(self._losses, {"task": self.task_floor, "pairs": self.pairs_floor}, self.lam)
        return "pairs" if gaps["pairs"] > gaps["task"] else "task"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._losses, self._window = {}, []
            if self.lam and not (self.task_floor or self.pairs_floor):
                rank_zero_warn(
                    "MAXRIGHT: task_floor and pairs_floor are both 0, so that losses of different units are compared."
                    " Set them to the last losses of runs on one objective each."
                )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._window = []  # a search for the learning rate has added losses
        if self.lam and not self._losses:
            self._measure(trainer, pl_module)

    @override
    def measured(self, loss: Tensor, stream: str) -> None:
        self._window.append(loss)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # The current step's choice is the last one, until the step is done and the next batch is fetched.
        if not self.lam or trainer.global_step != self._step + 1:
            return
        if trainer.global_step % self.refresh == 0:
            self._measure(trainer, pl_module)
        else:
            self._losses[self._choice] = self._mean(trainer, torch.stack(self._window).mean())
        self._window = []
        self.show({f"maxright/{name}_loss": torch.tensor(loss) for name, loss in self._losses.items()})

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "losses": dict(self._losses)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._losses = dict(state_dict["losses"])

    def _measure(self, trainer: Trainer, module: Any) -> None:
        """Measure both losses on the next batch of each stream, with neither gradient nor dropout."""
        with as_found(module), torch.no_grad(), trainer.precision_plugin.forward_context():
            preference = preference_loss(module, self.draw("pairs"), self.beta)
            losses = {"task": module.loss(self.draw("task")), "pairs": preference}
        self._losses = {name: self._mean(trainer, loss) for name, loss in losses.items()}

    @staticmethod
    def _mean(trainer: Trainer, loss: Tensor) -> float:
        """Return the mean over ranks on the host."""
        return float(trainer.strategy.reduce(loss.detach(), reduce_op="mean"))
