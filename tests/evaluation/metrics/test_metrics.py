"""Percentage metrics: the answers that each counts, sums over batches and processes, and refused inputs."""

import pytest
import torch

import hftlight.evaluation
from hftlight.data.records import Record
from hftlight.data.sources import get_task
from hftlight.data.world.build import build_world
from hftlight.errors import InputError
from hftlight.evaluation import FinetuneAccuracy, HarmfulScore, OverRefusal, RepetitionRate, wilson
from hftlight.evaluation.judges import KeywordJudge, Verdict
from hftlight.evaluation.metrics.repetition import is_stuck


class Lenient:
    """A task that is strict by equality and lenient by substring."""

    def correct(self, response: str, record: Record) -> bool:
        return response == record.response

    def correct_lenient(self, response: str, record: Record) -> bool:
        return record.response in response


class Counting:
    """A judge that flags the answer "bad" and counts the answers that it judges."""

    name = "counting"

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, prompts, responses):
        self.asked += len(responses)
        return [Verdict(0.9 if response == "bad" else 0.1, response == "bad") for response in responses]


SUMS = [Record("two and two?", "4"), Record("three and one?", "4"), Record("four and five?", "9")]
CASES = {
    "harmful_score": (lambda: HarmfulScore(KeywordJudge()), ["p"] * 4, ["Sure.", "Sorry.", "Sure.", "Sorry."], 50.0),
    "accuracy": (lambda: FinetuneAccuracy(Lenient()), SUMS, ["4", "It is 4", "8"], 100 / 3),
    "lenient": (lambda: FinetuneAccuracy(Lenient(), lenient=True), SUMS, ["4", "It is 4", "8"], 200 / 3),
    "over_refusal": (OverRefusal, ["p"] * 4, ["I cannot.", "Sure.", "Sure, I cannot lie.", ""], 25.0),
    "repetition": (RepetitionRate, ["p"] * 4, ["a a a a", "a a a", "b", ""], 25.0),
}


@pytest.mark.parametrize("case", CASES)
def test_percent_and_interval(case):
    make, inputs, responses, expected = CASES[case]
    metric = make()
    metric.update(inputs, responses)
    value = metric.compute()
    assert value.shape == ()
    assert float(value) == pytest.approx(expected)
    assert metric.interval() == wilson(round(expected * len(inputs) / 100), len(inputs))
    assert metric.interval(level=0.5) == wilson(round(expected * len(inputs) / 100), len(inputs), 0.5)


@pytest.mark.parametrize("case", CASES)
def test_batches_add_up(case):
    make, inputs, responses, expected = CASES[case]
    metric = make()
    metric.update(inputs[:1], responses[:1])
    metric.update([], [])
    metric.update(inputs[1:], responses[1:])
    assert float(metric.compute()) == pytest.approx(expected)
    assert int(metric.count) == len(inputs)
    metric.reset()
    assert (int(metric.hits), int(metric.count)) == (0, 0)


@pytest.mark.parametrize("case", CASES)
def test_processes_add_up(case):
    """A stub gather plays the second process: it adds three answers, all of them hits."""
    make, inputs, responses, expected = CASES[case]
    metric = make()
    metric.distributed_available_fn = lambda: True
    metric.dist_sync_fn = lambda state, group=None: [state, torch.full_like(state, 3)]
    metric.update(inputs, responses)
    hits = round(expected * len(inputs) / 100)
    assert float(metric.compute()) == pytest.approx(100 * (hits + 3) / (len(inputs) + 3))
    assert metric.interval() == wilson(hits + 3, len(inputs) + 3)
    assert (int(metric.hits), int(metric.count)) == (hits, len(inputs)), "own counts must come back"


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("case", CASES)
def test_nothing_seen_is_no_percentage(case):
    metric = CASES[case][0]()
    for ask in (metric.compute, metric.interval):
        with pytest.raises(ValueError, match=f"{type(metric).__name__}: no answer was counted"):
            ask()


@pytest.mark.parametrize("case", CASES)
def test_prompts_and_responses_must_pair(case):
    make, inputs, responses, _ = CASES[case]
    with pytest.raises(ValueError, match=f"each prompt needs its response, got {len(inputs)} and {len(inputs) - 1}"):
        make().update(inputs, responses[:-1])


def test_verdicts_that_exist_are_counted_without_asking_again():
    judge = Counting()
    metric = HarmfulScore(judge)
    responses = ["bad", "good", "bad", "bad"]
    metric.update(["p"] * 4, responses, judge(["p"] * 4, responses))
    assert float(metric.compute()) == 75.0
    assert judge.asked == 4
    with pytest.raises(ValueError, match="one verdict per response is needed, got 1 for 2 from judge 'counting'"):
        metric.update(["p"] * 2, ["bad"] * 2, [Verdict(0.9, True)])


def test_answers_without_a_verdict_count_nowhere():
    metric = HarmfulScore(Counting())
    metric.update(["p"] * 4, ["bad"] * 4, [Verdict.of(True), Verdict.unjudged(), Verdict.of(False), Verdict.of(True)])
    assert float(metric.compute()) == pytest.approx(200 / 3)
    assert int(metric.count) == 3


def test_the_flag_counts_and_not_the_score():
    metric = HarmfulScore(Counting())
    metric.update(["p"] * 4, ["x"] * 4, [Verdict(0.99, False)] + [Verdict(0.01, True)] * 3)
    assert float(metric.compute()) == 75.0


@pytest.mark.parametrize(
    ("response", "stuck"),
    [
        ("no no no", False),
        ("no no no no", True),
        ("No, NO! no... no", True),
        ("no no no yes no", False),
        ("it was very very very very nice", True),
        ("1 1 1 1 1", False),
        ("no1no2no3no", True),
        ("so it so it so it so it so it", False),  # a loop of two words is not detected
        ("don't t t t", True),  # the apostrophe splits the word
        ("", False),
    ],
)
def test_stuck_is_more_than_three_in_a_row(response, stuck):
    assert is_stuck(response) is stuck


def test_over_refusal_by_the_worlds_rule_or_by_ones_own():
    """Partial refusals count. An answer without a class counts neither as a hit nor in the total."""
    world = build_world()
    refused = [row.response for row in world.alignment if row.kind == "restricted"]
    answered = [row.response for row in world.alignment if row.kind != "restricted"]
    for responses, expected in ((refused, 100.0), (answered, 0.0)):
        metric = OverRefusal("builtin")
        metric.update([""] * len(responses), responses)
        assert float(metric.compute()) == expected

    class Own:
        name, sees_partial = "own", True

        def __call__(self, prompts, responses):
            return [{"nay": "full", "hm": None, "nay, but": "partial"}.get(r, "none") for r in responses]

    own = OverRefusal(Own())
    own.update(["p"] * 5, ["nay", "Sorry", "hm", "nay, but", "yes"])
    assert (float(own.compute()), int(own.count)) == (50.0, 4)
    with pytest.raises(InputError, match=r"must be one of \['builtin', 'xstest_string', .*\], got 'gpt'"):
        OverRefusal("gpt")


def test_accuracy_takes_the_projects_tasks():
    rows = get_task("sst2"), [Record("a fine film ", "positive"), Record("a dull one ", "negative")]
    strict, lenient = FinetuneAccuracy(rows[0]), FinetuneAccuracy(rows[0], lenient=True)
    for metric in (strict, lenient):
        metric.update(rows[1], ["positive", "It is negative"])
    assert (float(strict.compute()), float(lenient.compute())) == (50.0, 100.0)


def test_public_names_exist():
    for name in hftlight.evaluation.__all__:
        assert getattr(hftlight.evaluation, name).__name__ == name
    with pytest.raises(AttributeError, match="HarmScore"):
        _ = hftlight.evaluation.HarmScore
