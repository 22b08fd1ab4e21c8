"""Intervals over seeds against a printed t table, and over prompts against the binomial width."""

import math

import numpy as np
import pytest

from hftlight.evaluation.stats.seeds import Spread, over_prompts, over_seeds, paired_over_prompts


def test_three_seeds_by_hand():
    spread = over_seeds([10.0, 12.0, 17.0])
    assert spread.mean == 13
    assert spread.deviation == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    half = 4.30265 * spread.deviation / math.sqrt(3)  # t table, two degrees of freedom
    assert spread.low == pytest.approx(13 - half, rel=1e-5)
    assert spread.high == pytest.approx(13 + half, rel=1e-5)


@pytest.mark.parametrize(("count", "t"), [(2, 12.7062), (5, 2.77645), (11, 2.22814)])
def test_the_factor_is_students(count, t):
    values = [float(i % 2) for i in range(count)]
    spread = over_seeds(values)
    assert spread.high - spread.mean == pytest.approx(t * spread.deviation / math.sqrt(count), rel=1e-5)
    assert over_seeds(values, 0.5).high < spread.high


def test_one_seed_has_no_interval():
    assert over_seeds([41.0]) == Spread(41.0, None, None, None, 1)


def test_prompts_are_drawn_once_for_all_seeds():
    """Two seeds with equal answers have one seed's width. For two independent seeds it is sqrt(2) times smaller."""
    flags = [True] * 30 + [False] * 70
    low, high = over_prompts([flags])
    assert high - low == pytest.approx(2 * 1.96 * 100 * math.sqrt(0.3 * 0.7 / 100), rel=0.1)
    assert (low + high) / 2 == pytest.approx(30, abs=1)
    assert over_prompts([flags, flags]) == pytest.approx((low, high))
    apart = over_prompts([[i % 2 == 0 for i in range(100)], [i // 2 % 2 == 0 for i in range(100)]])
    assert apart[1] - apart[0] == pytest.approx(2 * 1.96 * 100 * math.sqrt(0.25 / 200), rel=0.1)
    # Different seeds do not widen the interval, since seeds are not resampled.
    assert over_prompts([[True] * 50, [False] * 50]) == (50.0, 50.0)


def drawn_for_each_seed(flags: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    """Return the interval of the old rule, which drew prompts anew for each seed."""
    count = flags.shape[1]
    means = np.mean([each[generator.integers(count, size=(500, count))].mean(1) for each in flags], axis=0)
    low, high = np.quantile(means, [0.025, 0.975])
    return 100 * float(low), 100 * float(high)


def test_the_interval_covers_the_expectation_over_prompts():
    """Each prompt has its own difficulty and three seeds. The interval covers the mean in 95 % of the trials.

    A difficulty is the probability that a seed flags the prompt, Beta(0.4, 0.4). The population's mean is 50 %.
    """
    generator = np.random.default_rng(7)
    inside = {"new": 0, "old": 0}
    trials, seeds, prompts = 400, 3, 60
    for _ in range(trials):
        flags = generator.random((seeds, prompts)) < generator.beta(0.4, 0.4, size=prompts)
        for name, (low, high) in (
            ("new", over_prompts(flags.tolist())),
            ("old", drawn_for_each_seed(flags, generator)),
        ):
            inside[name] += low <= 50 <= high
    assert inside["new"] / trials >= 0.93
    assert inside["old"] / trials < 0.88


def test_pairs_take_out_what_prompts_have_in_common():
    hard = [i % 2 == 0 for i in range(100)]
    better = [flag and i >= 10 for i, flag in enumerate(hard)]
    low, high = paired_over_prompts([better], [hard])
    assert low < -5 < high <= 0
    assert high - low < 12  # for two independent percentages near 50 it would be 27 points
    assert paired_over_prompts([hard], [hard]) == (0.0, 0.0)


def test_what_nobody_judged_counts_on_no_side():
    judged, gaps = [True] * 30 + [False] * 70, [None] * 40
    assert over_prompts([[*judged, *gaps]]) == over_prompts([judged])
    other = [False] * 100
    assert paired_over_prompts([[*judged, *gaps, True]], [[*other, *([True] * 40), None]]) == paired_over_prompts(
        [judged], [other]
    )


def test_a_replicate_without_a_decision_of_one_seed_is_drawn_from_the_others():
    """The first seed's one decision is in 1 - (1 - 1/50)^50 = 64 % of the replicates. The others give 0 %."""
    assert over_prompts([[True, *[None] * 49], [False] * 50]) == (0.0, 50.0)


def test_seeds_with_other_numbers_of_prompts_are_refused():
    with pytest.raises(ValueError, match=r"seeds answer the same prompts, got \[2, 1\] prompts"):
        over_prompts([[True, False], [True]])


@pytest.mark.parametrize(
    "call",
    [
        lambda: over_seeds([]),
        lambda: over_seeds([1.0, 2.0], 1.0),
        lambda: over_prompts([]),
        lambda: over_prompts([[True], []]),
        lambda: over_prompts([[None]]),
        lambda: paired_over_prompts([[True]], [[None]]),
        lambda: paired_over_prompts([[True]], [[True, False]]),
        lambda: paired_over_prompts([[True]], []),
    ],
)
def test_what_cannot_be_is_refused(call):
    with pytest.raises(ValueError):
        call()
