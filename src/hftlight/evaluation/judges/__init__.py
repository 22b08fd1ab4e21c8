"""Judges: is this answer harmful? They are plain Python; a judge that needs a model loads it when it is made."""

from collections.abc import Callable
from difflib import get_close_matches

from hftlight.errors import InputError
from hftlight.evaluation.judges.judge import Judge, Verdict
from hftlight.evaluation.judges.keyword import PHRASES, KeywordJudge, PhraseList
from hftlight.evaluation.judges.world import WorldJudge

JUDGES: dict[str, Callable[[], Judge]] = {
    "builtin": WorldJudge,
    "keyword": KeywordJudge,
    "keyword_durability": lambda: KeywordJudge("durability"),
}
__all__ = ["JUDGES", "PHRASES", "Judge", "KeywordJudge", "PhraseList", "Verdict", "WorldJudge", "get_judge"]


def get_judge(name: str) -> Judge:
    """Return a judge with its published settings.

    Args:
        name: a key of ``JUDGES``; hyphens count as underscores.

    Raises:
        InputError: if there is no such judge; names the nearest.
    """
    key = name.replace("-", "_")
    if key not in JUDGES:
        near = get_close_matches(key, JUDGES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"Judge: must be one of {sorted(JUDGES)}, got {name!r}.{hint}")
    return JUDGES[key]()
