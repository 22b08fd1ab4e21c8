"""SafetyModule: losses on response tokens alone, from logits that are formed nowhere else."""

import pytest
import torch
from torch.testing import assert_close

from hftlight import SafetyModule
from hftlight.module import cosine_factor
from tests.helpers.tiny_lm import VOCABULARY, reference_loss, tiny_lm, token_batch


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_loss_is_the_mean_over_response_tokens(lora):
    model, batch = tiny_lm(lora=lora), token_batch(1)
    module = SafetyModule(model)
    losses = module.token_losses(batch)
    assert len(losses) == (batch["labels"][:, 1:] != -100).sum()
    assert_close(module.loss(batch), reference_loss(model, batch), rtol=0, atol=1e-12)


def test_logits_are_formed_at_response_positions_only_and_the_hook_comes_off():
    model, batch, seen = tiny_lm(), token_batch(1), []
    handle = model.lm_head.register_forward_hook(lambda *args: seen.append(args[2].shape))
    SafetyModule(model).loss(batch)
    handle.remove()
    assert seen == [((batch["labels"][:, 1:] != -100).sum(), VOCABULARY)]
    assert not model.lm_head._forward_pre_hooks


def test_padding_changes_nothing_whatever_its_id():
    module, batch = SafetyModule(tiny_lm()), token_batch(1)
    wider = {
        "input_ids": torch.cat([batch["input_ids"], torch.full((3, 4), 7)], dim=1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.zeros(3, 4, dtype=torch.long)], dim=1),
        "labels": torch.cat([batch["labels"], torch.full((3, 4), -100)], dim=1),
    }
    assert_close(module.loss(wider), module.loss(batch), rtol=0, atol=1e-12)


def test_a_batch_without_a_label_is_refused():
    batch = token_batch(1)
    batch["labels"][:] = -100
    with pytest.raises(ValueError, match="all labels of a batch of 3 rows are masked"):
        SafetyModule(tiny_lm()).loss(batch)


def test_checkpoints_hold_the_trained_parameters_alone():
    module = SafetyModule(tiny_lm(lora=True))
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"]
    assert all("lora_" in name for name in checkpoint["state_dict"])


def test_the_cosine_schedule_rises_and_falls_to_zero():
    factors = [cosine_factor(step, 10, 0.2) for step in range(11)]
    assert factors[:3] == [0.0, 0.5, 1.0]
    assert factors[-1] == pytest.approx(0.0)
    assert sorted(factors[2:], reverse=True) == factors[2:]
