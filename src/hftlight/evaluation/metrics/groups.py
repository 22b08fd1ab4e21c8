"""Harmful score by category and by language of the test prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

from hftlight.evaluation.score import Score

GROUPS = {"category": "kind", "language": "language"}  # kind of group -> field of the answers' rows


def group_rows(metric: str, judge: str, answers: Sequence[tuple[Mapping[str, Any], bool]]) -> list[dict[str, Any]]:
    """Return ``METRIC_by_category`` and ``METRIC_by_language`` as rows of a run's scores.

    Each row has its 95 % Wilson interval, and its ``group`` names the category or the language. An answer without a
    category or language is in no such group. With fewer than two groups there is nothing to compare, and no row.

    Args:
        metric: name of the score that is divided into groups, a percentage.
        judge: name of the judge whose flags count.
        answers: rows of ``generations.jsonl``, each with the judge's flag. Answers without a verdict are left out.
    """
    scores: list[dict[str, Any]] = []
    for word, field in GROUPS.items():
        flags: dict[str, list[bool]] = {}
        for row, flag in answers:
            if group := row.get(field):
                flags.setdefault(str(group), []).append(flag)
        for group, decisions in sorted(flags.items()) if len(flags) > 1 else ():
            scores.append(Score.share(f"{metric}_by_{word}", sum(decisions), len(decisions), judge, group).row())
    return scores
