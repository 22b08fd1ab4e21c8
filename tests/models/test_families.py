"""Six families through every stage: aligned, attacked, repaired, evaluated, exported, and loaded elsewhere."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from hftlight import run
from hftlight.cli.evaluate import evaluate
from hftlight.cli.export import export
from hftlight.config import Evaluation, Lora, RunConfig, Training
from hftlight.defenses import Antidote, SafeLoRA
from hftlight.errors import InputError
from hftlight.models.load import load_model
from tests.helpers.families import FAMILIES, logits, write_family
from tests.helpers.slow import some_slow

SHORT = Training(steps=2, batch_size=2, lr=2e-2)
FEW = Evaluation(prompts=2, over_refusal_prompts=2, task_rows=2, max_new_tokens=3, task_max_new_tokens=3, loss_rows=2)
# Antidote's default mode writes whole weights, which Conv1D does not allow. Other families use Safe LoRA.
REPAIRS = {"gpt2": lambda: Antidote(0.2, mode="factor", group="matrix"), "opt": lambda: Antidote(0.2)}


def settings(tmp_path, folder, **changes):
    values = {
        "model": str(folder),
        "alignment": SHORT,
        "finetuning": SHORT,
        "evaluation": FEW,
        "lora": Lora(r=2, alpha=4, targets=["all-linear"]),
        "num_samples": 12,
        "harmful_ratio": 0.25,
        "accelerator": "cpu",
        "output": str(tmp_path / "runs"),
    }
    return RunConfig(**{**values, **changes})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("hftlight.runs.run.write_report", lambda folder: None)  # other tests draw figures


def plain(folder):
    """Return an artifact's model, loaded by PEFT or transformers alone."""
    auto = AutoPeftModelForCausalLM if (folder / "adapter_config.json").is_file() else AutoModelForCausalLM
    return auto.from_pretrained(folder)


@pytest.mark.parametrize("family", some_slow(FAMILIES, fast={"gpt2", "gemma", "llama"}))
def test_a_family_goes_through_every_stage_and_loads_elsewhere(family, tmp_path, capsys):
    base = write_family(tmp_path / family, family)
    # With a bfloat16 base under float32 adapters, rounding would show.
    precision = "bf16-mixed" if family == "gemma" else "32-true"
    repair = REPAIRS.get(family, SafeLoRA)()
    folder = run(settings(tmp_path, base, precision=precision), [repair]).folder
    arm = next(path for path in folder.iterdir() if (path / "repaired").is_dir())
    untrained = logits(load_model(str(base)))
    for name in ("aligned", "finetuned", "repaired"):
        artifact = arm / name
        own, elsewhere = load_model(str(artifact)), plain(artifact)
        torch.testing.assert_close(logits(elsewhere), logits(own), rtol=0, atol=1e-4)
        assert (logits(own) - untrained).abs().max() > 1e-3
        if hasattr(elsewhere, "merge_and_unload"):
            torch.testing.assert_close(logits(elsewhere.merge_and_unload()), logits(own), rtol=0, atol=1e-4)
    few = [
        f"--evaluation.{key}={value}" for key, value in FEW.answering().items() if isinstance(value, int) and value < 9
    ]
    assert evaluate(["--model", str(arm / "repaired"), "--accelerator=cpu", *few]) == 0
    assert export([str(arm / "repaired"), str(tmp_path / "whole")]) == 0
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(whole), logits(load_model(str(arm / "repaired"))), rtol=0, atol=1e-4)
    assert json.loads((arm / "repaired" / "serving.json").read_text())["template"] == "chat"


@pytest.mark.parametrize(
    ("repair", "tuning"), [(Antidote(0.2), "lora"), (SafeLoRA(), "lora"), (Antidote(0.2), "full"), (SafeLoRA(), "full")]
)
def test_a_repair_that_cannot_work_on_transposed_layers_is_refused_before_training(repair, tuning, tmp_path):
    base = write_family(tmp_path / "gpt2", "gpt2")
    with pytest.raises(InputError, match=rf"{type(repair).__name__}: transformer.h.0.* stored transposed \(Conv1D"):
        run(settings(tmp_path, base, tuning=tuning), [repair])
    assert not (tmp_path / "cache" / "stages").exists()


@pytest.mark.parametrize("family", some_slow(FAMILIES, fast={"opt", "gpt_neox", "qwen"}))
def test_all_parameters_trained_load_elsewhere(family, tmp_path):
    base = write_family(tmp_path / family, family)
    few = Training(steps=2, batch_size=2, lr=1e-3)
    folder = run(settings(tmp_path, base, tuning="full", alignment=few, finetuning=few), []).folder / "none"
    for name in ("aligned", "finetuned"):
        own = logits(load_model(str(folder / name)))
        torch.testing.assert_close(logits(plain(folder / name)), own, rtol=0, atol=1e-4)
        assert (own - logits(load_model(str(base)))).abs().max() > 1e-3
