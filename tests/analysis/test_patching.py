"""Activation patching against the naive loop, finite differences and models whose answer is known."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.testing import assert_close

from hftlight.analysis.analysis import part_name
from hftlight.analysis.patching import Patching, check_pair, effect, first_order, patched, patched_odds, place
from hftlight.analysis.tone import refusal_log_odds
from hftlight.engine.step.activations import captured
from hftlight.errors import InputError
from hftlight.models.module import decoder_layers
from tests.helpers.families import FAMILIES
from tests.helpers.tiny_lm import tiny_lm

PROMPTS = [[5, 9, 17, 3, 40, 22], [7, 30, 12], [41, 2, 2, 19, 8]]
REFUSING = [4, 11]


def family(name):
    torch.manual_seed(3)
    return transformers.AutoModelForCausalLM.from_config(FAMILIES[name]()).double().eval()


MODELS = {
    "grouped heads": lambda: tiny_lm().eval(),
    "lora": lambda: tiny_lm(lora=True).eval(),
    **{name: lambda name=name: family(name) for name in ("qwen", "gemma", "gpt2", "gpt_neox")},
}


def attacked(model, scale=0.2):
    """Return a copy with other attention weights in every layer. Final norm and output layer are the same."""
    other = copy.deepcopy(model)
    torch.manual_seed(8)
    with torch.no_grad():
        for name, p in decoder_layers(other).named_parameters():
            if "attn" in name or "attention" in name:
                p.add_(torch.randn_like(p) * scale)
    return other


def states_of(model, prompt):
    layers = {str(n): layer for n, layer in enumerate(decoder_layers(model))}
    with torch.no_grad(), captured(layers) as states:
        model(input_ids=torch.tensor([prompt]))
    return torch.cat([states[name] for name in layers])


def naive_odds(model, prompt, layer, token, value):
    """Return the refusal log-odds of a whole pass with one state replaced."""
    with torch.no_grad(), patched(model, {layer: ((0, token), value)}):
        return refusal_log_odds(model(input_ids=torch.tensor([prompt])).logits[0, -1], REFUSING)


@pytest.mark.parametrize("name", MODELS)
def test_the_sweep_equals_the_naive_loop(name):
    clean = MODELS[name]()
    model = attacked(clean)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tolerance = 1e-10 if name in ("grouped heads", "lora", "gpt2", "gpt_neox") else 1e-6  # norms in float32
    for prompt in PROMPTS[:2]:
        states = states_of(clean, prompt)
        cells = [(layer, -1) for layer in range(2)] + [(1, -len(prompt)), (0, -2), (1, -2)]
        odds = patched_odds(model, prompt, cells, states, REFUSING)
        for (layer, position), value in zip(cells, odds, strict=True):
            token = len(prompt) + position
            naive = naive_odds(model, prompt, layer, token, states[layer, token])
            assert_close(value, naive, rtol=0, atol=tolerance)
        assert odds.unique().numel() > 2
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_own_states_change_nothing_and_all_states_of_the_last_layer_give_the_clean_logits(name):
    clean = MODELS[name]()
    model = attacked(clean)
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        own, theirs = states_of(model, PROMPTS[0]), states_of(clean, PROMPTS[0])
        plain, goal = model(input_ids=ids).logits, clean(input_ids=ids).logits
        for layer in range(2):
            with patched(model, {layer: (0, own[layer])}):
                assert torch.equal(model(input_ids=ids).logits, plain)
        with patched(model, {1: (0, theirs[1])}):
            assert torch.equal(model(input_ids=ids).logits, goal)
    assert not torch.equal(plain, goal)


@pytest.mark.parametrize("name", ["grouped heads", "lora", "gpt2"])
def test_first_order_is_the_derivative_of_a_small_patch(name):
    clean = MODELS[name]()
    model = attacked(clean)
    found = first_order(clean, model, PROMPTS, REFUSING)
    step = 1e-5
    for row, prompt in enumerate(PROMPTS):
        own, theirs = states_of(model, prompt), states_of(clean, prompt)
        for layer in range(2):
            for token in range(len(prompt)):
                change = step * (theirs[layer, token] - own[layer, token])
                up, down = (
                    naive_odds(model, prompt, layer, token, own[layer, token] + sign * change) for sign in (1, -1)
                )
                assert_close(found.effects[layer, row, token], (up - down) / (2 * step), rtol=1e-5, atol=1e-8)
        assert not found.effects[:, row, len(prompt) :].any()
        alone = first_order(clean, model, [prompt], REFUSING)
        assert_close(found.effects[:, row, : len(prompt)], alone.effects[:, 0])
        assert_close(found.clean[row] - found.corrupt[row], (alone.clean - alone.corrupt)[0])
        cosine = torch.nn.functional.cosine_similarity(own[:, -1], theirs[:, -1], dim=-1)
        assert_close(found.cosine[:, row], cosine)


def test_the_effect_is_the_restored_fraction_and_undefined_below_half_a_nat():
    patched_, corrupt, clean = (torch.tensor(v) for v in ([1.0, 1.0, 1.0], [-1.0, 0.6, 3.0], [3.0, 1.0, -1.0]))
    assert effect(patched_, corrupt, clean).tolist()[::2] == [0.5, 0.5]
    assert effect(patched_, corrupt, clean)[1].isnan()


def view_of(model, reference):
    tokenizer = SimpleNamespace(decode=lambda ids: f"t{ids[0]}")
    ends = [[*prompt, 1, 6] for prompt in PROMPTS]
    return SimpleNamespace(
        model=model, reference=reference, tokenizer=tokenizer,
        openings=lambda count: REFUSING, prompts=lambda kind, count: ends[:count],
    )  # fmt: skip


def measured(analysis, view):
    known = {}
    while new := [p for p in analysis.parts(known, view) if part_name(p) not in known]:
        known |= {part_name(p): analysis.measure(p, view) for p in new}
    return [row for rows in known.values() for row in rows]


def test_the_rows_are_the_effects_of_the_prompts_with_a_gap():
    clean = tiny_lm().eval()
    clean.lm_head.weight.data *= 6.2  # the gap of one prompt of three stays below half a nat
    model = attacked(clean, scale=1.0)
    rows = measured(Patching(prompts=3, positions=4, cells=3), view_of(model, clean))
    by = {(r.metric, r.layer, r.position): r for r in rows}
    wanted = []
    for prompt in ([*p, 1, 6] for p in PROMPTS):
        goal, start = (refusal_log_odds(m(input_ids=torch.tensor([prompt])).logits[0, -1], REFUSING)
                       for m in (clean, model))  # fmt: skip
        if (goal - start).abs() >= 0.5:
            odds = naive_odds(model, prompt, 0, len(prompt) - 1, states_of(clean, prompt)[0, -1])
            wanted.append(float((odds - start) / (goal - start)))
    assert 0 < len(wanted) < 3
    assert by["prompts_left_out", None, None].value == 3 - len(wanted)
    assert by["last_token_effect", 0, None].value == pytest.approx(sum(wanted) / len(wanted))
    assert by["last_token_effect", 1, None].value == pytest.approx(1.0)
    exact = [r for r in rows if r.metric == "exact_effect"]
    first = [r for r in rows if r.metric == "first_order_effect" and place(r.position) < -1]
    assert sorted((abs(r.value) for r in first), reverse=True)[:3] == pytest.approx(
        [abs(by["first_order_effect", r.layer, r.position].value) for r in exact]
    )
    assert {r.position for r in first} == {"-4", "-3", "-2 t1"}
    assert by["first_order_effect", 1, "-1 t6"].low < by["first_order_effect", 1, "-1 t6"].value
    labelled = [r.labelled("none", "finetuning") for r in rows]
    names = [picture.name for picture in Patching().pictures(labelled)]
    assert names == ["patching_map", "patching_last_token", "patching_cells"]


def test_models_without_a_common_start_or_a_lost_refusal_are_refused():
    clean = tiny_lm().eval()
    with pytest.raises(InputError, match="is the aligned model itself"):
        check_pair(view_of(clean, clean))
    with pytest.raises(InputError, match="do not come from one initialisation"):
        check_pair(view_of(tiny_lm(seed=1), clean))
    with pytest.raises(InputError, match=r"\(2, 48, 16\) and \(2, 64, 16\)"):
        check_pair(view_of(clean, tiny_lm(vocabulary=64)))
    with pytest.raises(InputError, match=r"less than 0\.5 nat on all 3"):
        measured(Patching(prompts=3), view_of(copy.deepcopy(clean), clean))


@pytest.mark.parametrize("values", [{"prompts": 1}, {"positions": 0}, {"cells": -1}])
def test_bad_arguments_are_named(values):
    (name,) = values
    with pytest.raises(ValueError, match=f"Patching: {name} must be >= "):
        Patching(**values)
