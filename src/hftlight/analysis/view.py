"""View: one model as an analysis sees it, with its prompts. The weights are loaded when they are first asked for."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property
from types import TracebackType
from typing import Any, Literal, Self

from torch import nn

from hftlight.analysis.subjects import Subject
from hftlight.data.records import Record
from hftlight.data.templates import SystemSlot, get_template
from hftlight.data.tokens import encode_prompt
from hftlight.errors import InputError
from hftlight.evaluation.answering.generate import answer
from hftlight.evaluation.metrics.refusals import get_refusal_classifier
from hftlight.runs.measuring.test_sets import TestSets

Kind = Literal["harmful", "over_refusal", "task"]


class View:
    """A model with its tokenizer, prompts and reference.

    Use it as a context manager, which unloads the weights at its end.

    Args:
        subject: the model.
        tests: prompts and judges.
        shared: results that the views of a study share; see ``openings``.

    Attributes:
        subject: as given.
        tests: as given.
        slot: the system slot that the model is served with.
    """

    def __init__(self, subject: Subject, tests: TestSets, shared: dict[Any, Any] | None = None) -> None:
        self.subject, self.tests = subject, tests
        self._shared = {} if shared is None else shared
        self.slot: SystemSlot = subject.artifact.slot(subject.config.system)
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        for name in ("model", "reference"):
            self.__dict__.pop(name, None)

    @cached_property
    def model(self) -> nn.Module:
        """The model in evaluation mode, on the device where it is measured."""
        model: nn.Module = self._open.enter_context(self.subject.artifact.model(self.subject.config))
        return model.eval()

    @cached_property
    def reference(self) -> nn.Module:
        """The aligned model of the arm in evaluation mode; the model itself if it is that model or has no other.

        It is a second model in memory.
        """
        aligned = self.subject.reference
        if aligned is None or aligned.identity == self.subject.artifact.identity:
            return self.model
        model: nn.Module = aligned.another(self.subject.config)
        return model.eval()

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.subject.artifact.tokenizer()

    def records(self, kind: Kind, count: int = 0) -> Sequence[Record]:
        """Return the first prompts of a test set as the model receives them; 0 for all."""
        return self.tests.asked(kind)[: count or None]

    def prompts(self, kind: Kind, count: int = 0) -> list[list[int]]:
        """Return the token ids of the first prompts of a test set, in the model's template and system text."""
        return self.encoded(self.records(kind, count))

    def encoded(self, records: Sequence[Record]) -> list[list[int]]:
        """Return the token ids of prompts, in the model's template and system text."""
        template = get_template(self.subject.config.template, self.tokenizer)
        return [encode_prompt(record, template, self.tokenizer, self.slot) for record in records]

    def openings(self, count: int, max_new_tokens: int = 16) -> list[int]:
        """Return the tokens that open the aligned model's refusals, most frequent first.

        Such a token opens more of its refusals than of its other answers to the first harmful and ordinary prompts. All
        models of an arm share these tokens.

        Args:
            count: harmful and ordinary prompts to ask.
            max_new_tokens: longest answer, in tokens.

        Raises:
            InputError: if the aligned model refuses nothing in words of its own.
        """
        refusals, others = self._first_tokens(count, max_new_tokens)
        return _telling(refusals, others, refusals)

    def compliances(self, count: int, max_new_tokens: int = 16) -> list[int]:
        """Return the tokens that open more of the aligned model's other answers than of its refusals.

        Arguments are those of ``openings``.

        Raises:
            InputError: if there is no such token.
        """
        refusals, others = self._first_tokens(count, max_new_tokens)
        return _telling(others, refusals, refusals)

    def _first_tokens(self, count: int, max_new_tokens: int) -> tuple[Counter[int], Counter[int]]:
        """Return how often each token opens the aligned model's refusals, and its other answers."""
        aligned = self.subject.reference or self.subject.artifact
        found: tuple[Counter[int], Counter[int]] = self.shared(
            ("first tokens", aligned.identity, count, max_new_tokens), lambda: self._asked_first(count, max_new_tokens)
        )
        return found

    def _asked_first(self, count: int, max_new_tokens: int) -> tuple[Counter[int], Counter[int]]:
        classify = get_refusal_classifier(self.tests.refusal_judge)
        refusals, others = Counter[int](), Counter[int]()
        for kind in ("harmful", "over_refusal"):
            answers = answer(self.reference, self.tokenizer, self.prompts(kind, count), max_new_tokens=max_new_tokens)
            requests = [record.request for record in self.tests.rows(kind)[: count or None]]
            for each, refused in zip(answers, classify(requests, [a.text for a in answers]), strict=True):
                if each.ids:
                    (refusals if refused == "full" else others)[each.ids[0]] += 1
        return refusals, others

    def shared(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Return a result that the views of a study share, computed at its first use.

        Args:
            key: names the result with all that decides it, such as the identity of the aligned model.
            compute: returns the result.
        """
        if key not in self._shared:
            self._shared[key] = compute()
        return self._shared[key]


def _telling(these: Counter[int], those: Counter[int], refusals: Counter[int]) -> list[int]:
    """Return the tokens that open more of these answers than of those, most frequent first.

    Raises:
        InputError: if there is none, with the number of ``refusals``.
    """
    found = [token for token, times in these.most_common() if times > those[token]]
    if not found:
        raise InputError(
            f"the aligned model refuses {refusals.total()} of {these.total() + those.total()} prompts, and no first"
            " token tells its refusals from its other answers. Align it longer, name another --reference, or leave this"
            " analysis out."
        )
    return found
