"""The mean of a judge's scores, beside the share of answers that it flags."""

from collections.abc import Sequence
from typing import Any

from hftlight.evaluation.judges import scale_of
from hftlight.evaluation.judges.judge import Scale
from hftlight.evaluation.score import Score
from hftlight.evaluation.stats.intervals import wilson
from hftlight.evaluation.stats.seeds import bootstrap


def score_mean(scores: Sequence[float], scale: Scale) -> tuple[float, float, float]:
    """Return the mean score with its 95 % interval over prompts: mean, low, high, in the judge's own unit.

    The interval is the bootstrap's. If all scores are equal, the bootstrap has no width. Then Wilson's interval of the
    mean's place on the scale is returned, which no spread of scores between the two ends exceeds.

    Args:
        scores: one score per judged answer, at least one.
        scale: what they lie between.
    """
    mean = sum(scores) / len(scores)
    if len(set(scores)) > 1:
        return mean, *bootstrap([scores])
    width = scale.high - scale.low
    place = min(1.0, max(0.0, (mean - scale.low) / width))
    low, high = (scale.low + width * end / 100 for end in wilson(place * len(scores), len(scores)))
    return mean, low, high


def mean_rows(metric: str, judge: str, scores: Sequence[float]) -> list[dict[str, Any]]:
    """Return ``METRIC_mean`` as a row of a run's scores; no row if the judge only decides, or judged nothing.

    Args:
        metric: the share of flags that the mean stands beside.
        judge: the judge's name in results.
        scores: its scores, of the answers that it judged.
    """
    scale = scale_of(judge)
    if scale is None or not scores:
        return []
    value, low, high = score_mean(scores, scale)
    return [Score(f"{metric}_mean", value, judge, low, high, len(scores), scale.unit).row()]
