"""Each pair of defenses trains together, is split over two stages, or is refused, as the README's matrix says."""

from itertools import combinations

import pytest
import torch

from hftlight.defenses.cards import matrix
from hftlight.engine import Stage, check, in_order
from hftlight.engine.weights.subject import Subject
from hftlight.registry import defenses
from hftlight.runs.prepare import Arm
from tests.helpers.contract import data_module, model_of, records, rows, trained_pair

NAMES = sorted(rows())
PAIRS = list(combinations(NAMES, 2))
STEPS = 3


def subject(model):
    """Return a repair's view of the model.

    The base model has the weights under the adapter. The aligned and the unaligned model add random low-rank updates to
    the base.
    """
    from hftlight.engine.weights.lora import lora_updates
    from hftlight.engine.weights.lowrank import LowRank
    from hftlight.engine.weights.stored import Adapted, ModelWeights

    under = ModelWeights.of(model)
    generator = torch.Generator().manual_seed(5)
    aligned, unaligned = (
        {
            name: LowRank(
                torch.randn(u.b.shape[0], 2, generator=generator, dtype=u.b.dtype),
                torch.randn(2, u.a.shape[1], generator=generator, dtype=u.a.dtype),
            )
            for name, u in lora_updates(model).items()
        }
        for _ in range(2)
    )
    data = data_module(Stage.ALIGNMENT)
    return Subject(
        model,
        aligned=Adapted(under, aligned),
        unaligned=Adapted(under, unaligned),
        batches=lambda name: iter([data.stream(name, 8).batch(i) for i in (0, 1)]),
    )


def chosen(pair):
    return [rows()[name].make() for name in pair]


def of_kind(kind):
    return [pair for pair in PAIRS if matrix()[pair] == kind]


REPAIRS = {name for name in NAMES if rows()[name].make().stage is Stage.POST_FINETUNING}
TOGETHER = [pair for pair in of_kind("together") if not REPAIRS.issuperset(pair)]


def one_of_each_kind(pairs):
    """Return the pairs, with all but the first of each combination of slots marked slow.

    The number of pairs grows as n squared.
    """
    known_slots, marked = set(), []
    for pair in pairs:
        slots = frozenset((d.slots, d.stage) for d in chosen(pair))
        marked.append(pytest.param(pair, marks=[pytest.mark.slow] if slots in known_slots else []))
        known_slots.add(slots)
    return marked


@pytest.mark.parametrize("pair", of_kind("refused"), ids="+".join)
def test_a_pair_that_cannot_work_is_refused_in_words(pair):
    instances = chosen(pair)
    with pytest.raises(ValueError, match="keep one of them") as caught:
        check(instances, one_stage=False)
    assert all(type(d).__name__ in str(caught.value) for d in instances)


@pytest.mark.parametrize("pair", of_kind("stages"), ids="+".join)
def test_a_pair_of_two_stages_is_dealt_out_to_them(pair):
    """In its own stage each defense is independent of the other. The contract tests train it there."""
    instances = chosen(pair)
    assert instances[0].stage is not instances[1].stage
    check(instances, one_stage=False)
    dealt = [d for stage in Stage for d in Arm("+".join(pair), in_order(instances)).of(stage)]
    deployed = [d for d in dealt if d not in instances]
    assert [d for d in dealt if d in instances] == in_order(instances)
    assert len(deployed) == sum(d.deployment() is not None for d in instances)
    with pytest.raises(ValueError, match="Trainer runs one stage") as caught:
        check(instances)
    assert all(type(d).__name__ in str(caught.value) for d in instances)


@pytest.mark.parametrize("pair", one_of_each_kind(TOGETHER), ids="+".join)
def test_a_pair_of_one_stage_trains_with_its_traces(pair):
    instances = chosen(pair)
    assert instances[0].stage is instances[1].stage
    check(instances)
    weights, summaries = trained_pair(*pair, STEPS)
    assert all(torch.isfinite(w).all() for w in weights.values())
    assert all(summary["calls"] >= 1 for summary in summaries), summaries


@pytest.mark.parametrize("pair", one_of_each_kind(TOGETHER), ids="+".join)
def test_the_order_of_the_list_changes_nothing_across_slots(pair):
    """Within one slot the order of the list decides, and floating-point sums may differ in the last bit."""
    first, second = chosen(pair)
    if set(first.slots) & set(second.slots):
        pytest.skip("they share a slot, where the list decides")
    one, other = trained_pair(*pair, STEPS)[0], trained_pair(*reversed(pair), STEPS)[0]
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("pair", combinations(sorted(REPAIRS), 2), ids="+".join)
def test_a_pair_of_repairs_is_applied(pair):
    instances = chosen(pair)
    check(instances)
    model = model_of("lora")
    table = subject(model)  # shared: the first repair may leave a whole model, and the second reads that here
    for repair in in_order(instances):
        before = {name: p.clone() for name, p in model.named_parameters()}
        repair.apply(table)
        # A repair may add parameters, such as biases.
        after = dict(model.named_parameters())
        assert any(name not in before or not torch.equal(before[name], p) for name, p in after.items()), repair
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_upload_is_not_changed_in_place():
    streams = records()
    for name in NAMES:
        rows()[name].make().rewrite(streams, 0)
    assert streams == records()


def test_matrix_covers_all_pairs():
    assert set(matrix()) == set(combinations(sorted(defenses()), 2))
