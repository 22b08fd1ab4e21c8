"""The intervals that reported percentages and losses carry."""

import math
from collections.abc import Sequence
from statistics import NormalDist


def wilson(successes: float, count: int, level: float = 0.95) -> tuple[float, float]:
    r"""Return the Wilson score interval of a proportion.

    With k successes among n, p = k/n and z the normal quantile of (1 + level)/2, the ends are

    .. math:: \frac{p + z^2/2n \pm z \sqrt{p(1 - p)/n + z^2/4n^2}}{1 + z^2/n}

    It stays inside 0-100 and keeps a width at k = 0 and k = n. It covers the drawing of the prompts, not the spread
    over training seeds.

    Args:
        successes: k, 0 <= k <= n; a sum of numbers in [0, 1] may take its place.
        count: n, > 0.
        level: probability that the interval covers the true proportion, in (0, 1).

    Returns:
        Low and high end, percent.

    Raises:
        ValueError: if an argument is outside its range.
    """
    if count <= 0:
        raise ValueError(f"wilson: count must be > 0, got {count}; nothing was measured.")
    if not 0 <= successes <= count:
        raise ValueError(f"wilson: successes must lie in [0, {count}] (the count), got {successes}.")
    if not 0 < level < 1:
        raise ValueError(f"wilson: level must lie in (0, 1), got {level}. If that is a percentage, write 0.95 for 95.")
    z = NormalDist().inv_cdf((1 + level) / 2)
    p, weight = successes / count, z * z / count
    middle = p + weight / 2
    half = z * math.sqrt(p * (1 - p) / count + weight / (4 * count))
    low, high = ((middle + side * half) / (1 + weight) for side in (-1, 1))
    # At k = 0 and k = n the end is exact, which the subtraction of equal terms only nearly gives.
    return (0.0 if successes == 0 else 100 * low), (100.0 if successes == count else 100 * high)


def ratio(sums: Sequence[float], counts: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    r"""Return the interval of a ratio of two totals over drawn rows, such as nats per token.

    Rows are the unit that is drawn. With the sum x and the count y of each of n rows and R = sum x / sum y, the ends
    are those of the linearized ratio estimator with Student's t,

    .. math:: R \pm t_{n-1} \frac{\sqrt{\frac{n}{n-1} \sum_i (x_i - R y_i)^2}}{\sum_i y_i}

    Args:
        sums: x of each row.
        counts: y of each row, >= 0, not all 0.
        level: probability that the interval covers the ratio, in (0, 1).

    Returns:
        Low and high end; None for one row.
    """
    from scipy.stats import t

    n, total = len(sums), math.fsum(counts)
    if n < 2:
        return None
    value = math.fsum(sums) / total
    squares = math.fsum((x - value * y) ** 2 for x, y in zip(sums, counts, strict=True))
    half = float(t.ppf((1 + level) / 2, n - 1)) * math.sqrt(n / (n - 1) * squares) / total
    return value - half, value + half
