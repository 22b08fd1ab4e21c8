"""Edits of a model in its files equal edits in memory, and leave the source unchanged."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hftlight.cli.repair import repair
from hftlight.defenses import Antidote, SafeLoRA, TaskArithmetic
from hftlight.engine.weights.save import MARKER
from hftlight.engine.weights.subject import Subject
from hftlight.errors import InputError
from hftlight.files import folder_digest
from hftlight.models import mapped
from hftlight.models.mapped import mapped_model
from hftlight.models.repaired import repair_files, repair_model
from tests.helpers.tiny_lm import tiny_lm


def replace_config(config, **options):
    return type(config)(**{**config.to_dict(), **options})


def saved(folder, seed, dtype=torch.float32, **options):
    """Write a tiny model with random weights in several files, and return the folder."""
    model = tiny_lm(seed, dtype=torch.float32)
    if options:
        model = LlamaForCausalLM(replace_config(model.config, **options))
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def folders(tmp_path):
    return SimpleNamespace(
        **{name: saved(tmp_path / name, seed) for seed, name in enumerate(("tuned", "aligned", "base"))}
    )


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_an_edit_in_the_files_is_the_edit_in_memory(folders, tmp_path):
    before = folder_digest(folders.tuned)
    options = {"number": 3, "aligned": str(folders.aligned), "base": str(folders.base)}
    assert len(list(folders.tuned.glob("*.safetensors"))) > 1
    (report,) = repair_files([SafeLoRA(**options)], str(folders.tuned), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folders.tuned)
    expected = repair_model(SafeLoRA(**options), model)
    assert report["projected"] == expected["projected"]
    assert report["changed_entries"] == expected["changed_entries"] > 0
    assert report["output_digest"] == expected["output_digest"]
    repaired = weights(tmp_path / "out")
    assert all(torch.equal(w, repaired[name]) for name, w in model.state_dict().items())
    assert folder_digest(folders.tuned) == before
    assert (tmp_path / "out" / MARKER).is_file()


def test_pages_that_are_released_all_the_time_lose_no_edit(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "INTERVAL", 1e-5)
    options = {"fraction": 1.0, "aligned": str(folders.aligned), "base": str(folders.base)}
    repair_files([SafeLoRA(**options)], str(folders.tuned), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folders.tuned)
    repair_model(SafeLoRA(**options), model)
    repaired = weights(tmp_path / "out")
    assert all(torch.equal(w, repaired[name]) for name, w in model.state_dict().items())


def test_stored_scores_replace_the_pass_over_data(folders, tmp_path):
    from hftlight.engine.weights.repair import linear_weights

    model = AutoModelForCausalLM.from_pretrained(folders.tuned)
    tokens = torch.randint(0, 48, (4, 7), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    subject = Subject(model, batches=lambda _: iter([batch]))
    kept = {}

    def keep(repair, compute):
        kept.update(compute())
        return kept

    subject.kept = keep
    whole = Antidote(0.1, aligned=str(folders.aligned))
    whole.apply(subject)
    if not kept:
        pytest.skip("Antidote keeps no scores")
    repair_files([Antidote(0.1, aligned=str(folders.aligned))], str(folders.tuned), tmp_path / "out", kept)
    repaired = weights(tmp_path / "out")
    for name, weight in linear_weights(model).items():
        assert torch.equal(weight, repaired[name])


def test_every_repair_leaves_its_report(folders, tmp_path):
    options = {"aligned": str(folders.aligned)}
    repairs = [SafeLoRA(number=3, base=str(folders.base), **options), TaskArithmetic(update_weight=0.5, **options)]
    reports = repair_files(repairs, str(folders.tuned), tmp_path / "out")
    written = json.loads((tmp_path / "out" / MARKER).read_text())
    assert list(written["reports"]) == ["SafeLoRA", "TaskArithmetic"]
    for name, report in zip(written["reports"], reports, strict=True):
        assert written["reports"][name]["changed_entries"] == report["changed_entries"] > 0


def test_a_private_model_leaves_its_files_unchanged(folders):
    before = folder_digest(folders.tuned)
    with mapped_model(folders.tuned, private=True) as model:
        model.lm_head.weight.zero_()
        assert not model.lm_head.weight.any()
    assert folder_digest(folders.tuned) == before


def test_tied_weights_stay_tied(tmp_path):
    folder = saved(tmp_path / "tied", 0, tie_word_embeddings=True)
    with mapped_model(folder) as model:
        assert model.lm_head.weight is model.get_input_embeddings().weight


def test_bfloat16_stays_bfloat16(tmp_path):
    for seed, name in enumerate(("tuned", "aligned", "base")):
        saved(tmp_path / name, seed, torch.bfloat16)
    options = {"number": 2, "aligned": str(tmp_path / "aligned"), "base": str(tmp_path / "base")}
    (report,) = repair_files([SafeLoRA(**options)], str(tmp_path / "tuned"), tmp_path / "out")
    assert report["changed_entries"] > 0
    parts = [load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
    assert {t.dtype for part in parts for t in part.values()} == {torch.bfloat16}


def test_a_missing_weight_and_a_full_disk_are_named(folders, tmp_path, monkeypatch):
    gone = next(folders.tuned.glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"the repaired model takes .* but the disk has"):
        repair_files(
            [SafeLoRA(base=str(folders.base), aligned=str(folders.aligned))], str(folders.tuned), tmp_path / "o"
        )
    assert not (tmp_path / "o").exists()
    gone.unlink()
    with pytest.raises(InputError, match="is in none of the safetensors files"), mapped_model(folders.tuned):
        pass


def test_an_adapter_is_repaired_without_a_copy_of_its_base(tmp_path, folders):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(folders.aligned)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    command = [str(tmp_path / "adapter"), str(tmp_path / "out"), "--defense", "safe_lora", "--safe_lora.number", "1"]
    assert repair([*command, "--base", str(folders.base)]) == 0
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders.aligned), tmp_path / "out")
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders.aligned), tmp_path / "adapter")
    repair_model(SafeLoRA(number=1, base=str(folders.base)), expected)
    for name, w in expected.state_dict().items():
        assert_close(loaded.state_dict()[name], w, rtol=0, atol=1e-7)


def test_the_command_names_what_is_missing(folders, tmp_path, capsys):
    model, out = str(folders.tuned), str(tmp_path / "out")
    for arguments, words in (
        ([model, "--defense", "safe_lora"], "hftlight repair MODEL OUTPUT"),
        ([model, out], "--defense: name at least one repair"),
        ([model, out, "--defense", "lisa"], "lisa is no repair"),
        ([model, out, "--defense", "safe_lora"], "SafeLoRA: give --aligned"),
        ([model, out, "--defense", "antidote", "--aligned", model], "Antidote: measures the model on data"),
        ([model, model, "--defense", "safe_lora"], "exists already"),
        ([model, out, "--defense", "safety_lock", "--aligned", model], "SafetyLock: adds parameters"),
    ):
        assert repair(arguments) == 2
        assert words in capsys.readouterr().err
    others = ["--base", str(folders.base), "--aligned", str(folders.aligned)]
    assert repair([model, out, "--defense", "safe_lora", "--safe_lora.number", "2", *others]) == 0
    assert "entries changed" in capsys.readouterr().out
