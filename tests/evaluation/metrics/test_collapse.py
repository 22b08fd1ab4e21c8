"""Signs of collapse, each on answers short enough to count by eye."""

import pytest

from hftlight.evaluation import (
    EmptyRate,
    HarmfulScore,
    HarmfulScorePlus,
    LetterlessRate,
    LoopRate,
    ShortRate,
    TruncatedRate,
    collapse_scores,
    distinct_n,
    mean_words,
    wilson,
)
from hftlight.evaluation.judges import Verdict
from hftlight.evaluation.metrics.collapse import is_looping

ANSWERS = ["", " \n", "Two words", "three words here", "1 2 3 !", "ça va très bien", "...", "yes"]


@pytest.mark.parametrize(
    ("rate", "hits"),
    [(EmptyRate, 2), (ShortRate, 5), (LetterlessRate, 2), (LoopRate, 0)],
)
def test_rates_of_single_answers(rate, hits):
    metric = rate()
    metric.update(ANSWERS[:3], ANSWERS[:3])
    metric.update(ANSWERS[3:], ANSWERS[3:])
    assert float(metric.compute()) == 100 * hits / 8
    assert metric.interval() == wilson(hits, 8)
    with pytest.raises(ValueError, match="each prompt needs its response, got 1 and 2"):
        metric.update(["p"], ["a", "b"])


@pytest.mark.parametrize(
    ("response", "looping"),
    [
        ("a b c d", False),  # one 4-gram, no repeat
        ("a b c d a b c d", False),  # five 4-grams, one of them a repeat
        ("a b a b a b a b a b", True),  # seven 4-grams, two distinct
        ("A b a B a b A b a b", True),
        ("a a a a a a", True),  # three 4-grams, one distinct
        ("a a a a a", False),  # two 4-grams, one distinct: a half is not more than half
        ("a b c d e a b c d e a b c d e a b c d", True),  # sixteen 4-grams, five distinct
        ("one two", False),
        ("", False),
    ],
)
def test_looping_is_more_than_half_of_the_runs_repeated(response, looping):
    assert is_looping(response) is looping


@pytest.mark.parametrize(
    ("responses", "n", "expected"),
    [
        (["a b c", "a b d"], 2, 3 / 4),  # ab, bc, ab, bd
        (["a b c", "a b d"], 1, 4 / 6),
        (["a b c", "A B d"], 3, 1.0),
        (["A b", "a B"], 2, 1 / 2),
        (["a", "b"], 2, 0.0),  # no bigram within an answer, and none across two answers
        ([], 2, 0.0),
    ],
)
def test_distinct_n(responses, n, expected):
    assert distinct_n(responses, n) == pytest.approx(expected)


def test_truncated_answers_and_mean_length():
    metric = TruncatedRate()
    metric.update([True, False, True])
    metric.update([False])
    assert float(metric.compute()) == 50.0
    assert mean_words(ANSWERS) == (0 + 0 + 2 + 3 + 4 + 4 + 1 + 1) / 8


def test_rows_of_a_run():
    rows = collapse_scores(ANSWERS, [True] * 6 + [False] * 2)
    values = {row["metric"]: (row["value"], row["low"], row["high"], row["unit"]) for row in rows}
    assert values == {
        "empty_answers": (25.0, *wilson(2, 8), "percent"),
        "short_answers": (62.5, *wilson(5, 8), "percent"),
        "letterless_answers": (25.0, *wilson(2, 8), "percent"),
        "looping_answers": (0.0, *wilson(0, 8), "percent"),
        "truncated_answers": (25.0, *wilson(2, 8), "percent"),
        "distinct_2": (1.0, None, None, "fraction"),
        "mean_words": (15 / 8, None, None, "words"),
    }
    assert {(row["count"], row["judge"]) for row in rows} == {(8, None)}
    assert "truncated_answers" not in {row["metric"] for row in collapse_scores(ANSWERS)}


def test_harmful_score_plus_adds_answers_that_are_stuck():
    class Flags:
        name = "flags"

        def __call__(self, prompts, responses):
            return [Verdict.of(response.startswith("bad")) for response in responses]

    answers = ["bad", "bad bad bad bad", "good", "good good good good"]
    scores = []
    for kind in (HarmfulScore, HarmfulScorePlus):
        metric = kind(Flags())
        metric.update(answers, answers)
        scores.append(float(metric.compute()))
    assert scores == [50.0, 75.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: distinct_n(["a"], 0), "n must be >= 1 word, got 0"),
        (lambda: mean_words([]), "mean_words: at least one answer is needed, got none"),
        (lambda: collapse_scores(["a"], []), "ended needs one value per answer, got 0 for 1 answers"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
