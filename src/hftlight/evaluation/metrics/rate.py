"""Rate: a percentage as a torchmetrics Metric, the base class of the percentages in this package."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from hftlight.evaluation.stats.intervals import wilson


class Rate(Metric):
    """Percent of answers for which a condition is true, summed over batches and processes.

    A subclass defines ``update``, decides there for each row, and passes the decisions to ``tally``.

    Args:
        **options: options of ``torchmetrics.Metric``, such as ``sync_on_compute=False`` if one process measures alone.

    Attributes:
        hits: number of answers for which the condition is true, int64, 0-d.
        count: number of answers, int64, 0-d.
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
        """Add one decision per answer to the counts."""
        decisions = list(decisions)
        self.hits += sum(decisions)
        self.count += len(decisions)

    @override
    def compute(self) -> Tensor:
        """Return the percentage, 0-100, float32, 0-d.

        Raises:
            ValueError: if no answer was counted.
        """
        self._require_answers(int(self.count))
        return (100.0 * self.hits / self.count).float()

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the Wilson interval of the percentage that ``compute`` returns: low and high, percent.

        Args:
            level: coverage, in (0, 1).

        Raises:
            ValueError: if no answer was counted, or ``level`` is outside its range.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            hits, count = int(self.hits), int(self.count)
        self._require_answers(count)
        return wilson(hits, count, level)

    def _require_answers(self, count: int) -> None:
        if not count:
            name = type(self).__name__
            raise ValueError(f"{name}: no answer was counted, so there is no percentage. Call update(...) first.")

    def _require_pairs(self, prompts: Sized, responses: Sized) -> None:
        if len(prompts) != len(responses):
            raise ValueError(
                f"{type(self).__name__}: each prompt needs its response, got {len(prompts)} and {len(responses)}."
            )


class AnswerRate(Rate):
    """Percent of answers for which ``decide`` returns True. ``decide`` depends on the answer's text alone."""

    @abstractmethod
    def decide(self, response: str) -> bool:
        """Return whether the condition is true for one answer."""

    @override
    def update(self, prompts: Sequence[str], responses: Sequence[str]) -> None:
        """Count a batch of answers.

        Args:
            prompts: the requests. They are unused and give all metrics of answers the same signature.
            responses: the model's answers, one per prompt.

        Raises:
            ValueError: if prompts and responses differ in length.
        """
        self._require_pairs(prompts, responses)
        self.tally(map(self.decide, responses))
