"""Direct logit attribution: the terms sum to the logit difference, whatever the family."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close

from hftlight.analysis.attribution import Attribution, FrozenNorm, attribution
from hftlight.engine.step.activations import captured
from hftlight.errors import InputError
from tests.helpers.families import FAMILIES
from tests.helpers.tiny_lm import tiny_lm

PROMPTS = [[5, 9, 17, 3, 40, 22], [7, 30, 12], [41, 2, 2, 19, 8]]
REFUSING, COMPLYING = [4, 11], [20, 21, 33]


def in_float64(model):
    """Return a model in float64 whose RMS norms no longer round to float32."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if "RMSNorm" in type(child).__name__:
                twin = nn.RMSNorm(child.weight.shape[0], eps=getattr(child, "variance_epsilon", None) or child.eps)
                twin.weight.data = torch.rand_like(child.weight) + 0.5
                setattr(module, name, twin)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias") or ("ln" in name and p.dim() == 1):  # fresh models have no biases, gains of 1
                p.add_(torch.randn_like(p) * 0.3)
    return model.double().eval()


def family(name, **changes):
    torch.manual_seed(3)
    if name == "gemma2":
        config = transformers.Gemma2Config(
            vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, sliding_window=8, final_logit_softcapping=30.0,
        )  # fmt: skip
    elif name == "phi":
        config = transformers.PhiConfig(
            vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
    else:
        config = FAMILIES[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    return in_float64(transformers.AutoModelForCausalLM.from_config(config))


MODELS = {
    "grouped heads": lambda: tiny_lm(),
    "lora": lambda: tiny_lm(lora=True).eval(),
    "merged lora": lambda: tiny_lm(lora=True).merge_and_unload(),
    "tied embeddings": lambda: family("qwen"),
    "biases of heads": lambda: family("llama", attention_bias=True),
    "norms on outputs": lambda: family("gemma2"),
    "more norms on outputs": lambda: family("gemma"),
    "gpt2": lambda: family("gpt2"),
    "parallel attention": lambda: family("gpt_neox"),
    "opt": lambda: family("opt"),
    "bias of the output layer": lambda: family("phi"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_terms_sum_to_the_logit_difference(name):
    model = MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = attribution(model, PROMPTS, REFUSING, COMPLYING)
    for row, prompt in enumerate(PROMPTS):  # one at a time, so that padding counts as well
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].detach()
        if cap := getattr(model.config, "final_logit_softcapping", None):
            logits = cap * torch.atanh(logits / cap)
        difference = logits[REFUSING].mean() - logits[COMPLYING].mean()
        total = found.embedding + found.attention.sum(0) + found.mlp.sum(0) + found.bias
        assert_close(total[row], difference, rtol=0, atol=1e-9)
        assert_close(found.difference[row], difference, rtol=0, atol=1e-9)
    assert found.attention.abs().min() > 1e-6
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["grouped heads", "lora", "norms on outputs", "tied embeddings"])
def test_the_heads_sum_to_their_attention(name):
    found = attribution(MODELS[name](), PROMPTS, REFUSING, COMPLYING)
    assert_close(found.heads.sum(1), found.attention, rtol=0, atol=1e-10)


def test_the_bias_of_the_projection_belongs_to_no_head():
    model = MODELS["biases of heads"]()
    found = attribution(model, PROMPTS, REFUSING, COMPLYING)
    with torch.no_grad(), captured({"h": model.model.layers[1]}) as whole:
        model(input_ids=torch.tensor([PROMPTS[0]]))
    norm, h = model.model.norm, whole["h"][0, -1]
    u = model.lm_head.weight[REFUSING].mean(0) - model.lm_head.weight[COMPLYING].mean(0)
    for layer in range(2):
        bias = model.model.layers[layer].self_attn.o_proj.bias
        expected = u @ (norm.weight * bias / (h.square().mean() + norm.eps).sqrt())
        assert_close(found.attention[layer, 0] - found.heads[layer, :, 0].sum(), expected.detach(), rtol=0, atol=1e-10)


def test_a_head_adds_what_the_state_loses_without_its_columns_of_the_projection():
    model = tiny_lm()
    found = attribution(model, PROMPTS, REFUSING, COMPLYING)
    cut = copy.deepcopy(model)
    cut.model.layers[1].self_attn.o_proj.weight.data[:, 8:] = 0  # the second of two heads of 8 channels
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad(), captured({"a": model.model.layers[1].self_attn, "h": model.model.layers[1]}) as whole:
        model(input_ids=ids)
    with torch.no_grad(), captured({"a": cut.model.layers[1].self_attn}) as rest:
        cut(input_ids=ids)
    lost, h, norm = (whole["a"] - rest["a"])[0, -1], whole["h"][0, -1], model.model.norm
    u = model.lm_head.weight[REFUSING].mean(0) - model.lm_head.weight[COMPLYING].mean(0)
    expected = u @ (norm.weight * lost / (h.square().mean() + norm.eps).sqrt())
    assert_close(found.heads[1, 1, 0], expected.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_frozen_norm_is_linear_and_equals_the_norm_at_its_input(kind):
    torch.manual_seed(0)
    norm = (nn.LayerNorm if kind == "layer" else nn.RMSNorm)(6, eps=1e-5).double()
    nn.init.normal_(norm.weight)
    x, y = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    frozen = FrozenNorm.at(norm, x)
    assert_close(frozen(x) + frozen.bias, norm(x).detach())
    assert_close(frozen(x + 2 * y), frozen(x) + 2 * frozen(y))


def test_a_family_that_combines_its_parts_in_another_way_is_refused():
    class Halved(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.self_attn, self.mlp = inner.self_attn, inner.mlp
            self.inner = inner

        def forward(self, x, *args, **kwargs):
            return x + 0.5 * (self.inner(x, *args, **kwargs) - x)

    model = tiny_lm()
    model.model.layers[1] = Halved(model.model.layers[1])
    with pytest.raises(InputError, match="do not sum"):
        attribution(model, PROMPTS, REFUSING, COMPLYING)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="prompts must be >= 2, got 1"):
        Attribution(prompts=1)
