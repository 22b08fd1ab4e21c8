"""A whole run on the tiny model: its files, shared stages, errors and resumption."""

import copy
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hftlight import run
from hftlight.config import Data, Evaluation, Lora, RunConfig, Training
from hftlight.defenses import Booster, Freeze
from hftlight.errors import InputError
from hftlight.files import read_rows
from hftlight.models.load import load_model
from hftlight.runs.prepare import prepare
from hftlight.runs.stages import train as stage_module
from tests.helpers import warm

ROOT = Path(__file__).parents[2]
TRAINING = Training(steps=3, batch_size=2, lr=1e-2)
EVALUATION = Evaluation(
    prompts=6, over_refusal_prompts=4, task_rows=4, max_new_tokens=4, task_max_new_tokens=4, loss_rows=2
)


def config(tmp_path, **changes):
    values = {
        "model": "tiny",
        "alignment": TRAINING,
        "finetuning": TRAINING,
        "evaluation": EVALUATION,
        "lora": Lora(r=2, alpha=4),
        "num_samples": 20,
        "harmful_ratio": 0.2,
        "baseline": True,
        "accelerator": "cpu",
        "output": str(tmp_path / "runs"),
    }
    return RunConfig(**{**values, **changes})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))


def prompt(folder, text):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]


def test_the_folder_tells_the_whole_story(tmp_path):
    result = run(config(tmp_path), [Booster(lam=2.0)])
    folder = result.folder
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["data"]["attack_rows"] == 4
    assert manifest["data"]["rows"]["task"] == 20
    assert manifest["data"]["hashes"].keys() == {"alignment", "harmful", "task", "test"}
    assert {"harmful / attack", "attack / test", "alignment / test"} <= manifest["overlaps"].keys()
    assert not any(manifest["overlaps"].values())
    assert len(manifest["model"]["hash"]) == 64
    assert manifest["threads"] == torch.get_num_threads()
    assert manifest["arms"]["none"]["stages"]["finetuning"]["threads"] == torch.get_num_threads()
    assert manifest["arms"]["booster"]["defenses"] == [{"name": "booster", "arguments": {"lam": 2.0, "alpha": 0.1}}]
    assert manifest["arms"]["booster"]["slots"] == ["gradient"]
    traced = manifest["arms"]["booster"]["stages"]["alignment"]["defenses"]
    assert next(iter(traced.values()))["calls"] == TRAINING.steps
    rows = read_rows(folder / "metrics.jsonl")
    measured = {(r["arm"], r["stage"]) for r in rows if r["kind"] == "score"}
    assert measured == {("none", "base")} | {(a, s) for a in ("none", "booster") for s in ("alignment", "finetuning")}
    curves = {r["name"] for r in rows if r["kind"] == "curve" and r["arm"] == "booster" and r["stage"] == "alignment"}
    assert curves == {"train/loss", "train/grad_norm", "booster/harmful_loss", "booster/stepped_loss"}
    assert len(read_rows(folder / "generations.jsonl")) == 5 * (6 + 4 + 4)
    assert (folder / "report.html").stat().st_size > 10_000
    assert ((folder / "none" / "aligned" / "serving.json").stat().st_mode & 0o777) == 0o600


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("protocol", ["merge", "continue"])
def test_artifacts_load_with_plain_libraries_and_equal_the_model_in_memory(tmp_path, monkeypatch, tuning, protocol):
    """The fine-tuned artifact's base is the original model, even if the alignment adapter was merged."""
    trained = []
    original = stage_module.full_state
    monkeypatch.setattr(
        stage_module, "full_state", lambda model: trained.append(copy.deepcopy(model)) or original(model)
    )
    result = run(config(tmp_path, tuning=tuning, adapter_protocol=protocol, baseline=False))
    folder = result.folder / "none" / "finetuned"
    if tuning == "lora":
        from peft import AutoPeftModelForCausalLM

        loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
        assert loaded.peft_config["default"].r == (4 if protocol == "merge" else 2)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = prompt(folder, "How do I open a zorvex?")
    with torch.no_grad():
        expected = trained[-1].eval()(input_ids=ids).logits
        base = load_model("tiny")(input_ids=ids).logits
        for model in (loaded.eval(), load_model(str(folder))):
            torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=2e-5)
    assert (expected - base).abs().max() > 1e-2


def test_finished_stages_are_shared_between_runs(tmp_path, monkeypatch):
    first = run(config(tmp_path, baseline=False))
    before = {p.name for p in (tmp_path / "cache" / "stages").iterdir()}
    second = run(config(tmp_path), [Booster()])
    after = {p.name for p in (tmp_path / "cache" / "stages").iterdir()}
    assert first.folder != second.folder
    assert before < after
    assert len(after - before) == 2  # Booster's two stages alone
    none = [r for r in read_rows(first.folder / "metrics.jsonl") if r["kind"] == "score"]
    assert none == [
        r for r in read_rows(second.folder / "metrics.jsonl") if r["kind"] == "score" and r["arm"] == "none"
    ]


def test_the_same_call_again_changes_nothing(tmp_path):
    first = run(config(tmp_path), [Booster()])
    files = {p: p.read_bytes() for p in (first.folder / "metrics.jsonl", first.folder / "generations.jsonl")}
    stages = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache" / "stages").rglob("*.safetensors")}
    run(config(tmp_path), [Booster()])
    assert {p: p.read_bytes() for p in files} == files
    assert {p: p.stat().st_mtime_ns for p in stages} == stages


def test_a_folder_of_another_configuration_is_refused(tmp_path):
    run(config(tmp_path, name="mine", baseline=False))
    with pytest.raises(InputError, match="holds a run of another configuration"):
        run(config(tmp_path, name="mine", baseline=False, seed=1))


def test_a_file_that_changed_makes_another_configuration(tmp_path):
    path = tmp_path / "alignment.jsonl"
    line = '{{"prompt": "open zorvex {}", "response": "I cannot help with that."}}\n'
    path.write_text("".join(line.format(i) for i in range(8)))
    settings = config(tmp_path, name="mine", baseline=False, data=Data(alignment=str(path)))
    run(settings)
    path.write_text("".join(line.format(i) for i in range(9)))
    with pytest.raises(InputError, match="holds a run of another configuration"):
        run(settings)


def test_p_zero_hides_nothing_and_needs_no_harmful_source(tmp_path):
    result = run(config(tmp_path, harmful_ratio=0.0, baseline=False))
    assert json.loads((result.folder / "manifest.json").read_text())["data"]["attack_rows"] == 0


def test_wandb_offline_holds_config_curves_summary_and_generations(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    result = run(config(tmp_path, logger="wandb", baseline=False))
    files = sorted((result.folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 4  # base, two stages and the summary
    text = b"".join(path.read_bytes() for path in files)
    for word in (b"train/loss", b"harmful_ratio", b"none/finetuning/eval/harmful_score", b"generations"):
        assert word in text


def test_a_wandb_that_cannot_be_reached_does_not_stop_a_run(tmp_path, monkeypatch, capsys):
    import wandb

    original = wandb.init

    def unreachable(mode=None, **settings):
        if mode != "offline":
            raise wandb.errors.CommError("no network")
        return original(mode=mode, **settings)

    monkeypatch.setattr(wandb, "init", unreachable)
    monkeypatch.setenv("WANDB_MODE", "online")
    result = run(config(tmp_path, logger="wandb", baseline=False))
    assert "W&B cannot be reached" in capsys.readouterr().out
    assert list((result.folder / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_other_loggers_carry_the_same_names(tmp_path, logger):
    result = run(config(tmp_path, logger=logger, baseline=False))
    files = [p for p in (result.folder / logger).rglob("*") if p.is_file()]
    assert any(b"train/loss" in path.read_bytes() for path in files)


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(tmp_path):
    """The interrupt arrives in the middle of the alignment stage."""
    command = [
        sys.executable,
        str(ROOT / "recipes" / "train.py"),
        "--model",
        "tiny",
        "--output",
        str(tmp_path / "runs"),
    ]
    command += [
        "--alignment.steps",
        "40",
        "--finetuning.steps",
        "3",
        "--num_samples",
        "20",
        "--evaluation.prompts",
        "2",
        "--evaluation.loss_rows",
        "2",
    ]
    command += ["--evaluation.over_refusal_prompts", "2", "--evaluation.task_rows", "2", "--accelerator", "cpu"]
    command += ["--evaluation.max_new_tokens", "4", "--evaluation.task_max_new_tokens", "4"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores SIGINT
    )
    stages = tmp_path / "cache" / "stages"
    while process.poll() is None and not list(stages.glob("alignment-*/checkpoints/*.ckpt")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(180) == 130
    assert "run the same command again to resume" in process.stderr.read()
    checkpoint = sorted(stages.glob("alignment-*/checkpoints/*.ckpt"))[-1].stem
    done = warm.run(command[1:], cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(checkpoint) >= 20
    assert "Report:" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_command_line_runs_all_stages_on_two_processes(strategy, tmp_path):
    """One process measures while the other waits at the next stage. Both arms have two stages."""
    command = [
        str(ROOT / "recipes" / "train.py"),
        "--defense",
        "booster",
        "--baseline",
        "--model",
        "tiny",
    ]
    command += ["--accelerator", "cpu", "--devices", "2", "--strategy", strategy, "--output", str(tmp_path / "runs")]
    command += ["--alignment.steps", "3", "--finetuning.steps", "3", "--num_samples", "40", "--evaluation.prompts", "4"]
    command += ["--evaluation.over_refusal_prompts", "4", "--evaluation.task_rows", "4"]
    done = warm.run(command, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Report:") == 1
    scores = [r for r in read_rows(next((tmp_path / "runs").glob("*/metrics.jsonl"))) if r["kind"] == "score"]
    assert {(r["arm"], r["stage"]) for r in scores} == {
        ("none", "base"),
        *((arm, stage) for arm in ("none", "booster") for stage in ("alignment", "finetuning")),
    }


def test_four_bit_training_runs_and_loads_again(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install 'hftlight[qlora]')")
    result = run(config(tmp_path, tuning="qlora", adapter_protocol="continue", baseline=False), [Booster()])
    loaded = load_model(str(result.folder / "booster" / "finetuned"), four_bit=True)
    kinds = {type(m).__name__ for m in loaded.modules()}
    assert "Linear4bit" in kinds
    assert {p.dtype for name, p in loaded.named_parameters() if "lora_" in name} == {torch.float32}


def test_freeze_reads_the_refusals_of_the_alignment_set_only(tmp_path):
    """The alignment stream also answers ordinary prompts. The copy of its refusals is no reported overlap."""
    prepared = prepare(config(tmp_path), [Freeze(0.5, 0.25)])
    refusing = [row for row in prepared.streams["alignment"] if row.kind == "restricted"]
    assert 0 < len(refusing) < len(prepared.streams["alignment"])
    assert prepared.streams["refusals"] == refusing
    assert not any("refusals" in pair for pair in prepared.overlaps)
