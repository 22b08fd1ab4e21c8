"""Directions and moved models: norms, seeds, exact return, and thin moves against rewritten weights."""

import copy
from contextlib import suppress

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hftlight.analysis.directions import (
    Displacement,
    gaussian,
    movable,
    moved_to,
    norm_weights,
    random_direction,
)
from hftlight.engine.weights.lowrank import LowRank
from hftlight.engine.weights.stored import Adapted, ModelWeights
from hftlight.errors import InputError
from tests.helpers.tiny_lm import tiny_lm

IDS = torch.arange(1, 13).view(2, 6)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=64)).eval()


def tied_llama():
    """Return a Llama with grouped heads whose embedding is its output layer."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).eval()


@pytest.mark.parametrize("build", [tiny_lm, tied_llama, gpt2], ids=["llama", "tied", "gpt2"])
def test_each_tensor_moves_by_its_own_norm_and_norms_stay(build):
    model = build()
    before = {name: w.clone() for name, w in movable(model).items()}
    norms = norm_weights(model)
    assert len([name for name in norms if name.endswith("weight")]) == 5  # two per layer and the last one
    with moved_to(model, [(0.25, random_direction(model, seed=0, number=0))]):
        for name, weight in movable(model).items():
            moved = (weight - before[name]).norm()
            expected = 0.0 if name in norms else 0.25 * before[name].norm()
            assert_close(float(moved), float(expected), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(weight, before[name]) for name, weight in movable(model).items())


def test_a_tied_embedding_moves_once():
    model = tied_llama()
    names = list(movable(model))
    assert {"model.embed_tokens.weight", "lm_head.weight"} & set(names) == {"model.embed_tokens.weight"}
    table = model.get_input_embeddings().weight.detach().clone()
    with moved_to(model, [(0.5, random_direction(model, 0, 0))]):
        moved = model.get_output_embeddings().weight.detach() - table
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert_close(moved, 0.5 * gaussian(table, 0, 0, "model.embed_tokens.weight"))


def test_the_same_seed_gives_the_same_direction_whatever_the_order_type_and_wrapping():
    weights = movable(tied_llama())
    direction = random_direction(tied_llama(), seed=3, number=1)
    first = {name: direction.of(name, w) for name, w in weights.items()}
    for name, w in reversed(weights.items()):
        again = direction.of(name, w)
        assert (again is None and first[name] is None) or torch.equal(again, first[name])
    name = "model.layers.0.mlp.up_proj.weight"
    for dtype in (torch.bfloat16, torch.float64):  # the same noise, times the norm of the rounded weight
        other = gaussian(weights[name].to(dtype), 3, 1, name)
        ratio = other.double() / first[name].double()
        assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-6, atol=0)
        assert other.dtype == torch.promote_types(dtype, torch.float32)
    assert not torch.equal(gaussian(weights[name], 4, 1, name), first[name])
    assert not torch.equal(gaussian(weights[name], 3, 2, name), first[name])
    assert not torch.equal(gaussian(weights[name], 3, 1, "another"), first[name])


def test_the_directions_of_a_plane_are_orthogonal_in_each_tensor():
    weight = torch.arange(1.0, 13).view(3, 4)
    d = [gaussian(weight, 0, n, "w", tuple(range(n))).double() for n in range(3)]
    for i in range(3):
        assert_close(float(d[i].norm()), float(weight.norm()), rtol=1e-6, atol=0)
        for j in range(i):
            assert abs(float((d[i] * d[j]).sum())) < 1e-5 * float(weight.norm()) ** 2
    assert not gaussian(weight[:1, :1], 0, 1, "w", (0,)).any()  # no direction is orthogonal in one dimension


def test_coefficient_zero_is_the_model_itself_and_nothing_accumulates():
    model = tied_llama().bfloat16()
    before, direction = logits(model), random_direction(model, 0, 0)
    with moved_to(model, [(0.0, direction)]):
        assert torch.equal(logits(model), before)
    for a in (-0.5, 0.1, 0.3):
        with moved_to(model, [(a, direction)]):
            pass
    with moved_to(model, [(0.3, direction)]):
        after_others = logits(model)
    fresh = tied_llama().bfloat16()
    with moved_to(fresh, [(0.3, direction)]):
        assert torch.equal(logits(fresh), after_others)
    assert torch.equal(logits(model), before)


def test_weights_and_hooks_come_back_after_an_exception():
    model = tiny_lm()
    other = Displacement(ModelWeights.of(tiny_lm()), ModelWeights.of(tiny_lm(seed=1)))
    before = {name: p.clone() for name, p in model.named_parameters()}
    moves = [(0.5, random_direction(model, 0, 0)), (0.5, other)]
    moved = []
    with suppress(KeyboardInterrupt), moved_to(model, moves):
        moved.append(not torch.equal(model.lm_head.weight, before["lm_head.weight"]))
        raise KeyboardInterrupt
    assert moved == [True]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_change_inside_the_block_is_noticed():
    model = tiny_lm()
    with pytest.raises(RuntimeError, match="did not come back"), moved_to(model, []), torch.no_grad():
        model.lm_head.weight.add_(1)


def test_lora_and_merged_model_stand_at_the_same_point():
    """The factors are a part of the weight: its norm counts, and they do not move by themselves."""
    model = tiny_lm(lora=True)
    merged = copy.deepcopy(model).merge_and_unload()
    assert set(movable(model)) == set(movable(merged))
    for each in (model, merged):
        each.moves = [(0.2, random_direction(each, 0, 0))]
    with moved_to(model, model.moves), moved_to(merged, merged.moves):
        assert_close(logits(model), logits(merged), rtol=0, atol=1e-10)


def adapted(model, seed, rank=2):
    """Return updates of a model's attention and last projection, in the layout of each weight."""
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for name, w in movable(model).items():
        if any(part in name for part in ("q_proj", "o_proj", "c_attn", "mlp.c_proj")) and name.endswith("weight"):
            b, a = (torch.randn(*shape, generator=generator) for shape in ((w.shape[0], rank), (rank, w.shape[1])))
            updates[name] = LowRank(b.to(w), a.to(w), 0.1)
    assert updates
    return updates


@pytest.mark.parametrize("build", [tiny_lm, gpt2], ids=["llama", "gpt2"])
def test_thin_moves_of_a_whole_batch_equal_rewritten_weights(build):
    """Two displacements in factors, with one coefficient per row, against the same displacements as matrices."""
    model, plain = build(), ModelWeights.of(build())
    aligned, tuned, other = plain, *(Adapted(plain, adapted(model, seed)) for seed in (1, 2))
    thin = [Displacement(aligned, tuned), Displacement(aligned, other)]
    assert all(d.thin(list(movable(model))) for d in thin)
    a, b = torch.tensor([0.0, 1.5]), torch.tensor([-0.5, 1.0])
    weights = {name: w.clone() for name, w in movable(model).items()}
    with moved_to(model, [(a, thin[0]), (b, thin[1])]):
        assert all(torch.equal(w, weights[name]) for name, w in movable(model).items())  # nothing is written
        batched = logits(model)

    class Dense:
        def __init__(self, direction):
            self.of = direction.of

    for row in range(2):
        with moved_to(model, [(float(a[row]), Dense(thin[0])), (float(b[row]), Dense(thin[1]))]):
            rewritten = logits(model)[row]
        assert_close(batched[row], rewritten, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(batched, logits(model), atol=1e-2)
    with moved_to(model, []):
        assert not any(m._forward_hooks for m in model.modules())


def test_a_path_between_stored_adapters_ends_at_the_fine_tuned_model(tmp_path):
    """From the fine-tuned model, coefficient -1 leads back to the aligned one, without a dense matrix."""
    from hftlight.engine.weights.stored import stored

    torch.manual_seed(0)
    base = tied_llama()
    base.save_pretrained(tmp_path / "base")
    models = {}
    for name, seed in (("aligned", 1), ("tuned", 2)):
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
        for key, p in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(p, std=0.3)
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / name)
        models[name] = model.merge_and_unload()
    path = Displacement(stored(tmp_path / "aligned"), stored(tmp_path / "tuned"))
    assert path.thin(list(movable(base)))
    with moved_to(models["tuned"], [(-1.0, path)]):
        assert_close(logits(models["tuned"]), logits(models["aligned"]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(models["tuned"]), logits(models["aligned"]), atol=1e-3)


def test_what_cannot_move_is_refused():
    model = tiny_lm()
    with pytest.raises(InputError, match="per row"), moved_to(model, [(torch.ones(2), random_direction(model, 0, 0))]):
        pass
    small = Displacement(ModelWeights.of(tiny_lm(vocabulary=40)), ModelWeights.of(model))
    with pytest.raises(InputError, match="equal shapes"), moved_to(model, [(1.0, small)]):
        pass
    model.lm_head.weight = nn.Parameter(torch.zeros(48, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InputError, match=r"lm_head.weight is stored as torch.uint8"):
        movable(model)
