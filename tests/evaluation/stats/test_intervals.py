"""Wilson's interval against the equation it solves and against values worked out by hand."""

import math

import numpy as np
import pytest

from hftlight.evaluation.stats.intervals import ratio, wilson

Z = 1.959963984540054


@pytest.mark.parametrize(("successes", "count"), [(1, 10), (50, 100), (337, 1000), (999, 1000)])
def test_each_end_lies_z_standard_errors_from_the_share(successes, count):
    """The ends are the two q with |p - q| = z sqrt(q (1 - q) / n)."""
    p = successes / count
    for q in (end / 100 for end in wilson(successes, count)):
        assert abs(p - q) == pytest.approx(Z * math.sqrt(q * (1 - q) / count), rel=1e-9)
    low, high = wilson(successes, count)
    assert low < 100 * p < high


def test_no_success_and_no_failure_keep_a_width():
    """At k = 0 the high end is z^2 / (n + z^2)."""
    assert wilson(0, 10) == (0.0, pytest.approx(100 * Z**2 / (10 + Z**2)))
    assert wilson(10, 10) == (pytest.approx(100 - 100 * Z**2 / (10 + Z**2)), 100.0)


def test_half_widths_at_a_thousand_prompts():
    for percent, half in ((50, 3.1), (20, 2.5), (5, 1.4)):
        low, high = wilson(10 * percent, 1000)
        assert (high - low) / 2 == pytest.approx(half, abs=0.05)


def test_a_higher_level_is_wider():
    narrow, wide = wilson(3, 20, level=0.5), wilson(3, 20, level=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0), "count must be > 0, got 0"),
        ((3, 2), r"successes must lie in \[0, 2\] \(the count\), got 3"),
        ((-1, 2), "got -1"),
        ((1, 2, 95), "level must lie in .* got 95.* write 0.95"),
        ((1, 2, 1.0), "level"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        wilson(*arguments)


def test_a_ratio_of_totals_by_hand():
    """With x = 1, 4, 7 and y = 1, 2, 3: R = 2, residuals -1, 0, 1, so 4.30265 sqrt(3/2 * 2) / 6 on either side."""
    half = 4.30265 * math.sqrt(3) / 6
    assert ratio([1, 4, 7], [1, 2, 3]) == pytest.approx((2 - half, 2 + half), rel=1e-5)
    assert ratio([3, 5], [1, 1], 0.5) == pytest.approx((3, 5))  # t is 1, the deviation sqrt(2): 4 -+ sqrt(2) / sqrt(2)
    assert ratio([2.0], [4]) is None


def test_rows_of_equal_loss_leave_no_width_whatever_their_lengths():
    assert ratio([2.0, 6.0, 20.0], [1, 3, 10]) == pytest.approx((2.0, 2.0))


def test_a_ratios_interval_covers_the_populations():
    """Longer rows have a lower loss per token, as instructions do. The interval covers the ratio over 10^5 rows."""
    generator = np.random.default_rng(5)

    def drawn(count):
        tokens = generator.integers(5, 80, size=count)
        return tokens * generator.gamma(4, 1 / (4 + tokens / 20)), tokens

    sums, counts = drawn(100_000)
    truth, inside = sums.sum() / counts.sum(), 0
    for _ in range(300):
        low, high = ratio(*(each.tolist() for each in drawn(40)))
        inside += low <= truth <= high
    assert 0.92 <= inside / 300 <= 0.98
