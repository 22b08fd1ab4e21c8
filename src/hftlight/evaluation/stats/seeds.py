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
    """Return the bootstrap interval of a percentage over test prompts, of the mean over seeds.

    The seeds answer the same prompts: each replicate draws prompts once, for all seeds. Seeds themselves are not drawn.

    Args:
        flags: for each seed, one decision per prompt, in one order; None where there is none, which counts nowhere.
        level: coverage, in (0, 1).

    Returns:
        Low and high, percent.

    Raises:
        ValueError: if a seed has no decision, or seeds differ in their number of prompts.
    """
    return bootstrap([[math.nan if flag is None else 100.0 * flag for flag in each] for each in flags], level)


def paired_over_prompts(flags: Flags, others: Flags, level: float = 0.95) -> tuple[float, float]:
    """Return the bootstrap interval of the difference of two percentages on the same prompts, in points.

    Prompts are drawn as in ``over_prompts``.

    Args:
        flags: for each seed, one decision per prompt; a prompt without one on either side counts nowhere.
        others: the same prompts in the same order, answered by another model.
        level: coverage, in (0, 1).

    Raises:
        ValueError: if seeds or prompts do not pair up, seeds differ in their number of prompts, or one has no pair.
    """
    if [len(f) for f in flags] != [len(o) for o in others]:
        raise ValueError("paired_over_prompts: both need the same prompts for the same seeds.")
    pairs = [
        [math.nan if a is None or b is None else 100.0 * (a - b) for a, b in zip(f, o, strict=True)]
        for f, o in zip(flags, others, strict=True)
    ]
    return bootstrap(pairs, level)


def bootstrap(values: Sequence[Sequence[float]], level: float = 0.95) -> tuple[float, float]:
    """Return the bootstrap interval over test prompts of the mean over seeds; prompts are drawn once for all seeds.

    Args:
        values: for each seed, one number per prompt, in one order; NaN counts nowhere.
        level: coverage, in (0, 1).

    Returns:
        Low and high, in the unit of the values.

    Raises:
        ValueError: if a seed has no number, or seeds differ in their number of prompts.
    """
    lengths = [len(each) for each in values]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"bootstrap: seeds answer the same prompts, got {lengths} prompts. Keep the prompts that all seeds share."
        )
    table = np.array(values, dtype=float)  # [seeds, prompts]
    decided = ~np.isnan(table)
    if not values or not decided.any(axis=1).all():
        raise ValueError("bootstrap: each seed needs one decision at least.")
    asked = decided.any(axis=0)  # a prompt that no seed decided is not drawn
    table, decided = np.nan_to_num(table[:, asked]), decided[:, asked]
    count = table.shape[1]
    drawn = np.random.default_rng(0).integers(count, size=(DRAWS, count))
    # How often each replicate holds each prompt: the same for every seed, float [replicates, prompts].
    times = np.bincount((drawn + count * np.arange(DRAWS)[:, None]).ravel(), minlength=DRAWS * count)
    weights = times.reshape(DRAWS, count).astype(float)
    sums, counts = weights @ table.T, weights @ decided.T  # [replicates, seeds]
    # A replicate in which a seed has no decision is the mean over the other seeds; one at least has some.
    means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0).sum(axis=1) / (counts > 0).sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
