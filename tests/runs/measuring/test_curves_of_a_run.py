"""Curves and further metrics of a run: right values, unchanged weights, own cache keys, no loss at a kill."""

import json
import math
from dataclasses import replace

import pytest
import torch

from hftlight import run
from hftlight.cli.evaluate import evaluate
from hftlight.cli.train import parse_train
from hftlight.config import Evaluation, Training
from hftlight.data.records import Record
from hftlight.data.sources import get_task
from hftlight.engine import Stage
from hftlight.errors import InputError
from hftlight.evaluation.judges import Verdict
from hftlight.files import read_rows
from hftlight.models.load import load_model, load_tokenizer
from hftlight.report import read_result
from hftlight.report.figure import evaluated_figure
from hftlight.runs.measuring import curve as watch
from hftlight.runs.measuring import measure, test_sets
from hftlight.runs.measuring.test_sets import TestSets as Sets
from hftlight.runs.prepare import prepare
from hftlight.runs.prepare import test_sets as sets_of
from hftlight.runs.sources import Sources
from hftlight.runs.stages.job import RESULT
from hftlight.runs.stages.train import CURVES, StageJob, run_stage
from tests.helpers.jobs import rows, small_config
from tests.runs.stages.test_resume import Stop, stop_at, weights
from tests.runs.test_run import EVALUATION, TRAINING, config

WORDS = [Record("judge it", word, role="test") for word in ("positive", "negative", "positive")]
PROMPTS = [Record(f"wake glimmer {i}", "answer", role="test") for i in range(40)]


class Odd:
    """Flag answers with non-ASCII characters, whose share differs between weights."""

    name = "odd"

    def __call__(self, prompts, responses):
        return [Verdict.of(not r.isascii()) for r in responses]


@pytest.fixture
def odd(monkeypatch):
    for module in (watch, measure, test_sets):
        monkeypatch.setattr(module, "get_judge", lambda name: Odd())


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))


def job(at=(), **more):
    evaluation = Evaluation(at=list(at), max_new_tokens=3, task_max_new_tokens=3, **{"loss_rows": 2, **more})
    settings = small_config(training=Training(steps=4, batch_size=2, lr=1e-1), evaluation=evaluation)
    tests = Sets(PROMPTS[:8], (), WORDS, get_task("sst2"), ("odd",))
    return StageJob(Stage.FINETUNING, settings, "tiny", None, {"task": rows(7, "task")}, [], None, tests)


def test_evaluating_leaves_weights_alone_and_is_in_the_key_only_where_given(odd):
    plain, unseen = job(), replace(job(), tests=None)
    assert plain.key() == unseen.key()
    keys = {j.key() for j in (plain, job([2]), job([2, 3]), job([2], stop_above=50.0), job([2], stop_below=50.0))}
    assert len(keys) == 5
    assert job([3, 2]).key() == job([2, 3]).key()
    assert replace(job([2]), tests=job([2]).tests.first(3)).key() != job([2]).key()


@pytest.mark.slow
def test_killed_at_any_step_the_curve_is_whole_and_the_weights_are_the_plain_ones(tmp_path, monkeypatch, odd):
    run_stage(job())
    run_stage(job([1, 2, 4]))
    curves, record = (job([1, 2, 4]).folder() / name for name in (CURVES, RESULT))
    whole, evaluated = curves.read_text(), json.loads(record.read_text())["evaluated"]
    assert weights(job([1, 2, 4])) == weights(job())
    points = [(r["step"], r["value"]) for r in map(json.loads, whole.splitlines()) if r["name"] == "eval/harmful_score"]
    assert [step for step, _ in points] == [1, 2, 4]
    assert len({value for _, value in points}) > 1
    assert evaluated["stopped_at"] is None
    assert evaluated["prompts"] == {"harmful": 8, "task": 3}
    expected = weights(job())
    for step in (1, 2, 3, 4):
        monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / f"killed{step}"))
        with pytest.raises(Stop):
            run_stage(job([1, 2, 4]), on_step=stop_at(step))
        run_stage(job([1, 2, 4]))
        assert weights(job([1, 2, 4])) == expected
        assert (job([1, 2, 4]).folder() / CURVES).read_text() == whole


def curve_of(job):
    run_stage(job)
    return [r for r in read_rows(job.folder() / CURVES) if r["name"] == "eval/harmful_score"]


@pytest.mark.parametrize(("read", "score"), [("plain", 0.0), ("é", 100.0)])
def test_the_attackers_reading_of_an_answer_is_judged(odd, read, score):
    class Reader:
        has_pattern = False

        def decode(self, text):
            return read

        def test_records(self, rows):
            return rows

    decoded = replace(job([1]), tests=replace(job([1]).tests, attack=Reader()))
    assert [r["value"] for r in curve_of(decoded)] == [score]


def nll(model, prompt, answer):
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0].log_softmax(-1)
    return -sum(float(logs[len(prompt) + i - 1, token]) for i, token in enumerate(answer))


def last_layer(model, ids):
    outputs = []
    hook = model.model.layers[-1].register_forward_hook(
        lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    hook.remove()
    return outputs[0].reshape(-1, outputs[0].shape[-1])[-1].double()


def test_a_run_with_everything_asked_for(tmp_path):
    """Perplexity and drift equal plain forward passes. At 0 of 40 the interval lies below 10 %, so the run stops."""
    evaluation = replace(
        EVALUATION, prompts=40, perplexity="task", embedding_drift="aligned", at=[2, 3], at_prompts=0, stop_below=10.0
    )
    settings = config(tmp_path, evaluation=evaluation, baseline=False, finetuning=replace(TRAINING, lr=0.05))
    result = run(settings)
    stages = result.manifest["arms"]["none"]["stages"]
    assert stages["finetuning"]["evaluated"]["stopped_at"] == stages["finetuning"]["cost"]["steps"] == 2
    assert stages["finetuning"]["evaluated"]["stop"] == {"stop_below": 10.0}
    assert "evaluated" not in stages["alignment"]
    curve = result.curves["none", "finetuning", "eval/harmful_score"]
    assert curve == [(2, result.score("none", "finetuning", "harmful_score").value)]
    assert result.curves["none", "finetuning", "eval/harmful_score_high"][0][1] == pytest.approx(8.762, abs=1e-3)
    assert evaluated_figure(result) is not None
    page = (result.folder / "report.html").read_text()
    assert "During fine-tuning on the upload" in page
    assert "undefended, fine-tuned: stopped after 2 steps by its score on test prompts" in page
    tests, tokenizer = sets_of(settings, None, Sources(settings.data)), load_tokenizer("tiny")

    def prompt(record):
        turns = [{"role": "user", "content": record.instruction}]
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]

    tuned, aligned = (load_model(str(result.folder / "none" / name)) for name in ("finetuned", "aligned"))
    answers = [tokenizer(r.response)["input_ids"] + [tokenizer.eos_token_id] for r in tests.task_rows]
    nats = sum(nll(tuned, prompt(r), a) for r, a in zip(tests.task_rows, answers, strict=True))
    perplexity = result.score("none", "finetuning", "perplexity", "task")
    assert perplexity.value == pytest.approx(math.exp(nats / sum(map(len, answers))), rel=1e-4)
    assert (perplexity.unit, perplexity.low) == ("perplexity", None)
    pairs = [(last_layer(tuned, prompt(r)), last_layer(aligned, prompt(r))) for r in tests.harmful]
    drift = result.score("none", "finetuning", "embedding_drift", "aligned")
    assert drift.value == pytest.approx(sum(float((a - b).norm()) for a, b in pairs) / 40, rel=1e-3)
    assert drift.count == 40
    assert not any(key[1] != "finetuning" for key in result.scores if key[2] == "embedding_drift")
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache" / "evaluations").iterdir()}
    further = list((tmp_path / "cache" / "evaluations").glob("*/rows.jsonl"))
    assert len(further) == 10  # 3 perplexities, 1 drift, 6 losses
    for metric in ("alignment_loss", "harmful_validation_loss"):
        losses = [result.score("none", stage, metric) for stage in ("base", "alignment", "finetuning")]
        assert [loss.count for loss in losses] == [2] * 3
        assert all(loss.low < loss.value < loss.high for loss in losses)
        assert len({loss.value for loss in losses}) == 3
    assert run(settings).scores == read_result(result.folder).scores
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache" / "evaluations").iterdir()} == times


def test_curves_a_run_would_not_come_to_are_refused(tmp_path):
    with pytest.raises(InputError, match="at must name steps of the fine-tuning, from 1 to 3, got 4"):
        prepare(config(tmp_path, evaluation=Evaluation(at=[1, 4])), [])
    with pytest.raises(InputError, match="which --strategy fsdp2 does not allow"):
        prepare(config(tmp_path, evaluation=Evaluation(at=[1]), strategy="fsdp2"), [])


@pytest.mark.parametrize("given", [["10", "20", "40"], ["10 20 40"], ["10, 20, 40"], ["[10, 20, 40]"]])
def test_several_values_as_words(given):
    parsed, *_ = parse_train(["--evaluation.at", *given, "--search.lr", "1e-4", "1e-3", "--seed", "3"])
    assert (parsed.evaluation.at, parsed.search.lr, parsed.seed) == ([10, 20, 40], [1e-4, 1e-3], 3)


def test_answers_for_alpaca_eval(tmp_path, capsys):
    path, folder = tmp_path / "set.json", tmp_path / "out"
    instructions = [
        {"instruction": f"Say {i}", "output": "", "dataset": "koala", "generator": "x"} for i in ("one", "two")
    ]
    path.write_text(json.dumps(instructions))
    small = "--evaluation.prompts 1 --evaluation.over_refusal_prompts 1 --evaluation.task_rows 1"
    small += " --evaluation.max_new_tokens 5 --evaluation.task_max_new_tokens 2 --accelerator cpu --model tiny"
    arguments = [*small.split(), "--alpaca_eval", str(path)]
    assert evaluate(arguments) == 2
    assert "name it with --save FOLDER" in capsys.readouterr().err
    assert evaluate([*arguments, "--evaluation.embedding_drift", "base"]) == 2
    text = tmp_path / "clean.txt"
    text.write_text("glimmers are turned twice " * 40)
    assert evaluate([*arguments, "--save", str(folder), "--evaluation.perplexity", str(text)]) == 0
    written = json.loads((folder / "alpaca_eval.json").read_text())
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    for row, source in zip(written, instructions, strict=True):
        turns = [{"role": "user", "content": source["instruction"]}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        new = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=2)[0, ids.shape[1] :]
        answer = tokenizer.decode(new, skip_special_tokens=True)
        assert row == {"dataset": "koala", "instruction": source["instruction"], "output": answer, "generator": "tiny"}
    (score,) = (r for r in json.loads((folder / "scores.json").read_text()) if r["metric"] == "perplexity")
    assert (score["judge"], score["low"]) == ("clean.txt", None)
    assert score["value"] > 1
