"""Over-refusal: percent of ordinary requests that are refused."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from typing_extensions import override

from hftlight.evaluation.judges import KeywordJudge
from hftlight.evaluation.rate import Rate


class OverRefusal(Rate):
    """Percent of ordinary requests that the model refuses; lower is better.

    Alignment on refusals alone drives this up, and a harmful score says nothing about it.

    Args:
        rule: what counts as a refusal. ``"xstest"`` looks for XSTest's openings, lower-cased, and cannot see partial
            refusals, refusals later in the answer, or curly apostrophes; ``"builtin"`` is the made-up world's own rule;
            or any function response -> bool.
        **options: torchmetrics' own.

    Raises:
        ValueError: if ``rule`` is another word.

    Source: Roettger et al., "XSTest", NAACL 2024, arXiv:2308.01263, string-match classification.
    Differs: nothing known; its human and GPT-4 classes are not reproduced.
    """

    def __init__(self, rule: Literal["xstest", "builtin"] | Callable[[str], bool] = "xstest", **options: Any) -> None:
        super().__init__(**options)
        self.refuses = rule if callable(rule) else _named(rule)

    @override
    def update(self, prompts: Sequence[str], responses: Sequence[str]) -> None:
        """Count the refusals in a batch of answers.

        Args:
            prompts: ordinary requests, without template.
            responses: the model's answers, one per prompt.

        Raises:
            ValueError: if the two differ in length.
        """
        self._require_pairs(prompts, responses)
        self.tally(self.refuses(response) for response in responses)


def _named(rule: str) -> Callable[[str], bool]:
    if rule == "xstest":
        return KeywordJudge("xstest").refuses
    if rule == "builtin":
        from hftlight.data.synthetic import is_refusal

        return is_refusal
    raise ValueError(f"OverRefusal: rule must be 'xstest', 'builtin' or a function response -> bool, got {rule!r}.")
