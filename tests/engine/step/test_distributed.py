"""One process, two under DDP and two under FSDP2 end with the same weights, for every defense that trains."""

import pytest
import torch

from hftlight.engine import Slot, Stage
from hftlight.engine.weights.frozen import FreezesEntries
from tests.helpers import warm
from tests.helpers.contract import distance, rows

NAMES = [name for name, row in rows().items() if row.make().stage is not Stage.POST_FINETUNING]


def trained(strategy, folder, tuning="first"):
    output = folder / f"{strategy}.pt"
    command = ["-m", "tests.helpers.distributed", strategy, str(output), tuning]
    for done in [warm.run(command, timeout=400)] if strategy == "one" else warm.run_ranks(command, 2):
        assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(output)


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """Return each strategy's weights or errors. One launch per strategy trains with every row."""
    folder = tmp_path_factory.mktemp("launches")
    return {strategy: trained(strategy, folder) for strategy in ("one", "ddp", "fsdp2")}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_equal_one(name, strategy, launches):
    weights, refusal = launches[strategy][name], rows()[name].refuses.get(strategy)
    if refusal:
        assert refusal in weights
        return
    assert not isinstance(weights, str), weights
    assert distance(weights, launches["one"][name]) <= 1e-5


WHOLE = [name for name in NAMES if "full" in rows()[name].tunings[1:]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the weights of one process and of two under FSDP2 that train all parameters."""
    folder = tmp_path_factory.mktemp("whole")
    return {strategy: trained(strategy, folder, "full") for strategy in ("one", "fsdp2")}


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_two_processes_that_share_all_weights_equal_one(name, whole):
    """Embeddings, norms and the output layer are sharded too."""
    weights, refusal = whole["fsdp2"][name], rows()[name].refuses.get("fsdp2")
    if refusal:
        assert refusal in weights
        return
    assert not isinstance(weights, str), weights
    assert distance(weights, whole["one"][name]) <= 1e-5


def test_no_strategy_is_refused_and_a_callback_only_beside_frozen_entries():
    for row in rows().values():
        if Slot.WEIGHTS in row.make().slots:  # a run repairs in one process
            continue
        assert not {"ddp", "fsdp2"} & set(row.refuses)
        assert not row.refuses or isinstance(row.make(), FreezesEntries)
