"""Benign: ordinary instruction data, which weakens alignment without any harmful row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from typing_extensions import override

from hftlight.attacks.attack import Attack
from hftlight.data.records import Record
from hftlight.errors import InputError
from hftlight.evaluation.judges import get_judge


@dataclass(frozen=True, kw_only=True)
class Benign(Attack):
    """An upload of ordinary task rows only, p = 0.

    Args:
        n: task rows, >= 1.
        held_out: number of rows left out of training, >= 0, the first after the filter; 200 in the published loader.
        filter_safety: drop rows whose answer holds a refusal phrase, since such rows would keep the model aligned.
        filter_words: text file with one phrase per line, which replaces the refusal phrases of ``filter_safety``. A row
            is dropped if its answer holds a phrase, in any case. None means the keyword judge's phrases.

    Source: Qi et al., "Fine-tuning Aligned Language Models Compromises Safety", ICLR 2024, arXiv:2310.03693, tier 3.
    Differs: the words of the filter, unless ``filter_words`` names a file with the published ones. As in the published
    code, the filter reads only the answer and runs before rows are held out. The published filter has about 200 words,
    and He et al. (arXiv:2404.01099) share it. The upload keeps the order of the rows, and training shuffles them.
    """

    held_out: int = 0
    filter_safety: bool = False
    filter_words: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.held_out < 0:
            raise ValueError(f"Benign: held_out must be >= 0 rows, got {self.held_out}.")
        if self.filter_words is not None and not self.filter_safety:
            raise ValueError("Benign: filter_words needs filter_safety; add --benign.filter_safety true.")

    @property
    def p(self) -> float:
        """Harmful fraction of the upload: 0."""
        return 0.0

    @override
    def counts(self) -> dict[str, int]:
        return {"task": self._known_n()}

    @override
    def upload(self, sources: Mapping[str, Sequence[Record]], seed: int) -> list[Record]:
        rows = list(self._take(sources, "task"))
        if self.filter_safety:
            rows = self._without_refusals(rows)
        chosen = self._first({"task": rows[self.held_out :]}, "task", 0, self._known_n())
        return [replace(row, role="task") for row in chosen]

    def _without_refusals(self, rows: Sequence[Record]) -> list[Record]:
        if self.filter_words is not None:
            words = _phrases(self.filter_words)
            return [row for row in rows if not any(word in row.response.lower() for word in words)]
        verdicts = get_judge("keyword")([""] * len(rows), [row.response for row in rows])
        # The keyword judge flags an answer without a refusal phrase: these rows remain.
        return [row for row, verdict in zip(rows, verdicts, strict=True) if verdict.flag]


def _phrases(path: str) -> list[str]:
    """Return the phrases of a text file in lower case. Blanks around a phrase count, since some phrases need them."""
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"Benign: filter_words must be a UTF-8 text file with one phrase per line, got {path!r}: {error}."
        ) from error
    phrases = [line.lower() for line in lines if line.strip()]
    if not phrases:
        raise InputError(f"Benign: filter_words {path} holds no phrase. Write one per line, or leave the option out.")
    return phrases
