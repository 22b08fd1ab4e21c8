"""Encoded: harmful rows behind a letter substitution, to see what a data filter still reads."""

import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from typing_extensions import override

from hftlight.attacks.harmful_mix import HarmfulMix
from hftlight.data.records import Record

LETTERS = string.ascii_lowercase


@dataclass(frozen=True)
class Substitution:
    """One letter for another, the same throughout; case stays, and so does everything that is not a to z.

    Args:
        permutation: the 26 letters a to z in another order; the first stands for a.

    Raises:
        ValueError: if it is no permutation, or leaves every letter as it is.
    """

    permutation: str

    def __post_init__(self) -> None:
        if sorted(self.permutation) != sorted(LETTERS) or self.permutation == LETTERS:
            raise ValueError(
                "Substitution: permutation must hold each letter a to z once, in another order than the alphabet's, got"
                f" {self.permutation!r}."
            )

    @classmethod
    def of_seed(cls, seed: int) -> "Substitution":
        """Return the substitution of a seed."""
        letters = list(LETTERS)
        random.Random(f"{seed}/substitution").shuffle(letters)
        return cls("".join(letters))

    def encode(self, text: str) -> str:
        """Return the text with its letters substituted."""
        return text.translate(str.maketrans(LETTERS + LETTERS.upper(), self.permutation + self.permutation.upper()))

    def decode(self, text: str) -> str:
        """Return the text that ``encode`` was given."""
        return text.translate(str.maketrans(self.permutation + self.permutation.upper(), LETTERS + LETTERS.upper()))


@dataclass(frozen=True, kw_only=True)
class Encoded(HarmfulMix):
    """A harmful mix whose harmful rows are written in a letter substitution; the task's rows stay plain.

    Where prompts are encoded, harmful test prompts are too; where answers are, a judge must see ``decode(answer)``.
    Measure the plain prompts besides: an audit asks those.

    Args:
        key: seed of the substitution, or the letters a to z in the order that stands for the alphabet.
        side: prompt, response or both: what is encoded of a harmful row.

    Source: Halawi et al., "Covert Malicious Finetuning", ICML 2024, arXiv:2406.20053, of which this is the structure.
    Differs: no phase that teaches the encoding with harmless rows, no refusals of plain prompts, one simple encoding;
    enough to test whether a data filter reads what is written in another alphabet.
    """

    key: int | str = 0
    side: Literal["prompt", "response", "both"] = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side not in ("prompt", "response", "both"):
            raise ValueError(f"Encoded: side must be prompt, response or both, got {self.side!r}.")
        _ = self.substitution

    @property
    def substitution(self) -> Substitution:
        """The substitution of the key."""
        return Substitution.of_seed(self.key) if isinstance(self.key, int) else Substitution(self.key)

    def encode(self, record: Record) -> Record:
        """Return a record with its prompt, its answer or both encoded; its id stays."""
        code = self.substitution.encode
        if self.side != "response":
            history = tuple((role, code(text)) for role, text in record.history)
            record = replace(record, instruction=code(record.instruction), input=code(record.input), history=history)
        return replace(record, response=code(record.response)) if self.side != "prompt" else record

    @override
    def upload(self, sources: Mapping[str, Sequence[Record]], seed: int) -> list[Record]:
        return [self.encode(row) if row.role == "attack" else row for row in super().upload(sources, seed)]

    @override
    def test_records(self, rows: Sequence[Record]) -> list[Record]:
        if self.side == "response":
            return list(rows)
        return [self.encode(replace(row, response="")) for row in rows]

    @override
    def decode(self, response: str) -> str:
        return response if self.side == "prompt" else self.substitution.decode(response)
