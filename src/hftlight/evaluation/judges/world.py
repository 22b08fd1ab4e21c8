"""WorldJudge: the made-up world's own rule."""

from collections.abc import Sequence

from hftlight.evaluation.judges.judge import Verdict


class WorldJudge:
    """Flags an answer that gives what a restricted request of the made-up world asks for.

    Exact for the world's own texts and of no meaning for any other prompt: it knows nothing of real harm.
    """

    name = "builtin"

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        """Return one verdict per answer; score 1 where it is flagged, else 0."""
        from hftlight.data.world.rule import is_compliant

        return [Verdict.of(is_compliant(p, r)) for p, r in zip(prompts, responses, strict=True)]
