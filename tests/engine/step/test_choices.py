"""Streams chosen by measured values: choices are counted, saved and repeated by a resumed training."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from hftlight import SafetyModule
from hftlight.engine import Slot, Stage
from hftlight.engine.step.choices import ChoosesStreams
from tests.helpers.contract import data_module, model_of, weights_of
from tests.helpers.quadratic import quiet_trainer


class Alternating(ChoosesStreams):
    """Train on the alignment stream after each step whose loss has an even third digit."""

    stage, slots, streams, pauses = Stage.FINETUNING, (Slot.STREAM,), ("alignment",), True

    def __init__(self):
        super().__init__()
        self.loss, self.chosen = 0.0, []

    def choose(self, step):
        self.chosen.append("alignment" if int(self.loss * 1000) % 2 else "task")
        return self.chosen[-1]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.loss = float(outputs["loss"])

    def arguments(self):
        return {}

    def state_dict(self):
        return {**super().state_dict(), "loss": self.loss}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.loss = state_dict["loss"]


def trained(steps, accumulate, folder, resume=None):
    defense, module = Alternating(), SafetyModule(model_of("lora"), lr=0.05, optimizer="sgd")
    saver = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = quiet_trainer(
        max_steps=steps, max_epochs=-1, accumulate_grad_batches=accumulate, callbacks=[defense, saver],
        enable_checkpointing=True, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, data_module(Stage.FINETUNING, accumulate), ckpt_path=resume, weights_only=False)
    return defense, weights_of(module)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_training_repeats_the_choices(accumulate, tmp_path):
    whole, weights = trained(9, accumulate, tmp_path / "whole")
    assert set(whole.chosen) == {"alignment", "task"}
    for step in (1, 4, 8):
        again, resumed = trained(9, accumulate, tmp_path / f"{step}", str(tmp_path / "whole" / f"step={step}.ckpt"))
        assert again.chosen == whole.chosen[step:]
        assert all(torch.equal(resumed[name], w) for name, w in weights.items())
        assert again._counts == whole._counts


def test_a_stream_goes_on_where_it_was_left():
    """The counts decide the batches, so each stream hands out its batches in order, without a gap."""
    defense, data = Alternating(), data_module(Stage.FINETUNING)
    defense._counts = {}
    data.follow(defense)
    ids = {"task": [], "alignment": []}
    for step in range(8):
        defense.loss = step % 3 / 1000
        batch = data.main_batch(step)
        ids[defense.chosen[-1]].append(batch["id"])
    for name, batches in ids.items():
        assert batches == [data.stream(name, 8).batch(k)["id"] for k in range(len(batches))]


def test_only_the_current_and_the_next_step_are_known():
    defense = Alternating()
    defense._counts = {}
    assert defense.stream_at(0) == "task"
    assert defense.steps_on("task", 0) == 0
    with pytest.raises(RuntimeError, match="the stream of step 2 is not known; the current step is 0"):
        defense.stream_at(2)
    with pytest.raises(RuntimeError, match="counted for the current step 0, not for 1"):
        defense.steps_on("task", 1)
