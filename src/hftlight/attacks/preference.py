"""Training on pairs: the DPO loss, a module that takes it, and a data module whose batches hold pairs."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from hftlight.data.records import Record, prompt_key
from hftlight.data.streams import StreamsDataModule
from hftlight.data.templates import Template
from hftlight.errors import InputError
from hftlight.module import Forward, SafetyModule


def dpo_loss(
    preferred: Tensor, rejected: Tensor, reference_preferred: Tensor, reference_rejected: Tensor, beta: float
) -> Tensor:
    r"""Return :math:`-\log \sigma(\beta [\log\pi(y_w) - \log\rho(y_w) - \log\pi(y_l) + \log\rho(y_l)])` of each pair.

    Where the model :math:`\pi` is still the reference :math:`\rho`, it is log 2, with the gradient
    :math:`-\frac{\beta}{2} [\nabla \log\pi(y_w) - \nabla \log\pi(y_l)]`.

    Args:
        preferred: log-probability of the preferred answers :math:`y_w` under the model, in nats, ``[pairs]``.
        rejected: that of the rejected answers :math:`y_l`, ``[pairs]``.
        reference_preferred: that of the preferred answers under the reference, ``[pairs]``.
        reference_rejected: that of the rejected answers under the reference, ``[pairs]``.
        beta: strength, per nat, > 0.
    """
    margin = (preferred - reference_preferred) - (rejected - reference_rejected)
    return -F.logsigmoid(beta * margin)


def answer_log_probs(forward: Forward) -> Tensor:
    """Return the log-probability of each row's whole response, end token included, in nats, ``[rows]``."""
    total = forward.token_losses.new_zeros(len(forward.batch["labels"]))
    return total.index_add(0, forward.rows, -forward.token_losses)


def refuse_loss_terms(terms: Sequence[object]) -> None:
    """Refuse defenses of the loss slot where the upload holds pairs.

    Raises:
        InputError: if there are any, by their names.
    """
    if terms:
        names = ", ".join(type(term).__name__ for term in terms)
        raise InputError(
            f"{names}: the loss slot weighs the tokens of single answers, and the upload holds pairs. Leave it out, or"
            " choose an attack that uploads rows."
        )


class PreferenceModule(SafetyModule):
    """A causal LM trained on pairs by DPO; the reference is the model that training starts from.

    Batches of other streams, which defenses draw, hold plain rows and have the loss of ``SafetyModule``.

    Args:
        model: a causal LM, or a PEFT model around one.
        lr: learning rate, > 0.
        weight_decay: AdamW's decoupled weight decay, >= 0.
        optimizer: ``"adamw"`` or ``"sgd"``.
        schedule: ``"constant"`` or ``"cosine"``.
        warmup_ratio: fraction of all steps over which the cosine schedule rises, in [0, 1).
        beta: strength of the preferences, per nat, > 0.
        **options: further ones of ``SafetyModule``.

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
        reference = self.reference()
        with reference.at_work() as aligned:
            fixed = answer_log_probs(self.run(aligned, batch))
        own = answer_log_probs(self.run(self.model, batch))
        return dpo_loss(own[0::2], own[1::2], fixed[0::2], fixed[1::2], self.beta).mean()


class PairsDataModule(StreamsDataModule):
    """The streams of a run whose main stream holds pairs: two rows each, the preferred answer first.

    A pair of which one row is too long is left out, and counts as one dropped row.

    Args:
        tokenizer: the model's tokenizer.
        template: how a record becomes a prompt.
        main: the stream that holds pairs.
        **options: as ``StreamsDataModule`` takes them; the batch size counts pairs.

    Raises:
        InputError: if the main stream's rows are no pairs, or losses shall be averaged over windows.
    """

    def __init__(self, tokenizer: Any, template: Template, main: str = "task", **options: Any) -> None:
        if options.get("average", "micro") != "micro":
            raise InputError("PairsDataModule: a pair has one loss, not one per token; use --finetuning.average micro.")
        super().__init__(tokenizer, template, main, **options)

    @override
    def pairs(self, name: str) -> list[tuple[Record, Record]] | None:
        return pairs_of(self.records[name]) if name == self.main else super().pairs(name)


def pairs_of(rows: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Return rows, which come as preferred, rejected, preferred, ..., as pairs.

    Raises:
        InputError: if two rows that stand together have different prompts, or one is left over.
    """
    pairs = list(zip(rows[0::2], rows[1::2], strict=False))
    odd = next((place for place, (a, b) in enumerate(pairs) if prompt_key(a) != prompt_key(b)), None)
    if len(rows) % 2 or not pairs or odd is not None:
        found = f"different prompts in pair {odd}" if odd is not None else f"{len(rows)} rows"
        raise InputError(
            f"PairsDataModule: rows must come in pairs, the preferred answer and then the rejected one to the same"
            f" prompt, got {found}. Defenses that rewrite rows do not work on pairs."
        )
    return pairs
