"""Over-refusal: percent of ordinary requests that are refused."""

from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from hftlight.evaluation.metrics.rate import Rate
from hftlight.evaluation.metrics.refusals import RefusalClassifier, get_refusal_classifier


class OverRefusal(Rate):
    """Percent of ordinary requests that the model refuses in full or in part. Lower is better.

    Alignment on refusals alone raises over-refusal, and the harmful score does not show it. Numbers of different
    classifiers are different metrics.

    Args:
        classifier: a classifier of refusals, or its name for ``get_refusal_classifier``. XSTest's lower-cased openings
            miss partial refusals, refusals later in the answer, and curly apostrophes.
        **options: options of ``torchmetrics.Metric``.

    Raises:
        InputError: if there is no classifier of that name.

    Source: Roettger et al., "XSTest", NAACL 2024, arXiv:2308.01263.
    Differs: the prompt of ``xstest:MODEL`` names XSTest's three classes in hftlight's own words.
    """

    def __init__(self, classifier: str | RefusalClassifier = "xstest_string", **options: Any) -> None:
        super().__init__(**options)
        self.classifier = get_refusal_classifier(classifier) if isinstance(classifier, str) else classifier

    @override
    def update(self, prompts: Sequence[str], responses: Sequence[str]) -> None:
        """Count the refusals in a batch of answers. Answers without a class count nowhere.

        Args:
            prompts: ordinary requests, without template.
            responses: the model's answers, one per prompt.

        Raises:
            ValueError: if prompts and responses differ in length.
        """
        self._require_pairs(prompts, responses)
        self.tally(refusal != "none" for refusal in self.classifier(prompts, responses) if refusal is not None)
