"""Intervals over seeds and over test prompts: what a comparison may claim."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000  # bootstrap samples: the ends of a 95 % interval are then known to a fraction of a point


@dataclass(frozen=True)
class Spread:
    """A number over seeds.

    Attributes:
        mean: over seeds.
        deviation: standard deviation over seeds, n - 1 in the denominator; None for one seed.
        low: lower end of the 95 % interval of the mean; None where there is none.
        high: its upper end.
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
        raise ValueError("over_seeds: needs the value of one seed at least.")
    if not 0 < level < 1:
        raise ValueError(f"over_seeds: level must lie in (0, 1), got {level}.")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Spread(mean, None, None, None, 1)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * deviation / math.sqrt(len(values))
    return Spread(mean, deviation, mean - half, mean + half, len(values))


Flags = Sequence[Sequence[bool | None]]  # of each seed, in the order of its prompts


def over_prompts(flags: Flags, level: float = 0.95) -> tuple[float, float]:
    """Return the bootstrap interval of a percentage: prompts are drawn again within each seed, seeds stay.

    Args:
        flags: for each seed, one decision per prompt; None where there is none, which counts nowhere.
        level: coverage, in (0, 1).

    Returns:
        Low and high, percent.

    Raises:
        ValueError: if a seed has no decision.
    """
    return _bootstrap([np.array([flag for flag in each if flag is not None], dtype=float) for each in flags], level)


def paired_over_prompts(flags: Flags, others: Flags, level: float = 0.95) -> tuple[float, float]:
    """Return the bootstrap interval of the difference of two percentages on the same prompts, in points.

    Args:
        flags: for each seed, one decision per prompt; a prompt without one on either side counts nowhere.
        others: the same prompts in the same order, answered by another model.
        level: coverage, in (0, 1).

    Raises:
        ValueError: if seeds or prompts do not pair up.
    """
    if [len(f) for f in flags] != [len(o) for o in others]:
        raise ValueError("paired_over_prompts: both need the same prompts for the same seeds.")
    pairs = [
        [float(a) - float(b) for a, b in zip(f, o, strict=True) if a is not None and b is not None]
        for f, o in zip(flags, others, strict=True)
    ]
    return _bootstrap([np.array(each) for each in pairs], level)


def _bootstrap(values: Sequence[np.ndarray], level: float) -> tuple[float, float]:
    if not values or not all(len(v) for v in values):
        raise ValueError("Bootstrap: each seed needs one decision at least.")
    generator = np.random.default_rng(0)
    means = np.mean([v[generator.integers(len(v), size=(DRAWS, len(v)))].mean(1) for v in values], axis=0)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return 100 * float(low), 100 * float(high)
