"""Curves of a killed and resumed stage equal an undisturbed stage's, byte for byte, whatever it logs."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from hftlight.config import Training
from hftlight.defenses import Booster
from hftlight.engine import Defense, Slot, Stage
from hftlight.files import read_rows
from hftlight.runs.stages.checkpoint import AtomicCheckpointIO
from hftlight.runs.stages.train import CURVES, StageJob, run_stage
from tests.helpers.jobs import rows, small_config

STEPS = 9  # two and a quarter passes of four batches


class Stop(BaseException):
    """Stands for a kill."""


class NowAndThen(Defense):
    """Log at some steps, at each micro-batch for a mean over the pass, and at a pass's end, which no curve has."""

    stage, slots, streams = Stage.ALIGNMENT, (Slot.GRADIENT,), ()

    def __init__(self) -> None:
        pass

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step in (1, 2, 5):
            pl_module.log("rare/step", float(trainer.global_step))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = trainer.callback_metrics["train/loss"].clone()
        pl_module.log("rare/mean", loss, on_step=False, on_epoch=True, batch_size=1)
        if trainer.global_step == 4:
            self.show({"rare/shown": torch.tensor(4.0)})

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log("rare/pass", float(trainer.current_epoch))


def job(log_every, accumulate=1, checkpoint_every=1):
    training = Training(steps=STEPS, batch_size=2, lr=1e-2, accumulate=accumulate)
    config = small_config(training=training, log_every=log_every, checkpoint_every=checkpoint_every)
    records = {"alignment": rows(7, "alignment"), "harmful": rows(5, "harmful")}
    return StageJob(Stage.ALIGNMENT, config, "tiny", None, records, [Booster(lam=5.0, alpha=0.1), NowAndThen()])


def curves(stage_job):
    return (stage_job.folder() / CURVES).read_bytes()


@pytest.mark.parametrize(
    ("log_every", "accumulate", "checkpoint_every"),
    [
        pytest.param(1, 1, 1, marks=pytest.mark.slow),
        pytest.param(3, 2, 1, marks=pytest.mark.slow),
        pytest.param(3, 1, 2, marks=pytest.mark.slow),
    ],
)
def test_curves_of_a_killed_stage_are_those_of_an_undisturbed_one(
    log_every, accumulate, checkpoint_every, tmp_path, monkeypatch
):
    """Each stage is killed within a step, right after a checkpoint and at the end of a pass, then finished."""
    settings = (log_every, accumulate, checkpoint_every)
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "whole"))
    run_stage(job(*settings))
    expected = curves(job(*settings))
    assert b"rare/pass" not in expected
    assert {row["step"] for row in read_rows(job(*settings).folder() / CURVES)} == {
        step for step in range(1, STEPS + 1) if step % log_every == 0
    }
    save, count = AtomicCheckpointIO.save_checkpoint, []
    kills = {"behind the checkpoint": 0, "within a step": 0, "at the end of a pass": 0}

    def saved(self, checkpoint, path, storage_options=None):
        save(self, checkpoint, path, storage_options)
        if int(Path(path).stem) == count[0]:
            kills["behind the checkpoint"] += 1
            raise Stop

    def within(step, loss):
        if step == count[0]:
            kills["within a step"] += 1
            raise Stop

    def ended(self, trainer, pl_module):
        if trainer.global_step >= count[0]:
            kills["at the end of a pass"] += 1
            raise Stop

    for step in (1, 2, 4, 8):  # steps 4 and 8 end a pass
        monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / f"killed{step}"))
        count[:] = [step]
        try_to(run_stage, job(*settings), on_step=within)
        with monkeypatch.context() as patch:
            patch.setattr(AtomicCheckpointIO, "save_checkpoint", saved)
            try_to(run_stage, job(*settings))
        with monkeypatch.context() as patch:
            patch.setattr(Callback, "on_train_epoch_end", ended)
            try_to(run_stage, job(*settings))
        run_stage(job(*settings))
        assert curves(job(*settings)) == expected, step
    assert all(kills.values())


def try_to(work, *arguments, **options):
    with suppress(Stop):
        work(*arguments, **options)


def test_a_value_that_is_logged_now_and_then_has_a_point_where_it_was_made(tmp_path, monkeypatch):
    """A point is the last value since the point before, and there is none without a value."""
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path))
    for every, expected in ((1, {2: 1.0, 3: 2.0, 6: 5.0}), (2, {2: 1.0, 4: 2.0, 6: 5.0})):
        run_stage(stage_job := job(every, checkpoint_every=every))
        rare = {r["step"]: r["value"] for r in read_rows(stage_job.folder() / CURVES) if r["name"] == "rare/step"}
        assert rare == expected
        for path in stage_job.folder().parent.iterdir():  # log_every is not part of the key
            path.rename(tmp_path / f"{every}")
