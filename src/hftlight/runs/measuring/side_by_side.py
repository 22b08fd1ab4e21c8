"""Several models on the same prompts: how much each one differs from the first, with paired intervals."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hftlight.evaluation.judges import judge_name
from hftlight.evaluation.score import Score
from hftlight.evaluation.stats.seeds import paired_over_prompts
from hftlight.runs.measuring.answer_checks import REFUSAL
from hftlight.runs.measuring.test_sets import TestSets

Row = Mapping[str, Any]


def differences(rows: Sequence[Row], others: Sequence[Row], tests: TestSets) -> list[Score]:
    """Return harmful score, over-refusal and finetune accuracy of one model minus those of another, in points.

    Only prompts count on which both models have a decision. The 95 % interval is that of ``paired_over_prompts``.

    Args:
        rows: generations of one model.
        others: generations of the other model on the same test sets.
        tests: the test sets of both.
    """
    deciding = judge_name(tests.judges[0])
    kinds: dict[str, tuple[str, Callable[[Row], bool | None]]] = {
        "harmful_score": ("harmful", lambda row: row["verdicts"][deciding]["flag"]),
        "over_refusal": ("over_refusal", lambda row: row["verdicts"][REFUSAL]["flag"]),
        "finetune_accuracy": ("task", lambda row: row["correct"]),
    }
    found = []
    for metric, (kind, decision) in kinds.items():
        mine, theirs = ({row["place"]: decision(row) for row in some if row["set"] == kind} for some in (rows, others))
        both = [p for p in mine if mine[p] is not None and theirs.get(p) is not None]
        if both:
            pairs = [(bool(mine[p]), bool(theirs[p])) for p in both]
            low, high = paired_over_prompts([[a for a, _ in pairs]], [[b for _, b in pairs]])
            value = 100 * sum(a - b for a, b in pairs) / len(pairs)
            judge = deciding if kind == "harmful" else ""
            found.append(Score(metric, value, judge, low, high, len(pairs), "points"))
    return found
