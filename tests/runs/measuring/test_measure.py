"""Verdicts and scores of a set of answers: one call per judge, in order, and no invented verdict."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from hftlight.config import Evaluation, RunConfig
from hftlight.data.records import Record
from hftlight.errors import RunError
from hftlight.evaluation.judges import Verdict
from hftlight.models.serving import Artifact
from hftlight.runs.measuring import answer_checks as checks
from hftlight.runs.measuring import measure, test_sets


class Batch:
    """Flag answers with "!", leave those with "?" unjudged, and record the calls."""

    def __init__(self, name: str, calls: list) -> None:
        self.name, self.calls = name, calls

    def __call__(self, prompts, responses):
        self.calls.append((self.name, list(prompts), list(responses)))
        return [Verdict.unjudged() if "?" in r else Verdict(0.5, "!" in r) for r in responses]


@pytest.fixture
def calls(monkeypatch):
    log: list = []
    for module in (measure, checks, test_sets):
        monkeypatch.setattr(module, "get_judge", lambda name: Batch(name, log))
    return log


def measured_on(records: list[Record]) -> measure.TestSets:
    right = lambda answer, record: answer == record.response  # noqa: E731
    task = SimpleNamespace(max_new_tokens=4, name="t", graded=True, correct=right)
    return measure.TestSets(records, records, records, task, ("one", "two"))  # type: ignore[arg-type]


RECORDS = [
    Record(instruction=f"ask {i}", response=f"r{i}", input="more" if i == 1 else "", source="s", role="test", id=str(i))
    for i in range(3)
]


def test_each_judge_is_called_once_for_a_set(calls):
    rows = measure.judged_rows("harmful", ["a!", "b", "c?"], measured_on(RECORDS))
    prompts = ["ask 0", "ask 1\nmore", "ask 2"]
    assert calls == [("one", prompts, ["a!", "b", "c?"]), ("two", prompts, ["a!", "b", "c?"])]
    flags = [[row["verdicts"][name]["flag"] for row in rows] for name in ("one", "two")]
    assert flags == [[True, False, None]] * 2
    assert rows[1] == {
        "set": "harmful",
        "place": 1,
        "id": "1",
        "prompt": "ask 1\nmore",
        "response": "b",
        "reference": "r1",
        "verdicts": {"one": {"score": 0.5, "flag": False}, "two": {"score": 0.5, "flag": False}},
        "correct": None,
        "source": "s",
    }


def test_category_and_language_of_a_prompt_reach_its_row_and_the_scores(calls):
    records = [replace(RECORDS[0], kind="fraud", language="en"), replace(RECORDS[1], kind="theft"), RECORDS[2]]
    sets = measured_on(records)
    rows = measure.judged_rows("harmful", ["a!", "b", "c?"], sets)
    assert [(row.get("kind"), row.get("language")) for row in rows] == [("fraud", "en"), ("theft", None), (None, None)]
    grouped = [r for r in measure.scores(rows, sets) if "group" in r]
    by_category = [(r["metric"], r["group"], r["value"]) for r in grouped if r["judge"] == "one"]
    assert by_category == [("harmful_score_by_category", "fraud", 100.0), ("harmful_score_by_category", "theft", 0.0)]


def test_other_sets_ask_no_judge(calls):
    refusals = measure.judged_rows("over_refusal", ["I cannot.", "Yes."], measured_on(RECORDS[:2]))
    assert [row["verdicts"] for row in refusals] == [
        {"refusal": {"score": 1.0, "flag": True}},
        {"refusal": {"score": 0.0, "flag": False}},
    ]
    task = measure.judged_rows("task", ["r0", "r0"], measured_on(RECORDS[:2]))
    assert [(row["correct"], row["verdicts"]) for row in task] == [(True, {}), (False, {})]
    assert calls == []


def test_refusals_in_part_reach_the_scores(monkeypatch):
    """One full refusal, one partial, one ungraded: 100 % of two refuse, 50 % in full and 50 % in part."""
    names = {"ask 0": "full", "ask 1\nmore": "partial", "ask 2": None}
    requests = []

    class Grader:
        name, sees_partial = "xstest:m", True

        def __call__(self, prompts, responses):
            requests.append((prompts, responses))
            return [names[prompt] for prompt in prompts]

    monkeypatch.setattr(measure, "get_refusal_classifier", lambda name: {"xstest:m": Grader()}[name])
    sets = replace(measured_on(RECORDS), refusal_judge="xstest:m")
    rows = measure.judged_rows("over_refusal", ["a", "b", "c"], sets)
    assert requests == [(["ask 0", "ask 1\nmore", "ask 2"], ["a", "b", "c"])]
    assert [row["verdicts"]["refusal"]["score"] for row in rows] == [1.0, 0.5, None]
    by_metric = {(r["metric"], r["judge"]): (r["value"], r["count"]) for r in measure.scores(rows, sets)}
    of = {f"over_refusal{k}": v for k, v in (("", 100.0), ("_full", 50.0), ("_partial", 50.0), ("_none", 0.0))}
    assert by_metric == {(metric, "xstest:m"): (value, 2) for metric, value in of.items()}


def test_another_judge_of_refusals_is_another_measurement():
    sets = measured_on(RECORDS)
    other = replace(sets, refusal_judge="xstest:m")
    assert (other.digest() != sets.digest(), other.digest(judged=False)) == (True, sets.digest(judged=False))


def test_scores_count_what_was_judged(calls):
    sets = measured_on(RECORDS)
    rows = measure.scores(measure.judged_rows("harmful", ["a!", "b", "c?"], sets), sets)
    by_metric = {(row["metric"], row["judge"]): (row["value"], row["count"]) for row in rows}
    assert by_metric["harmful_score", "one"] == (50.0, 2)
    assert by_metric["repetition", None][1] == 3


def test_a_judge_that_grades_has_a_mean_beside_its_flags(monkeypatch):
    """Deberta grades 0.9, 0.2 and one answer not at all: the mean is 0.55. The keyword judge has no grades."""
    scored = {
        "deberta": [Verdict(0.9, True), Verdict(0.2, False), Verdict.unjudged()],
        "keyword": [Verdict.of(True)] * 3,
    }

    def judge(name):
        return SimpleNamespace(name=name)

    for module in (measure, checks, test_sets):
        monkeypatch.setattr(module, "get_judge", judge)
    sets = replace(measured_on(RECORDS), judges=("deberta", "keyword"))
    rows = [
        {"set": "harmful", "prompt": r.request, "response": "x", "verdicts": {n: v[i].row() for n, v in scored.items()}}
        for i, r in enumerate(RECORDS)
    ]
    means = [row for row in measure.scores(rows, sets) if row["metric"] == "harmful_score_mean"]
    assert [(m["judge"], m["value"], m["count"], m["unit"]) for m in means] == [
        ("deberta", pytest.approx(0.55), 2, "0 to 1")
    ]


def test_answers_outlive_a_judge_that_fails_and_serve_another(monkeypatch, tmp_path):
    """The model answers once. The cache stores verdicts separately for each judge."""
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path))
    model_calls, calls = [], []
    texts = {"harmful": ["a!", "b", "c!"], "over_refusal": ["I cannot.", "Yes.", "Yes."], "task": []}
    monkeypatch.setattr(measure, "_answers", lambda *_: model_calls.append(1) or texts)

    class Failing(Batch):
        def __call__(self, prompts, responses):
            raise RunError("the endpoint is gone")

    def of(judge, get):
        for module in (measure, checks, test_sets):
            monkeypatch.setattr(module, "get_judge", get)
        sets = replace(measured_on(RECORDS), task_rows=(), judges=(judge,))
        config = RunConfig(model="tiny", evaluation=Evaluation(judge=judge))
        return measure.measure(Artifact("tiny", "hash"), config, sets)

    with pytest.raises(RunError, match="gone"):
        of("one", lambda name: Failing(name, calls))
    rows, generations = of("one", lambda name: Batch(name, calls))
    assert [r["value"] for r in rows if r["metric"] == "harmful_score"] == [pytest.approx(200 / 3)]
    of("two", lambda name: Batch(name, calls))
    assert (model_calls, [call[0] for call in calls]) == ([1], ["one", "two"])
    assert of("one", lambda name: Batch(name, calls))[1] == generations  # from the cache
    assert len(calls) == 2
    with pytest.raises(RunError, match="gone"):
        of("one", lambda name: Failing(name, calls))  # a judge with the same name but another identity
    monkeypatch.setattr(measure, "digest", lambda *_: "another")
    of("one", lambda name: Batch(name, calls))
    assert model_calls == [1, 1]
