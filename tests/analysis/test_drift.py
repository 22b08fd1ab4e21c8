"""Drift by layer and site, against sums over tokens by hand, and its invariances."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hftlight.analysis.drift import SITES, LayerDrift, SiteDrift, drift, linear_cka, relative_drift, rows_of
from hftlight.analysis.study import study
from hftlight.analysis.subjects import plain_subjects
from hftlight.config import RunConfig
from hftlight.errors import InputError
from hftlight.models.module import decoder_layers
from tests.helpers.families import FAMILIES
from tests.helpers.tiny_lm import tiny_lm

PROMPTS = [[5, 9, 11, 2, 30], [7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8], [12, 40, 3, 3], [20, 21, 22, 23, 24]]


def family(name, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(FAMILIES[name]()).double().eval()


@torch.no_grad()
def outputs(model, prompt, site):
    """Return one prompt's outputs ``[layers, tokens, hidden]``, without batch and padding."""
    kept = []
    names = {"residual": "", "attention": "self_attn", "mlp": "mlp"}
    hooks = [
        (layer.get_submodule(names[site]) if names[site] else layer).register_forward_hook(
            lambda m, a, out: kept.append((out[0] if isinstance(out, tuple) else out)[0])
        )
        for layer in decoder_layers(model)
    ]
    model(torch.tensor([prompt]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(kept)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_sums_are_those_over_tokens_without_padding_and_first_token(batch_size):
    model, reference = tiny_lm(1), tiny_lm(2)
    found = drift(model, PROMPTS, reference, sites=SITES, batch_size=batch_size)
    for site in SITES:
        here, there = ([outputs(m.eval(), p, site)[:, 1:] for p in PROMPTS] for m in (model, reference))
        difference = [a - b for a, b in zip(here, there, strict=True)]
        every, base = torch.cat(difference, 1), torch.cat(there, 1)
        one = found[site]
        assert_close(one.relative, every.square().sum((1, 2)) / base.square().sum((1, 2)))
        assert_close(one.per_dimension, every.square().sum(-1).mean(1) / 16)
        assert_close(one.mean_shift, every.mean(1).square().sum(-1) / every.square().sum(-1).mean(1))
        cosine = 1 - torch.nn.functional.cosine_similarity(torch.cat(here, 1), base, dim=-1)
        assert_close(one.cosine.sum(1) / one.tokens.sum(), cosine.mean(1))
        assert_close(one.last[0], torch.stack([states[:, -1] for states in here], 1).float())
        assert_close(one.vaccine_sum(), every.square().sum())
        norms = [torch.cat(difference[i : i + 2], 1).square().sum((1, 2)).sqrt().sum() for i in (0, 2, 4)]
        assert_close(one.antidote_sum(batch=2), torch.stack(norms).sum())
        assert rows_of(one, "x")[0].value == pytest.approx(float(one.relative[0]))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "qwen", "gemma", "opt"])
def test_equal_models_do_not_drift_and_sites_are_found_by_family(name):
    """OPT's layers hold the MLP's matrices themselves, so that it has no such site."""
    model = family(name)
    found = drift(model, PROMPTS, copy.deepcopy(model), sites=SITES)
    assert set(found) == (set(SITES) - {"mlp"} if name == "opt" else set(SITES))
    for one in found.values():
        assert not one.squared.any()
        assert not one.mean_shift.any()
        assert one.reference.all()
        assert_close(one.cka, torch.ones(2).double())
    moved = drift(model, PROMPTS, family(name, 1), sites=SITES)
    assert all(one.relative.min() > 1e-3 for one in moved.values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_without_a_reference_the_adapter_is_switched_off():
    base = tiny_lm(0)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])).double()
    assert not drift(model, PROMPTS)["residual"].squared.any()  # B is 0
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    off = drift(model, PROMPTS)["residual"]
    assert_close(off.squared, drift(model, PROMPTS, base)["residual"].squared)
    assert off.squared.all()
    merged = copy.deepcopy(model).merge_and_unload()
    assert_close(drift(merged, PROMPTS, base)["residual"].squared, off.squared)
    with pytest.raises(InputError, match="drift: the model has no adapter"):
        drift(base, PROMPTS)


def test_relative_drift_ignores_a_common_scale():
    here, there = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0)).double()
    assert_close(relative_drift(7 * here, 7 * there), relative_drift(here, there))
    assert_close(relative_drift(2 * there, there), torch.ones(3).double())


def test_one_shift_of_all_tokens_is_all_mean():
    shift, tokens = torch.randn(2, 8).double(), torch.tensor([3, 2])
    squared = shift.square().sum(-1)[:, None] * tokens
    one = SiteDrift(squared, squared, squared, tokens, shift * 5, torch.zeros(2, 2, 2, 8))
    assert_close(one.mean_shift, torch.ones(2).double())


def test_cka_sees_rotation_shift_and_scale_as_equal_and_unrelated_states_as_apart():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 12, 200, generator=generator).double()
    turned = 3 * x @ torch.linalg.qr(torch.randn(200, 200, generator=generator).double())[0] + 5
    assert_close(linear_cka(x, turned), torch.ones(()).double())
    # The usual estimate of unrelated states is 0.9 here: 12 prompts in 200 dimensions.
    assert abs(float(linear_cka(x, y))) < 0.3
    k, m = ((s - s.mean(0)) @ (s - s.mean(0)).T for s in (x, y))
    assert float((k * m).sum() / (k.norm() * m.norm())) > 0.8
    with pytest.raises(ValueError, match="at least 4"):
        linear_cka(x[:3], y[:3])


def test_a_study_of_the_aligned_model_is_zero(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path))
    done = study(plain_subjects(["tiny"], RunConfig(model="tiny", accelerator="cpu"), "tiny"), [LayerDrift(prompts=4)])
    rows = done.rows["drift"]
    assert {row.value for row in rows if row.metric != "linear_cka"} == {0.0}
    assert {row.position for row in rows} == {
        f"{kind}{site}" for kind in ("harmful", "ordinary", "task") for site in ("", ", attention", ", mlp")
    }
    assert [p.name for p in done.pictures["drift"]] == ["drift", "drift_sites", "drift_shape"]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="prompts must be >= 4"):
        LayerDrift(prompts=3)
    with pytest.raises(ValueError, match="sites must be some of"):
        LayerDrift(sites=["heads"])
    with pytest.raises(ValueError, match="more than 1 tokens"):
        drift(tiny_lm(), [[1]], tiny_lm(1))
    with pytest.raises(ValueError, match=r"got \['heads'\]"):
        drift(tiny_lm(), PROMPTS, tiny_lm(1), sites=["heads"])
    with pytest.raises(InputError, match="hidden size"):
        drift(tiny_lm(), PROMPTS, family("llama").to(torch.float64))
