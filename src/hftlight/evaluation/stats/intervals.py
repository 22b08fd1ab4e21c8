"""Intervals of reported percentages and losses."""

import math
from collections.abc import Sequence
from statistics import NormalDist


def wilson(successes: float, count: int, level: float = 0.95) -> tuple[float, float]:
    r"""Return the Wilson score interval of a proportion.

    With k successes among n answers, p = k/n and z the normal quantile of (1 + level)/2, the ends are

    .. math:: \frac{p + z^2/2n \pm z \sqrt{p(1 - p)/n + z^2/4n^2}}{1 + z^2/n}

    The interval stays inside 0-100 percent, and its width is positive even at k = 0 and k = n. The interval covers the
    sampling of the test prompts, not the variation over training seeds.

    Args:
        successes: k, 0 <= k <= n. A sum of numbers in [0, 1] is allowed too.
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
    # The low end is exactly 0 at k = 0, and the high end exactly 100 at k = n. The formula gives both only up to
    # rounding, since it subtracts equal terms.
    return (0.0 if successes == 0 else 100 * low), (100.0 if successes == count else 100 * high)


def ratio(sums: Sequence[float], counts: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    r"""Return the interval of the ratio of two totals over sampled rows, such as nats per token.

    The sampled unit is the row. Row i of n has the sum x_i and the count y_i, and R = sum x / sum y. The linearized
    ratio estimator with Student's t gives the ends

    .. math:: R \pm t_{n-1} \frac{\sqrt{\frac{n}{n-1} \sum_i (x_i - R y_i)^2}}{\sum_i y_i}

    Args:
        sums: x of each row.
        counts: y of each row, >= 0, not all 0.
        level: probability that the interval covers the ratio, in (0, 1).

    Returns:
        Low and high end. None if there are fewer than two rows.
    """
    from scipy.stats import t

    n, total = len(sums), math.fsum(counts)
    if n < 2:
        return None
    value = math.fsum(sums) / total
    squares = math.fsum((x - value * y) ** 2 for x, y in zip(sums, counts, strict=True))
    half = float(t.ppf((1 + level) / 2, n - 1)) * math.sqrt(n / (n - 1) * squares) / total
    return value - half, value + half
