"""A comparison on a Ray cluster of two nodes on this machine. One node is killed in the middle of a cell."""

import json
import os
import socket
import sys
import threading
from pathlib import Path

import pytest

from hftlight.comparison import workers
from hftlight.comparison.grid import Grid
from hftlight.comparison.sweep import compare, finished
from hftlight.comparison.workers import LOG, STARTED
from hftlight.config import Training
from hftlight.errors import InputError
from hftlight.folders import CELLS
from tests.runs.test_run import config

ROOT = Path(__file__).parents[2]
GRID = Grid(("none", "lisa"), (0.1,), ("builtin",), 1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def cluster(monkeypatch):
    """Return a cluster with one core on each of two nodes. RAY_ADDRESS names the cluster."""
    pytest.importorskip("ray", reason="Ray is not installed")
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT)]))
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    ray_cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    ray_cluster.second = ray_cluster.add_node(**node)
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    yield ray_cluster
    ray.shutdown()
    ray_cluster.shutdown()


def starts(folder):
    return {c.name: (c / LOG).read_text().count("started on ") for c in (folder / CELLS).iterdir()}


def results(folder):
    """Return each cell's scores, artifact digests and answers, without clocks and memory."""
    by_cell = {}
    for cell in sorted((folder / CELLS).iterdir()):
        rows = [json.loads(line) for line in (cell / "metrics.jsonl").read_text().splitlines()]
        manifest = json.loads((cell / "manifest.json").read_text())
        hashes = [s["artifact"] for arm in manifest["arms"].values() for s in arm["stages"].values()]
        assert hashes
        by_cell[cell.name] = (
            [r for r in rows if r["kind"] == "score"],
            hashes,
            (cell / "generations.jsonl").read_text(),
        )
    return by_cell


@pytest.mark.slow
def test_a_node_dies_and_every_cell_ends_as_if_it_had_not(cluster, tmp_path, monkeypatch):
    settings = config(tmp_path, finetuning=Training(steps=60, batch_size=2, lr=1e-3), checkpoint_every=5)
    folder, killed, events, ended = tmp_path / "ray", {}, [], threading.Event()
    import ray

    def watch():
        """Kill the second node once a cell runs there and a fine-tuning checkpoint exists."""
        pids = set()
        while not ended.wait(0.05):
            for path in (folder / CELLS).glob(f"*/{STARTED}"):
                pid = json.loads(path.read_text())["process"]
                if pid in pids or second.pid in parents(pid):
                    pids.add(pid)
                    checkpoints = (tmp_path / "cache" / "stages").glob("finetuning-*/checkpoints/*.ckpt")
                    if any(checkpoints) and not finished(path.parent):
                        killed.update(cell=path.parent.name, process=pid)
                        cluster.remove_node(cluster.second, allow_graceful=False)
                        return

    second = cluster.second.all_processes["raylet"][0].process
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        options = {"backend": "ray", "on_cell": lambda cell, what: events.append((cell.name, what))}
        outcome = compare(settings, GRID, folder, **options)
    finally:
        ended.set()
        thread.join()
    assert set(outcome.values()) == {"done"}
    assert killed
    assert not alive(killed["process"])
    counted = starts(folder)
    assert counted[killed["cell"]] == 2
    assert sum(counted.values()) == 3  # only the killed cell ran twice
    assert events.count((killed["cell"], "started")) == 2
    assert [what for _, what in events].count("done") == 2
    assert not ray.is_initialized()
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "another"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    compare(settings, GRID, tmp_path / "processes")
    assert results(folder) == results(tmp_path / "processes")


def crash(spec):
    """Stand in for ``run_cell``: the process dies every time."""
    folder = Path(spec["config"]["output"])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "tries", "a") as file:
        file.write("x")
    os._exit(1)


@pytest.mark.slow
def test_a_cell_whose_process_always_dies_is_reported(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "run_cell", crash)
    monkeypatch.setattr(workers, "LOST", 1)
    outcome = compare(config(tmp_path), Grid(("none",)), tmp_path / "c", backend="ray", retries=0)
    (error,) = outcome.values()
    assert "worker died" in error
    assert next(tmp_path.glob("c/**/tries")).read_text() == "xx"


def parents(pid):
    import psutil

    try:
        return [p.pid for p in psutil.Process(pid).parents()]
    except psutil.NoSuchProcess:
        return []


def alive(pid):
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r'pip install "hftlight\[ray\]"'):
        compare(config(tmp_path), Grid(), tmp_path / "c", backend="ray")


@pytest.mark.parametrize("address", ["free port", "nobody"])
def test_a_cluster_that_does_not_answer_is_named(address, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        if address == "free port":
            address = f"127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(InputError, match=rf"no Ray cluster answers at {address} .*RAY_ADDRESS"):
            compare(config(tmp_path), Grid(), tmp_path / "c", backend="ray")
