"""RESTA against dense sums of whole models, and against the model that it must give back exactly."""

import copy

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hftlight.defenses.post_finetuning.resta import RESTA
from hftlight.engine.weights.lora import lora_updates
from hftlight.engine.weights.save import save_repaired
from hftlight.engine.weights.stored import Adapted, ModelWeights, stored
from hftlight.engine.weights.subject import Subject
from tests.helpers.repairs import moved_model, small_llama, with_update

IDS = torch.tensor([[3, 5, 7, 11, 13, 2]])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def weights(model):
    """Return copies of a model's weights by name, its adapter merged in."""
    model = copy.deepcopy(model)
    model = model.merge_and_unload() if hasattr(model, "peft_config") else model
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def folder_of(model, place):
    """Write a model or an adapter, and return its folder."""
    if hasattr(model, "peft_config"):
        model.get_base_model().config.name_or_path = str(place.parent / "aligned")
        model.peft_config["default"].base_model_name_or_path = str(place.parent / "aligned")
    model.save_pretrained(place)
    return str(place)


def thin_world(tmp_path, targets=("q_proj", "v_proj", "down_proj")):
    """Return a fine-tuned PEFT model, the aligned folder, and an adapter on it as the unaligned model."""
    aligned = small_llama()
    aligned.save_pretrained(tmp_path / "aligned")
    harmful = with_update(copy.deepcopy(aligned), seed=9, r=2, target_modules=list(targets))
    folder = folder_of(harmful, tmp_path / "unaligned")
    return with_update(copy.deepcopy(aligned)), aligned, harmful, folder


def test_stacked_factors_equal_the_dense_sum(tmp_path):
    """``W' = W_ft + g (W_al - W_un)``. The rank is 4 + 2, and PEFT's cross terms would be visible."""
    model, aligned, harmful, folder = thin_world(tmp_path)
    tuned, safe, unsafe = weights(model), weights(aligned), weights(harmful)
    subject = Subject(model, stored(tmp_path / "aligned"), unaligned=stored(folder))
    RESTA(0.7).apply(subject)
    assert not subject.dense
    for name, p in weights(model).items():
        assert_close(p, tuned[name] + 0.7 * (safe[name] - unsafe[name]), rtol=0, atol=1e-12)
    row = subject.report["weights"]["model.layers.0.self_attn.q_proj.weight"]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert row["rank"] == 6
    assert row["harm_norm"] == pytest.approx(float((unsafe[name] - safe[name]).norm()))
    assert row["update_norm"] == pytest.approx(float((tuned[name] - safe[name]).norm()))
    assert row["repaired_norm"] == pytest.approx(float((weights(model)[name] - safe[name]).norm()))


def test_a_grown_adapter_loads_in_plain_peft(tmp_path):
    model, aligned, _, folder = thin_world(tmp_path)
    before = logits(model)
    subject = Subject(model, stored(tmp_path / "aligned"), unaligned=stored(folder))
    RESTA(0.7).apply(subject)
    save_repaired(tmp_path / "repaired", subject)
    loaded = PeftModel.from_pretrained(copy.deepcopy(aligned), tmp_path / "repaired").to(torch.float64)
    assert loaded.peft_config["default"].r == 6
    assert_close(logits(loaded), logits(model), rtol=0, atol=1e-12)
    assert (logits(loaded) - before).abs().max() > 1e-3


def test_a_harm_vector_beyond_the_adapter_gives_a_whole_model(tmp_path):
    """The unaligned model moved a layer that the user's adapter does not have."""
    model, aligned, harmful, folder = thin_world(tmp_path, targets=("k_proj", "q_proj"))
    tuned, safe, unsafe = weights(model), weights(aligned), weights(harmful)
    subject = Subject(model, stored(tmp_path / "aligned"), unaligned=stored(folder))
    RESTA(0.7).apply(subject)
    assert subject.dense
    for name, p in weights(model).items():
        assert_close(p, tuned[name] + 0.7 * (safe[name] - unsafe[name]), rtol=0, atol=1e-12)
    save_repaired(tmp_path / "repaired", subject)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "repaired", dtype=torch.float64)
    assert torch.equal(logits(loaded), logits(model))


def test_dropped_components_and_a_dense_harm_vector_add_up():
    """The same components are dropped whether the rest stays an adapter or is added to the weights."""
    aligned, results = small_llama(), []
    unaligned = moved_model(aligned, 0.05, seed=3)
    for strength in (0.0, 0.5):
        model = with_update(copy.deepcopy(aligned))
        subject = Subject(model, ModelWeights.of(aligned), unaligned=ModelWeights.of(unaligned), seed=4)
        RESTA(strength, 0.5, "component").apply(subject)
        assert subject.dense == (strength > 0)
        results.append(weights(model))
    for name, p in results[1].items():
        harm = unaligned.get_parameter(name) - aligned.get_parameter(name)
        assert_close(p, results[0][name] - 0.5 * harm, rtol=0, atol=1e-12)


@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_an_adapter_and_the_same_weights_trained_whole_give_the_same_model(tmp_path, drop):
    adapted, aligned, _, _ = thin_world(tmp_path)
    unaligned = moved_model(aligned, 0.05, seed=3)
    full = copy.deepcopy(adapted).merge_and_unload()
    for model in (adapted, full):
        subject = Subject(model, stored(tmp_path / "aligned"), unaligned=ModelWeights.of(unaligned), seed=4)
        RESTA(0.5, drop).apply(subject)
    whole = weights(full)
    for name, p in weights(adapted).items():
        assert_close(p, whole[name], rtol=0, atol=1e-12)


def test_a_model_without_safety_becomes_the_aligned_one_exactly():
    """With ``W_ft = W_un`` and g = 1 the two vectors cancel, norms, biases and embeddings included."""
    aligned = small_llama(bias=True, dtype=torch.float32)
    model = moved_model(aligned, 0.1, seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01
    subject = Subject(model, ModelWeights.of(aligned), unaligned=ModelWeights.of(copy.deepcopy(model)))
    RESTA(1.0).apply(subject)
    for name, p in model.named_parameters():
        assert torch.equal(p, aligned.get_parameter(name)), name
    assert subject.report["norm_ratio"] == 0


def test_strength_zero_is_the_fine_tuned_model():
    model = with_update(small_llama())
    before = logits(model)
    subject = Subject(model)
    RESTA(0.0).apply(subject)
    assert torch.equal(logits(model), before)
    assert subject.report["changed_entries"] == 0


def test_the_dropped_entries_have_their_aligned_value_and_the_rest_grows():
    aligned = small_llama()
    model = with_update(copy.deepcopy(aligned))
    tuned, safe = weights(model), weights(aligned)
    subject = Subject(model, seed=1)
    RESTA(0.0, 0.75).apply(subject)
    assert subject.dense
    kept = total = 0
    for name, p in weights(model).items():
        update, result = tuned[name] - safe[name], p - safe[name]
        if not update.any():
            assert torch.equal(p, safe[name])
            continue
        dropped = result == 0
        assert_close(result[~dropped], 4 * update[~dropped], rtol=0, atol=1e-12)
        kept, total = kept + int((~dropped).sum()), total + update.numel()
    assert abs(kept / total - 0.25) < 4 * (0.25 * 0.75 / total) ** 0.5


def test_dropped_components_leave_an_adapter():
    model = with_update(small_llama())
    tuned = {name: u.factors().rows() for name, u in lora_updates(model).items()}
    subject = Subject(model, seed=3)
    RESTA(0.0, 0.5, "component").apply(subject)
    assert not subject.dense
    ranks = []
    for name, update in lora_updates(model).items():
        s = torch.linalg.svdvals(tuned[name])[:4]
        remaining = torch.linalg.svdvals(update.factors().rows())[:4] / 2
        remaining = remaining[remaining > 1e-12]
        ranks.append(len(remaining))
        assert all((s - value).abs().min() < 1e-12 for value in remaining)
    assert 0 < sum(ranks) < 40


def test_what_is_missing_is_named(tmp_path):
    aligned = small_llama()
    with pytest.raises(RuntimeError, match=r"RESTA: .* Give unaligned="):
        RESTA().apply(Subject(with_update(small_llama())))
    with pytest.raises(RuntimeError, match="RESTA: it needs the aligned model"):
        RESTA().apply(Subject(moved_model(aligned, 0.1, seed=1), unaligned=ModelWeights.of(aligned)))
    other = ModelWeights({name: p[:-1] for name, p in aligned.named_parameters()})
    with pytest.raises(ValueError, match=r"RESTA: .* must have one shape in the aligned and in the unaligned"):
        RESTA().apply(Subject(with_update(small_llama()), unaligned=other))
    with pytest.raises(TypeError, match="drop_unit='component' needs the update in a LoRA adapter"):
        RESTA(0.5, 0.5, "component").apply(
            Subject(moved_model(aligned, 0.1, 1), ModelWeights.of(aligned), unaligned=ModelWeights.of(aligned))
        )
    with pytest.raises(TypeError, match=r"RESTA: the update must be added to .* torch.bfloat16"):
        RESTA(0.0, 0.5).apply(Subject(with_update(small_llama(dtype=torch.bfloat16))))


def test_a_change_lost_in_rounding_is_told():
    aligned = small_llama(dtype=torch.bfloat16)
    model = moved_model(aligned, 0.1, seed=1)
    unaligned = Adapted(ModelWeights.of(aligned), {})
    shifted = {name: p.float() * (1 + 1e-4) for name, p in aligned.named_parameters()}
    subject = Subject(model, unaligned, unaligned=ModelWeights(shifted))
    with pytest.warns(UserWarning, match="is lost by rounding to torch.bfloat16"):
        RESTA(1.0).apply(subject)
