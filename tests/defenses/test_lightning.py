"""Every defense beside Lightning's callbacks and with compiled models: it works, or its refusal names both."""

import copy
import logging
import pickle

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hftlight.engine import Stage
from tests.helpers.contract import acts_in_steps, rows, weights_of
from tests.helpers.lightning import CALLBACKS, DECAY, Trajectory, fit_with
from tests.helpers.slow import some_slow
from tests.helpers.tiny_lm import token_batch

NAMES = sorted(rows())
SLOW = ("BaseFinetuning", "StochasticWeightAveraging", "GradientAccumulationScheduler", "ModelCheckpoint")
REPAIRS = {name for name in NAMES if rows()[name].make().stage is Stage.POST_FINETUNING}


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory):
    """Return a function from a defense's name to the weights after each step of a fit without other callbacks."""
    known = {}

    def of(name):
        if name not in known:
            watch = Trajectory()
            _, module = fit_with(name, [watch], tmp_path_factory.mktemp(name))
            known[name] = [*watch.weights, weights_of(module)]
        return known[name]

    return of


REWRITES = {"sa_lora"}  # after the fit its adapter has another form, which its own test compares


@pytest.mark.parametrize("name", some_slow(NAMES, [*filter(acts_in_steps, NAMES)]))
@pytest.mark.parametrize("callback", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in CALLBACKS])
def test_a_defense_works_beside_it_or_says_why_not(name, callback, tmp_path, trajectories, caplog):
    caplog.set_level(logging.ERROR, logger="lightning.pytorch")
    extra = CALLBACKS[callback]()
    if words := rows()[name].refuses.get(callback):
        with pytest.raises((ValueError, TypeError), match=words):
            fit_with(name, extra, tmp_path)
        return
    defense, module = fit_with(name, extra, tmp_path, compiled=callback == "torch.compile")
    weights = {key.replace("_orig_mod.", ""): w for key, w in weights_of(module).items()}
    assert all(w.isfinite().all() for w in weights.values())
    if name in REPAIRS:
        assert defense.applied
        return
    *steps, last = trajectories(name)
    if callback in ("LearningRateFinder", "ModelCheckpoint", "torch.compile"):
        assert_close(weights, last, rtol=0, atol=1e-12)
    if callback == "EMAWeightAveraging" and name not in REWRITES:
        average = steps[1]  # the average begins with the first step's weights
        for step in steps[2:]:
            average = {key: DECAY * w + (1 - DECAY) * step[key] for key, w in average.items()}
        assert_close(weights, average, rtol=0, atol=1e-12)
    if callback == "BaseFinetuning":
        (late,) = extra
        assert late.late or name not in ("l2_sp", "lisa", "ewc")
        if name not in ("sppft", "mllr"):
            assert (
                any(not torch.equal(p, start) for p, start in zip(late.late, late.start, strict=True)) or not late.late
            )


def test_a_repaired_average_is_what_the_folder_holds(tmp_path):
    """Averaging callbacks write the average into the model when training ends. The repair runs after them."""
    defense, module = fit_with("antidote", CALLBACKS["EMAWeightAveraging"](), tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(defense.output, dtype=torch.float64)
    batch = token_batch(0)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert_close(saved(**inputs).logits, module.model.eval()(**inputs).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", some_slow(NAMES, [*filter(acts_in_steps, NAMES)]))
def test_a_defense_is_copied_and_pickled_before_and_after_a_fit(name, tmp_path, trajectories):
    """Tuners and distributed launchers copy and pickle defenses. The copy trains exactly like the original."""
    *_, last = trajectories(name)
    fresh = rows()[name].make()
    assert pickle.loads(pickle.dumps(fresh)).state_key == fresh.state_key
    used, _ = fit_with(name, [], tmp_path / "first")
    again = copy.deepcopy(pickle.loads(pickle.dumps(used)))
    assert again.state_key == used.state_key
    if name not in REPAIRS:
        _, module = fit_with(name, [], tmp_path / "again", defense=again)
        assert_close(weights_of(module), last, rtol=0, atol=0)
