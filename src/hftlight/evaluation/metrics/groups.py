"""Harmful score by category and by language, where test prompts have one."""

from collections.abc import Mapping, Sequence
from typing import Any

from hftlight.evaluation.score import Score

GROUPS = {"category": "kind", "language": "language"}  # what answers are grouped by -> field of their rows


def group_rows(metric: str, judge: str, answers: Sequence[tuple[Mapping[str, Any], bool]]) -> list[dict[str, Any]]:
    """Return ``METRIC_by_category`` and ``METRIC_by_language`` as rows of a run's scores, with Wilson's 95 % interval.

    A row's ``group`` names the category or the language. Answers without one are in no group. Where fewer than two
    groups are left, there is nothing to compare and no row.

    Args:
        metric: the score that is divided, a percentage.
        judge: whose flags are counted.
        answers: rows of ``generations.jsonl`` with the judge's flag, of the answers that it judged.
    """
    found: list[dict[str, Any]] = []
    for word, field in GROUPS.items():
        flags: dict[str, list[bool]] = {}
        for row, flag in answers:
            if group := row.get(field):
                flags.setdefault(str(group), []).append(flag)
        for group, given in sorted(flags.items()) if len(flags) > 1 else ():
            found.append(Score.share(f"{metric}_by_{word}", sum(given), len(given), judge, group).row())
    return found
