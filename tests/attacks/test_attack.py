"""Shared behavior of attacks: values out of range, steps from epochs, settings applied to a configuration."""

from dataclasses import FrozenInstanceError

import pytest

from hftlight.attacks import ATTACKS, Explicit, HarmfulMix, IdentityShift, get_attack, overridden, steps_of
from hftlight.config import RunConfig, Training
from hftlight.errors import InputError


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "accumulate", "drop_last", "steps"),
    [
        (999, 10, 20, 1, False, 2000),  # Booster: 99 harmful and 900 task rows
        (1000, 5, 20, 1, False, 4000),  # Vaccine on SST2
        (1000, 5, 50, 1, False, 10000),  # Vaccine on GSM8K
        (4999, 5, 20, 1, True, 19980),  # what Antidote's log prints
        (100, 2, 15, 8, False, 90),
        (100, 128, 15, 1, False, 15),  # fewer rows than one batch: a step per epoch
        (10, 10, 0.5, 1, False, 1),
        (10, 4, 1, 4, False, 1),  # an unfinished window is still a step
        (21, 10, 1.5, 1, False, 5),
    ],
)
def test_epochs_become_steps(rows, batch, epochs, accumulate, drop_last, steps):
    assert steps_of(rows, batch, epochs, accumulate, drop_last) == steps


@pytest.mark.parametrize("bad", [(0, 5, 1), (5, 0, 1), (5, 5, 0), (5, 5, -1)])
def test_steps_of_nothing_are_refused(bad):
    with pytest.raises(ValueError, match=r"steps_of: rows, batch_size and accumulate must be >= 1"):
        steps_of(*bad)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": 0}, "Explicit: n must be a whole number >= 1, got 0"),
        ({"n": 2.5}, "Explicit: n must be a whole number >= 1, got 2.5"),
        ({"steps": 0}, "Explicit: steps must be a whole number >= 1, got 0"),
        ({"batch_size": -1}, "Explicit: batch_size must be a whole number >= 1, got -1"),
        ({"epochs": 0}, "Explicit: epochs must be > 0, got 0"),
        ({"lr": float("nan")}, "Explicit: lr must be > 0, got nan"),
        ({"epochs": 1, "steps": 1}, "epochs and steps both set the length of training, got 1 and 1; give only one"),
        ({"tuning": "half"}, "tuning must be one of lora, full, qlora, got 'half'"),
        ({"adapter_protocol": "stack"}, "adapter_protocol must be one of merge, continue, got 'stack'"),
    ],
)
def test_values_out_of_range_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        Explicit(**values)


def test_an_attack_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Explicit().n = 5


def test_settings_hold_what_was_stated_and_nothing_else():
    attack = Explicit(n=21, epochs=2, batch_size=10, lr=1e-5, tuning="full", template="alpaca", source="rows.jsonl")
    assert attack.settings() == {
        "num_samples": 21,
        "harmful_ratio": 1.0,
        "finetuning.lr": 1e-5,
        "finetuning.batch_size": 10,
        "finetuning.steps": 6,
        "tuning": "full",
        "template": "alpaca",
        "data.attack": "rows.jsonl",
    }
    assert HarmfulMix().settings() == {}


def test_epochs_without_a_batch_size_are_refused():
    with pytest.raises(InputError, match="epochs=2 become steps only with a batch size"):
        Explicit(epochs=2).settings()


def test_nothing_stated_is_the_run_as_it_was():
    config = RunConfig(num_samples=50, harmful_ratio=0.2, finetuning=Training(batch_size=4, accumulate=2, steps=7))
    assert HarmfulMix().applied(config) == config


def test_what_is_stated_wins_and_the_batch_is_divided():
    config = RunConfig(devices=2, finetuning=Training(batch_size=3, accumulate=4, lr=1.0))
    applied = Explicit(n=40, epochs=3, batch_size=16, lr=0.5).applied(config)
    assert (applied.num_samples, applied.harmful_ratio) == (40, 1.0)
    assert (applied.finetuning.batch_size, applied.finetuning.accumulate, applied.finetuning.lr) == (2, 4, 0.5)
    assert applied.finetuning.steps == 9  # ceil(40 / 16) a pass, three passes
    assert (config.finetuning.lr, config.num_samples) == (1.0, 384)  # the original configuration is unchanged
    with pytest.raises(InputError, match="must be a multiple of 8, got 10"):
        Explicit(batch_size=10).applied(config)


def test_a_resolved_attack_knows_everything():
    config = RunConfig(num_samples=50, harmful_ratio=0.2, finetuning=Training(batch_size=4, accumulate=2))
    described = HarmfulMix(lr=1e-4, epochs=3).resolved(config).describe()
    assert described["attack"] == "harmful_mix"
    assert described["rows"] == {"attack": 10, "task": 40}
    assert (described["p"], described["lr"], described["batch_size"]) == (0.2, 1e-4, 8)
    assert described["steps"] == 21  # ceil(50 / 8) = 7 a pass
    assert described["tuning"] == "lora"
    with pytest.raises(InputError, match="n, the rows of the upload, is not known"):
        HarmfulMix(p=0.1).counts()
    with pytest.raises(InputError, match="p, the harmful ratio, is not known"):
        HarmfulMix(n=10).counts()


def test_overriding_by_dotted_name():
    config = RunConfig()
    config.data.columns = {"instruction": "q"}
    changed = overridden(config, {"lora.r": 3, "data.columns": {"kind": "lang"}, "template": "alpaca"})
    assert (changed.lora.r, changed.template) == (3, "alpaca")
    assert changed.data.columns == {"instruction": "q", "kind": "lang"}
    assert (config.lora.r, config.data.columns) == (8, {"instruction": "q"})
    with pytest.raises(InputError, match=r"no option 'finetuning.step'\. Did you mean 'steps'"):
        overridden(config, {"finetuning.step": 3})


def test_attacks_by_name():
    for name, cls in ATTACKS.items():
        assert get_attack(name.replace("_", "-")) is cls
        assert cls().name == name
    with pytest.raises(InputError, match=r"Unknown attack 'explicitt'; did you mean 'explicit'\? Known: harmful_mix,"):
        get_attack("explicitt")


def test_identity_shift_takes_its_own_number_of_rows_not_the_runs():
    assert IdentityShift().applied(RunConfig()).num_samples == 10
