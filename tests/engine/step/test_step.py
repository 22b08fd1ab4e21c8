"""The engine's parts one by one: vectors, displacement, hooks, order, slots, side streams."""

import contextlib
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, IterableDataset

from hftlight.defenses import Booster
from hftlight.engine import (
    Defense,
    LoaderStream,
    Slot,
    Stage,
    captured,
    check,
    difference,
    dot,
    hooked,
    in_order,
    moved,
    norm,
    passes_order,
    scaled,
    shifted,
    unit,
)
from hftlight.engine.step.order import trainer_seed
from hftlight.engine.step.side_streams import halves

A = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
B = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[-1.0]])}


def test_vectors_take_one_norm_over_all_tensors():
    assert norm(A).item() == 5.0
    assert dot(A, B).item() == -1.0
    assert_close(unit(A)["b"], torch.tensor([[0.8]]))
    assert_close(difference(A, B)["a"], torch.tensor([2.0, -2.0]))
    assert_close(scaled(A, torch.tensor(2.0))["a"], torch.tensor([6.0, 0.0]))


def test_unit_of_zero_is_zero_and_norms_of_half_precision_are_float32():
    assert torch.equal(unit({"a": torch.zeros(3)})["a"], torch.zeros(3))
    large = {"a": torch.full((4,), 3e4, dtype=torch.float16)}
    assert norm(large).item() == 6e4
    assert dot(large, large).item() == pytest.approx(3.6e9)  # beyond the largest float16


def test_moved_restores_bit_for_bit_after_an_exception():
    model = nn.Linear(7, 5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for _ in range(20):
        inside = []
        with contextlib.suppress(ZeroDivisionError), moved(model, direction, 0.123):
            inside.append(model.weight.detach() - before["weight"])
            raise ZeroDivisionError
        assert_close(inside[0], 0.123 * direction["weight"], rtol=1e-4, atol=1e-6)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_moved_refuses_weights_of_16_bits():
    model = nn.Linear(2, 2).to(torch.bfloat16)
    with pytest.raises(TypeError, match="float32 or float64"), moved(model, {"weight": torch.ones(2, 2)}, 0.1):
        pass


@dataclass
class Output:
    hidden: torch.Tensor
    extra: int = 0


class Wrapped(nn.Module):
    """A linear layer that wraps its output in a tensor, tuple or dataclass."""

    def __init__(self, kind):
        super().__init__()
        self.inner, self.kind = nn.Linear(3, 3), kind

    def forward(self, x):
        y = self.inner(x)
        return {"tensor": y, "tuple": (y, None), "dataclass": Output(y)}[self.kind]


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dataclass"])
def test_outputs_of_every_kind_are_shifted_for_the_whole_batch(kind):
    layer, x = Wrapped(kind), torch.randn(4, 3)
    shift = torch.randn(4, 3)
    with captured({"layer": layer}) as plain:
        layer(x)
    with shifted({"layer": layer}, {"layer": shift}), captured({"layer": layer}) as moved_outputs:
        layer(x)
    assert_close(moved_outputs["layer"], plain["layer"] + shift)
    assert not layer._forward_hooks


def test_hooks_come_off_after_an_exception_and_keep_the_first_call():
    layer = nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError), hooked({"layer": layer}, lambda name, value: None, inputs=True):
        raise ZeroDivisionError
    assert not layer._forward_pre_hooks
    with captured({"layer": layer}) as outputs:
        first = layer(torch.ones(1, 2))
        layer(torch.zeros(1, 2))
    assert outputs["layer"] is first


def test_order_is_a_permutation_that_depends_on_seed_stream_and_pass_alone():
    first = passes_order(101, 4, seed=1, stream="task", epoch=0)
    assert first == passes_order(101, 4, seed=1, stream="task", epoch=0)
    assert sorted(row for batch in first for row in batch) == list(range(101))
    for other in ({"seed": 2}, {"stream": "harmful"}, {"epoch": 1}):
        assert passes_order(101, 4, **{"seed": 1, "stream": "task", "epoch": 0, **other}) != first
    assert [len(batch) for batch in first] == [4] * 25 + [1]


def test_order_groups_rows_of_similar_length():
    lengths = [(i * 37) % 100 for i in range(400)]
    # Padding tokens: each row's distance to the longest row of its batch.
    padding = sum(
        max(lengths[r] for r in batch) - lengths[row]
        for batch in passes_order(400, 8, 0, "task", 0, lengths)
        for row in batch
    )
    assert padding < 0.1 * sum(lengths)


def hypergeometric_share(rows: int, marked: int, batch: int) -> float:
    """Return the chance that a batch drawn without replacement contains a marked row."""
    return 1 - math.comb(rows - marked, batch) / math.comb(rows, batch)


def test_a_plain_shuffle_spreads_long_rows_as_chance_does():
    """With 100 harmful rows of 1000, 65 % of batches of 10 contain one. Groups by length cluster these rows."""
    assert hypergeometric_share(1000, 100, 10) == pytest.approx(0.653, abs=0.001)
    lengths = [135] * 100 + [70] * 900

    def share(lengths):
        passes = [passes_order(1000, 10, seed, "task", 0, lengths) for seed in range(30)]
        return sum(any(row < 100 for row in batch) for batches in passes for batch in batches) / 3000

    assert share(None) == pytest.approx(0.653, abs=0.02)
    assert share(lengths) < 0.3


class A1(Defense):
    stage, slots = Stage.ALIGNMENT, (Slot.GRADIENT,)


class A2(Defense):
    stage, slots = Stage.ALIGNMENT, (Slot.PROJECTION, Slot.UPDATE)


class A3(Defense):
    stage, slots = Stage.ALIGNMENT, (Slot.FORWARD,)


class A4(A3):
    pass


class F1(Defense):
    stage, slots = Stage.FINETUNING, (Slot.GRADIENT,)


def test_slots_decide_the_order_and_within_a_slot_the_list_does():
    class Second(A1):
        pass

    masks, adds, probes, again = A2(), A1(), A3(), Second()
    assert in_order([masks, adds, probes, again]) == [probes, adds, again, masks]


@pytest.mark.parametrize(
    ("defenses", "message"),
    [
        ([A3(), A4()], "A3 and A4 both fill the forward slot; keep one of them"),
        ([A1(), F1()], "A1 works in the alignment stage and F1 in the finetuning stage"),
        ([A1(), A1()], "A1 is in the list twice"),
    ],
)
def test_lists_that_cannot_work_are_refused_by_name(defenses, message):
    with pytest.raises(ValueError, match=message):
        check(defenses)


def test_a_loader_becomes_a_stream_with_random_access():
    data = [torch.tensor(i) for i in range(10)]
    stream = LoaderStream(DataLoader(data, batch_size=4), "harmful")
    epochs = [torch.cat([stream.batch(3 * e + k) for k in range(3)]).tolist() for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]
    assert stream.batch(1).tolist() == LoaderStream(DataLoader(data, batch_size=4), "harmful").batch(1).tolist()
    assert stream.batch(1).tolist() != LoaderStream(DataLoader(data, batch_size=4), "harmful", 1).batch(1).tolist()


@pytest.mark.parametrize("loader", [True, False], ids=["loader", "batches"])
def test_a_held_out_part_shares_no_row_with_the_rest(loader):
    """A hash of the row decides, so that more rows move none to the other part."""
    data = [torch.tensor(i) for i in range(40)]

    def rows(count):
        source = DataLoader(data[:count], batch_size=1) if loader else [row[None] for row in data[:count]]
        parts = halves(LoaderStream(source, "harmful"), "harmful", 0.25)
        return [{int(part.batch(k)) for k in range(part.per_pass)} for part in parts]

    rest, held_out = rows(40)
    assert not rest & held_out
    assert rest | held_out == set(range(40))
    assert 2 < len(held_out) < 18
    assert rows(20)[1] == {row for row in held_out if row < 20}


def test_side_batches_follow_the_seed_of_the_trainer(monkeypatch):
    """``seed_everything`` decides the order of a loader that a user hands to a defense."""
    loader = DataLoader([torch.tensor(i) for i in range(30)], batch_size=4)

    def first_batch(seed):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        return Booster(streams={"harmful": loader})._find("harmful", None)().batch(0).tolist()

    assert first_batch(3) == first_batch(3) != first_batch(4)
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert trainer_seed() == 0


def test_sources_that_cannot_be_resumed_are_refused():
    class Endless(IterableDataset):
        def __iter__(self):
            yield 1

    with pytest.raises(TypeError, match="map-style data set"):
        LoaderStream(DataLoader(Endless(), batch_size=1), "harmful")
    with pytest.raises(TypeError, match="DataLoader or a list of batches, got generator"):
        LoaderStream((x for x in []), "harmful")
    with pytest.raises(ValueError, match="less than one batch"):
        LoaderStream([], "harmful")
