"""Cache entries of a run are whole or made anew, separate from the run's folder, and not needed afterwards."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from hftlight import run
from hftlight.defenses import Antidote, Booster
from hftlight.files import folder_digest, read_rows
from hftlight.model_files import model_hash
from hftlight.models.load import load_model
from tests.helpers.slow import some_slow
from tests.runs.test_run import config, prompt
from tests.test_cache import cut_at_a_line, emptied, half_written, other_bytes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a folder with a finished run and its cache. Tests that change files work on the copy ``place``."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HFTLIGHT_CACHE", str(place / "cache"))
        run(config(place, name="first", baseline=False), [Booster(), Antidote(prune_ratio=0.5)])
    return place


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "made")
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "made" / "cache"))
    return tmp_path / "made"


ARM = "booster+antidote"


def again(place, name="second"):
    return run(config(place, name=name, baseline=False), [Booster(), Antidote(prune_ratio=0.5)]).folder


def outcome(folder):
    rows = [r for r in read_rows(folder / "metrics.jsonl") if r["kind"] != "cost"]
    weights = {p.name: folder_digest(p, "*.safetensors") for p in sorted((folder / ARM).iterdir())}
    return rows, weights, (folder / "generations.jsonl").read_text()


KINDS = ("models", "stages", "evaluations")


@pytest.mark.parametrize("damage", some_slow([emptied, cut_at_a_line, half_written, other_bytes], fast={other_bytes}))
def test_damaged_files_are_named_and_made_anew(damage, place, capsys):
    """Every file of the cache is damaged, and a second run has the results of the first."""
    # Every file of the cache that is not empty.
    files = [p for kind in KINDS for p in (place / "cache" / kind).rglob("*") if p.is_file() and p.stat().st_size]
    damaged = [p for p in files if p.name != "lock"]
    assert {p.name for p in damaged} >= {"adapter_model.safetensors", "curves.jsonl", "stage.json", "answers.json"}
    for path in damaged:
        damage(path)
    assert outcome(again(place)) == outcome(place / "runs" / "first")
    messages = capsys.readouterr().err
    for kind in KINDS:
        assert f"hftlight: {kind}/" in messages
    # Model, stages, answers and verdicts.
    assert messages.count("in the cache has changed since it was written") >= 3 + 3 + 1


def test_one_damaged_file_costs_one_stage(place):
    """The aligned model is trained anew, byte for byte, so the key of the fine-tuning stays the same."""
    (curves,) = (place / "cache" / "stages").glob("alignment-*/curves.jsonl")
    untouched = {p: p.stat().st_mtime_ns for p in (place / "cache").rglob("*/finetuning-*/artifact/*")}
    cut_at_a_line(curves)
    assert outcome(again(place)) == outcome(place / "runs" / "first")
    assert untouched == {p: p.stat().st_mtime_ns for p in untouched}
    assert untouched


def test_nothing_but_weights_is_shared_with_the_cache(made):
    """An editor that writes in place would change the cache with the run."""
    cached = {p.stat().st_ino for p in (made / "cache").rglob("*") if p.is_file()}
    shared = {p.suffix for p in (made / "runs").rglob("*") if p.is_file() and p.stat().st_ino in cached}
    assert shared == {".safetensors"}


def test_weights_are_shared_by_link(made):
    linked = [p for p in (made / "runs").rglob("*.safetensors") if p.stat().st_nlink > 1]
    assert len(linked) == len(list((made / "runs").rglob("*.safetensors"))) == 4  # three stages and the base


def test_artifacts_outlive_the_cache(tmp_path, monkeypatch):
    """In a moved cache hftlight finds the base. Without a cache, plain PEFT and hftlight load the artifact."""
    from peft import AutoPeftModelForCausalLM

    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))
    folder = run(config(tmp_path, name="mine", baseline=False)).folder
    artifact = folder / "none" / "finetuned"
    ids = prompt(artifact, "How do I open a zorvex?")
    with torch.no_grad():
        expected = load_model(str(artifact))(input_ids=ids).logits
        before = model_hash(str(artifact))
        (tmp_path / "cache").rename(tmp_path / "elsewhere")
        monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "elsewhere"))
        cached = next((tmp_path / "elsewhere" / "stages").glob("finetuning-*/artifact"))
        assert model_hash(str(cached)) == model_hash(str(artifact)) == before  # the base lies in the moved cache
        shutil.rmtree(tmp_path / "elsewhere")
        for model in (AutoPeftModelForCausalLM.from_pretrained(artifact).eval(), load_model(str(artifact))):
            torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
        moved = folder.rename(tmp_path / "moved") / "none" / "finetuned"  # PEFT names a base by an absolute path
        torch.testing.assert_close(load_model(str(moved))(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    assert model_hash(str(moved)) == before


def test_stages_in_a_moved_cache_are_used(place, monkeypatch):
    (place / "cache").rename(place / "elsewhere")
    monkeypatch.setenv("HFTLIGHT_CACHE", str(place / "elsewhere"))
    times = {p: p.stat().st_mtime_ns for p in (place / "elsewhere" / "stages").rglob("*.safetensors")}
    assert outcome(again(place)) == outcome(place / "runs" / "first")
    assert times == {p: p.stat().st_mtime_ns for p in (place / "elsewhere" / "stages").rglob("*.safetensors")}


def test_the_manifest_names_model_versions_and_code(made):
    manifest = json.loads((made / "runs" / "first" / "manifest.json").read_text())
    assert manifest["model"]["name"] == "tiny"
    assert {"hftlight", "torch", "transformers", "peft", "tokenizers"} <= manifest["versions"].keys()
    assert {"hftlight", "hftlight.defenses.alignment.booster.Booster"} <= manifest["code"].keys()
    stages = manifest["arms"][ARM]["stages"]
    assert all(Path(made / "cache" / "stages" / f"{kind}-{stage['key']}").is_dir() for kind, stage in stages.items())
