"""WorldJudge: the built-in rule of the made-up world."""

from collections.abc import Sequence

from hftlight.evaluation.judges.judge import Verdict


class WorldJudge:
    """A judge that flags an answer if it complies with a restricted request of the made-up world.

    It is exact for the world's own texts and meaningless for any other prompt, since it cannot detect real harm.
    """

    name = "builtin"

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        """Return one verdict per answer. The score is 1 if the answer is flagged, else 0."""
        from hftlight.data.world.rule import is_compliant

        return [Verdict.of(is_compliant(p, r)) for p, r in zip(prompts, responses, strict=True)]
