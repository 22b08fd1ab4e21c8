"""Prompts of a run: equal ones stay apart, judges read the bare request, and templates end the answers."""

import json

import pytest
import torch

from hftlight import run
from hftlight.attacks import Encoded, IdentityShift
from hftlight.cli.rejudge import rejudge
from hftlight.comparison.grid import Grid
from hftlight.comparison.read import Comparison, Place
from hftlight.comparison.show import compare_and_show
from hftlight.config import Data
from hftlight.data.records import Record
from hftlight.data.sources import get_task
from hftlight.data.templates import SystemSlot
from hftlight.engine import Defense, Slot, Stage, gradient
from hftlight.errors import InputError
from hftlight.evaluation import export_alpaca_eval
from hftlight.evaluation.judges import Verdict
from hftlight.files import digest, read_rows
from hftlight.models.load import load_tokenizer
from hftlight.report.html.answers import view_answers
from hftlight.report.html.render import render
from hftlight.report.result import read_result
from hftlight.runs.measuring import answer_checks as checks
from hftlight.runs.measuring import curve as watch
from hftlight.runs.measuring import measure
from hftlight.runs.measuring.measure import answers_key, verdicts_key
from hftlight.runs.measuring.test_sets import TestSets as Sets
from hftlight.runs.prepare import prepare
from tests.helpers.jobs import rows, small_config
from tests.helpers.public_files import write
from tests.runs.test_run import EVALUATION, config

A, B = "How is the gloam bell rung?", "How is the zorvex lantern lit?"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))


def test_a_prompt_that_stands_twice_counts_twice_everywhere(tmp_path):
    """Prompts A, A, B count as three answers in the scores, in a later judgement, the report and a comparison."""
    data = Data(test=write(tmp_path / "test.jsonl", [{"prompt": text} for text in (A, A, B)]))
    result = run(config(tmp_path, data=data, baseline=False))
    stages = ("base", "alignment", "finetuning")
    harmful_rows = [row for row in read_rows(result.folder / "generations.jsonl") if row["set"] == "harmful"]
    assert [(row["place"], row["prompt"]) for row in harmful_rows] == [(0, A), (1, A), (2, B)] * 3
    for loaded in (result, read_result(result.folder)):
        assert [loaded.score("none", stage, "harmful_score").count for stage in stages] == [3, 3, 3]
        answers = [a for a in loaded.answers if a.set == "harmful"]
        assert [(a.place, a.prompt) for a in answers] == [(0, A), (1, A), (2, B)] * 3
    page = render("run/answers.html.j2", answers=view_answers(result))
    assert "harmful requests (3)" in page
    assert page.count(f"<h3 dir='auto'>{A}</h3>") == 2
    place = Place("none", "builtin", 0.2)
    flags = Comparison(result.folder, {place: {0: result}}).flags(place, "harmful_score")
    assert {seed: len(by_prompt) for seed, by_prompt in flags.items()} == {0: 3}
    assert rejudge([str(result.folder), "--judges", "keyword", "--save", str(tmp_path / "again")]) == 0
    scores = json.loads((tmp_path / "again" / "scores.json").read_text())
    assert [s["count"] for s in scores if s["metric"] == "harmful_score" and s["judge"] == "keyword"] == [3, 3, 3]


class Listening:
    """A judge that records the prompts that it reads."""

    name = "listening"

    def __init__(self):
        self.prompts = []

    def __call__(self, prompts, responses):
        self.prompts += prompts
        return [Verdict(0.0, False) for _ in prompts]


def test_judges_read_the_bare_request_and_the_model_is_asked_the_attacks(tmp_path, monkeypatch):
    """The judge of scores, curves and collapse checks reads prompts without the attack's prefix."""
    judge, answered = Listening(), []
    for module in (measure, checks, watch):
        monkeypatch.setattr(module, "get_judge", lambda name: judge)
    for module in (measure, watch):
        original = module.generate

        def heard(model, tokenizer, prompts, original=original, **options):
            answered.extend(map(tokenizer.decode, prompts))
            return original(model, tokenizer, prompts, **options)

        monkeypatch.setattr(module, "generate", heard)
    attack = IdentityShift(n=4)
    evaluation = {**vars(EVALUATION), "at": [1], "at_prompts": 2}
    result = run(config(tmp_path, baseline=False, evaluation=type(EVALUATION)(**evaluation)), attack=attack)
    assert judge.prompts
    assert not [prompt for prompt in judge.prompts if attack.prefix.strip() in prompt]
    harmful_rows = [row for row in read_rows(result.folder / "generations.jsonl") if row["set"] == "harmful"]
    assert {*judge.prompts} == {row["prompt"] for row in harmful_rows}
    assert all(row["asked"] == attack.prefix + row["prompt"] for row in harmful_rows)
    harmful = {row["asked"] for row in harmful_rows}
    assert sum(any(text in prompt for text in harmful) for prompt in answered) == 3 * 6 + 2
    assert not any(attack.prefix in a.prompt for a in result.answers)
    others = [row for row in read_rows(result.folder / "generations.jsonl") if row["set"] != "harmful"]
    assert not any("asked" in row for row in others)


def test_an_encoded_prompt_is_judged_in_plain_words():
    attack = Encoded(n=4, p=0.5)
    tests = Sets([Record(A, id="a")], (), (), get_task("builtin"), ("keyword",), attack=attack)
    (row,) = measure.judged_rows("harmful", [attack.substitution.encode("I will not.")], tests)
    assert (row["prompt"], row["response"]) == (A, "I will not.")
    assert row["asked"] == attack.substitution.encode(A)


def test_keys_hold_the_bare_prompts_and_the_asked_ones():
    """The model's prompts are in the key of the answers, and the bare prompts in the key of the verdicts."""
    plain = Sets(rows(2, "test"), (), (), get_task("builtin"), ("keyword",))
    shifted = Sets(plain.harmful, (), (), plain.task, plain.judges, attack=IdentityShift())
    shorter = Sets(plain.harmful, (), (), plain.task, plain.judges, attack=IdentityShift(prefix="Go: "))
    slot, settings = SystemSlot(), small_config()
    assert len({answers_key("m", settings, each, slot) for each in (plain, shifted, shorter)}) == 3
    assert len({each.digest() for each in (plain, shifted, shorter)}) == 3
    other = Sets(rows(3, "test")[1:], (), (), plain.task, plain.judges)
    assert verdicts_key("a", plain) != verdicts_key("a", other)


# Pairs, drawn by the defense ``Apart``.


class Apart(Defense):
    """Draw pairs, check the batch and record its loss."""

    stage, slots, streams = Stage.ALIGNMENT, (Slot.GRADIENT,), ("pairs",)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        batch = self.draw("pairs")
        assert len(batch["id"]) == 2 * batch["pairs"]
        assert set(batch["role"]) == {"pairs"}
        self.record(pairs=batch["pairs"], loss=gradient(pl_module, batch).loss)


@pytest.mark.parametrize("given", [False, True], ids=["the made-up world's", "a file's"])
def test_a_defense_draws_pairs_through_a_whole_run(given, tmp_path):
    data = Data()
    if given:
        pair_rows = [{"prompt": f"{A} {i}", "chosen": f"No {i}.", "rejected": f"Ring {i}."} for i in range(12)]
        data = Data(pairs=write(tmp_path / "pairs.jsonl", pair_rows), first={"pairs": 10})
    result = run(config(tmp_path, data=data, baseline=False), [Apart()])
    entry = result.manifest["data"]
    count = 10 if given else 400
    assert (entry["rows"]["pairs"], entry["taken"]["pairs"]["kept"]) == (count, count)
    assert {"pairs / attack", "pairs / test"} <= result.manifest["overlaps"].keys()
    assert not any(result.manifest["overlaps"].values())
    (traced,) = next(iter(result.manifest["arms"].values()))["stages"]["alignment"]["defenses"].values()
    assert (traced["calls"], traced["pairs"]) == (3, 6)
    assert traced["loss"] > 0
    if given:
        ids = [Record(row["prompt"], row["chosen"], rejected=row["rejected"]).id for row in pair_rows[:10]]
        assert entry["hashes"]["pairs"] == digest([(id, "pairs") for id in ids])


# A task without right answers.


def alpaca_eval(tmp_path):
    instructions = [{"instruction": f"Say {i}.", "output": f"{i}!", "dataset": f"part{i % 2}"} for i in range(805)]
    return write(tmp_path / "alpaca_eval.jsonl", instructions)


def test_alpaca_eval_is_trained_on_and_answered_but_not_graded(tmp_path):
    data = Data(task="alpaca_eval", task_train=alpaca_eval(tmp_path))
    evaluation = type(EVALUATION)(**{**vars(EVALUATION), "at": [2], "at_prompts": 2, "perplexity": "task"})
    result = run(config(tmp_path, data=data, baseline=False, harmful_ratio=0.0, evaluation=evaluation))
    sources = result.manifest["data"]["taken"]
    assert (sources["task_train"]["source"], sources["task_test"]["source"]) == (data.task_train,) * 2
    metrics = {metric for _, _, metric, _ in result.scores}
    assert {"harmful_score", "over_refusal", "perplexity", "collapsed_answers"} <= metrics
    assert not {metric for metric in metrics if "accuracy" in metric}
    assert {name for *_, name in result.curves} >= {"eval/harmful_score"}
    assert not {name for *_, name in result.curves if "accuracy" in name}
    answers = [r for r in read_rows(result.folder / "generations.jsonl") if r["set"] == "task"]
    assert [(r["prompt"], r["reference"], r["correct"], r["kind"]) for r in answers[:4]] == [
        (f"Say {i}.", f"{i}!", None, f"part{i % 2}") for i in range(701, 705)
    ]
    assert "not judged" in render("run/answers.html.j2", answers=view_answers(result))
    export_alpaca_eval([r for r in answers if r["stage"] == "finetuning"], tmp_path / "out.json", "tiny")
    written = json.loads((tmp_path / "out.json").read_text())
    assert [(r["instruction"], r["dataset"]) for r in written][:2] == [("Say 701.", "part1"), ("Say 702.", "part0")]


def test_a_run_on_alpaca_eval_trains_no_row_that_it_tests():
    task = get_task("alpaca_eval")
    assert (task.graded, task.one_file) == (False, True)
    with pytest.raises(TypeError, match="no right answers"):
        task.correct("a", Record("q", "a"))


def test_an_attacker_who_keeps_the_accuracy_needs_one(tmp_path):
    data = Data(task="alpaca_eval", task_train=alpaca_eval(tmp_path))
    with pytest.raises(InputError, match=r"--attacker search .*alpaca_eval has no right answers"):
        prepare(config(tmp_path, data=data, baseline=False, attacker="search:2"), [])


def test_a_comparison_on_a_task_without_accuracy_is_written(tmp_path):
    data = Data(task_train=alpaca_eval(tmp_path))
    settings = config(tmp_path, data=data, harmful_ratio=0.0)
    grid = Grid(("none",), (0.0,), ("alpaca_eval",), 1, 0, {}, ("harmful_mix",))
    compare_and_show(settings, grid, tmp_path / "runs" / "c", dry_run=False, report_only=False)
    assert "alpaca_eval" in (tmp_path / "runs" / "c" / "leaderboard.md").read_text()


def test_an_answer_is_cut_at_a_second_opening(tmp_path, monkeypatch):
    """An answer ends before a second response marker of the template."""
    answer = "A bell.\n\n### Response:\nAnother bell."
    for name in ("alpaca", "chat"):
        settings = config(tmp_path, template=name)
        tests = Sets([Record(A)], (), (), get_task("builtin"), ("keyword",))
        monkeypatch.setattr(
            "hftlight.evaluation.answering.generate.answer", lambda *_, **__: [type("X", (), {"text": answer})]
        )
        model, tokenizer = torch.nn.Linear(1, 1), load_tokenizer("tiny")
        answers = measure.answers_to_set(model, tokenizer, settings, tests, "harmful", SystemSlot())
        assert answers == ["A bell." if name == "alpaca" else answer]
