"""The plan of a run: equal steps have equal keys, other inputs give other keys, and no judge is loaded."""

from dataclasses import replace

import pytest

from hftlight.attacks.model_edit import ModelEdit
from hftlight.config import Evaluation, RunConfig, Search, Training
from hftlight.defenses import SOMF, Antidote, Booster, Lisa
from hftlight.runs.measuring.test_sets import TestSets as Sets
from hftlight.runs.plan import plan
from hftlight.runs.prepare import prepare

TRAINING = Training(steps=2, batch_size=2)
CONFIG = RunConfig(
    model="tiny", num_samples=20, alignment=TRAINING, finetuning=TRAINING, evaluation=Evaluation(4, 2, 4, loss_rows=2)
)


def keys(config=CONFIG, defenses=(), attack=None):
    return {step.label: step.key for step in plan(prepare(config, list(defenses), attack))}


def test_arms_share_what_is_done_once():
    lisa_keys = keys(replace(CONFIG, baseline=True), [Lisa()])
    assert lisa_keys["undefended: aligned"] == lisa_keys["lisa: aligned"]
    assert lisa_keys["undefended: aligned, measuring"] == lisa_keys["lisa: aligned, measuring"]
    assert lisa_keys["undefended: fine-tuned"] != lisa_keys["lisa: fine-tuned"]
    booster_keys = keys(CONFIG, [Booster()])
    assert booster_keys["base model: measuring"] == lisa_keys["base model: measuring"]
    assert booster_keys["booster: aligned"] != lisa_keys["lisa: aligned"]


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"alignment": replace(TRAINING, lr=1e-3)}, "undefended: aligned"),
        ({"finetuning": replace(TRAINING, lr=1e-3)}, "undefended: fine-tuned"),
        ({"harmful_ratio": 0.3}, "undefended: fine-tuned"),
        ({"evaluation": replace(CONFIG.evaluation, prompts=3)}, "base model: measuring"),
    ],
)
def test_from_the_first_step_that_an_input_decides_the_keys_are_others(changes, first):
    before, after = keys(), keys(replace(CONFIG, **changes))
    changed = [label for label in before if before[label] != after[label]]
    assert changed[0] == first


def test_settings_of_search_and_edit_are_inputs():
    searching = replace(CONFIG, attacker="search:2")
    label = "undefended: attacker's search"
    search_keys = [keys(c)[label] for c in (searching, replace(searching, attacker="search:3"))]
    search_keys.append(keys(replace(searching, search=Search(lr=[1e-3])))[label])
    assert len(set(search_keys)) == 3
    edits = [
        keys(c, (), ModelEdit(background=2))["undefended: edited"] for c in (CONFIG, replace(CONFIG, system="Be."))
    ]
    assert len(set(edits)) == 2


def test_no_judge_is_looked_at(monkeypatch):
    """A judge's identity is the hash of its weights, which a dry run must not download."""
    monkeypatch.setattr(Sets, "judging", lambda self: pytest.fail("the plan asked what a judge is"))
    assert keys(replace(CONFIG, evaluation=replace(CONFIG.evaluation, at=[1])))


def test_a_repair_that_trains_counts_its_steps_and_their_time():
    def step(steps):
        found = plan(prepare(CONFIG, [SOMF(steps=steps), Antidote()], None))
        return next(s for s in found if s.label.endswith(": repaired"))

    assert (step(3).count, step(9).count) == (5, 11)  # and one for each of the two repairs
    few, more, most = (step(n).seconds for n in (3, 9, 15))
    assert 0 < few < more
    assert most - more == pytest.approx(more - few)
