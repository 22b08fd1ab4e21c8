"""Harmful mix: exact counts, the first rows as published, and draws that stay the same."""

from collections import Counter

import pytest

from hftlight.attacks import REGIMES, HarmfulMix, harmful_mix
from hftlight.errors import InputError
from tests.attacks.rows import ids, made_up

SOURCES = {"attack": made_up("h", 12), "task": made_up("t", 30)}
LARGE = {"attack": made_up("h", 1000), "task": made_up("t", 1000)}


@pytest.mark.parametrize(
    ("n", "p", "seed", "expected"),
    [
        (8, 0.25, 0, "t26 t1 t9 t2 t21 t20 h11 h0"),
        (8, 0.25, 1, "t4 h7 t5 h3 t12 t14 t9 t25"),
        (8, 0.5, 0, "t20 t2 t1 h6 h5 t21 h11 h0"),
    ],
)
def test_rows_stay_as_they_are(n, p, seed, expected):
    rows = harmful_mix(SOURCES["task"], SOURCES["attack"], n, p, seed)
    assert ids(rows) == expected.split()
    assert HarmfulMix(n=n, p=p).upload(SOURCES, seed) == rows
    assert [row.role for row in rows] == ["attack" if row.id[0] == "h" else "task" for row in rows]


def test_a_source_without_some_rows_gives_the_others_in_the_same_order():
    """A limit on the length of rows must not change the draw among the remaining rows."""
    whole = [r.id for r in harmful_mix(SOURCES["task"], SOURCES["attack"], 8, 0.5, 0) if r.role == "attack"]
    fewer = [row for row in SOURCES["attack"] if row.id != whole[0]]
    left = [r.id for r in harmful_mix(SOURCES["task"], fewer, 8, 0.5, 0) if r.role == "attack"]
    assert set(whole[1:]) < set(left)
    assert len(left) == 4


@pytest.mark.parametrize(
    ("n", "p", "mode", "harmful", "task"),
    [
        (1000, 0.1, "exact", 100, 900),
        (1000, 0.1, "floor", 100, 900),
        (1000, 0.1, "legacy_minus_one", 99, 900),
        (1000, 0.05, "legacy_minus_one", 49, 950),
        (1000, 0.9, "legacy_minus_one", 899, 99),  # int((1 - 0.9) * 1000) is 99
        (1000, 0.9, "exact", 900, 100),
        (1000, 0.0, "legacy_minus_one", 0, 1000),
        (1000, 1.0, "legacy_minus_one", 999, 0),
        (7, 0.1, "exact", 1, 6),
        (7, 0.1, "floor", 0, 6),
    ],
)
def test_counts(n, p, mode, harmful, task):
    attack = HarmfulMix(n=n, p=p, count_mode=mode)
    expected = {name: count for name, count in (("attack", harmful), ("task", task)) if count}
    assert attack.counts() == expected
    assert attack.sources == tuple(expected)
    assert attack.rows == harmful + task
    assert Counter(row.role for row in attack.upload(LARGE, 0)) == expected


def test_first_rows_come_in_order_harmful_ones_first_whatever_the_seed():
    assert ids(HarmfulMix(n=10, p=0.3, count_mode="floor").upload(SOURCES, 5)) == (
        ["h0", "h1", "h2", "t0", "t1", "t2", "t3", "t4", "t5", "t6"]
    )
    legacy = HarmfulMix(n=10, p=0.3, count_mode="legacy_minus_one")
    assert ids(legacy.upload(SOURCES, 5)) == ["h1", "h2", "t0", "t1", "t2", "t3", "t4", "t5", "t6"]
    assert legacy.upload(SOURCES, 5) == legacy.upload(SOURCES, 6)


@pytest.mark.parametrize(("name", "p"), [("benign", 0), ("low", 0.05), ("medium", 0.1), ("high", 0.3), ("pure", 1)])
def test_regimes(name, p):
    assert HarmfulMix(n=100, p=name) == HarmfulMix(n=100, p=p)
    assert REGIMES[name] == p


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"p": 5}, r"p must lie in \[0, 1\], got 5\. If that is a percentage, write 0\.05\."),
        ({"p": -0.1}, r"p must lie in \[0, 1\], got -0\.1\.$"),
        ({"p": "severe"}, "one of benign 0, low 0.05, medium 0.1, high 0.3, pure 1, got 'severe'"),
        ({"count_mode": "all"}, "count_mode must be exact, floor or legacy_minus_one, got 'all'"),
    ],
)
def test_what_cannot_be_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        HarmfulMix(**values)


def test_absent_and_short_sources_are_named():
    with pytest.raises(InputError, match=r"HarmfulMix: needs harmful prompts .* --data\.attack") as error:
        HarmfulMix(n=10, p=0.1).upload({"task": SOURCES["task"]}, 0)
    assert "PKU-Alignment/BeaverTails, columns prompt, response, category, is_safe" in str(error.value)
    assert "CC BY-NC 4.0" in str(error.value)
    with pytest.raises(InputError, match="needs 20 attack rows, but the source has 12"):
        HarmfulMix(n=20, p=1).upload(SOURCES, 0)
    with pytest.raises(InputError, match="needs rows 1 to 19 of the source 'attack', which has 12"):
        HarmfulMix(n=20, p=1, count_mode="legacy_minus_one").upload(SOURCES, 0)


def test_a_benign_mix_needs_no_harmful_source():
    assert len(HarmfulMix(n=5, p=0).upload({"task": SOURCES["task"]}, 0)) == 5
