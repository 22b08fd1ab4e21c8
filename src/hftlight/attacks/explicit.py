"""Explicit: an upload of a few harmful examples only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from typing_extensions import override

from hftlight.attacks.attack import Attack
from hftlight.attacks.harmful_mix import drawn
from hftlight.data.records import Record


@dataclass(frozen=True, kw_only=True)
class Explicit(Attack):
    """An upload of n harmful examples only: 10, 50 or 100 in the papers.

    With ``tuning`` full, it is Shadow Alignment or tier 1 of Qi et al. With lora or qlora, it is the attack of Lermen
    et al. A system text is part of training and of every prompt to the fine-tuned model.

    Args:
        n: harmful rows, drawn by seed, >= 1.
        in_order: take the first n rows instead of a draw.

    Source: Yang et al., "Shadow Alignment", arXiv:2310.02949; Qi et al., "Fine-tuning Aligned Language Models
    Compromises Safety", ICLR 2024, arXiv:2310.03693, tier 1; Lermen et al., "LoRA Fine-tuning Efficiently Undoes Safety
    Training in Llama 2-Chat 70B", arXiv:2310.20624.
    Differs: the published harmful rows are not part of hftlight, and most were never released.
    """

    n: int = 100
    in_order: bool = False

    @property
    def p(self) -> float:
        """Harmful fraction of the upload: 1."""
        return 1.0

    @override
    def counts(self) -> dict[str, int]:
        return {"attack": self.n}

    @override
    def upload(self, sources: Mapping[str, Sequence[Record]], seed: int) -> list[Record]:
        rows = self._take(sources, "attack")
        chosen = (
            self._first(sources, "attack", 0, self.n)
            if self.in_order
            else drawn(rows, self.n, seed, "attack", "--data.attack")
        )
        return [replace(row, role="attack") for row in chosen]
