"""Guards, which decide what a model may train on.

A guard reads rows before training, and a judge reads answers after it. Every judge is a guard too.
"""

from collections.abc import Callable

from hftlight.evaluation.guards.guard import Guard, GuardScore, scores_of
from hftlight.evaluation.guards.judged import JudgeGuard, same_model
from hftlight.evaluation.guards.minilm import MiniLMGuard
from hftlight.evaluation.guards.rates import filter_rates
from hftlight.evaluation.judges import get_judge

GUARDS: dict[str, Callable[[str | None], Guard]] = {"minilm": MiniLMGuard}
__all__ = [
    "GUARDS",
    "Guard",
    "GuardScore",
    "JudgeGuard",
    "MiniLMGuard",
    "filter_rates",
    "get_guard",
    "same_model",
    "scores_of",
]


def get_guard(name: str | Guard) -> Guard:
    """Return a guard by name.

    Args:
        name: a key of ``GUARDS``, or such a key, a colon and the folder of its model, or the name of a judge as
            ``get_judge`` takes it. A guard is returned unchanged.

    Raises:
        InputError: if there is no such guard and no such judge.
    """
    if not isinstance(name, str):
        return name
    head, _, model = name.partition(":")
    return GUARDS[head](model or None) if head in GUARDS else JudgeGuard(get_judge(name))
