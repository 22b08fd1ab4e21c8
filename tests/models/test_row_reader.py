"""States of chosen layers and losses of rows, against passes of one row and loops over tokens."""

import pytest
import torch
from torch.testing import assert_close

from hftlight.models.row_reader import layer_states, row_losses
from tests.helpers.tiny_lm import reference_loss, tiny_lm, token_batch


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_states_are_those_of_the_named_layers(lora, mean):
    model, batch = tiny_lm(lora=lora).eval(), token_batch(1)
    batch["labels"][2] = -100  # without a response token, the last attended one is read
    found = layer_states(model, batch, [1, 2], mean)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    outputs = []
    handles = [
        layer.register_forward_hook(lambda _, __, out: outputs.append(out if torch.is_tensor(out) else out[0]))
        for layer in (model.get_base_model() if lora else model).model.layers
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    for n, hidden in enumerate(outputs):
        last = torch.stack([hidden[0, 8], hidden[1, 7], hidden[2, 6]])
        means = torch.stack([hidden[0, 4:9].mean(0), hidden[1, 4:8].mean(0), hidden[2, 6]])
        assert_close(found[n], means if mean else last, rtol=0, atol=1e-12)
    assert not found.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_losses_are_those_of_one_row_at_a_time():
    model, batch = tiny_lm().eval(), token_batch(3)
    losses = row_losses(model, batch)
    for row in range(3):
        assert_close(losses[row], reference_loss(model, {k: v[row : row + 1] for k, v in batch.items()}))
    assert losses.requires_grad
