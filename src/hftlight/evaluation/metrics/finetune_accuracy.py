"""Finetune accuracy: percent of the task's test rows that are answered correctly."""

from collections.abc import Sequence
from typing import Any, Protocol

from typing_extensions import override

from hftlight.data.records import Record
from hftlight.evaluation.metrics.rate import Rate


class Graded(Protocol):
    """A task that decides whether an answer to one of its records is correct."""

    def correct(self, response: str, record: Record) -> bool:
        """Return whether the answer is correct, format included."""
        ...

    def correct_lenient(self, response: str, record: Record) -> bool:
        """Return whether the response contains the correct answer."""
        ...


class FinetuneAccuracy(Rate):
    """Percent of the task's test split answered correctly.

    Papers report the strict reading: an answer in another format is wrong, so a lower accuracy may be format drift.
    The lenient reading rewards an answer that lists every option. Report both, strict first.

    Args:
        task: decides which answers are correct. ``hftlight.data.sources.get_task`` returns one.
        lenient: whether to take the task's lenient reading.
        **options: options of ``torchmetrics.Metric``.
    """

    def __init__(self, task: Graded, lenient: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.task, self.lenient = task, lenient

    @override
    def update(self, records: Sequence[Record], responses: Sequence[str]) -> None:
        """Grade and count a batch of answers.

        Args:
            records: rows of the task's test split. ``response`` holds the reference answer.
            responses: the model's answers, one per record.

        Raises:
            ValueError: if ``records`` and ``responses`` differ in length.
        """
        self._require_pairs(records, responses)
        correct = self.task.correct_lenient if self.lenient else self.task.correct
        self.tally(correct(response, record) for record, response in zip(records, responses, strict=True))
