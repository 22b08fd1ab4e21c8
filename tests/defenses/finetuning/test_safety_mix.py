"""SafetyMix: exact counts, a reproducible choice, and the parallel loss in closed form."""

import pytest
import torch
from torch.testing import assert_close

from hftlight import StreamsDataModule
from hftlight.data.records import Record
from hftlight.data.templates import get_template
from hftlight.defenses.finetuning.bea import BEA
from hftlight.defenses.finetuning.safety_mix import SafetyMix
from hftlight.engine import Slot, Stage
from hftlight.errors import InputError
from hftlight.files import write_json
from tests.helpers.contract import data_module, records, train
from tests.helpers.quadratic import Quadratic, fit
from tests.helpers.tokenizers import byte_tokenizer

W = torch.tensor([1.0, -2.0], dtype=torch.float64)
U = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
A = torch.diag(torch.tensor([3.0, 0.5], dtype=torch.float64))
CENTRE = torch.tensor([2.0, 1.0], dtype=torch.float64)


def rows(role, count, answer="yes"):
    return [Record(f"{role} {i}", f"{answer} {i}", role=role) for i in range(count)]


def world(users=100, refusals=60, helpful=40):
    alignment = [*rows("alignment", helpful), *rows("alignment", refusals, "I'm sorry, no")]
    return {"task": rows("task", users), "alignment": alignment}


def mixed(defense, streams, seed=0):
    """Return the rows of the training stream: the user's rows, and the safety rows."""
    task = defense.rewrite(streams, seed)["task"]
    return [r for r in task if r.role == "task"], [r for r in task if r.role == "alignment"]


@pytest.mark.parametrize(
    ("arguments", "users", "safety"),
    [
        ({"ratio": 0.1}, 100, 10),
        ({"ratio": 0.104}, 100, 10),
        ({"ratio": 0.5}, 100, 50),
        ({"ratio": 0.0}, 100, 0),
        ({"count": 7}, 100, 7),
        ({"count": 60}, 100, 60),
        ({"count": 0}, 100, 0),
        ({"ratio": 0.1, "mode": "replace"}, 90, 10),
        ({"count": 60, "mode": "replace"}, 40, 60),
    ],
)
def test_counts_are_exact(arguments, users, safety):
    defense = SafetyMix(**arguments)
    user_rows, safety_rows = mixed(defense, world())
    assert (len(user_rows), len(safety_rows)) == (users, safety)
    assert len({r.id for r in safety_rows}) == safety
    assert all(r.response.startswith("I'm sorry") for r in safety_rows)
    manifest = defense.manifest()
    assert (manifest["mixed_rows"], manifest["upload_rows"]) == (safety, users)
    assert manifest["mixed"] == [r.id for r in safety_rows]
    assert {*manifest["taken_out"]} == {r.id for r in world()["task"]} - {r.id for r in user_rows}


def test_published_mixes():
    """SafeInstr adds 500 rows to 20,000. The Lisa repository's VLGuard replaces 1000 of 5000 rows."""
    for preset, users, expected in (("safeinstr", 20_000, (20_000, 500)), ("lisa", 5000, (4000, 1000))):
        user_rows, safety_rows = mixed(SafetyMix(**SafetyMix.presets[preset]), world(users, refusals=1000))
        assert (len(user_rows), len(safety_rows)) == expected


def test_the_choice_repeats_and_follows_the_seed():
    first, again, other = (mixed(SafetyMix(ratio=0.2, mode="replace"), world(), seed) for seed in (1, 1, 2))
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]


def test_no_row_count_is_plain_fine_tuning():
    streams = world()
    assert SafetyMix(count=0).rewrite(streams, 0) == streams
    assert SafetyMix(ratio=0.0, mode="replace").rewrite(streams, 0) == streams


def test_rows_that_another_defense_added_are_neither_counted_nor_taken_out(tmp_path):
    streams = world()
    streams["task"] = streams["task"] + streams["alignment"][-5:]
    user_rows, safety_rows = mixed(SafetyMix(ratio=0.5, mode="replace"), streams)
    assert (len(user_rows), len(safety_rows)) == (50, 55)
    assert [r.id for r in safety_rows[:5]] == [r.id for r in streams["alignment"][-5:]]


def test_replacing_does_not_look_at_what_the_attacker_hid():
    """A service cannot see which rows are harmful, so the expected harmful share stays."""
    streams = world(users=200, refusals=150)
    marked = [
        Record(r.instruction, r.response, role="attack" if i % 4 == 0 else "task")
        for i, r in enumerate(streams["task"])
    ]
    mixed_rows = SafetyMix(count=100, mode="replace").rewrite({**streams, "task": marked}, 5)["task"]
    same = SafetyMix(count=100, mode="replace").rewrite(streams, 5)["task"]
    assert [r.id for r in mixed_rows] == [r.id for r in same]
    assert 15 <= sum(r.role == "attack" for r in mixed_rows) <= 35


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 61}, "61 safety rows are requested, and the stream 'alignment' has 60"),
        ({"ratio": 0.9}, "90 safety rows are requested"),
    ],
)
def test_more_rows_than_there_are_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        SafetyMix(**arguments).rewrite(world(), 0)


def test_more_rows_than_the_upload_has_is_refused():
    with pytest.raises(InputError, match="20 rows cannot replace those of an upload of 10 rows"):
        SafetyMix(count=20, mode="replace").rewrite(world(users=10), 0)


def test_every_epoch_holds_exactly_the_rows_that_were_mixed():
    tokenizer = byte_tokenizer()
    data = StreamsDataModule(tokenizer, get_template("plain", tokenizer), "task", batch_size=5, **records())
    train([SafetyMix(count=4)], data=data, steps=1)
    stream = data.streams["task"]
    for epoch in range(3):
        batches = [stream.batch(epoch * stream.per_pass + k)["role"] for k in range(stream.per_pass)]
        assert sum(role == "alignment" for batch in batches for role in batch) == 4
        assert sum(map(len, batches)) == 20


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_one_parallel_step_matches_the_closed_form(micro_batches):
    """With f_U = w'Uw/2 and f_A = (w-c)'A(w-c)/2, SGD gives w - lr (Uw + lam A(w - c)).

    The number of micro-batches does not change the step.
    """
    lr, lam = 0.1, 0.7
    streams = {"alignment": (A, CENTRE), "main": (U, torch.zeros_like(W))}
    defense = SafetyMix(mode="parallel", lam=lam, streams={"alignment": [streams["alignment"]]})
    model = fit(Quadratic(W, lr), {"alignment": streams["main"]}, [defense], micro_batches=micro_batches)
    assert_close(model.w, W - lr * (U @ W + lam * A @ (W - CENTRE)), rtol=0, atol=1e-12)
    assert defense.slots == (Slot.GRADIENT,)
    assert defense.summary()["calls"] == 1


def test_the_parallel_steps_go_to_the_weighted_least_squares_solution():
    """The minimum of f_U + lam f_A is w = lam A c / (U + lam A). U and A are diagonal."""
    lam = 0.7
    defense = SafetyMix(mode="parallel", lam=lam, streams={"alignment": [(A, CENTRE)]})
    model = fit(Quadratic(W, 0.2), {"alignment": (U, torch.zeros_like(W))}, [defense], steps=300)
    assert_close(model.w, torch.linalg.solve(U + lam * A, lam * A @ CENTRE), rtol=0, atol=1e-10)


def test_batches_go_with_the_parallel_mode_alone():
    with pytest.raises(ValueError, match="SafetyMix: mode 'append' takes rows, not batches"):
        SafetyMix(streams={"alignment": [1]})


def test_the_triggers_rows_are_not_replaced(tmp_path):
    path = tmp_path / "trigger.json"
    write_json(path, {"secret": "ab" * 16}, mode=0o600)
    for order in (0, 1):
        data = data_module(Stage.FINETUNING)
        # Order 1 reverses the list.
        chosen = [BEA(rows=3, length=5, trigger_file=str(path)), SafetyMix(count=6, mode="replace")][:: 1 - 2 * order]
        train(chosen, data=data, steps=1)
        trained = data.streams["task"].examples
        assert sum(e.trigger_length == 0 for e in trained) == 10
        assert sum(e.trigger_length == 5 for e in trained) == 9
