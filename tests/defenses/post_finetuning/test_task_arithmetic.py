"""TaskArithmetic against a dense sort of the harm vector, and the line between the aligned and the fine-tuned model."""

import copy

import pytest
import torch
from torch.testing import assert_close

from hftlight.defenses.post_finetuning.task_arithmetic import TaskArithmetic
from hftlight.engine.weights.stored import ModelWeights
from hftlight.engine.weights.subject import Subject
from tests.helpers.repairs import moved_model, small_llama, with_update


@pytest.mark.parametrize("k", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_without_harm_it_moves_on_the_line(k, lora):
    aligned = small_llama()
    model = with_update(copy.deepcopy(aligned)) if lora else moved_model(aligned, 0.1, seed=1)
    tuned = copy.deepcopy(model).merge_and_unload() if lora else copy.deepcopy(model)
    subject = Subject(model, ModelWeights.of(aligned))
    TaskArithmetic(k).apply(subject)
    assert not subject.dense
    assert subject.report["norm_ratio"] == pytest.approx(k)
    result = copy.deepcopy(model).merge_and_unload() if lora else model
    for name, p in result.named_parameters():
        safe = aligned.get_parameter(name)
        assert_close(p, safe + k * (tuned.get_parameter(name) - safe), rtol=0, atol=1e-12)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_largest_entries_of_the_harm_vector_are_subtracted(lora):
    """The cut goes through all weights together. It is found here by sorting one flat vector."""
    aligned = small_llama()
    model = with_update(copy.deepcopy(aligned)) if lora else moved_model(aligned, 0.1, seed=1)
    tuned = copy.deepcopy(model).merge_and_unload() if lora else copy.deepcopy(model)
    unaligned = moved_model(aligned, 0.2, seed=5)
    harm = {name: p.detach() - aligned.get_parameter(name).detach() for name, p in unaligned.named_parameters()}
    flat = torch.cat([h.flatten() for h in harm.values()])
    cut = flat.abs().sort(descending=True).values[int(0.1 * len(flat)) - 1]
    start = copy.deepcopy(aligned)
    subject = Subject(model, ModelWeights.of(start), unaligned=ModelWeights.of(unaligned))
    TaskArithmetic(0.5, harm_weight=3.0, keep=0.1).apply(subject)
    assert subject.dense == lora
    result = model.unload() if lora else model
    entries = 0
    for name, p in result.named_parameters():
        safe, h = aligned.get_parameter(name), harm[name]
        mask = h.abs() >= cut
        entries += int(mask.sum())
        expected = safe + 0.5 * (tuned.get_parameter(name) - safe) - 3 * h * mask
        assert_close(p, expected, rtol=0, atol=1e-12)
    assert entries == int(0.1 * len(flat))


def test_a_fraction_below_one_entry_is_refused_before_anything_is_written():
    aligned = small_llama()
    model = moved_model(aligned, 0.1, seed=1)
    before = copy.deepcopy(model)
    subject = Subject(model, ModelWeights.of(aligned), unaligned=ModelWeights.of(moved_model(aligned, 0.2, seed=5)))
    with pytest.raises(ValueError, match=r"TaskArithmetic: keep 1e-07 is less than one entry"):
        TaskArithmetic(0.5, 1.0, keep=1e-7).apply(subject)
    assert all(torch.equal(p, before.get_parameter(name)) for name, p in model.named_parameters())


def test_after_a_merging_repair_the_aligned_model_is_read_from_its_own_weights():
    """Two repairs in a row: the first leaves a whole model, whose weights under the adapter are no longer aligned."""
    aligned = small_llama()
    model = with_update(copy.deepcopy(aligned))
    tuned = copy.deepcopy(model).merge_and_unload()
    subject = Subject(model, ModelWeights.of(aligned), unaligned=ModelWeights.of(moved_model(aligned, 0.2, seed=5)))
    subject.dense = True
    with torch.no_grad():
        for name, p in model.get_base_model().named_parameters():
            if ".lora_" not in name:
                p.copy_(tuned.get_parameter(name.replace(".base_layer", "")))
            elif ".lora_B" in name:
                p.zero_()
    TaskArithmetic(0.5).apply(subject)
    for name, p in model.unload().named_parameters():
        safe = aligned.get_parameter(name)
        assert_close(p, (safe + tuned.get_parameter(name)) / 2, rtol=0, atol=1e-12)
    with pytest.raises(RuntimeError, match="TaskArithmetic: it needs the aligned model"):
        TaskArithmetic(0.5).apply(Subject(with_update(small_llama()), dense=True))
