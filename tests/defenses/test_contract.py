"""The contract of every public defense, generated from the defense's row. A defense without a row fails here."""

import inspect

import pytest
import torch
from lightning.pytorch import Callback

from hftlight.engine import Slot, Stage
from hftlight.registry import defense_class, defenses
from tests.helpers.contract import (
    STEPS,
    acts_in_steps,
    distance,
    fitted,
    hooks_of,
    model_of,
    plain_weights,
    records,
    rows,
    train,
    weights_of,
)
from tests.helpers.slow import some_slow

NAMES = sorted(rows())
TRAINING = [name for name in NAMES if rows()[name].make().stage is not Stage.POST_FINETUNING]
WITH_SLOW = [name for name in TRAINING if rows()[name].slow]


def test_every_public_defense_has_a_row():
    assert sorted(defenses()) == NAMES


def tuned(names):
    return [pytest.param(name, tuning, id=f"{name}-{tuning}") for name in names for tuning in rows()[name].tunings]


def plain(name, tuning, **settings):
    return plain_weights(tuning, rows()[name].make().stage, **settings)


@pytest.mark.parametrize("name", NAMES)
def test_bad_arguments_are_named(name):
    row = rows()[name]
    arguments = set(inspect.signature(defense_class(name).__init__).parameters) - {"self", "streams"}
    assert row.bad or not arguments
    for bad_arguments, words in row.bad:
        with pytest.raises((ValueError, TypeError), match=words) as caught:
            defense_class(name)(**bad_arguments)
        assert str(caught.value).startswith(defense_class(name).__name__)


@pytest.mark.parametrize("name", NAMES)
def test_docstring_names_source_differences_and_cost(name):
    text = inspect.getdoc(defense_class(name))
    assert all(part in text for part in ("Source:", "Differs:", "Cost:", "Args:"))


@pytest.mark.parametrize("name", NAMES)
def test_presets_are_arguments(name):
    for values in defense_class(name).presets.values():
        assert defense_class(name)(**values).arguments().items() >= dict(values).items()


@pytest.mark.parametrize("name", NAMES)
def test_state_key_tells_settings_apart(name):
    row = rows()[name]
    assert row.make().state_key == row.make().state_key
    if row.neutral is not None:
        assert row.make().state_key != row.neutral().state_key


@pytest.mark.parametrize(("name", "tuning"), tuned(TRAINING))
def test_neutral_setting_is_plain_fine_tuning(name, tuning):
    row = rows()[name]
    if row.neutral is None:
        assert row.no_neutral
        pytest.skip(row.no_neutral)
    off = weights_of(train([row.neutral()], tuning, optimizer="adamw", lr=0.01))
    assert all(map(torch.equal, off.values(), plain(name, tuning, optimizer="adamw", lr=0.01).values()))


@pytest.mark.parametrize(("name", "tuning"), tuned(TRAINING))
def test_it_does_something_and_leaves_its_trace(name, tuning):
    fit = fitted(name, tuning, steps=2 * STEPS)
    assert fit.summary["calls"] > 0
    assert all(value == value for value in fit.summary.values())
    if name != "ptst":  # PTST changes the prompt at serving and nothing in training
        assert distance(fit.weights, plain(name, tuning)) > 1e-7


@pytest.mark.parametrize(("name", "tuning"), tuned(WITH_SLOW))
@pytest.mark.parametrize(
    "clip", [pytest.param(None, id="free", marks=pytest.mark.slow), pytest.param(0.5, id="clipped")]
)
def test_equals_an_independent_slow_loop(name, tuning, clip):
    row = rows()[name]
    slow = row.slow(model_of(tuning), row.make().stage, accumulate=2).run(clip)
    assert distance(fitted(name, tuning, accumulate=2, clip=clip).weights, slow) <= 1e-10
    assert distance(plain(name, tuning, clip=clip), slow) > 1e-7


@pytest.mark.parametrize("name", some_slow(TRAINING, [*filter(acts_in_steps, TRAINING)]))
def test_accumulation_changes_nothing(name):
    row = rows()[name]
    if row.per_micro_batch:
        pytest.skip(row.per_micro_batch)
    once = fitted(name, row.tunings[0], steps=2 * STEPS)
    for accumulate in (2, 4, 8):
        assert distance(fitted(name, row.tunings[0], accumulate=accumulate).weights, once.weights) <= 1e-10


@pytest.mark.parametrize("name", some_slow(TRAINING, [*filter(acts_in_steps, TRAINING)]))
def test_checkpointing_changes_nothing(name):
    tuning = rows()[name].tunings[-1]
    once = fitted(name, tuning, steps=2 * STEPS)
    assert distance(fitted(name, tuning, checkpointing=True).weights, once.weights) <= 1e-10


@pytest.mark.parametrize("name", TRAINING)
def test_hooks_come_off_and_terms_are_let_go_after_an_exception(name):
    """The main pass fails in its third micro-batch. Afterwards hooks, loss terms and gradient flags are restored."""
    row = rows()[name]
    defense = row.make()
    module_holder = {}

    class Trip(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            module_holder["module"] = pl_module
            module_holder["count"] = module_holder.get("count", 0) + 1
            if module_holder["count"] == 3:
                raise KeyError("trip")

    model = model_of(row.tunings[0])
    before, flags = hooks_of(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyError, match="trip"):
        train([defense], row.tunings[0], accumulate=2, model=model, callbacks=[Trip()])
    module = module_holder["module"]
    assert hooks_of(model) == before
    assert module.loss_terms == []
    assert module.parameter_groups is None
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize(("name", "tuning"), tuned(TRAINING))
def test_hooks_do_not_pile_up(name, tuning):
    before, after = fitted(name, tuning, steps=2 * STEPS).hooks
    assert before == after


@pytest.mark.parametrize("name", TRAINING)
def test_passes_are_counted_truthfully(name):
    """In the last four of eight steps the forward passes per step equal the declared number.

    If steps differ in their number of passes, the mean may miss the declared number by one.
    """
    fit = fitted(name, rows()[name].tunings[0], steps=2 * STEPS)
    forwards_per_step = (fit.forwards[-1] - fit.forwards[STEPS - 1]) / STEPS
    assert forwards_per_step == fit.passes if fit.steady else abs(forwards_per_step - fit.passes) <= 1


DATA = [name for name in TRAINING if Slot.DATA in rows()[name].make().slots]


@pytest.mark.parametrize("name", DATA)
def test_rows_are_what_an_independent_computation_says(name):
    row = rows()[name]
    streams = records()
    before = {key: list(value) for key, value in streams.items()}
    assert row.make().rewrite(streams, 3) == row.records(records(), 3)
    assert streams == before
