"""The refusal direction: planted and found, ablated by hooks as by weights, and updates measured as factors."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hftlight.analysis.analysis import ANALYSES
from hftlight.analysis.refusal_direction import (
    RefusalDirection,
    ablated,
    choose,
    direction_cosine,
    first_logits,
    projected,
    refusal_direction,
    share_along,
    writers,
)
from hftlight.analysis.states import last_states
from hftlight.analysis.study import study
from hftlight.analysis.subjects import plain_subjects
from hftlight.analysis.tone import refusal_log_odds
from hftlight.config import RunConfig
from hftlight.engine.weights.lowrank import LowRank
from hftlight.engine.weights.stored import Difference, ModelWeights, displacement, stored
from hftlight.models.module import decoder_layers
from tests.helpers.families import FAMILIES, write_family
from tests.helpers.tiny_lm import tiny_lm

GENERATOR = torch.Generator().manual_seed(0)
HARMFUL, ORDINARY = torch.randn(2, 3, 10, 8, generator=GENERATOR)
PROMPTS = [[5, 9, 11, 2, 30], [7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8]]


def test_a_planted_direction_is_found_and_places_are_those_of_the_means():
    planted = torch.zeros(8)
    planted[2] = 50.0
    harmful = ORDINARY + planted
    direction = refusal_direction(harmful, ORDINARY)
    assert_close(direction, planted.double().expand(3, 8), atol=1e-5, rtol=0)
    origin = ORDINARY.double().mean(1)
    assert_close(projected(ORDINARY, direction, origin).mean(1), torch.zeros(3).double(), atol=1e-12, rtol=0)
    assert_close(projected(harmful, direction, origin).mean(1), torch.ones(3).double())
    # Adding half of the direction moves every state by exactly one half.
    moved = projected(harmful.double() + direction[:, None] / 2, direction, origin) - projected(
        harmful, direction, origin
    )
    assert_close(moved, torch.full((3, 10), 0.5).double())


def test_cosine_and_its_jackknife_are_those_of_leaving_each_prompt_out():
    here = HARMFUL, ORDINARY[:, :7]
    there = HARMFUL + 0.5 * torch.randn(3, 10, 8, generator=GENERATOR), ORDINARY[:, :7].clone()
    value, error = direction_cosine(here, there)

    def cosine(*kept):
        directions = [
            refusal_direction(*(s[:, k] for s, k in zip(model, kept, strict=True))) for model in (here, there)
        ]
        return F.cosine_similarity(directions[0], directions[1], dim=-1)

    squares = torch.zeros(3).double()
    for kind, n in ((0, 10), (1, 7)):
        kept = [[list(range(10)), list(range(7))] for _ in range(n)]
        for i in range(n):
            kept[i][kind] = [j for j in kept[i][kind] if j != i]
        without = torch.stack([cosine(*k) for k in kept])
        squares += (n - 1) / n * (without - without.mean(0)).square().sum(0)
    assert_close(value, cosine(list(range(10)), list(range(7))))
    assert_close(error, squares.sqrt())
    same, no_error = direction_cosine(here, here)
    assert_close(same, torch.ones(3).double())
    assert_close(no_error, torch.zeros(3).double(), atol=1e-7, rtol=0)


def test_the_share_of_an_update_is_that_of_the_dense_matrix():
    b, a, r = (torch.randn(*s, generator=GENERATOR).double() for s in ((8, 3), (3, 5), (8,)))
    dense = 0.7 * b @ a
    expected = float((r / r.norm() @ dense).norm() / dense.norm())
    assert share_along(LowRank(b, a, 0.7), r) == pytest.approx(expected)
    assert share_along(LowRank(a.T, b.T, 0.7), r, transposed=True) == pytest.approx(expected)
    before, after = (ModelWeights({"w": w}) for w in (torch.ones(8, 5).double(), 1 + dense))
    assert share_along(Difference(after, before, "w"), r) == pytest.approx(expected)
    before, after = (ModelWeights({"w": w}) for w in (torch.ones(5, 8).double(), 1 + dense.T))
    assert share_along(Difference(after, before, "w"), r, transposed=True) == pytest.approx(expected)
    assert share_along(LowRank(r[:, None], a[:1]), r) == pytest.approx(1.0)
    assert share_along(LowRank(0 * b, a), r) == 0.0


@pytest.mark.parametrize("lora", [False, True])
def test_ablation_by_hooks_is_that_of_orthogonal_weights(lora):
    """Embeddings and writers of an untied model without biases are made orthogonal to r; the weights stay as found."""
    model, r = tiny_lm(lora=lora).eval(), torch.randn(16, generator=GENERATOR).double()
    digest = {name: p.detach().clone() for name, p in model.named_parameters()}
    other = copy.deepcopy(model)
    if lora:
        other = other.merge_and_unload()
    u = r / r.norm()
    with torch.no_grad():
        embedding = other.get_input_embeddings().weight
        embedding -= embedding @ u[:, None] * u
        for layer in decoder_layers(other):
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight -= u[:, None] * (u @ writer.weight)
    plain = first_logits(model, PROMPTS)
    with ablated(model, r):
        hooked = first_logits(model, PROMPTS)
        assert_close(last_states(model, PROMPTS).double() @ u, torch.zeros(2, 3).double(), atol=1e-6, rtol=0)
        with ablated(model, r):  # a second time changes nothing
            assert_close(first_logits(model, PROMPTS), hooked, atol=1e-6, rtol=0)
    assert_close(hooked, first_logits(other, PROMPTS), atol=1e-5, rtol=0)
    assert float((hooked - plain).abs().max()) > 1e-3
    assert torch.equal(first_logits(model, PROMPTS), plain)
    assert all(torch.equal(p, digest[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ("self_attn.o_proj", "mlp.down_proj")),
        ("gpt2", ("attn.c_proj", "mlp.c_proj")),
        ("gpt_neox", ("attention.dense", "mlp.dense_4h_to_h")),
        ("opt", ("self_attn.out_proj", "fc2")),
    ],
)
def test_writers_and_ablation_of_families(family, names):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    found = writers(model)
    assert len(found) == 4
    assert [any(name.endswith(end) for end in names) for _, name, _ in found] == [True] * 4
    assert {transposed for _, _, transposed in found} == {family == "gpt2"}
    for _, name, transposed in found:
        assert model.get_parameter(f"{name}.weight").shape[int(transposed)] == 32
    r = torch.randn(32, generator=GENERATOR)
    with ablated(model, r):
        states = last_states(model, PROMPTS)
    assert float((states @ r).abs().max()) < 1e-3 * float(states.norm(dim=-1).max() * r.norm())


def test_an_adapter_and_its_merged_model_have_the_same_share(tmp_path):
    base = write_family(tmp_path / "base", "llama")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["o_proj", "down_proj"])
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    model.save_pretrained(tmp_path / "adapter")
    names = writers(model)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    r = torch.randn(32, generator=GENERATOR).double()
    for _, name, _ in names:
        thin, dense = (
            displacement(stored(tmp_path / place), stored(base), f"{name}.weight") for place in ("adapter", "merged")
        )
        assert isinstance(thin, LowRank)
        assert isinstance(dense, Difference)
        assert share_along(thin, r) == pytest.approx(share_along(dense, r), rel=1e-4)


def test_the_chosen_layer_is_the_best_of_those_that_leave_ordinary_prompts(monkeypatch):
    """Every layer is tried by hand. Without a limit of the KL, the lowest log-odds win; below all, the lowest KL."""
    model, refusing = tiny_lm(3).eval(), [4, 5, 6]
    harmful, ordinary = PROMPTS, [[40, 41, 3], [20, 21, 22, 23]]
    states = last_states(model, harmful), last_states(model, ordinary)
    monkeypatch.setattr("hftlight.analysis.refusal_direction.DEPTH", 1.0)
    tried = {}
    for layer, r in enumerate(refusal_direction(*states)):
        before = first_logits(model, ordinary).double().log_softmax(-1)
        with ablated(model, r):
            odds = refusal_log_odds(first_logits(model, harmful), refusing).mean()
            after = first_logits(model, ordinary).double().log_softmax(-1)
        tried[layer] = float(odds), float(F.kl_div(after, before, log_target=True, reduction="batchmean"))
    for limit, best in ((1e9, min(tried, key=lambda n: tried[n][0])), (-1.0, min(tried, key=lambda n: tried[n][1]))):
        monkeypatch.setattr("hftlight.analysis.refusal_direction.KL_LIMIT", limit)
        chosen = choose(model, harmful, ordinary, states, refusing)
        assert chosen.layer == best
        assert (chosen.log_odds, chosen.kl) == pytest.approx(tried[best], rel=1e-4)


def test_a_study_of_the_aligned_model_finds_it_unmoved(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path))
    assert ANALYSES["refusal_direction"] == "RefusalDirection"
    subjects = plain_subjects(["tiny"], RunConfig(model="tiny", accelerator="cpu"), "tiny")
    done = study(subjects, [RefusalDirection(prompts=8, ablate=False)])
    rows = done.rows["refusal_direction"]
    assert {round(row.value, 9) for row in rows if row.metric == "direction_cosine"} == {1.0}
    assert {row.position for row in rows if row.metric == "projection"} == {"harmful", "ordinary"}
    assert [p.name for p in done.pictures["refusal_direction"]] == ["refusal_direction", "refusal_projection"]
    with pytest.raises(Exception, match="refuses 0 of 16 prompts"):
        study(subjects, [RefusalDirection(prompts=8)])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="prompts must be >= 8"):
        RefusalDirection(prompts=7)
    with pytest.raises(ValueError, match="answers must be >= 1"):
        RefusalDirection(answers=0)
