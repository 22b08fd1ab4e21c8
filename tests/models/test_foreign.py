"""Models and adapters of other authors: a run refuses unsupported ones before its first step."""

import json
import re
from dataclasses import replace

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hftlight import run
from hftlight.cli.evaluate import evaluate
from hftlight.cli.export import export
from hftlight.cli.train import train
from hftlight.config import Data, Evaluation, Lora
from hftlight.defenses import MLLR, PTST, Antidote, Booster, SafeLoRA
from hftlight.engine.weights.stored import stored
from hftlight.errors import InputError
from hftlight.model_files import model_path
from hftlight.models.load import load_model, load_tokenizer
from hftlight.runs.prepare import prepare
from tests.helpers.families import IDS, POSITIONS, logits, write_family
from tests.models.test_families import FEW, own_cache, settings  # noqa: F401


def adapter(folder, base, **options):
    """Write an adapter with a random B by PEFT's save_pretrained. Return its folder and logits."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(3)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"r": 2, "lora_alpha": 4, **options}))
    for name, p in adapted.named_parameters():
        if p.requires_grad and "lora_A" not in name:
            torch.nn.init.normal_(p, std=0.3)
    adapted.save_pretrained(folder)
    return folder, logits(adapted)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


TARGETS = {
    "gpt2": ("['c_attn', 'c_fc', 'c_proj']", "Conv1D"),
    "gpt_neox": ("['dense', 'dense_4h_to_h', 'dense_h_to_4h', 'query_key_value']", "Linear"),
}


@pytest.mark.parametrize("family", TARGETS)
def test_targets_that_a_family_lacks_are_answered_with_those_it_has(family, tmp_path):
    base, (known, kind) = write_family(tmp_path / "m", family), TARGETS[family]
    with pytest.raises(InputError) as caught:
        prepare(settings(tmp_path, base, lora=Lora()), [])
    assert str(caught.value) == (
        f"--lora.targets: no linear layer is called 'q_proj'; linear layers are {known} ({kind})."
    )


@pytest.mark.parametrize(("family", "targets"), [("gpt2", ["c_attn", "c_proj"]), ("gpt_neox", ["query_key_value"])])
def test_mllr_names_the_layers_of_other_families_before_anything_trains(family, targets, tmp_path):
    base = write_family(tmp_path / "m", family)
    message = f"MLLR: no trainable module is called 'v_proj'; choose from {targets}."
    with pytest.raises(InputError, match=re.escape(message)):
        prepare(settings(tmp_path, base, lora=Lora(targets=targets)), [MLLR()])
    chosen = MLLR(robust=targets[:1]) if len(targets) > 1 else MLLR(robust=[f"{targets[0]}:0-0"])
    prepare(settings(tmp_path, base, lora=Lora(targets=targets)), [chosen])
    assert not chosen.trace


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("protocol", ["merge", "continue"])
def test_the_two_ends_of_a_model_get_no_adapter(tied, target, protocol, tmp_path):
    base = write_family(tmp_path / "m", "llama", tie_word_embeddings=tied)
    lora = Lora(targets=["q_proj", target])
    with pytest.raises(InputError, match=f"'{target}' is the output layer or the input embedding"):
        prepare(settings(tmp_path, base, lora=lora, adapter_protocol=protocol), [])


def test_a_target_that_is_no_layer_is_refused_and_all_linear_stands_alone(tmp_path):
    base = write_family(tmp_path / "m", "llama")
    with pytest.raises(InputError, match="no linear layer is called 'mlp'"):
        prepare(settings(tmp_path, base, lora=Lora(targets=["mlp"])), [])
    with pytest.raises(InputError, match="all-linear must be the only entry"):
        prepare(settings(tmp_path, base, lora=Lora(targets=["all-linear", "q_proj"])), [])


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_all_linear_is_what_peft_makes_of_it(family, tmp_path):
    base = write_family(tmp_path / "m", family)
    folder = run(settings(tmp_path, base), []).folder
    _, _ = adapter(tmp_path / "peft", base, target_modules="all-linear")
    ours = load_file(folder / "none" / "finetuned" / "adapter_model.safetensors")
    assert ours.keys() == load_file(tmp_path / "peft" / "adapter_model.safetensors").keys()
    assert not any("lm_head" in name for name in ours)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_rows_are_no_longer_than_the_positions(family, tmp_path):
    base = write_family(tmp_path / "m", family)
    rows = [{"instruction": f"Write list {i}.", "output": "jar " * (30 + 120 * (i % 2))} for i in range(40)]
    harmful = jsonl(tmp_path / "h.jsonl", rows)
    data = Data(task=jsonl(tmp_path / "t.jsonl", rows), harmful=harmful)
    config = settings(tmp_path, base, max_tokens=2000, num_samples=8, harmful_ratio=0.0, template="plain", data=data)
    prepared = prepare(config, [Booster()])
    assert prepared.config.max_tokens == POSITIONS
    assert prepared.notes == [
        f"--max_tokens was lowered from 2000 to {POSITIONS}, the positions that the model has.",
        f"17 of 32 task rows have more than {POSITIONS} tokens and are left out before rows are drawn.",
    ]
    assert prepared.dropped["harmful"] == 20
    assert prepared.trained_on.rows == 8  # long rows were not drawn
    long = Data(task=jsonl(tmp_path / "long.jsonl", rows[1::2]))
    with pytest.raises(InputError, match=r"lowered from 2000 to 512, the positions.* Stream 'task'.* shorter rows"):
        prepare(replace(config, data=long), [])


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_answers_that_leave_the_positions_are_refused_by_row_and_option(family, tmp_path):
    base = write_family(tmp_path / "m", family)
    test = jsonl(tmp_path / "test.jsonl", [{"prompt": "a"}, {"prompt": "b" * 480}])
    config = settings(tmp_path, base, data=Data(test=test), evaluation=Evaluation(max_new_tokens=40))
    with pytest.raises(InputError, match=r"of 'test harmful': .* 512 positions.* --evaluation.max_new_tokens 40"):
        prepare(config, [])
    long = Evaluation(task_max_new_tokens=600)
    with pytest.raises(InputError, match=r"of 'test task': .* --evaluation.task_max_new_tokens 600"):
        prepare(settings(tmp_path, base, evaluation=long), [])


def test_a_served_system_text_counts_among_the_positions(tmp_path):
    base = write_family(tmp_path / "m", "gpt2")
    prepare(settings(tmp_path, base), [PTST("Be safe.")])
    with pytest.raises(InputError, match="512 positions"):
        prepare(settings(tmp_path, base), [PTST("Be safe. " * 60)])


def with_token(folder, **added):
    """Add tokens to a folder's tokenizer without resizing its model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(added)
    tokenizer.save_pretrained(folder)
    return folder


def test_padding_outside_the_embedding_is_done_with_an_id_inside(tmp_path):
    """Every token of the artifact's tokenizer has an embedding row. Else PEFT would grow the embedding."""
    base = with_token(write_family(tmp_path / "m", "llama"), pad_token="[PAD]")
    assert AutoTokenizer.from_pretrained(base).pad_token_id == IDS
    assert load_tokenizer(str(base)).pad_token_id < IDS
    folder = run(settings(tmp_path, base), [Antidote(0.2, mode="factor", group="matrix")]).folder / "antidote"
    for name in ("finetuned", "repaired"):
        elsewhere = AutoPeftModelForCausalLM.from_pretrained(folder / name)
        torch.testing.assert_close(logits(elsewhere), logits(load_model(str(folder / name))), rtol=0, atol=1e-4)


@pytest.mark.parametrize("where", ["task", "test"])
def test_a_rows_own_token_outside_the_embedding_is_named(where, tmp_path):
    base = with_token(write_family(tmp_path / "m", "llama"), additional_special_tokens=["<tool>"])
    rows = [{"instruction": "Call <tool> now.", "output": "Done."}] * 20
    data = Data(**{where: jsonl(tmp_path / "rows.jsonl", rows)})
    with pytest.raises(InputError, match=r"its token '<tool>' has the id 259, and the model's embedding has 259 rows"):
        prepare(settings(tmp_path, base, data=data, harmful_ratio=0.0), [])


def test_a_second_round_on_an_adapter_is_one_adapter_on_the_original_base(tmp_path):
    """The second round has other layers and another rank. The repair's base is the first round's model."""
    lora = Lora(r=2, alpha=6, targets=["q_proj", "up_proj"])
    base = write_family(tmp_path / "m", "llama")
    first = run(settings(tmp_path, base, name="one", lora=lora), []).folder / "none" / "finetuned"
    second = settings(tmp_path, first, name="two", lora=Lora(r=3, alpha=3, targets=["q_proj", "o_proj"]))
    folder = run(second, [SafeLoRA()]).folder / "safe_lora"
    start = logits(load_model(str(first)))
    for name, rank in (("aligned", 7), ("finetuned", 10), ("repaired", 10)):
        own = logits(load_model(str(folder / name)))
        elsewhere = AutoPeftModelForCausalLM.from_pretrained(folder / name)
        assert elsewhere.peft_config["default"].base_model_name_or_path == model_path(str(base))
        assert elsewhere.peft_config["default"].r == rank
        torch.testing.assert_close(logits(elsewhere), own, rtol=0, atol=1e-4)
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder / name)), own, rtol=0, atol=1e-4)
        assert (own - start).abs().max() > 1e-3
    assert prepare(second, []).config_hash


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter_protocol": "continue"}, "--adapter_protocol continue would add a second one"),
        ({"tuning": "qlora", "adapter_protocol": "continue"}, "--tuning qlora would add a second one"),
    ],
)
def test_a_second_adapter_on_top_of_one_is_refused_with_the_way_out(changes, message, tmp_path):
    base = write_family(tmp_path / "m", "llama")
    folder, _ = adapter(tmp_path / "a", base, target_modules=["q_proj"])
    with pytest.raises(InputError, match=f"{message}.*hftlight export"):
        prepare(settings(tmp_path, folder, **changes), [])


OTHERS = {
    "rank-stabilized": {"target_modules": ["q_proj", "up_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 5},
        "alpha_pattern": {"k_proj": 9},
    },
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "trained biases": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}
STACKING = ("rank-stabilized", "patterns", "some layers")


@pytest.mark.parametrize("kind", OTHERS)
def test_adapters_of_others_are_loaded_right_and_stacked_or_refused(kind, tmp_path):
    bias = {"attention_bias": True} if kind == "trained biases" else {}
    base = write_family(tmp_path / "m", "llama", **bias)
    folder, expected = adapter(tmp_path / "a", base, **OTHERS[kind])
    torch.testing.assert_close(logits(load_model(str(folder))), expected, rtol=0, atol=1e-4)
    assert export([str(folder), str(tmp_path / "whole")]) == 0
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(whole), expected, rtol=0, atol=1e-4)
    config = settings(tmp_path, folder, lora=Lora(r=2, alpha=4, targets=["q_proj"]))
    if kind not in STACKING:
        with pytest.raises(InputError, match=r"an adapter must be plain LoRA on linear layers, got .*hftlight export"):
            run(config, [])
        return
    artifact = run(config, []).folder / "none" / "finetuned"
    own = logits(load_model(str(artifact)))
    torch.testing.assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(artifact)), own, rtol=0, atol=1e-4)
    assert 1e-3 < (own - expected).abs().max() < (expected - logits(load_model(str(base)))).abs().max() * 3


def test_an_adapter_on_a_tied_end_is_refused(tmp_path):
    base = write_family(tmp_path / "m", "llama", tie_word_embeddings=True)
    folder, _ = adapter(tmp_path / "a", base, target_modules=["q_proj", "lm_head"])
    with pytest.raises(InputError, match="which are one weight in this model"):
        load_model(str(folder))


def test_an_adapter_with_missing_weights_is_refused(tmp_path):
    base = write_family(tmp_path / "m", "llama")
    folder, _ = adapter(tmp_path / "a", base, target_modules=["q_proj"])
    state = load_file(folder / "adapter_model.safetensors")
    dropped = sorted(state)[0]
    save_file({k: v for k, v in state.items() if k != dropped}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"weights are missing from its file.*layers.0.self_attn.q_proj.lora_A"):
        load_model(str(folder))


def test_an_adapter_of_a_deeper_model_is_refused(tmp_path):
    deep = write_family(tmp_path / "deep", "llama", num_hidden_layers=3)
    folder, _ = adapter(tmp_path / "a", deep, target_modules=["q_proj"])
    base = write_family(tmp_path / "m", "llama")
    settings_file = folder / "adapter_config.json"
    settings_file.write_text(settings_file.read_text().replace(str(deep), str(base)))
    with pytest.raises(InputError, match=r"layers.2.self_attn.q_proj.lora_A.weight.* have no place in the model"):
        load_model(str(folder))


def test_an_adapter_that_writes_into_the_prompt_is_refused(tmp_path):
    from peft import PromptTuningConfig

    base = write_family(tmp_path / "m", "llama")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    adapted.save_pretrained(tmp_path / "a")
    with pytest.raises(InputError, match="adapts the prompt, not the weights"):
        load_model(str(tmp_path / "a"))


def test_a_plain_peft_folder_has_its_bases_tokenizer(tmp_path, capsys):
    base = write_family(tmp_path / "m", "llama")
    folder, _ = adapter(tmp_path / "a", base, target_modules=["q_proj"])
    assert not (folder / "tokenizer.json").exists()
    few = [f"--evaluation.{k}={v}" for k, v in FEW.answering().items() if isinstance(v, int) and v < 9]
    assert evaluate(["--model", str(folder), "--accelerator=cpu", *few]) == 0
    assert export([str(folder), str(tmp_path / "whole")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "whole").vocab_size > 0
    prepare(settings(tmp_path, folder), [])
    for file in base.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError) as caught:
        load_tokenizer(str(folder))
    assert f"It was looked for in {folder.resolve()} and {base.resolve()}." in str(caught.value)


def test_updates_of_transposed_layers_are_read_in_the_layout_of_their_weights(tmp_path):
    """GPT-2's attn.c_proj is square: a transposed update would fit, but be wrong."""
    base = write_family(tmp_path / "m", "gpt2")
    folder, _ = adapter(tmp_path / "a", base, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    weights, merged = stored(folder), load_model(str(folder))
    for name, p in merged.named_parameters():
        if weights.shape(name) is not None:
            torch.testing.assert_close(weights.rows(name), p.detach(), rtol=0, atol=1e-6)


def test_a_template_with_a_text_of_its_own_is_told_of_and_refused_by_ptst(tmp_path, capsys):
    text = (
        "<sys>You follow a strict policy.{% if messages[0].role=='system' %} {{ messages[0].content }}{% endif %}<end>"
        "{% for m in messages %}{% if m.role!='system' %}<{{ m.role }}>{{ m.content }}<end>{% endif %}{% endfor %}<go>"
    )
    base = write_family(tmp_path / "m", "llama", chat_template=text)
    (note,) = prepare(settings(tmp_path, base), []).notes
    assert note.endswith("adds its own system text to every prompt: '<sys>You follow a strict policy.'.")
    with pytest.raises(InputError, match="PTST: the chat template writes a system text of its own"):
        prepare(settings(tmp_path, base), [PTST()])
    arguments = ["--model", str(base), "--dry_run", "--lora.targets", "all-linear", "--accelerator", "cpu"]
    assert train(arguments) == 0
    assert "'<sys>You follow a strict policy.'" in " ".join(capsys.readouterr().out.split())


THINKING = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)


def test_thinking_reaches_training_and_measuring_and_is_recorded(tmp_path, monkeypatch):
    from hftlight.data import templates

    thinking_off = []
    real = templates.ChatTemplate.render

    def render(template, tokenizer, turns):
        text = real(template, tokenizer, turns)
        if turns[-1][0] == "user":
            thinking_off.append(text.endswith("[assistant]<think></think>"))
        return text

    monkeypatch.setattr(templates.ChatTemplate, "render", render)
    base = write_family(tmp_path / "m", "llama", chat_template=THINKING)
    result = run(settings(tmp_path, base, template="chat_no_thinking"), [])
    assert thinking_off
    assert all(thinking_off)
    assert json.loads((result.folder / "manifest.json").read_text())["template"] == "chat_no_thinking"
    artifact = result.folder / "none" / "finetuned"
    assert json.loads((artifact / "serving.json").read_text())["template"] == "chat_no_thinking"
    thinking_off.clear()
    few = [f"--evaluation.{k}={v}" for k, v in FEW.answering().items() if isinstance(v, int) and v < 9]
    assert evaluate(["--model", str(artifact), "--accelerator=cpu", "--evaluation.prompts=3", *few[1:]]) == 0
    assert thinking_off
    assert all(thinking_off)


def test_a_template_that_cannot_be_told_to_think_is_refused(tmp_path):
    base = write_family(tmp_path / "m", "llama")
    with pytest.raises(InputError, match="chat template knows no enable_thinking"):
        prepare(settings(tmp_path, base, template="chat_thinking"), [])
