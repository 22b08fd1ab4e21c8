"""A process loads the base model once. A returned base equals the loaded base bit for bit."""

import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hftlight.models.base as base_model
from hftlight import run
from hftlight.comparison.grid import Grid
from hftlight.comparison.sweep import compare
from hftlight.config import Lora
from hftlight.defenses import Vaccine
from hftlight.files import folder_digest, read_rows
from hftlight.model_files import model_path
from hftlight.models.adapters import attach
from hftlight.models.base import drop_base, keeps_base, lent_model
from hftlight.models.load import load_model
from hftlight.models.serving import Artifact, trainable_model
from tests.helpers.slow import some_slow
from tests.runs.test_run import config


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))
    drop_base()
    yield
    drop_base()


@pytest.fixture
def loads(monkeypatch):
    """Record the models that are loaded from the disk, and how many are alive at one time."""
    real = AutoModelForCausalLM.from_pretrained

    class Loads(list):
        free = False  # whether several may be alive at one time

        @property
        def alive(self):
            return sum(reference() is not None for reference in self)

    recorded = Loads()

    def counted(*arguments, **options):
        assert recorded.free or recorded.alive == 0, "a second base model in memory"
        loaded = real(*arguments, **options)
        recorded.append(weakref.ref(loaded[0]))
        return loaded

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    return recorded


def same_as_fresh(model):
    fresh, state = load_model("tiny").state_dict(), model.state_dict()
    return fresh.keys() == state.keys() and all(torch.equal(fresh[k], state[k]) for k in fresh)


@pytest.mark.parametrize("protocol", some_slow(["merge", "continue"], fast={"continue"}))
def test_two_cells_load_the_base_once(protocol, tmp_path, loads):
    settings = config(tmp_path, adapter_protocol=protocol)
    outcome = compare(settings, Grid(("none", "lisa")), tmp_path / "c")
    assert set(outcome.values()) == {"done"}
    assert len(loads) == 1
    assert not base_model._kept


@pytest.mark.parametrize("protocol", some_slow(["merge", "continue"], fast={"merge"}))
def test_results_are_those_of_a_fresh_base_each_time(protocol, tmp_path, monkeypatch, loads):
    results = []
    for keep in (True, False):
        monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / f"cache{keep}"))
        if not keep:
            loads.clear()
            loads.free = True
            for user in ("serving", "state"):
                monkeypatch.setattr(f"hftlight.models.{user}.keeps_base", lambda _: False)
            drop_base()
        folder = run(config(tmp_path, adapter_protocol=protocol, output=str(tmp_path / str(keep))), [Vaccine()]).folder
        weights = [folder_digest(path, "*.safetensors") for path in sorted(folder.glob("*/*ed"))]
        results.append((weights, read_rows(folder / "generations.jsonl")))
        assert len(weights) == 4
        assert len(loads) == 1 if keep else len(loads) > 4
        assert not base_model._kept
    assert results[0] == results[1]


def test_full_tuning_keeps_nothing(tmp_path, loads):
    loads.free = True
    run(config(tmp_path, tuning="full", baseline=False))
    assert len(loads) == 2 + 3 * 2  # trained twice; answers and losses of three models
    assert not base_model._kept


def adapter(tmp_path, settings):
    folder = tmp_path / "adapter"
    with trainable_model(settings, None) as model:
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.normal_()
        model.save_pretrained(folder)
    return folder


def test_a_merged_adapter_is_taken_out_again_bit_for_bit(tmp_path):
    folder = adapter(tmp_path, config(tmp_path))
    with lent_model(str(folder), torch.float32, keep=True) as model:
        assert not same_as_fresh(model)
        first = {name: t.clone() for name, t in model.state_dict().items()}
    (base,) = base_model._kept
    assert same_as_fresh(base.model)
    with lent_model(str(folder), torch.float32, keep=True) as again:
        assert again is base.model
        assert all(torch.equal(t, first[name]) for name, t in again.state_dict().items())


def test_a_weight_that_the_file_does_not_have_is_not_kept(tmp_path, monkeypatch):
    with lent_model("tiny", torch.float32, keep=True) as model:
        model.model.norm.weight.data += 1
        monkeypatch.setattr(base_model, "_read_again", lambda *_: None)
    assert not base_model._kept


def leave_hook(model):
    model.model.register_forward_hook(lambda *_: None)


def leave_checkpointing(model):
    model.gradient_checkpointing_enable()


def leave_attention(model):
    model.config._attn_implementation = "eager"


def leave_generation(model):
    model.generation_config.temperature = 0.5


def leave_adapter(model):
    attach(model, Lora(r=2), seed=0)


@pytest.mark.parametrize(
    "leave",
    [leave_hook, leave_checkpointing, leave_attention, leave_generation, leave_adapter],
    ids=lambda f: f.__name__,
)
def test_a_base_that_something_stays_on_is_not_kept(leave):
    with lent_model("tiny", torch.float32, keep=True) as model:
        leave(model)
    assert not base_model._kept


def test_an_exception_in_the_block_drops_the_base():
    with pytest.raises(RuntimeError), lent_model("tiny", torch.float32, keep=True):
        raise RuntimeError
    assert not base_model._kept


def test_modes_and_gradients_are_put_back():
    with lent_model("tiny", torch.float32, keep=True) as model:
        model.train().requires_grad_(False)
        model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    (base,) = base_model._kept
    assert not any(module.training for module in base.model.modules())
    assert all(p.requires_grad and p.grad is None for p in base.model.parameters())


def test_another_type_and_other_files_are_another_base(tmp_path, loads):
    own = tmp_path / "own"
    shutil.copytree(model_path("tiny"), own)
    for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
        with lent_model(str(own), dtype, keep=True) as model:
            assert model.dtype == dtype
        del model
    assert len(loads) == 2
    file = own / "model.safetensors"
    state = load_file(file)
    save_file({name: t + 1 for name, t in state.items()}, file, metadata={"format": "pt"})
    with lent_model(str(own), torch.bfloat16, keep=True) as model:
        assert torch.equal(model.model.norm.weight.data, (state["model.norm.weight"] + 1).bfloat16())


def test_bfloat16_weights_come_back_as_they_were_rounded(tmp_path):
    folder = adapter(tmp_path, config(tmp_path))
    with lent_model("tiny", torch.bfloat16, keep=True) as model:
        before = {name: t.clone() for name, t in model.state_dict().items()}
    with lent_model(str(folder), torch.bfloat16, keep=True):
        pass
    (base,) = base_model._kept
    assert all(torch.equal(t, before[name]) for name, t in base.model.state_dict().items())


def test_a_checkpointed_stage_starts_from_a_clean_base(tmp_path):
    settings = config(tmp_path, gradient_checkpointing=True)
    with trainable_model(settings, None) as model:
        assert model.is_gradient_checkpointing
    assert not base_model._kept


def test_a_name_and_a_link_to_the_same_folder_are_one_base(tmp_path, monkeypatch, loads):
    """An artifact names its base by the path of the load, which may go through a link."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "link"))
    drop_base()
    for name in (
        "tiny",
        model_path("tiny"),
        str((tmp_path / "link").resolve() / Path(model_path("tiny")).parts[-2] / Path(model_path("tiny")).name),
    ):
        with lent_model(name, torch.float32, True):
            pass
    assert len(loads) == 1
    drop_base()


@pytest.mark.parametrize(
    ("changes", "keeps"),
    [
        ({}, True),
        ({"tuning": "full"}, False),
        ({"tuning": "qlora"}, False),
        ({"strategy": "fsdp2"}, False),
        ({"devices": 2}, False),
        ({"num_nodes": 2}, False),
    ],
)
def test_only_adapters_in_one_process_leave_the_base_alone(changes, keeps, tmp_path):
    assert keeps_base(config(tmp_path, **changes)) is keeps


@pytest.mark.parametrize("options", [{"keep": False}, {"keep": True, "four_bit": True}], ids=["unkept", "four bits"])
def test_what_is_not_kept_makes_room_for_itself_first(options, monkeypatch, loads):
    """A kept base is released before another model is loaded."""
    with lent_model("tiny", torch.float32, keep=True) as model:
        pass
    del model
    assert loads.alive == 1
    monkeypatch.setattr(base_model, "load_model", lambda name, dtype, four_bit: load_model(name, dtype))
    with lent_model("tiny", torch.float32, **options):
        assert not base_model._kept
    assert len(loads) == 2


def test_an_upload_does_not_start_in_the_alignments_own_directions(tmp_path):
    """A new adapter on an aligned model has another A than the alignment's adapter had, the same at every start."""
    settings = config(tmp_path)
    aligned = Artifact.of(run(settings).folder / "none" / "aligned")

    def downs(parent):
        with trainable_model(settings, parent) as model:
            return [p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name]

    first, second, again = downs(None), downs(aligned), downs(aligned)
    assert all(torch.equal(a, b) for a, b in zip(second, again, strict=True))
    cosines = [float(torch.cosine_similarity(a.flatten(), b.flatten(), 0)) for a, b in zip(first, second, strict=True)]
    assert max(map(abs, cosines)) < 0.5
