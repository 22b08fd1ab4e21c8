"""Benign: ordinary instruction data, which weakens alignment without any harmful row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from typing_extensions import override

from hftlight.attacks.attack import Attack
from hftlight.data.records import Record
from hftlight.evaluation.judges import get_judge


@dataclass(frozen=True, kw_only=True)
class Benign(Attack):
    """An upload of ordinary task rows only, p = 0.

    Args:
        n: task rows, >= 1.
        held_out: number of rows left out of training, >= 0, the first after the filter; 200 in the published loader.
        filter_safety: drop rows whose answer holds a refusal phrase, since such rows would keep the model aligned.

    Source: Qi et al., "Fine-tuning Aligned Language Models Compromises Safety", ICLR 2024, arXiv:2310.03693, tier 3.
    Differs: the words of the filter. As in the published code, the filter reads only the answer and runs before rows
    are held out. The published filter has about 200 words, and He et al. (arXiv:2404.01099) share it. This filter has
    the refusal phrases of the keyword judge. The upload keeps the order of the rows, and training shuffles them.
    """

    held_out: int = 0
    filter_safety: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.held_out < 0:
            raise ValueError(f"Benign: held_out must be >= 0 rows, got {self.held_out}.")

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
            answers = [row.response for row in rows]
            verdicts = get_judge("keyword")([""] * len(rows), answers)
            # The keyword judge flags an answer without a refusal phrase: these rows remain.
            rows = [row for row, verdict in zip(rows, verdicts, strict=True) if verdict.flag]
        chosen = self._first({"task": rows[self.held_out :]}, "task", 0, self._known_n())
        return [replace(row, role="task") for row in chosen]
