"""Reverse SFT and DPO: two phases, each with its own settings."""

import pytest

from hftlight.attacks import Explicit, ReversePreference, ReverseSftDpo
from hftlight.config import RunConfig, Training
from hftlight.errors import InputError
from tests.attacks.rows import made_up

SOURCES = {"attack": made_up("h", 12)}


def test_harmful_rows_are_taught_and_then_preferred():
    attack = ReverseSftDpo(n=4, lr=1e-4, batch_size=2, epochs=3, dpo_lr=1e-5, dpo_steps=7, beta=0.2, system="Obey.")
    first, second = attack.phases()
    assert first == Explicit(n=4, lr=1e-4, batch_size=2, epochs=3, system="Obey.")
    assert second == ReversePreference(n=4, lr=1e-5, batch_size=2, steps=7, beta=0.2, system="Obey.")
    rows = attack.upload(SOURCES, 5)
    assert rows == [*first.upload(SOURCES, 5), *second.upload(SOURCES, 5)]
    assert len(rows) == 4 + 2 * 4
    assert all(preferred.response != ReversePreference().refusal for preferred in rows[4::2])
    assert (attack.p, attack.counts()) == (1.0, {"attack": 4})


def test_the_second_phase_takes_over_what_it_has_no_value_for():
    config = RunConfig(finetuning=Training(steps=9, lr=3e-3, batch_size=5))
    first, second = ReverseSftDpo(n=10, dpo_epochs=2).resolved(config).phases()
    trained = [phase.applied(config).finetuning for phase in (first, second)]
    assert [(t.steps, t.lr, t.batch_size) for t in trained] == [(9, 3e-3, 5), (4, 3e-3, 5)]
    assert second.epochs == 2
    assert second.steps is None


def test_a_description_has_both_phases():
    description = ReverseSftDpo(n=4, dpo_steps=7, source="secret.jsonl").resolved(RunConfig()).describe()
    assert [(phase["attack"], phase["steps"]) for phase in description["phases"]] == [
        ("explicit", 96),
        ("reverse_preference", 7),
    ]
    assert not any("source" in phase for phase in description["phases"])
    assert "phases" not in Explicit().resolved(RunConfig()).describe()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta": 0.0}, "ReverseSftDpo: in the second phase, ReversePreference: beta must be > 0"),
        ({"dpo_lr": -1.0}, "ReverseSftDpo: in the second phase, ReversePreference: lr must be > 0"),
        ({"dpo_epochs": 1, "dpo_steps": 1}, "epochs and steps both set the length of training"),
        ({"steps": 0}, "ReverseSftDpo: steps must be a whole number >= 1"),
    ],
)
def test_what_cannot_be_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ReverseSftDpo(**values)


def test_rows_that_are_missing_are_asked_for():
    with pytest.raises(InputError):
        ReverseSftDpo(n=40).upload(SOURCES, 0)
