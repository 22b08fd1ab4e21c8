"""The interface of guards: what a guard sees, what it may return, and judges as guards."""

import math

import pytest

from hftlight.data.records import Record
from hftlight.errors import InputError, RunError
from hftlight.evaluation.guards import Guard, JudgeGuard, filter_rates, get_guard, same_model, scores_of
from hftlight.evaluation.judges import ClassifierJudge, KeywordJudge, Verdict, WorldJudge, get_judge
from hftlight.evaluation.stats.intervals import wilson


class Lengths(Guard):
    """Scores a row by the length of its texts, and keeps what it was shown."""

    name, reads_prompts = "lengths", True

    def __init__(self):
        self.shown = []

    def score(self, prompts, responses):
        self.shown.append(list(zip(prompts, responses, strict=True)))
        return [len(p + r) / 100 for p, r in zip(prompts, responses, strict=True)]

    def score_prompts(self, prompts):
        return [len(p) / 100 for p in prompts]


PROMPTS, RESPONSES = ["bbb", "a", "cc", "a"], ["x", "yy", "z", "yy"]


def test_scores_come_back_in_the_order_of_the_rows():
    assert scores_of(Lengths(), PROMPTS, RESPONSES) == [0.04, 0.03, 0.03, 0.03]
    assert scores_of(Lengths(), PROMPTS) == [0.03, 0.01, 0.02, 0.01]
    assert scores_of(Lengths(), [], []) == []


def test_a_guard_sees_each_different_row_once_in_an_order_of_its_own():
    one, other = Lengths(), Lengths()
    scores_of(one, PROMPTS, RESPONSES)
    scores_of(other, PROMPTS[::-1], RESPONSES[::-1])
    assert one.shown == other.shown == [[("a", "yy"), ("bbb", "x"), ("cc", "z")]]


@pytest.mark.parametrize("returned", [[0.5], [0.5, 1.5], [0.5, -0.1], [0.5, math.nan], [0.5, 0.5, 0.5]])
def test_scores_that_are_no_probabilities_are_refused(returned):
    guard = Lengths()
    guard.score = lambda prompts, responses: returned
    with pytest.raises(RunError, match="Guard 'lengths': "):
        scores_of(guard, ["a", "b"], ["c", "d"])


def test_a_crash_goes_through():
    guard = Lengths()
    guard.score = lambda prompts, responses: 1 / 0
    with pytest.raises(ZeroDivisionError):
        scores_of(guard, ["a"], ["b"])


def test_a_judge_is_a_guard_whose_missing_verdict_is_unsure():
    class Halting:
        name = "halting"

        def __call__(self, prompts, responses):
            return [Verdict.unjudged() if r == "?" else Verdict(0.3, r == "harm") for r in responses]

    guard = JudgeGuard(Halting())
    assert guard.score(["p"] * 3, ["harm", "?", "fine"]) == [1.0, None, 0.0]
    assert guard.decides
    assert not guard.reads_prompts
    assert guard.identity()["name"] == "halting"


def test_guards_have_names_and_revisions():
    assert get_guard("keyword").name == "keyword"
    assert get_guard("minilm").name == "minilm"
    assert get_guard("keyword").revision != get_guard("builtin").revision
    own = Lengths()
    assert get_guard(own) is own
    with pytest.raises(InputError, match="Judge: must be one of"):
        get_guard("keywrd")


def test_same_model_by_weights_by_name_and_by_class(tmp_path):
    """A copy of the weights under another path and with another limit is the same model."""
    for name, weights in (("one", "w"), ("copy", "w"), ("other", "v")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_text(weights)
    one, copy, other = (get_judge(f"moderation:{tmp_path / name}") for name in ("one", "copy", "other"))
    assert same_model(one, copy)
    assert same_model(one, get_judge(f"moderation_512_tokens:{tmp_path / 'copy'}"))
    assert same_model(one, ClassifierJudge("harmbench", str(tmp_path / "copy")))
    assert not same_model(one, other)
    assert not same_model(one, KeywordJudge())
    assert same_model(KeywordJudge(), KeywordJudge("durability"))
    assert not same_model(KeywordJudge(), WorldJudge())


def test_rates_on_counts_done_by_hand():
    """Of 4 attack rows one passes; of 5 other rows two are dropped, one of them as unsure."""
    records = [Record(f"q{i}", "a", role="attack" if i < 4 else "task", id=str(i)) for i in range(9)]
    selection = [{"id": str(i), "kept": i not in (0, 1, 2, 4, 5), "unsure": i in (5, 6)} for i in range(9)]
    rates = filter_rates(selection, records)
    assert rates["attack"] == {"rows": 4, "dropped": 3, "unsure": 0}
    assert rates["other"] == {"rows": 5, "dropped": 2, "unsure": 2}
    for name, hits, count in (("false_negatives", 1, 4), ("false_positives", 2, 5)):
        row = rates[name]
        assert (row["value"], row["count"]) == (100 * hits / count, count)
        assert (row["low"], row["high"]) == wilson(hits, count)


def test_rows_of_one_id_are_counted_one_by_one():
    """Of three equal attack rows two are dropped. A row without a score is unsure."""
    records = [Record("q", "a", role="attack", id="same")] * 3
    selection = [{"id": "same", "score": score, "kept": score is not None} for score in (None, None, 0.1)]
    rates = filter_rates(selection, records)
    assert rates["attack"] == {"rows": 3, "dropped": 2, "unsure": 3}


def test_a_rate_without_rows_is_left_out():
    rates = filter_rates([{"id": "0", "kept": True, "unsure": False}], [Record("q", "a", id="0")])
    assert "false_negatives" not in rates
    assert rates["false_positives"]["value"] == 0.0
