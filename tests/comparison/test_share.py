"""A cell's share of the machine: threads by affinity and OMP_NUM_THREADS, GPUs by visibility."""

import os

import pytest
import torch

from hftlight.comparison.share import cores, gpus_each, threads, threads_each, visible_gpus
from hftlight.errors import InputError


@pytest.fixture
def gpus(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


@pytest.mark.parametrize(
    ("given", "jobs", "expected"), [(None, 1, 3), (None, 2, 1), (None, 9, 1), ("2", 1, 2), ("8,2", 1, 3), ("no", 1, 3)]
)
def test_threads_follow_affinity_and_what_is_given(given, jobs, expected, monkeypatch):
    """The machine has 64 cores, of which this process may use three."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5, 7})
    monkeypatch.setattr(os, "process_cpu_count", lambda: 3, raising=False)
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert cores() == 3
    assert threads_each(jobs) == expected


def test_the_number_of_threads_is_put_back_after_an_error_too():
    before = torch.get_num_threads()
    counts = []

    def work():
        with threads(before + 1):
            counts.append(torch.get_num_threads())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert counts == [before + 1]
    assert torch.get_num_threads() == before


def test_gpus_are_dealt_out_by_the_names_that_are_visible(gpus, monkeypatch):
    assert visible_gpus() == ["0", "1", "2", "3"]
    assert gpus_each({"accelerator": "auto", "devices": 1}, 3, False) == ["0", "1", "2"]
    assert gpus_each({"accelerator": "gpu", "devices": 2}, 2, False) == ["0,1", "2,3"]
    assert gpus_each({"accelerator": "cpu", "devices": 1}, 9, False) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6, MIG-x ,2,7,9")
    assert visible_gpus() == ["6", "MIG-x", "2", "7"]  # device_count is 4
    assert gpus_each({"accelerator": "auto", "devices": 3}, 2, True) == ["6,MIG-x,2"] * 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpus_each({"accelerator": "auto", "devices": 1}, 9, False) == []


@pytest.mark.parametrize(
    ("devices", "jobs", "way_out"),
    [(1, 5, "Use --jobs 4, or let"), (2, 3, "Use --jobs 2"), (5, 1, "Use --devices 4")],
)
def test_more_than_there_are_is_refused(devices, jobs, way_out, gpus):
    with pytest.raises(InputError, match=rf"needs {devices * jobs} GPUs.*Visible GPUs: 4 .*{way_out}"):
        gpus_each({"accelerator": "auto", "devices": devices}, jobs, False)
