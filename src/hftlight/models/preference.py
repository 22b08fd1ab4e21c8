"""PreferenceModule: a causal LM trained on pairs by DPO."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from typing_extensions import override

from hftlight.engine.preference import dpo_loss
from hftlight.errors import InputError
from hftlight.models.module import Forward, SafetyModule


def answer_log_probs(forward: Forward) -> Tensor:
    """Return the log-probability of each row's whole response, end token included, in nats, ``[rows]``."""
    total = forward.token_losses.new_zeros(len(forward.batch["labels"]))
    return total.index_add(0, forward.rows, -forward.token_losses)


def preference_loss(module: Any, batch: dict[str, Any], beta: float) -> Tensor:
    """Return the mean DPO loss of a batch of pairs against a module's aligned model, 0-d in nats.

    Args:
        module: a ``SafetyModule``.
        batch: as ``collate`` returns it for pairs.
        beta: strength of the preferences, per nat, > 0.
    """
    with module.reference().at_work() as aligned:
        fixed = answer_log_probs(module.run(aligned, batch))
    own = answer_log_probs(module.run(module.model, batch))
    # Even rows of the batch hold the preferred answers, odd rows the rejected ones.
    return dpo_loss(own[0::2], own[1::2], fixed[0::2], fixed[1::2], beta).mean()


def refuse_loss_terms(terms: Sequence[object]) -> None:
    """Refuse loss-slot defenses, since the upload holds pairs.

    Raises:
        InputError: if there are any; the message names them.
    """
    if terms:
        names = ", ".join(type(term).__name__ for term in terms)
        raise InputError(
            f"{names}: the loss slot weighs the tokens of single answers, but the upload holds pairs. Leave the defense"
            " out, or choose an attack that uploads rows."
        )


class PreferenceModule(SafetyModule):
    """A causal LM trained on pairs by DPO.

    The reference is the model that training starts from. Batches that defenses draw from other streams hold plain rows,
    and their loss is that of ``SafetyModule``.

    Args:
        model: a causal LM, or a PEFT model around one.
        lr: learning rate, > 0.
        weight_decay: AdamW's decoupled weight decay, >= 0.
        optimizer: ``"adamw"`` or ``"sgd"``.
        schedule: ``"constant"`` or ``"cosine"``.
        warmup_ratio: fraction of all steps over which the cosine schedule rises, in [0, 1).
        beta: strength of the preferences, per nat, > 0.
        **options: further arguments of ``SafetyModule``.

    Raises:
        ValueError: if ``beta`` is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 5e-4,
        weight_decay: float = 0.1,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        schedule: Literal["constant", "cosine"] = "constant",
        warmup_ratio: float = 0.0,
        beta: float = 0.1,
        **options: Any,
    ) -> None:
        if not beta > 0:
            raise ValueError(f"PreferenceModule: beta must be > 0, got {beta}.")
        super().__init__(model, lr, weight_decay, optimizer, schedule, warmup_ratio, **options)
        self.beta = beta

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self.reference()

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        refuse_loss_terms(self.loss_terms)

    @override
    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        if stage == "fit":
            self.forget_reference()

    @override
    def loss(self, batch: dict[str, Any]) -> Tensor:
        if "pairs" not in batch:
            return super().loss(batch)
        return preference_loss(self, batch, self.beta)
