"""Finetune accuracy: percent of the task's test rows that are answered right."""

from collections.abc import Sequence
from typing import Any, Protocol

from typing_extensions import override

from hftlight.data.records import Record
from hftlight.evaluation.metrics.rate import Rate


class Graded(Protocol):
    """A task that knows when an answer to one of its records is right."""

    def correct(self, response: str, record: Record) -> bool:
        """Return whether the answer is right, format included."""
        ...

    def correct_lenient(self, response: str, record: Record) -> bool:
        """Return whether the right answer can be found in the response."""
        ...


class FinetuneAccuracy(Rate):
    """Percent of the task's test split answered correctly.

    The strict reading is the one papers report: an answer in another format is wrong, so a drop may be format drift.
    The lenient one rewards an answer that names everything. Report both, strict first.

    Args:
        task: decides what is correct, as ``hftlight.data.sources.get_task`` returns it.
        lenient: take the task's lenient reading.
        **options: torchmetrics' own.
    """

    def __init__(self, task: Graded, lenient: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.task, self.lenient = task, lenient

    @override
    def update(self, records: Sequence[Record], responses: Sequence[str]) -> None:
        """Grade and count a batch of answers.

        Args:
            records: rows of the task's test split; ``response`` holds the reference.
            responses: the model's answers, one per record.

        Raises:
            ValueError: if the two differ in length.
        """
        self._require_pairs(records, responses)
        correct = self.task.correct_lenient if self.lenient else self.task.correct
        self.tally(correct(response, record) for record, response in zip(records, responses, strict=True))
