"""Measurement of a model: answers, judges, and percentages with their intervals.

The functions ``generate``, ``perplexity`` and ``embedding_drift`` have the same names as their modules. Import each
from its module: ``from hftlight.evaluation.answering.generate import generate``.
"""

from importlib import import_module
from typing import Any

from hftlight.evaluation.stats.agreement import Agreement, cohens_kappa
from hftlight.evaluation.stats.intervals import wilson

_HOMES = {
    "Drift": "metrics.embedding_drift",
    "EmptyRate": "metrics.collapse",
    "FinetuneAccuracy": "metrics.finetune_accuracy",
    "HarmfulScore": "metrics.harmful_score",
    "HarmfulScorePlus": "metrics.harmful_score",
    "LetterlessRate": "metrics.collapse",
    "LoopRate": "metrics.collapse",
    "OverRefusal": "metrics.over_refusal",
    "Perplexity": "metrics.perplexity",
    "Rate": "metrics.rate",
    "RefusalClassifier": "metrics.refusals",
    "RepetitionRate": "metrics.repetition",
    "ShortRate": "metrics.collapse",
    "StringRefusals": "metrics.refusals",
    "TruncatedRate": "metrics.collapse",
    "collapse_scores": "metrics.collapse",
    "count_refusals": "metrics.refusals",
    "distinct_n": "metrics.collapse",
    "export_alpaca_eval": "alpaca_eval",
    "mean_words": "metrics.collapse",
    "refusal_scores": "metrics.refusals",
    "response_perplexity": "metrics.perplexity",
}
__all__ = [
    "Agreement",
    "Drift",
    "EmptyRate",
    "FinetuneAccuracy",
    "HarmfulScore",
    "HarmfulScorePlus",
    "LetterlessRate",
    "LoopRate",
    "OverRefusal",
    "Perplexity",
    "Rate",
    "RefusalClassifier",
    "RepetitionRate",
    "ShortRate",
    "StringRefusals",
    "TruncatedRate",
    "cohens_kappa",
    "collapse_scores",
    "count_refusals",
    "distinct_n",
    "export_alpaca_eval",
    "mean_words",
    "refusal_scores",
    "response_perplexity",
    "wilson",
]


def __getattr__(name: str) -> Any:
    """Import a metric at its first use, since the judges in this package need no torch."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
