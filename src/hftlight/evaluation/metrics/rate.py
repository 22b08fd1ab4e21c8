"""Rate: a percentage as a torchmetrics Metric, the base of every score here."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from hftlight.evaluation.stats.intervals import wilson


class Rate(Metric):
    """Percent of answers of which something is true; adds up over batches and over processes.

    A subclass defines ``update``, decides there row by row, and hands the decisions to ``tally``.

    Args:
        **options: torchmetrics' own, such as ``sync_on_compute=False`` where one process measures alone.

    Attributes:
        hits: answers of which it is true, int64, 0-d.
        count: answers seen, int64, 0-d.
    """

    is_differentiable = False
    full_state_update = False
    hits: Tensor
    count: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("hits", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def tally(self, decisions: Iterable[bool]) -> None:
        """Count one decision per answer."""
        decisions = list(decisions)
        self.hits += sum(decisions)
        self.count += len(decisions)

    @override
    def compute(self) -> Tensor:
        """Return the percentage, 0-100, float32, 0-d.

        Raises:
            ValueError: if no answer was seen.
        """
        self._require_answers(int(self.count))
        return (100.0 * self.hits / self.count).float()

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the Wilson interval of the percentage over the answers that ``compute`` counts: low and high, percent.

        Args:
            level: coverage, in (0, 1).

        Raises:
            ValueError: if no answer was seen, or ``level`` is outside its range.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            hits, count = int(self.hits), int(self.count)
        self._require_answers(count)
        return wilson(hits, count, level)

    def _require_answers(self, count: int) -> None:
        if not count:
            name = type(self).__name__
            raise ValueError(f"{name}: no answer was seen, and 0 of 0 is no percentage. Call update(...) first.")

    def _require_pairs(self, prompts: Sized, responses: Sized) -> None:
        if len(prompts) != len(responses):
            raise ValueError(
                f"{type(self).__name__}: each prompt needs its response, got {len(prompts)} and {len(responses)}."
            )


class AnswerRate(Rate):
    """Percent of answers of which ``decide`` is true, a function of the answer's text alone."""

    @abstractmethod
    def decide(self, response: str) -> bool:
        """Return whether it is true of one answer."""

    @override
    def update(self, prompts: Sequence[str], responses: Sequence[str]) -> None:
        """Count a batch of answers.

        Args:
            prompts: the requests; unused, here so that all scores on answers are called alike.
            responses: the model's answers, one per prompt.

        Raises:
            ValueError: if the two differ in length.
        """
        self._require_pairs(prompts, responses)
        self.tally(map(self.decide, responses))
