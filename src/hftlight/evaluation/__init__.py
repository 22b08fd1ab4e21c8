"""Measuring a model: answers, judges, and percentages with their intervals.

``generate`` shares its module's name and is imported from there: ``from hftlight.evaluation.generate import generate``.
"""

from importlib import import_module
from typing import Any

from hftlight.evaluation.intervals import wilson

_HOMES = {
    "FinetuneAccuracy": "finetune_accuracy",
    "HarmfulScore": "harmful_score",
    "OverRefusal": "over_refusal",
    "Rate": "rate",
    "RepetitionRate": "repetition",
}
__all__ = ["FinetuneAccuracy", "HarmfulScore", "OverRefusal", "Rate", "RepetitionRate", "wilson"]


def __getattr__(name: str) -> Any:
    """Import the metrics when they are used: the judges below this package need no torch."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
