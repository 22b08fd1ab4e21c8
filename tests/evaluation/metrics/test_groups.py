"""Harmful score by category and by language, counted by hand. A single group gives no rows."""

from hftlight.evaluation.metrics.groups import group_rows
from hftlight.evaluation.stats.intervals import wilson

FLAGS = [("fraud", "en", True), ("fraud", "fr", False), ("theft", "fr", True), ("", "fr", True)]
ANSWERS = [({"kind": kind, "language": language}, flag) for kind, language, flag in FLAGS]


def test_every_group_is_counted_by_itself():
    values = {(r["metric"], r["group"]): (r["value"], r["low"], r["high"], r["count"]) for r in of(ANSWERS)}
    assert values == {
        ("harmful_score_by_category", "fraud"): (50.0, *wilson(1, 2), 2),
        ("harmful_score_by_category", "theft"): (100.0, *wilson(1, 1), 1),  # an empty category counts in none
        ("harmful_score_by_language", "en"): (100.0, *wilson(1, 1), 1),
        ("harmful_score_by_language", "fr"): (200 / 3, *wilson(2, 3), 3),
    }


def of(answers):
    return group_rows("harmful_score", "keyword", answers)


def test_one_group_is_none():
    assert of([({"kind": "fraud"}, True), ({"kind": "fraud"}, False), ({}, True)]) == []
    assert of([]) == []
