"""The parts of task arithmetic: DARE's draws over seeds, blocks and shards, and adapters that grow."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from hftlight.engine.weights import arithmetic
from hftlight.engine.weights.arithmetic import kept_entries, rescaled, thinned
from hftlight.engine.weights.lora import lora_updates, put_factors
from hftlight.engine.weights.lowrank import LowRank
from tests.helpers.repairs import small_llama, with_update

IDS = torch.tensor([[3, 5, 7, 11, 13, 2]])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_dare_keeps_the_update_in_expectation():
    """Over n seeds the mean of an entry is normal with standard deviation |delta| sqrt(p / (1 - p) / n)."""
    update, p, n = normal(6, 5), 0.3, 400
    masks = torch.stack([kept_entries(seed, "weight", 0, 6, (6, 5), p) for seed in range(n)])
    mean = torch.stack([rescaled(update, mask, p) for mask in masks]).mean(dim=0)
    assert ((mean - update).abs() < 5 * update.abs() * (p / (1 - p) / n) ** 0.5).all()
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == n


def test_dropped_components_keep_the_update_in_expectation():
    update, n = LowRank(normal(6, 3), normal(3, 5, seed=1), 0.5), 600
    mean = sum(thinned(update, seed, "weight", 0.5).rows() for seed in range(n)) / n
    assert float((mean - update.rows()).norm() / update.rows().norm()) < 5 * n**-0.5


def test_components_do_not_depend_on_the_factors():
    """An update that is written with cancelling factors, as under the continue protocol, has the same components."""
    b, a, extra = normal(6, 2), normal(2, 5, seed=1), normal(6, 2, seed=2)
    doubled = LowRank(torch.cat([b + extra, -extra], dim=1), torch.cat([a, a]))
    for seed in range(6):
        kept, other = (thinned(m, seed, "weight", 0.5).rows() for m in (LowRank(b, a), doubled))
        assert_close(kept, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cuts", [[0, 20], [0, 3, 8, 20], [0, 11, 20]])
def test_draws_do_not_depend_on_blocks_and_shards(monkeypatch, cuts):
    monkeypatch.setattr(arithmetic, "BLOCK", 8)
    whole = kept_entries(7, "weight", 0, 20, (20, 5), 0.5)
    parts = [kept_entries(7, "weight", i, j, (20, 5), 0.5) for i, j in pairwise(cuts)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole[:8], whole[8:16])
    assert not torch.equal(whole, kept_entries(7, "other", 0, 20, (20, 5), 0.5))


def test_an_adapter_takes_factors_of_any_rank():
    """Within their ranks, layers keep ranks and scales. An adapter that grows has one rank and scale 1."""
    model = with_update(small_llama(), use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3})
    updates = lora_updates(model)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        scales = {name: u.scale for name, u in updates.items()}
        put_factors(model, {name: LowRank(u.scale * u.b, u.a.clone()) for name, u in updates.items()})
        assert_close(model(input_ids=IDS).logits, before, rtol=0, atol=1e-12)
        assert {name: u.scale for name, u in lora_updates(model).items()} == scales
        put_factors(
            model, {name: LowRank(normal(u.b.shape[0], 7), normal(7, u.a.shape[1])) for name, u in updates.items()}
        )
    for update in lora_updates(model).values():
        assert update.scale == 1
        assert_close(update.factors().rows(), normal(update.b.shape[0], 7) @ normal(7, update.a.shape[1]))
    assert (model.peft_config["default"].r, model.peft_config["default"].rank_pattern) == (7, {})
