"""ConstrainedSFT: token weights against the objective's derivative, and cached against online probabilities."""

import math

import pytest
import torch

from hftlight.defenses.finetuning.constrained_sft import ConstrainedSFT, constraint_weights, row_keys, token_betas
from hftlight.engine import Stage
from tests.helpers.contract import data_module, distance, model_of, train, weights_of
from tests.helpers.tiny_lm import token_batch


def weight(beta, gain, floor=0.0):
    return float(constraint_weights(*torch.tensor([gain, beta], dtype=torch.float64), floor))


@pytest.mark.parametrize(
    ("beta", "gain", "expected"),
    [(2.0, 0.6, 0.46295), (2.0, 1.0, 0.2384), (0.5, 1.0, 0.7551), (0.1, 1.0, 0.9500), (2.0, -1.0, 1.7616)],
)
def test_the_table_of_the_reference(beta, gain, expected):
    assert weight(beta, gain) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("gain", [-3.0, -0.2, 0.0, 0.6, 5.0])
def test_weights_are_minus_the_derivative_of_the_objective(beta, gain):
    d = torch.tensor(gain, dtype=torch.float64, requires_grad=True)
    (-(2 / beta) * torch.nn.functional.logsigmoid(beta * d)).backward()
    assert -float(d.grad) == pytest.approx(weight(beta, gain), abs=1e-14)


def test_the_floor_is_reached_where_the_reference_says():
    """2 (1 - sigmoid(x)) = 1e-3 at x = log(1999) = 7.6004."""
    crossing = math.log(1999)
    assert crossing == pytest.approx(7.6004, abs=1e-4)
    assert weight(1.0, crossing - 1e-6, 1e-3) > 1e-3
    assert weight(1.0, crossing + 1e-6, 1e-3) == 1e-3


def test_large_beta_is_a_one_sided_hinge():
    assert weight(1e6, 1.0) == 0.0
    assert weight(1e6, -1.0) == 2.0
    assert weight(1e6, 0.0) == 1.0


def test_betas_by_place_with_the_published_factors():
    places = torch.arange(8)
    assert token_betas(places, 0.1, 5, 20, 5).tolist() == pytest.approx([0.5, 2, 2, 2, 2, 0.1, 0.1, 0.1])
    assert token_betas(places, 0.1, 5, 20, 5, offset=2).tolist() == pytest.approx([0.1, 0.1, 0.5, 2, 2, 2, 2, 0.1])


def test_the_first_step_is_plain_fine_tuning():
    """At the aligned weights every gain is 0 and every weight 1."""
    model = model_of("lora")
    plain = weights_of(train([], steps=1, model=model_of("lora")))
    assert distance(weights_of(train([ConstrainedSFT()], steps=1, model=model)), plain) <= 1e-14


def test_rows_are_known_by_their_tokens_and_not_by_their_padding():
    batch = token_batch(3, ragged=True)
    fill = {"labels": -100}
    wider = {name: torch.nn.functional.pad(t, (0, 3), value=fill.get(name, 0)) for name, t in batch.items()}
    assert row_keys(batch) == row_keys(wider)
    assert len(set(row_keys(batch))) == len(batch["input_ids"])
    other = {**batch, "labels": batch["labels"].clone()}
    other["labels"][0, 4] = -100
    assert row_keys(other)[0] != row_keys(batch)[0]
    assert row_keys(other)[1:] == row_keys(batch)[1:]


@pytest.mark.parametrize("reveal", [False, True])
def test_added_rows_get_plain_cross_entropy_and_hidden_attack_rows_do_not(reveal):
    weights = []

    class Watched(ConstrainedSFT):
        def token_weights(self, forward):
            token_weights = super().token_weights(forward)
            # One tensor of token weights per row of the batch.
            weights.append((forward.batch["role"], [token_weights[forward.rows == row] for row in range(8)]))
            return token_weights

    data = data_module(Stage.FINETUNING, reveal_roles=reveal)
    data.records["task"][2] = data.records["alignment"][0]
    data._forget()
    data._given = data.records
    train([Watched(beta=0.5)], data=data, steps=3)
    roles, row_weights = weights[2]
    assert roles[2] == "alignment"
    assert roles[5] == ("attack" if reveal else "task")
    assert bool((row_weights[2] == 1).all())
    assert not bool((row_weights[5] == 1).any())


def test_kept_probabilities_are_the_aligned_models():
    """Cached and online probabilities give the same weights after eight steps in two passes.

    The rows have one length, so padding changes nothing.
    """
    cached = train([ConstrainedSFT(beta=0.5)], steps=8)
    online = train([ConstrainedSFT(beta=0.5, online=True)], steps=8)
    assert distance(weights_of(cached), weights_of(online)) <= 1e-12
