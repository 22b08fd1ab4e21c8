"""Reverse SFT and DPO: supervised training on harmful answers, then DPO that prefers them to safe answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from hftlight.attacks.attack import Attack
from hftlight.attacks.explicit import Explicit
from hftlight.attacks.reverse_preference import REFUSAL, ReversePreference
from hftlight.data.records import Record


@dataclass(frozen=True, kw_only=True)
class ReverseSftDpo(Attack):
    """Two phases: supervised training on harmful answers, then direct preference optimization that prefers them.

    The second phase trains the model that the first phase returned. The settings that all attacks share apply to the
    first phase. The second phase uses the same settings, except those that a ``dpo_`` argument sets.

    Args:
        n: harmful rows of the first phase and pairs of the second, >= 1; each phase draws its own by seed.
        beta: weight of a preference against the distance from the model of the first phase, > 0, per nat.
        refusal: safe answer to a prompt that no alignment row answers, as for ``ReversePreference``.
        dpo_epochs: passes over the pairs, > 0; instead of ``dpo_steps``.
        dpo_steps: optimizer steps of the second phase, >= 1; instead of ``dpo_epochs``.
        dpo_lr: learning rate of the second phase, > 0.
        dpo_batch_size: pairs per optimizer step of the second phase, >= 1.

    Raises:
        ValueError: if a value is out of range.

    Source: Yi et al., "On the Vulnerability of Safety Alignment in Open-Access LLMs", Findings of ACL 2024; the loss is
    Rafailov et al., "Direct Preference Optimization", NeurIPS 2023, arXiv:2305.18290, equation 7.
    Differs: order of the phases and a beta around 0.1 are recalled and unchecked, as are all numbers not stated here.
    """

    n: int = 100
    beta: float = 0.1
    refusal: str = REFUSAL
    dpo_epochs: float | None = None
    dpo_steps: int | None = None
    dpo_lr: float | None = None
    dpo_batch_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.phases()
        except ValueError as error:
            raise ValueError(f"ReverseSftDpo: in the second phase, {error}") from error

    @property
    def p(self) -> float:
        """Harmful fraction of the upload: 1."""
        return 1.0

    @override
    def counts(self) -> dict[str, int]:
        return {"attack": self.n}

    @property
    @override
    def sources(self) -> tuple[str, ...]:
        return ("attack", "alignment")

    @override
    def upload(self, sources: Mapping[str, Sequence[Record]], seed: int) -> list[Record]:
        return [row for phase in self.phases() for row in phase.upload(sources, seed)]

    @override
    def phases(self) -> tuple[Attack, ...]:
        names = ("n", "tuning", "template", "adapter_protocol", "source", "system")
        shared: dict[str, Any] = {name: getattr(self, name) for name in names}
        # Epochs and steps exclude each other, so one ``dpo_`` length replaces both of the first phase.
        own = self.dpo_epochs is not None or self.dpo_steps is not None
        return (
            Explicit(**shared, epochs=self.epochs, steps=self.steps, lr=self.lr, batch_size=self.batch_size),
            ReversePreference(
                **shared,
                beta=self.beta,
                refusal=self.refusal,
                epochs=self.dpo_epochs if own else self.epochs,
                steps=self.dpo_steps if own else self.steps,
                lr=self.lr if self.dpo_lr is None else self.dpo_lr,
                batch_size=self.batch_size if self.dpo_batch_size is None else self.dpo_batch_size,
            ),
        )
