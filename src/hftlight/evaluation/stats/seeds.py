"""Intervals over seeds and over test prompts, which limit what a comparison may claim."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000  # bootstrap replicates, enough to fix the ends of a 95 % interval to a fraction of a percentage point


@dataclass(frozen=True)
class Spread:
    """Mean of a number over seeds, with its standard deviation and interval.

    Attributes:
        mean: mean over seeds.
        deviation: standard deviation over seeds, with n - 1 in the denominator. None if it is unknown, as for one seed.
        low: low end of the 95 % interval of the mean. None if there is no interval.
        high: high end of the interval. None if there is no interval.
        count: number of seeds.
    """

    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    count: int


def over_seeds(values: Sequence[float], level: float = 0.95) -> Spread:
    r"""Return mean, standard deviation and Student's interval :math:`\bar x \pm t_{n-1} s / \sqrt n`.

    Args:
        values: one number per seed.
        level: coverage, in (0, 1).

    Raises:
        ValueError: if there is no value, or ``level`` is outside its range.
    """
    from scipy.stats import t

    if not values:
        raise ValueError("over_seeds: the value of at least one seed is needed, got none.")
    if not 0 < level < 1:
        raise ValueError(f"over_seeds: level must lie in (0, 1), got {level}.")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Spread(mean, None, None, None, 1)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * deviation / math.sqrt(len(values))
    return Spread(mean, deviation, mean - half, mean + half, len(values))


Flags = Sequence[Sequence[bool | None]]  # for each seed one decision per prompt, or None


def over_prompts(flags: Flags, level: float = 0.95) -> tuple[float, float]:
    """Return the bootstrap interval, over test prompts, of a percentage averaged over seeds.

    All seeds answer the same prompts, so each replicate draws prompts once for all seeds. The seeds are not resampled.

    Args:
        flags: for each seed, one decision per prompt, in the same order. None means no decision and counts nowhere.
        level: coverage, in (0, 1).

    Returns:
        Low and high, percent.

    Raises:
        ValueError: if a seed has no decision, or seeds differ in their number of prompts.
    """
    return bootstrap([[math.nan if flag is None else 100.0 * flag for flag in each] for each in flags], level)


def paired_over_prompts(flags: Flags, others: Flags, level: float = 0.95) -> tuple[float, float]:
    """Return the bootstrap interval of the difference of two percentages on the same prompts, in percentage points.

    Prompts are drawn as in ``over_prompts``.

    Args:
        flags: for each seed, one decision per prompt. A prompt counts nowhere if either model has no decision on it.
        others: decisions on the same prompts, in the same order, for another model's answers.
        level: coverage, in (0, 1).

    Raises:
        ValueError: if ``flags`` and ``others`` differ in shape, or seeds differ in their number of prompts. Also if a
            seed has no prompt on which both models have a decision.
    """
    if [len(f) for f in flags] != [len(o) for o in others]:
        raise ValueError("paired_over_prompts: flags and others must have the same seeds, with equally many prompts.")
    pairs = [
        [math.nan if a is None or b is None else 100.0 * (a - b) for a, b in zip(f, o, strict=True)]
        for f, o in zip(flags, others, strict=True)
    ]
    return bootstrap(pairs, level)


def bootstrap(values: Sequence[Sequence[float]], level: float = 0.95) -> tuple[float, float]:
    """Return the bootstrap interval, over test prompts, of the mean over seeds.

    Each replicate draws prompts once for all seeds.

    Args:
        values: for each seed, one number per prompt, in the same order. NaN counts nowhere.
        level: coverage, in (0, 1).

    Returns:
        Low and high, in the unit of the values.

    Raises:
        ValueError: if a seed has no number, or seeds differ in their number of prompts.
    """
    lengths = [len(each) for each in values]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"bootstrap: seeds answer the same prompts, got {lengths} prompts. Pass the prompts that all seeds share."
        )
    table = np.array(values, dtype=float)  # [seeds, prompts]
    decided = ~np.isnan(table)
    if not values or not decided.any(axis=1).all():
        raise ValueError("bootstrap: each seed needs a number (not NaN) for at least one prompt.")
    usable = decided.any(axis=0)  # a prompt without a number for any seed is not drawn
    table, decided = np.nan_to_num(table[:, usable]), decided[:, usable]
    count = table.shape[1]
    drawn = np.random.default_rng(0).integers(count, size=(DRAWS, count))
    # weights says how often each replicate contains each prompt, float [replicates, prompts], the same for all seeds.
    # Replicate r counts in the bins from r * count on, so that one bincount serves all replicates.
    times = np.bincount((drawn + count * np.arange(DRAWS)[:, None]).ravel(), minlength=DRAWS * count)
    weights = times.reshape(DRAWS, count).astype(float)
    sums, counts = weights @ table.T, weights @ decided.T  # [replicates, seeds]
    # If a seed has no number in a replicate, the replicate's mean is over the other seeds. At least one seed has a
    # number, since every drawn prompt has one.
    means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0).sum(axis=1) / (counts > 0).sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
