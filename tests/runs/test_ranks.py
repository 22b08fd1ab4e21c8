"""Two processes of one run act on one decision. They wait past the time limit, but not for ever."""

import json

import pytest

from tests.helpers import warm

SCENARIOS = ("shared", "refused")


def launched(folder, *scenarios):
    """Return the results of both processes by scenario."""
    done = warm.run(["-m", "tests.helpers.ranks", str(folder), *scenarios], timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    logs = {p.name: p.read_text()[-1500:] for p in folder.glob("*.log")}
    for line in done.stdout.splitlines():
        assert set(json.loads(line).popitem()[1]) == {0}, (line, logs)
    return {name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)] for name in scenarios}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return launched(tmp_path_factory.mktemp("ranks"), *SCENARIOS)


def test_the_first_process_decides_whether_a_stage_is_done_and_where_it_resumes(seen):
    """Process 1 reads wrong states: an unfinished stage as done, a finished one as not done, no checkpoint."""
    first, second = seen["shared"]
    assert first == second
    assert (first["not done"]["done"], first["not done"]["steps"]) == (False, [1, 2, 3, 4])
    assert (first["done"]["done"], first["done"]["steps"]) == (True, [])
    assert first["resumed"]["steps"] == [3, 4]
    assert first["done"]["weights"] == first["not done"]["weights"]


def test_what_the_first_process_is_refused_ends_all_of_them_by_name(seen):
    first, second = seen["refused"]
    assert first["error"] == "InputError: the file is missing"
    assert second["error"] == "InputError: process 1 stops because process 0 failed: the file is missing"
    assert "The file of process 1 is version 1, of process 0 version 0." in second["agree"]
    assert second["order"].startswith("RunError: Process 1 expects the decision 'step 1', but process 0 made 'step 0'")
    assert second["lost"].startswith(
        "RunError: Process 1 lost the connection to process 0 while it waited for 'the end'"
    )


@pytest.mark.slow
def test_judges_and_measurements_may_take_longer_than_the_process_groups_time_limit(tmp_path):
    """One scenario has a slow judge during training, the other slow measurements between stages."""
    results = launched(tmp_path, "slow_judge", "slow_run")
    assert results["slow_judge"][0] == results["slow_judge"][1]
    first, second = results["slow_run"]
    assert first["scores"] == second["scores"] > 0
    assert (first["measured"], second["measured"]) == (3, 0)
