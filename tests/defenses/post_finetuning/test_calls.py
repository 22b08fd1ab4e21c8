"""Repairs in one call: in memory and on a folder they give the same model. The input folder stays unchanged."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hftlight.defenses.post_finetuning.antidote import antidote
from hftlight.defenses.post_finetuning.resta import resta
from hftlight.defenses.post_finetuning.safe_lora import safe_lora
from hftlight.defenses.post_finetuning.safety_lock import safety_lock
from hftlight.defenses.post_finetuning.somf import somf
from hftlight.defenses.post_finetuning.task_arithmetic import task_arithmetic
from tests.helpers.tiny_lm import tiny_lm, token_batch
from tests.helpers.tokenizers import byte_tokenizer

BATCHES = [token_batch(seed) for seed in range(2)]
PAIRS = [{**token_batch(seed, rows=4), "pairs": 2} for seed in range(2)]
for batch in PAIRS:  # both answers of a pair have the prompt of the first
    batch["input_ids"][1::2, :4] = batch["input_ids"][0::2, :4]


@pytest.fixture
def world(tmp_path):
    """Return a folder with a base model, an aligned model and an adapter, and the PEFT model in memory."""
    torch.manual_seed(0)
    base = tiny_lm(seed=1, dtype=torch.float32, vocabulary=259)
    aligned = tiny_lm(seed=0, dtype=torch.float32, vocabulary=259)
    for name, model in (("base", base), ("aligned", aligned)):
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "aligned", dtype=torch.float32),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    tuned.save_pretrained(tmp_path / "tuned")
    return tmp_path, tuned


CALLS = {
    "safe_lora": lambda model, folder, **o: safe_lora(
        model, str(folder / "base"), str(folder / "aligned"), number=2, **o
    ),
    "resta": lambda model, folder, **o: resta(model, str(folder / "base"), aligned=str(folder / "aligned"), **o),
    "task_arithmetic": lambda model, folder, **o: task_arithmetic(model, update_weight=0.5, **o),
    "somf": lambda model, folder, **o: somf(model, PAIRS, steps=2, **o),
    "antidote": lambda model, folder, **o: antidote(model, BATCHES, prune_ratio=0.2, **o),
    "safety_lock": lambda model, folder, **o: safety_lock(model, PAIRS, heads=2, **o),
}


def logits(model):
    batch = BATCHES[0]
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def loaded(folder):
    from peft import AutoPeftModelForCausalLM

    kind = AutoPeftModelForCausalLM if (folder / "adapter_config.json").is_file() else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("call", CALLS)
def test_a_folder_becomes_the_model_in_memory(call, world):
    folder, tuned = world
    before = {path: path.read_bytes() for path in (folder / "tuned").iterdir()}
    plain = logits(copy.deepcopy(tuned))
    report = CALLS[call](str(folder / "tuned"), folder, output=str(folder / "repaired"))
    assert CALLS[call](tuned, folder)["changed_entries"] == report["changed_entries"] > 0
    assert_close(logits(loaded(folder / "repaired")), logits(tuned), rtol=0, atol=1e-5)
    assert (logits(tuned) - plain).abs().max() > 1e-4
    assert {path: path.read_bytes() for path in (folder / "tuned").iterdir()} == before
    assert (folder / "repaired" / "tokenizer_config.json").is_file()


@pytest.mark.parametrize("call", CALLS)
def test_what_cannot_be_repaired_is_named(call, world):
    folder, tuned = world
    with pytest.raises(ValueError, match="give output="):
        CALLS[call](folder / "tuned", folder)
    with pytest.raises(ValueError, match="holds something that is no repaired model"):
        CALLS[call](folder / "tuned", folder, output=str(folder / "base"))
    CALLS[call](folder / "tuned", folder, output=str(folder / "repaired"))
    with pytest.raises(RuntimeError, match="was repaired before"):
        CALLS[call](folder / "repaired", folder, output=str(folder / "twice"))
    CALLS[call](tuned, folder)
    with pytest.raises(RuntimeError, match="applied to the model before"):
        CALLS[call](tuned, folder)
