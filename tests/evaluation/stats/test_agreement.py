"""Cohen's kappa on tables worked by hand, and on tables where kappa is 0/0."""

import math

import pytest

from hftlight.evaluation.stats.agreement import Agreement, cohens_kappa


def test_a_table_worked_by_hand():
    """20, 5, 10, 15: p_o = 35/50, p_e = (25 * 30 + 25 * 20) / 2500 = 1/2. Kappa = (0.7 - 0.5) / 0.5."""
    first = [True] * 25 + [False] * 25
    second = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    result = cohens_kappa(first, second)
    assert result == Agreement(20, 5, 10, 15)
    assert (result.count, result.observed, result.expected) == (50, 0.7, 0.5)
    assert result.kappa == pytest.approx(0.4, abs=1e-15)


def test_an_uneven_table():
    """45, 15, 25, 15: p_o = 0.6, p_e = (60 * 70 + 40 * 30) / 10000 = 0.54, kappa = 0.06 / 0.46."""
    result = Agreement(45, 15, 25, 15)
    assert result.expected == pytest.approx(0.54, abs=1e-15)
    assert result.kappa == pytest.approx(6 / 46, abs=1e-15)


@pytest.mark.parametrize(
    ("first", "second", "kappa"),
    [
        ([1, 0], [1, 0], 1.0),
        ([1, 0], [0, 1], -1.0),
        ([1, 1, 0, 0], [1, 0, 1, 0], 0.0),
        ([1, 1, 1], [1, 0, 1], 0.0),  # one judge never varies
        ([0, 0], [1, 1], 0.0),
        ([1], [1], math.nan),  # neither judge varies
        ([0, 0, 0], [0, 0, 0], math.nan),
    ],
)
def test_extremes(first, second, kappa):
    result = cohens_kappa(list(map(bool, first)), list(map(bool, second))).kappa
    assert result == kappa or (math.isnan(kappa) and math.isnan(result))


def test_judges_may_change_places():
    assert Agreement(3, 1, 4, 2).kappa == Agreement(3, 4, 1, 2).kappa


def test_what_is_no_flag_is_refused():
    with pytest.raises(ValueError, match="same answers, got 1 and 2 flags"):
        cohens_kappa([True], [True, False])
    with pytest.raises(ValueError, match="at least one answer"):
        cohens_kappa([], [])
    with pytest.raises(ValueError, match=r"second\[1\] must be a flag .* got 0.7. Pass verdict.flag"):
        cohens_kappa([True, False], [True, 0.7])  # type: ignore[list-item]
