"""The new alignment defenses on other families of models: what they hook, and what they refuse by name."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hftlight import SafetyModule
from hftlight.defenses import TAR, RepNoise, RSNTune
from hftlight.engine import Stage, main_stream
from hftlight.models.module import decoder_layers, final_norm
from tests.helpers.contract import data_module
from tests.helpers.families import FAMILIES, write_family
from tests.helpers.quadratic import quiet_trainer

WORKS = {
    "repnoise": (lambda: RepNoise(1.0, 0.5), {"llama", "qwen", "gemma", "gpt_neox", "gpt2"}, "no module is called"),
    "tar": (lambda: TAR(2, 1, 0.1, inner_lrs=[1e-3]), set(FAMILIES), ""),
    "rsn_tune": (
        lambda: RSNTune(0.9, 0.1, samples=4, shared=0.5, safety="harmful", utility="retain"),
        {"llama", "qwen", "gemma", "gpt_neox", "opt"},
        "RSNTune: ",
    ),
}


def loaded(family, folder):
    return AutoModelForCausalLM.from_pretrained(write_family(folder, family)).float()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_final_norm_is_what_the_output_layer_reads(family, tmp_path):
    model, inputs, outputs = loaded(family, tmp_path), [], []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    final_norm(model).register_forward_hook(lambda _, __, y: outputs.append(y))
    model(input_ids=torch.arange(1, 9)[None])
    assert torch.equal(inputs[0], outputs[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", WORKS)
def test_a_family_trains_or_is_refused_in_words(name, family, tmp_path):
    make, works, words = WORKS[name]
    defense, model = make(), loaded(family, tmp_path)
    before = {n: p.detach().clone() for n, p in decoder_layers(model).named_parameters()}
    data = data_module(Stage.ALIGNMENT, main=main_stream([defense], "alignment"))
    module, trainer = SafetyModule(model, lr=1e-3), quiet_trainer(max_steps=2, callbacks=[defense])
    if family not in works:
        with pytest.raises(TypeError, match=words):
            trainer.fit(module, data)
        return
    trainer.fit(module, data)
    assert any(not torch.equal(p, before[n]) for n, p in decoder_layers(model).named_parameters())
    assert defense.summary()["calls"] > 0
