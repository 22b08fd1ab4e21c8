"""JudgeGuard: any judge of harm as a guard."""

from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from hftlight.evaluation.guards.guard import Guard, GuardScore
from hftlight.evaluation.judges import Judge, judge_identity


class JudgeGuard(Guard):
    """A guard that asks a judge of harm about each answer.

    A harmful verdict scores 1 and a harmless one 0. The judge's own threshold decides. If the judge cannot judge an
    answer, the guard is unsure. A judge scores answers only, so it has no score for a request.

    Args:
        judge: the judge.
    """

    decides = True

    def __init__(self, judge: Judge) -> None:
        self.judge, self.name = judge, judge.name

    @override
    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[GuardScore]:
        return [float(v.flag) if v.judged else None for v in self.judge(prompts, responses)]

    @override
    def identity(self) -> dict[str, Any]:
        return judge_identity(self.judge)


def same_model(one: Judge, other: Judge) -> bool:
    """Tell whether two judges decide by the same model, whatever their thresholds and token limits.

    Equal weights, or equal names of a model behind an endpoint, are the same model. Two judges without a model are the
    same if they have the same class, such as two lists of refusal phrases.
    """
    if one.name == other.name:
        return True
    facts, others = (dict(j.identity()) if hasattr(j, "identity") else {} for j in (one, other))
    for fact in ("weights", "model"):
        if fact in facts or fact in others:
            return facts.get(fact) == others.get(fact)
    return type(one) is type(other)
