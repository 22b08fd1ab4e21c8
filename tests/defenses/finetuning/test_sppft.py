"""SPPFT: the frozen span keeps every bit, even under AdamW."""

import pytest
import torch

from hftlight.defenses.finetuning.sppft import SPPFT, safety_span
from tests.helpers.contract import model_of, train


@pytest.mark.parametrize(("depth", "span"), [(32, (5, 14)), (30, (5, 13)), (2, (0, 1)), (1, (0, 0))])
def test_the_published_span_scales_with_the_depth(depth, span):
    assert safety_span(depth) == span


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_frozen_layers_keep_every_bit_under_adamw(tuning):
    model = model_of(tuning)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train([SPPFT(first=1, last=1)], tuning, model=model, optimizer="adamw", lr=0.01)
    for name, p in model.named_parameters():
        trained = "lora_" in name or tuning == "full"
        assert torch.equal(p, before[name]) == (".layers.1." in name or not trained), name


def test_the_flags_come_back():
    model = model_of("full")
    train([SPPFT(first=0, last=0)], "full", model=model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("span", "message"),
    [((0, 1), "contain every trainable parameter"), ((0, 2), "layers 0 to 1, got 0 to 2")],
)
def test_a_span_that_cannot_be_is_refused(span, message):
    with pytest.raises(ValueError, match=message):
        train([SPPFT(*span)], "lora")
