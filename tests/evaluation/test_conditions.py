"""Conditions on scores: every sign, every end of an interval, and errors that name the missing score."""

import pytest

from hftlight.errors import InputError
from hftlight.evaluation.conditions import Condition

SCORES = [
    {"metric": "harmful_score", "judge": "first", "value": 4.0, "low": 2.0, "high": 6.0},
    {"metric": "harmful_score", "judge": "second", "value": 50.0, "low": 40.0, "high": 60.0},
    {"metric": "harmful_score", "judge": "first", "value": 90.0, "low": 80.0, "high": 95.0, "group": "fraud"},
    {"metric": "perplexity", "value": 12.0, "low": None, "high": None},
]


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("harmful_score>3.9", True),
        ("harmful_score>4", False),
        ("harmful_score>=4", True),
        ("harmful_score_high>5", True),
        ("harmful_score_high > 6 %", False),
        ("harmful_score_low<2", False),
        ("harmful_score_low<=2", True),
        ("perplexity<1.3e1", True),
    ],
)
def test_a_condition_compares_value_or_end_of_the_first_judge(text, met):
    assert Condition.parse(text).holds(SCORES) is met


@pytest.mark.parametrize(
    "text", ["", "harmful_score", "harmful_score>", ">5", "harmful_score=5", "a>b", "a>1.2.3", "a>5>6"]
)
def test_another_form_is_refused(text):
    with pytest.raises(InputError, match="such as 'harmful_score_high>5'"):
        Condition.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("harm>5", "harm was not measured; measured were harmful_score, perplexity"),
        ("perplexity_high>5", "perplexity has no high end"),
    ],
)
def test_what_was_not_measured_is_no_silent_pass(text, message):
    with pytest.raises(InputError, match=message):
        Condition.parse(text).holds(SCORES)


def test_a_condition_reads_as_it_was_written():
    assert str(Condition.parse("harmful_score_high > 5")) == "harmful_score_high>5"
