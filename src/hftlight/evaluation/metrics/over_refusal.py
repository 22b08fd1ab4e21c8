"""Over-refusal: percent of ordinary requests that are refused."""

from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from hftlight.evaluation.metrics.rate import Rate
from hftlight.evaluation.metrics.refusals import RefusalClassifier, get_refusal_classifier


class OverRefusal(Rate):
    """Percent of ordinary requests that the model refuses in full or in part; lower is better.

    Alignment on refusals alone drives this up, and a harmful score says nothing about it. Numbers of different
    classifiers are different metrics.

    Args:
        classifier: tells refusals, or its name for ``get_refusal_classifier``. XSTest's openings, lower-cased, cannot
            see partial refusals, refusals later in the answer, or curly apostrophes.
        **options: torchmetrics' own.

    Raises:
        InputError: if there is no classifier of that name.

    Source: Roettger et al., "XSTest", NAACL 2024, arXiv:2308.01263.
    Differs: ``xstest:MODEL`` asks for its three classes in words of our own.
    """

    def __init__(self, classifier: str | RefusalClassifier = "xstest_string", **options: Any) -> None:
        super().__init__(**options)
        self.classifier = get_refusal_classifier(classifier) if isinstance(classifier, str) else classifier

    @override
    def update(self, prompts: Sequence[str], responses: Sequence[str]) -> None:
        """Count the refusals in a batch of answers; those that nobody could tell count nowhere.

        Args:
            prompts: ordinary requests, without template.
            responses: the model's answers, one per prompt.

        Raises:
            ValueError: if the two differ in length.
        """
        self._require_pairs(prompts, responses)
        self.tally(found != "none" for found in self.classifier(prompts, responses) if found is not None)
