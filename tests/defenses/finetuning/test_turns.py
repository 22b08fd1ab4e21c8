"""ALRIGHT and MAXRIGHT: the choice of the objective on quadratics, and what a run says about it."""

import math
from dataclasses import replace

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from hftlight import SafetyModule
from hftlight.defenses.finetuning.alright import ALRIGHT, on_preferences
from hftlight.defenses.finetuning.maxright import MAXRIGHT, weighted_gaps
from tests.helpers.contract import data_module, distance, model_of, records, train, weights_of
from tests.helpers.quadratic import quiet_trainer

LAM = 0.3


@pytest.mark.parametrize("lam", [0.25, 0.5, 0.75])
def test_the_share_of_steps_on_preferences_is_lambda(lam):
    """Of 4000 steps, the share deviates by less than four standard errors."""
    share = sum(on_preferences(7, step, lam) for step in range(4000)) / 4000
    assert abs(share - lam) < 4 * math.sqrt(lam * (1 - lam) / 4000)


def test_another_seed_gives_other_choices():
    choices = [[on_preferences(seed, step, 0.5) for step in range(64)] for seed in (0, 0, 1)]
    assert choices[0] == choices[1] != choices[2]


def test_alternation_by_chance_reaches_the_weighted_optimum():
    """For f = (w - 2)^2 / 2 and g = (w + 1)^2 / 2, steps of 1 / t average the centres, with the mean 2 - 3 lambda."""
    w = 0.0
    for step in range(20000):
        centre = -1.0 if on_preferences(3, step, LAM) else 2.0
        w -= (w - centre) / (step + 1)
    assert w == pytest.approx(2 - 3 * LAM, abs=0.05)


def test_the_larger_gap_equalises_the_weighted_gaps():
    """Small steps on f = (w - 2)^2 / 2 + 5 and g = (w + 1)^2 / 2 + 1 end where (1 - lambda)(f - 5) = lambda (g - 1)."""
    w, floors = 0.0, {"task": 5.0, "pairs": 1.0}
    for _ in range(4000):
        losses = {"task": (w - 2) ** 2 / 2 + 5, "pairs": (w + 1) ** 2 / 2 + 1}
        gaps = weighted_gaps(losses, floors, LAM)
        w -= 0.002 * (w + 1 if gaps["pairs"] > gaps["task"] else w - 2)
    assert gaps["task"] == pytest.approx(gaps["pairs"], rel=0.02)
    ratio = math.sqrt(LAM / (1 - LAM))
    assert w == pytest.approx((2 - ratio) / (1 + ratio), abs=0.01)


def test_a_tie_trains_on_the_users_data():
    defense = MAXRIGHT(0.5, task_floor=1.0, pairs_floor=1.0)
    defense._losses = {"task": 2.0, "pairs": 2.0}
    assert defense.choose(0) == "task"
    defense._losses["pairs"] = 2.1
    assert defense.choose(0) == "pairs"


def test_the_manifest_counts_the_steps_of_each_stream():
    defense = ALRIGHT(0.5)
    assert defense.manifest()["steps_on"] == {}
    train([defense], steps=8)
    on_pairs = sum(on_preferences(0, step, 0.5) for step in range(8))
    assert 0 < on_pairs < 8
    assert defense.manifest()["steps_on"] == {"task": 8 - on_pairs, "pairs": on_pairs}


def test_with_lambda_one_the_users_rows_have_no_effect():
    def trained(answer):
        task = [replace(row, response=answer) for row in records()["task"]]
        return weights_of(train([ALRIGHT(1.0)], data=data_module(ALRIGHT.stage, task=task)))

    assert distance(trained("say one"), trained("say two")) == 0


def test_the_losses_in_use_are_the_last_measured_ones():
    """Without a refresh the loss of a step's own batch is used. With a refresh after each step both losses are new."""
    seen = {}
    for refresh in (1, 100):
        defense = MAXRIGHT(0.4, 0.3, task_floor=5.155, refresh=refresh)
        train([defense], steps=2)
        seen[refresh] = dict(defense._losses)
    start = seen[100]
    assert start["pairs"] == pytest.approx(math.log(2))  # measured at the aligned model, where both models agree
    assert all(seen[1][name] != start[name] for name in start)


@pytest.mark.parametrize(
    "make", [lambda: ALRIGHT(0.5), lambda: MAXRIGHT(0.4, 0.3, 5.155, refresh=3)], ids=["alright", "maxright"]
)
def test_a_resumed_training_repeats_choices_and_losses(make, tmp_path):
    def trained(resume=None):
        defense, module = make(), SafetyModule(model_of("lora"), lr=0.1, optimizer="sgd")
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        trainer = quiet_trainer(
            max_steps=6, max_epochs=-1, callbacks=[defense, saver], enable_checkpointing=True,
            use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(module, data_module(defense.stage), ckpt_path=resume, weights_only=False)
        return weights_of(module), defense.state_dict()

    weights, state = trained()
    for step in (1, 2, 5):
        again, repeated = trained(str(tmp_path / f"step={step}.ckpt"))
        assert distance(again, weights) == 0
        assert repeated == state


def test_no_batch_of_the_user_is_lost():
    """While a step trains on preferences, the user's data waits: its batches come in order, none twice."""

    class Seen(Callback):
        def __init__(self):
            self.ids = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if "rejected" not in batch:
                self.ids += batch["id"]

    seen, plain = Seen(), Seen()
    data = {"task": records(64)["task"]}
    train([ALRIGHT(0.5)], steps=8, callbacks=[seen], data=data_module(ALRIGHT.stage, **data))
    train([], steps=8, callbacks=[plain], data=data_module(ALRIGHT.stage, **data))
    assert 0 < len(seen.ids) < len(plain.ids)
    assert seen.ids == plain.ids[: len(seen.ids)]


def test_floors_of_zero_are_warned_of():
    with pytest.warns(UserWarning, match="task_floor and pairs_floor are both 0"):
        train([MAXRIGHT(0.5)], steps=1)


@pytest.mark.parametrize("defense", [ALRIGHT(0.5), MAXRIGHT(0.5)], ids=["alright", "maxright"])
def test_a_trainer_without_streams_is_refused_by_name(defense):
    module = SafetyModule(model_of("lora"))
    with pytest.raises(ValueError, match=f"{type(defense).__name__}: .*pairs|StreamsDataModule"):
        quiet_trainer(max_steps=1, callbacks=[defense]).fit(module, [{}])


def test_no_memory_of_the_aligned_model_is_left():
    assert train([ALRIGHT(0.5)])._aligned is None
