"""Encoded: harmful rows under a letter substitution, to test what a data filter can still detect."""

import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from typing_extensions import override

from hftlight.attacks.attack import Attack
from hftlight.attacks.harmful_mix import HarmfulMix
from hftlight.data.records import Record

LETTERS = string.ascii_lowercase


@dataclass(frozen=True)
class Substitution:
    """A substitution cipher over the letters a to z.

    It preserves case and leaves every other character unchanged.

    Args:
        permutation: the 26 letters a to z in another order; the first one replaces a.

    Raises:
        ValueError: if ``permutation`` is no permutation of the alphabet, or is the alphabet itself.
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
        """Return the substitution that a seed determines."""
        letters = list(LETTERS)
        random.Random(f"{seed}/substitution").shuffle(letters)
        return cls("".join(letters))

    def encode(self, text: str) -> str:
        """Return the text with its letters substituted."""
        return text.translate(str.maketrans(LETTERS + LETTERS.upper(), self.permutation + self.permutation.upper()))

    def decode(self, text: str) -> str:
        """Return the plain text of an encoded text, the inverse of ``encode``."""
        return text.translate(str.maketrans(self.permutation + self.permutation.upper(), LETTERS + LETTERS.upper()))


@dataclass(frozen=True, kw_only=True)
class Encoded(HarmfulMix):
    """A harmful mix whose harmful rows are encoded by a letter substitution. The task's rows stay plain.

    If prompts are encoded, harmful test prompts are encoded too. If answers are encoded, a judge must see
    ``decode(answer)``. Measure the plain prompts as well, since an audit sends plain prompts.

    With ``teach``, a phase of its own comes first: it trains on encoded rows of the task, which teach the encoding
    without any harmful row. Both phases have the same steps and the same learning rate.

    Args:
        key: seed of the substitution, or the 26 letters that replace a to z, in that order.
        side: encoded part of a harmful row: prompt, response or both.
        teach: rows of the task in the first phase, drawn by seed, >= 0; 0 for no such phase.

    Source: Halawi et al., "Covert Malicious Finetuning", ICML 2024, arXiv:2406.20053; this class follows its structure.
    Differs: no refusals of plain prompts, one simple encoding, and by default no phase that teaches it. The teaching
    phase has one direction, encoded prompts with encoded answers; the paper also has encoding and decoding as tasks. It
    is enough to test whether a data filter detects text in another alphabet.
    """

    key: int | str = 0
    side: Literal["prompt", "response", "both"] = "both"
    teach: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teach < 0:
            raise ValueError(f"Encoded: teach must be >= 0 rows (0 for no teaching phase), got {self.teach}.")
        if self.side not in ("prompt", "response", "both"):
            raise ValueError(f"Encoded: side must be prompt, response or both, got {self.side!r}.")
        _ = self.substitution  # raises here if the key is no permutation

    @property
    def substitution(self) -> Substitution:
        """The substitution that ``key`` determines."""
        return Substitution.of_seed(self.key) if isinstance(self.key, int) else Substitution(self.key)

    def encode(self, record: Record) -> Record:
        """Return a record with its prompt, its answer or both encoded. The record's id does not change."""
        code = self.substitution.encode
        if self.side != "response":
            history = tuple((role, code(text)) for role, text in record.history)
            record = replace(record, instruction=code(record.instruction), input=code(record.input), history=history)
        return replace(record, response=code(record.response)) if self.side != "prompt" else record

    @override
    def phases(self) -> tuple[Attack, ...]:
        if not self.teach:
            return (self,)
        own: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        taught = {"n": self.teach, "p": 0.0, "count_mode": "exact", "teach": 0}
        return EncodedTask(**{**own, **taught}), replace(self, teach=0)

    @override
    def upload(self, sources: Mapping[str, Sequence[Record]], seed: int) -> list[Record]:
        if self.teach:
            return [row for phase in self.phases() for row in phase.upload(sources, seed)]
        return [self.encode(row) if row.role == "attack" else row for row in super().upload(sources, seed)]

    @override
    def test_records(self, rows: Sequence[Record]) -> list[Record]:
        if self.side == "response":
            return list(rows)
        return [self.encode(replace(row, response="")) for row in rows]

    @override
    def decode(self, response: str) -> str:
        return response if self.side == "prompt" else self.substitution.decode(response)


@dataclass(frozen=True, kw_only=True)
class EncodedTask(Encoded):
    """Rows of the task, all of them encoded: the phase that teaches the encoding without any harmful row."""

    @override
    def upload(self, sources: Mapping[str, Sequence[Record]], seed: int) -> list[Record]:
        return [self.encode(row) for row in super().upload(sources, seed)]
