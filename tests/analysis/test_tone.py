"""Refusal tone: the log-odds against their definition, and the logit lens against the model's own logits."""

import math

import pytest
import torch

from hftlight.analysis.states import last_states, lens
from hftlight.analysis.tone import Tone, first_layer, refusal_log_odds
from tests.helpers.tiny_lm import tiny_lm

PROMPTS = [[3, 9, 4, 1], [5, 2], [7, 7, 1, 8, 2, 6]]


def test_log_odds_of_known_probabilities():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    odds = refusal_log_odds(p.log(), [0, 1])
    assert odds.tolist() == pytest.approx([math.log(0.8 / 0.2), math.log(0.3 / 0.7)])
    # Logits are probabilities up to a constant.
    assert refusal_log_odds(p.log() + 5, [0, 1]).tolist() == pytest.approx(odds.tolist())


def test_log_odds_of_a_sure_model_are_finite():
    assert refusal_log_odds(torch.tensor([200.0, 0.0, -200.0]), [0]).item() == pytest.approx(200.0)


@pytest.mark.parametrize("lora", [False, True])
def test_the_lens_after_the_last_layer_is_the_model(lora):
    model = tiny_lm(lora=lora)
    states = last_states(model, PROMPTS)
    assert states.shape == (2, 3, 16)
    for row, prompt in enumerate(PROMPTS):
        own = model(input_ids=torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(lens(model, states[-1, row]), own.float(), rtol=1e-4, atol=1e-5)


def test_states_do_not_depend_on_the_batch():
    model = tiny_lm()
    torch.testing.assert_close(last_states(model, PROMPTS, 1), last_states(model, PROMPTS, 3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("odds", "layer"), [([-1, 2, 3], 1), ([1, -1, 2], 2), ([1, 2], 0), ([1, -1], None)])
def test_first_layer_from_which_on_the_tone_refuses(odds, layer):
    assert first_layer(odds) == layer


def test_too_few_prompts_are_refused():
    with pytest.raises(ValueError, match="prompts must be >= 2, got 1"):
        Tone(prompts=1)
