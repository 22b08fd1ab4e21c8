"""One process, two under DDP and two under FSDP2 write the same repaired models."""

import json

import pytest
from safetensors.torch import load_file

from hftlight.engine.weights.save import MARKER
from tests.helpers import warm
from tests.helpers.repairs import moved_model, small_llama


def repaired(strategy, folder):
    command = ["-m", "tests.helpers.distributed_repair", strategy, str(folder)]
    for done in [warm.run(command, timeout=240)] if strategy == "one" else warm.run_ranks(command, 2):
        assert done.returncode == 0, done.stderr[-3000:]
    models = {}
    for place in sorted((folder / strategy).iterdir()):
        (file,) = place.glob("*.safetensors")
        models[place.name] = (load_file(file), json.loads((place / MARKER).read_text()))
    return models


def places(report):
    """Return the heads that SafetyLock chose."""
    return [(row["weight"], row["head"]) for row in report.get("heads", [])]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repair")
    small_llama().save_pretrained(folder / "base")
    moved_model(small_llama(), 0.02, seed=1).save_pretrained(folder / "aligned")
    return folder, repaired("one", folder)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_equal_one(strategy, one_process):
    folder, expected = one_process
    models = repaired(strategy, folder)
    assert models.keys() == expected.keys()
    assert len(models) == 12
    for name, (weights, report) in expected.items():
        others, theirs = models[name]
        assert weights.keys() == others.keys()
        for key, tensor in weights.items():
            assert (tensor - others[key]).norm() <= 1e-6 * max(1e-6, float(tensor.norm())), (name, key)
        assert theirs["changed_entries"] == report["changed_entries"] > 0
        assert theirs.get("projected") == report.get("projected")
        assert theirs.get("samples") == report.get("samples")
        assert places(theirs) == places(report)
