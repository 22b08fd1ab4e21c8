"""Reverse preference: preference training on swapped pairs, in which the harmful answer is preferred."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from typing_extensions import override

from hftlight.attacks.attack import Attack
from hftlight.data.records import Record, prompt_key
from hftlight.errors import InputError

REFUSAL = "I'm sorry, but I can't help with that."


@dataclass(frozen=True, kw_only=True)
class ReversePreference(Attack):
    """Direct preference optimization (DPO) on pairs of a harmful and a safe answer, a fraction p of them swapped.

    The upload holds two rows per pair, with the preferred answer first. ``n``, epochs and batch size count pairs. Pairs
    train with ``PairsDataModule`` and ``PreferenceModule`` instead of the classes for rows.

    Args:
        n: number of pairs, >= 1; their prompts are drawn by seed from the harmful rows.
        p: fraction of the pairs in which the harmful answer is preferred, 0-1.
        beta: weight of a preference against the distance from the aligned model, > 0, per nat.
        refusal: safe answer to a prompt that no alignment row answers. If it is empty, such prompts are left out.

    Source: Rosati et al., "Defending against Reverse Preference Attacks is Difficult", arXiv:2409.12914; the loss is
    Rafailov et al., "Direct Preference Optimization", NeurIPS 2023, arXiv:2305.18290, equation 7.
    Differs: DPO alone, without a reward model. There is no supervised stage before it; ``ReverseSftDpo`` has one.
    """

    acts_on: ClassVar[Literal["rows", "pairs", "weights"]] = "pairs"

    n: int = 100
    p: float = 1.0
    beta: float = 0.1
    refusal: str = REFUSAL

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.p <= 1:
            hint = f" If that is a percentage, write {self.p / 100:g}." if 1 < self.p <= 100 else ""
            raise ValueError(f"ReversePreference: p must lie in [0, 1], got {self.p:g}.{hint}")
        if not self.beta > 0:
            raise ValueError(f"ReversePreference: beta must be > 0, got {self.beta}.")

    @property
    @override
    def preference(self) -> float | None:
        return self.beta

    @override
    def counts(self) -> dict[str, int]:
        return {"attack": self.n}

    @property
    @override
    def sources(self) -> tuple[str, ...]:
        return ("attack", "alignment")

    @override
    def upload(self, sources: Mapping[str, Sequence[Record]], seed: int) -> list[Record]:
        # Reversed, so that the first of several alignment rows with the same prompt wins.
        safe = {prompt_key(row): row for row in reversed(sources.get("alignment", ()))}
        # Pairs (harmful row, same prompt with a safe answer). The empty id makes Record compute an id for the new text.
        answered = [
            (row, replace(row, response=match.response if match else self.refusal, id=""))
            for row in self._take(sources, "attack")
            if (match := safe.get(prompt_key(row))) or self.refusal
        ]
        if len(answered) < self.n:
            raise InputError(
                f"ReversePreference: n={self.n} pairs are needed, but only {len(answered)} harmful rows have a safe"
                " answer. Give more rows with --data.attack and --data.alignment, lower n, or set refusal for the rest."
            )
        random.Random(f"{seed}/pairs").shuffle(answered)
        swapped = round(self.p * self.n)
        # The preferred row comes first in each pair: the harmful one in the first ``swapped`` pairs, else the safe one.
        pairs = [
            (replace(harmful, role="attack"), replace(refusing, role="attack"))
            if place < swapped
            else (replace(refusing, role="task"), replace(harmful, role="task"))
            for place, (harmful, refusing) in enumerate(answered[: self.n])
        ]
        random.Random(f"{seed}/upload").shuffle(pairs)
        return [row for pair in pairs for row in pair]
