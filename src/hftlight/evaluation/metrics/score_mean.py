"""Mean of a judge's scores, reported beside the percentage of answers that the judge flags."""

from collections.abc import Sequence
from typing import Any

from hftlight.evaluation.judges import scale_of
from hftlight.evaluation.judges.judge import Scale
from hftlight.evaluation.score import Score
from hftlight.evaluation.stats.intervals import wilson
from hftlight.evaluation.stats.seeds import bootstrap


def score_mean(scores: Sequence[float], scale: Scale) -> tuple[float, float, float]:
    """Return the mean score with its 95 % interval over prompts: mean, low, high, in the judge's own unit.

    The interval is the bootstrap interval. If all scores are equal, the bootstrap interval has no width. Then the
    function returns Wilson's interval, with the mean's position on the scale as the proportion. No distribution of
    scores between the ends of the scale needs a wider one.

    Args:
        scores: one score per judged answer, at least one.
        scale: the lowest and the highest score of the judge.
    """
    mean = sum(scores) / len(scores)
    if len(set(scores)) > 1:
        return mean, *bootstrap([scores])
    width = scale.high - scale.low
    place = min(1.0, max(0.0, (mean - scale.low) / width))
    low, high = (scale.low + width * end / 100 for end in wilson(place * len(scores), len(scores)))
    return mean, low, high


def mean_rows(metric: str, judge: str, scores: Sequence[float]) -> list[dict[str, Any]]:
    """Return ``METRIC_mean`` as a row of a run's scores, or no row if the judge gives no scores.

    Args:
        metric: name of the percentage of flags that the mean accompanies.
        judge: the judge's name in results.
        scores: the judge's scores of the answers that it judged.
    """
    scale = scale_of(judge)
    if scale is None or not scores:
        return []
    value, low, high = score_mean(scores, scale)
    return [Score(f"{metric}_mean", value, judge, low, high, len(scores), scale.unit).row()]
