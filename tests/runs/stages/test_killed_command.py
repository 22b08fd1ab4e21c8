"""The real command, killed at a random moment for every defense and run again, ends with the same bytes."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hftlight.files import folder_digest
from tests.helpers import warm
from tests.helpers.contract import rows

ROOT = Path(__file__).parents[3]
SMALL = [
    "--model=tiny", "--alignment.steps=6", "--finetuning.steps=6", "--alignment.batch_size=2",
    "--finetuning.batch_size=2", "--lora.r=2", "--lora.dropout=0.2", "--num_samples=20", "--checkpoint_every=1",
    "--evaluation.prompts=2", "--evaluation.over_refusal_prompts=2", "--evaluation.task_rows=2",
    "--evaluation.loss_rows=2",
    "--evaluation.max_new_tokens=2", "--evaluation.task_max_new_tokens=2", "--accelerator=cpu", "--name=run",
]  # fmt: skip
FITTING = {
    "antidote": ["--antidote.prune_ratio=0.5"],
    "bea": ["--bea.length=16"],
    "moderation_filter": ["--moderation_filter.guard=builtin", "--moderation_filter.allow_same=true"],
    "ctrl": ["--ctrl.share=0.004", "--ctrl.rounds=1", "--ctrl.max_new_tokens=8"],
    "tar": ["--tar.inner_steps=2", "--tar.every=1"],
    "rsn_tune": ["--rsn_tune.samples=4"],
    "t_vaccine": ["--t_vaccine.layers=1"],
    "freeze": ["--freeze.samples=4"],
    "freeze_plus": ["--freeze_plus.samples=4", "--freeze_plus.scu=0.1"],
    "nlsr": ["--nlsr.sparsity=0.5", "--nlsr.samples=4", "--nlsr.gate=worst"],
    "rewind": ["--rewind.samples=4"],
    "safety_lock": ["--safety_lock.heads=2", "--safety_lock.samples=4"],
    "ewc": ["--ewc.samples=4"],
    "sa_lora": ["--sa_lora.samples=4"],
    "saft": ["--saft.rate=0.1"],
    "somf": ["--somf.steps=2"],
    "sppft": ["--sppft.first=0", "--sppft.last=0"],
}
# One of each kind of work: selections, phases, streams, repairs, what is kept or trained beside. Others are rare.
KINDS = {
    "antidote", "bea", "ctrl", "lisa", "moderation_filter", "panacea", "repnoise", "resta", "sa_lora", "seal", "tar",
    "vaccine",
}  # fmt: skip
REAL = {"antidote", "bea", "vaccine"}  # resumed in a fresh interpreter with its own hash seed
TRIES = 4


def command(name, output):
    return [
        str(ROOT / "recipes" / "train.py"), "--defense", name, *SMALL, *FITTING.get(name, []), f"--output={output}",
    ]  # fmt: skip


def environment(cache, shared):
    secret = shared / "secrets"
    secret.mkdir(exist_ok=True)
    (cache / "secrets").parent.mkdir(parents=True, exist_ok=True)
    if not (cache / "secrets").exists():
        (cache / "secrets").symlink_to(secret)
    return {**os.environ, "HFTLIGHT_CACHE": str(cache), "OMP_NUM_THREADS": "1"}


def last_artifact(output, name):
    arm = output / "run" / name
    return folder_digest(arm / ("repaired" if (arm / "repaired").is_dir() else "finetuned"), "*.safetensors")


def killed(name, folder, shared, moment):
    """Start the command, kill it after ``moment`` seconds, and return whether it was still running."""
    running = warm.Command(command(name, folder / "out"), env=environment(folder / "cache", shared))
    try:
        assert running.wait(moment) == 0, running.stderr[-3000:]
    except subprocess.TimeoutExpired:
        running.kill()
    return running.wait() == -9


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in KINDS else pytest.mark.rare) for name in sorted(rows())]
)
def test_one_kill_of_the_command(name, tmp_path, tmp_path_factory):
    shared = tmp_path_factory.getbasetemp()
    warm.run(["-c", ""])  # so that the duration has no imports
    since = time.monotonic()
    warm.run(command(name, tmp_path / "whole"), env=environment(tmp_path / "a", shared), check=True)
    moment = (time.monotonic() - since) * random.Random(name).uniform(0.1, 0.9)
    for number in range(TRIES):  # if the command ended before the kill, try again earlier
        folder = tmp_path / f"try{number}"
        if killed(name, folder, shared, moment):
            break
        moment /= 2
    else:
        pytest.fail(f"{TRIES} commands ended before they could be killed")
    line, env = command(name, folder / "out"), environment(folder / "cache", shared)
    if name in REAL:
        again = subprocess.run([sys.executable, *line], env=env, capture_output=True, text=True)
    else:
        again = warm.run(line, env=env)
    assert again.returncode == 0, again.stderr[-3000:]
    assert last_artifact(folder / "out", name) == last_artifact(tmp_path / "whole", name)
