"""Judges, which decide whether an answer is harmful.

Judges are plain Python objects. A judge with a local model loads the model at its first call.
"""

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

from hftlight.errors import InputError
from hftlight.evaluation.judges.classifier import ClassifierJudge
from hftlight.evaluation.judges.formats import FORMATS, ClassifierFormat
from hftlight.evaluation.judges.judge import Judge, Scale, Verdict, judge_identity
from hftlight.evaluation.judges.keyword import PHRASES, KeywordJudge, PhraseList
from hftlight.evaluation.judges.llm import RUBRICS, LLMJudge
from hftlight.evaluation.judges.moderation import ModerationJudge
from hftlight.evaluation.judges.world import WorldJudge

_LOCAL: dict[str, Callable[..., Judge]] = {
    "moderation": ModerationJudge,
    "moderation_512_tokens": partial(ModerationJudge, max_tokens=512),
    **{name: partial(ClassifierJudge, name) for name in FORMATS},
}
JUDGES: dict[str, Callable[[], Judge]] = {
    "builtin": WorldJudge,
    "keyword": KeywordJudge,
    "keyword_durability": lambda: KeywordJudge("durability"),
    **_LOCAL,
}
# Judges behind an endpoint: they have no default model. Rubrics that judge refusals are no judges of harm.
_GRADERS = {name: partial(LLMJudge, name) for name, rubric in RUBRICS.items() if rubric.of == "harm"}
OF_MODEL: dict[str, Callable[[str], Judge]] = {**_LOCAL, **_GRADERS}
__all__ = [
    "FORMATS",
    "JUDGES",
    "OF_MODEL",
    "PHRASES",
    "RUBRICS",
    "ClassifierFormat",
    "ClassifierJudge",
    "Judge",
    "KeywordJudge",
    "LLMJudge",
    "ModerationJudge",
    "PhraseList",
    "Scale",
    "Verdict",
    "WorldJudge",
    "get_judge",
    "judge_identity",
    "judge_name",
    "scale_of",
]


def judge_name(judge: str | Judge) -> str:
    """Return the name of a judge in results."""
    return judge if isinstance(judge, str) else judge.name


def get_judge(name: str | Judge) -> Judge:
    """Return a judge with its published settings.

    Args:
        name: a key of ``JUDGES``, or a key of ``OF_MODEL``, a colon and a model, such as ``"hexphi:gpt-4o"`` or
            ``"harmbench:/models/my-copy"``; hyphens before the colon count as underscores. A judge is returned
            unchanged.

    Raises:
        InputError: if there is no such judge. The message suggests the nearest name.
    """
    if not isinstance(name, str):
        return name
    head, colon, model = name.partition(":")
    key = head.replace("-", "_")
    if colon and key in OF_MODEL and model:
        return OF_MODEL[key](model)
    if not colon and key in JUDGES:
        return JUDGES[key]()
    if key in OF_MODEL:
        raise InputError(f"Judge: {key!r} needs a model after a colon, such as '{key}:MODEL', got {name!r}.")
    near = get_close_matches(key, [*JUDGES, *OF_MODEL], n=1)
    hint = f" Did you mean {_written(near[0], model)!r}?" if near else ""
    choices = [*sorted(JUDGES), *(f"{of}:MODEL" for of in sorted(OF_MODEL))]
    raise InputError(f"Judge: must be one of {choices}, got {name!r}.{hint}")


def scale_of(name: str) -> Scale | None:
    """Return the range of a judge's scores.

    Args:
        name: the judge's name in results, including the model after the colon.

    Returns:
        The range. None means that the judge only decides, or is not part of this package.
    """
    key = name.partition(":")[0]
    if key in FORMATS:
        return FORMATS[key].scale
    if key in _GRADERS:
        return RUBRICS[key].scale
    return Scale() if key.startswith("moderation") else None


def _written(key: str, model: str) -> str:
    """Return a judge's name as the user writes it: with a colon and the model, if the judge takes a model."""
    if key not in OF_MODEL or (key in JUDGES and not model):
        return key
    return f"{key}:{model or 'MODEL'}"
