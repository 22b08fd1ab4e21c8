"""A stage that is stopped anywhere and resumed ends with the weights of an uninterrupted one."""

import os
import time

import pytest
import torch

from hftlight.config import Training
from hftlight.errors import RunError
from hftlight.runs.stages.checkpoint import newest_checkpoint
from hftlight.runs.stages.train import CURVES, run_stage
from tests.helpers import warm
from tests.helpers.jobs import booster_job, small_config

STEPS = 9  # two and a quarter passes of four batches


class Stop(Exception):
    """Stands for any end of a process."""


def stop_at(step):
    def on_step(now, loss):
        if now == step:
            raise Stop

    return on_step


def weights(job):
    return (job.place() / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return the final weights and curves by accumulation."""
    results = {}
    before = os.environ.get("HFTLIGHT_CACHE")
    for accumulate in (1, 2):
        os.environ["HFTLIGHT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
        job = booster_job(small_config(training=Training(steps=STEPS, batch_size=2, lr=1e-2, accumulate=accumulate)))
        run_stage(job)
        results[accumulate] = weights(job), (job.folder() / CURVES).read_text()
    os.environ.pop("HFTLIGHT_CACHE")
    if before is not None:
        os.environ["HFTLIGHT_CACHE"] = before
    return results


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_resumed_after_any_step_equals_uninterrupted(step, accumulate, uninterrupted, tmp_path, monkeypatch):
    """Weights and curves are equal after a stop at any step, with dropout, two streams and AdamW."""
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path))
    config = small_config(training=Training(steps=STEPS, batch_size=2, lr=1e-2, accumulate=accumulate))
    with pytest.raises(Stop):
        run_stage(booster_job(config), on_step=stop_at(step))
    steps = []
    job = booster_job(config)
    run_stage(job, on_step=lambda now, loss: steps.append(now))
    assert steps == list(range(step, STEPS + 1))
    assert weights(job) == uninterrupted[accumulate][0]
    assert (job.folder() / CURVES).read_text() == uninterrupted[accumulate][1]


def test_a_finished_stage_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path))
    job = booster_job(small_config())
    run_stage(job)
    before = weights(job)
    run_stage(booster_job(small_config()), on_step=stop_at(1))
    assert weights(job) == before


def test_a_truncated_checkpoint_is_named_and_the_one_before_is_used(tmp_path, monkeypatch, capsys, uninterrupted):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path))
    config = small_config(training=Training(steps=STEPS, batch_size=2, lr=1e-2))
    with pytest.raises(Stop):
        run_stage(booster_job(config), on_step=stop_at(6))
    job = booster_job(config)
    newest = newest_checkpoint(job.folder() / "checkpoints")
    assert newest is not None
    newest.write_bytes(newest.read_bytes()[:-2000])
    steps = []
    run_stage(job, on_step=lambda now, loss: steps.append(now))
    assert "is incomplete" in capsys.readouterr().err
    assert steps[0] == 5
    assert weights(job) == uninterrupted[1][0]


def test_a_loss_that_leaves_the_finite_numbers_stops_with_the_step_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path))
    from hftlight.models.module import SafetyModule

    original, calls = SafetyModule.loss, []

    def poisoned(self, batch):
        calls.append(None)
        return original(self, batch) * (float("nan") if len(calls) > 9 else 1.0)

    monkeypatch.setattr(SafetyModule, "loss", poisoned)
    job = booster_job(small_config())
    with pytest.raises(RunError, match=r"alignment, step 4: the gradient norm is nan.*last good checkpoint is"):
        run_stage(job)
    checkpoint = newest_checkpoint(job.folder() / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.stem == "00000003"
    state = torch.load(checkpoint, weights_only=False)["state_dict"]
    assert all(torch.isfinite(t).all() for t in state.values())


def test_killed_while_it_works(tmp_path, monkeypatch, uninterrupted):
    """After SIGKILL from outside at three moments, the same call ends with the same weights."""
    script = (
        "from tests.helpers.jobs import *\nfrom hftlight.runs.stages.train import run_stage\nimport sys\n"
        f"t = Training(steps={STEPS}, batch_size=2, lr=1e-2)\n"
        "def tell(step, loss):\n    print(step, flush=True)\n"
        "run_stage(booster_job(small_config(training=t)), on_step=tell)\nprint('end', flush=True)\n"
    )
    environment = {**os.environ, "HFTLIGHT_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for after, delay in (("2", 0.0), ("5", 0.05), ("8", 0.02)):
        process = warm.Command(["-c", script], env=environment)
        while after not in process.stdout.split() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
        process.wait()
    done = warm.run(["-c", script], env=environment, check=True)
    assert done.stdout.split()[-1] == "end"
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path))
    job = booster_job(small_config(training=Training(steps=STEPS, batch_size=2, lr=1e-2)))
    assert weights(job) == uninterrupted[1][0]
