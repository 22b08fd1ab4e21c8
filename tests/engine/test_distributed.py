"""One process, two under DDP and two under FSDP2 end with the same weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def trained(strategy, folder):
    output = folder / f"{strategy}.pt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.helpers.distributed_booster", strategy, str(output)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(output)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return trained("one", tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_equal_one(strategy, one_process, tmp_path):
    weights = trained(strategy, tmp_path)
    assert weights.keys() == one_process.keys()
    left, right = (torch.cat([w[name].flatten() for name in one_process]) for w in (weights, one_process))
    assert (left - right).norm() / right.norm() <= 1e-5
