"""A model's identity: every file that loading reads, from any folder or hub, and no other file beside them."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from hftlight import files
from hftlight import model_files as models
from hftlight.config import RunConfig
from hftlight.data.records import Record
from hftlight.data.sources import get_task
from hftlight.errors import InputError
from hftlight.model_files import base_of, model_hash, model_path
from hftlight.models.load import load_model, load_tokenizer
from hftlight.runs.measuring.measure import measure_model
from hftlight.runs.measuring.test_sets import TestSets
from tests.helpers.hub import loopback_hub


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_snapshots", {})


@pytest.fixture
def tiny(tmp_path):
    """Return a copy of the tiny model in the test's own folder."""
    shutil.copytree(model_path("tiny"), tmp_path / "m", ignore=shutil.ignore_patterns("seal.json"))
    return tmp_path / "m"


def another(folder, seed=7, weights="safetensors"):
    """Write a model of the tiny model's shape with other weights."""
    model = load_model("tiny")
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    folder.mkdir(parents=True)
    load_tokenizer("tiny").save_pretrained(folder)
    model.save_pretrained(folder)
    if weights == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


# Every file that loading reads, an adapter's base included.


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "special_tokens_map.json",
        "model.safetensors",
        "pytorch_model.bin",
        "model-00001-of-00002.safetensors",
        "shards/model-00002.safetensors",
        "modeling_own.py",
        "serving.json",
    ],
)
def test_every_file_that_loading_reads_counts(tiny, name):
    (tiny / "x.index.json").write_text(json.dumps({"weight_map": {"w": "shards/model-00002.safetensors"}}))
    path = tiny / name
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        path.write_text("{}")
    before = model_hash(str(tiny))
    assert model_hash(str(tiny)) == before
    path.write_bytes(path.read_bytes() + b" ")
    assert model_hash(str(tiny)) != before
    path.unlink()
    if name != "config.json":
        assert model_hash(str(tiny)) != before


def test_what_only_lies_beside_a_model_does_not_count(tiny):
    before = model_hash(str(tiny))
    (tiny / "README.md").write_text("a model")
    (tiny / ".gitattributes").write_text("x")
    (tiny / "checkpoint-5").mkdir()
    (tiny / "checkpoint-5" / "model.safetensors").write_text("x")
    assert model_hash(str(tiny)) == before


def test_an_adapter_is_also_what_it_stands_on_and_not_where_that_lies(tiny, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_text("weights")

    def stand_on(place, **more):
        settings = {"base_model_name_or_path": str(place), "r": 8, **more}
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
        return model_hash(str(adapter))

    before = stand_on(tiny)
    shutil.copytree(tiny, tmp_path / "elsewhere")
    assert stand_on(tmp_path / "elsewhere") == before
    assert stand_on(tiny, r=9) != before
    (tiny / "generation_config.json").write_text("{}")
    assert stand_on(tiny) != before


def test_the_base_of_an_adapter_is_found_when_the_cache_was_moved_or_cleared(tmp_path, monkeypatch):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    here = model_path("tiny")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": here}))
    before = model_hash(str(adapter))
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "moved"))
    shutil.rmtree(here)
    assert base_of(adapter) == "tiny"
    assert model_hash(str(adapter)) == before
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(InputError, match=r"belongs to the model in .*gone, which does not exist"):
        base_of(adapter)


def test_a_damaged_model_in_the_cache_is_made_anew(capsys):
    folder, before = Path(model_path("tiny")), model_hash("tiny")
    (folder / "tokenizer_config.json").write_text("{}")
    assert model_hash("tiny") == before
    assert (
        "models/tiny-1 in the cache has changed since it was written (tokenizer_config.json differs)"
        in capsys.readouterr().err
    )


def test_code_of_another_repository_is_never_taken_for_known(tiny, monkeypatch):
    settings = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(
        json.dumps({**settings, "auto_map": {"AutoModelForCausalLM": "lab/code--own.Own"}})
    )
    plain = model_hash(str(tiny))
    monkeypatch.setitem(models._allowed, "remote_code", True)
    here = model_hash(str(tiny))
    assert here == model_hash(str(tiny)) != plain
    monkeypatch.setattr(models, "_UNKNOWN", "another process")
    assert model_hash(str(tiny)) != here


# Two models never share an answer.


def answers(model, prompts=("ask one", "ask two")):
    rows = [Record(p, role="test") for p in prompts]
    tests = TestSets(rows, [], [], get_task("builtin"), ("keyword",))
    config = RunConfig(model=str(model), accelerator="cpu")
    config.evaluation.max_new_tokens = 8
    return [g["response"] for g in measure_model(config, tests)[1]]


def fresh(model, tmp_path, monkeypatch):
    """Return a model's answers with an empty cache."""
    with monkeypatch.context() as patch:
        patch.setenv("HFTLIGHT_CACHE", str(tmp_path / f"fresh-{time.monotonic_ns()}"))
        return answers(model)


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
def test_two_folders_and_one_cache(tmp_path, monkeypatch, weights):
    a, b = (another(tmp_path / name, seed, weights) for name, seed in (("a", 1), ("b", 2)))
    cached = [answers(a), answers(b)]
    assert cached == [fresh(a, tmp_path, monkeypatch), fresh(b, tmp_path, monkeypatch)]
    assert cached[0] != cached[1]


def test_an_edited_chat_template_asks_anew(tmp_path, tiny):
    before = answers(tiny)
    config = next(p for p in (tiny / "chat_template.jinja", tiny / "tokenizer_config.json") if p.is_file())
    config.write_text(config.read_text().replace("<' + message['role'] + '>'", "<' + message['role'] + '> Please: '"))
    assert answers(tiny) != before


def test_two_models_on_a_hub_and_one_cache(tmp_path, monkeypatch):
    """Each model gets its own answers on first use. Only read files are fetched. A new revision is another model."""
    import huggingface_hub.constants as hub

    places = {name: another(tmp_path / name, seed) for name, seed in (("one", 1), ("two", 2))}
    alone = [fresh(place, tmp_path, monkeypatch) for place in places.values()]
    (places["one"] / "model.gguf").write_text("not read")
    served = {f"lab/{name}": place for name, place in places.items()}
    with loopback_hub(served) as (address, fetched):
        for name, value in (
            ("ENDPOINT", address),
            ("HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"),
            ("HF_HUB_CACHE", str(tmp_path / "hub")),
        ):
            monkeypatch.setattr(hub, name, value)
        load_tokenizer("lab/one")
        assert not any("safetensors" in name for name in fetched)
        assert [answers("lab/one"), answers("lab/two")] == alone
        assert alone[0] != alone[1]
        assert not any("gguf" in name for name in fetched)
        first = model_hash("lab/one")
        pinned = f"lab/one@{Path(model_path('lab/one')).name}"
        shutil.rmtree(places["one"])
        another(places["one"], 3)
        assert model_hash("lab/one") == first  # one process reads one revision
        monkeypatch.setattr(models, "_snapshots", {})
        assert model_hash("lab/one") != first
        assert model_hash(pinned) == first
        with pytest.raises(InputError, match="'lab/three' cannot be loaded"):
            model_path("lab/three")
    monkeypatch.setattr(models, "_snapshots", {})
    assert model_hash(pinned) == first  # without the hub, from the files in the cache


# Costs: digests are stored and reused.


def test_the_digest_of_a_large_file_is_remembered_while_it_stays(tmp_path, monkeypatch):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"x" * files.REMEMBERED)
    monkeypatch.setattr(files, "SETTLED", -(10**9))
    first, reads = files.file_digest(path), []
    real = files.hashlib.file_digest
    monkeypatch.setattr(files.hashlib, "file_digest", lambda *a: reads.append(a) or real(*a))
    assert files.file_digest(path) == first
    files._digests.clear()
    assert files.file_digest(path) == first  # another process finds the digest in the cache
    assert reads == []
    note = next((tmp_path / "cache" / "hashes").iterdir())
    note.write_text(note.read_text()[:20])
    files._digests.clear()
    assert files.file_digest(path) == first
    assert len(reads) == 1
    status = path.stat()
    path.write_bytes(b"y" * files.REMEMBERED)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert files.file_digest(path) != first


def test_a_file_that_has_just_changed_is_read_each_time(tmp_path):
    path = tmp_path / "rows.txt"
    for text in ("one", "two", "six"):
        path.write_text(text)
        assert files.file_digest(path) == files.hashlib.sha256(text.encode()).hexdigest()
