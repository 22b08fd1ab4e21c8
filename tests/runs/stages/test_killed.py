"""After SIGKILL at random moments, the same work ends with the same weights, bit for bit, for every defense."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.helpers import warm
from tests.helpers.contract import acts_in_steps
from tests.helpers.killed import COMBINATIONS, ENDS, INSIDE, makers, moments, plan

NAMES = sorted(makers())


def cases():
    """Yield each row with the moments of its plan: the first one of every other row, and the others, which are slow.

    The first combination takes all moments of its plan. The other combinations are slow.
    """
    for number, name in enumerate(NAMES):
        if name in COMBINATIONS:
            slow = [] if name == next(iter(COMBINATIONS)) else [pytest.mark.slow]
            yield pytest.param(name, slice(None), id=name, marks=slow)
        else:
            slow = [] if number % 2 == 0 and acts_in_steps(name) else [pytest.mark.slow]
            yield pytest.param(name, slice(1), id=name, marks=slow)
            yield pytest.param(name, slice(1, None), id=f"{name}-again", marks=pytest.mark.slow)


def chain(cache: Path, name, kill=()):
    """Run a row's stages in a process of their own and return its exit status and its answer."""
    answer = cache / "answer"
    answer.unlink(missing_ok=True)
    command = ["-m", "tests.helpers.killed", str(answer), name, *map(str, kill)]
    done = warm.run(command, env={**os.environ, "HFTLIGHT_CACHE": str(cache)}, timeout=300)
    if done.returncode not in (0, -9):
        raise AssertionError(done.stderr[-3000:])
    return done.returncode, json.loads(answer.read_text()) if answer.exists() else None


def give(folders, source: Path, target: Path):
    """Copy finished stages into a cache."""
    for folder in folders:
        shutil.copytree(source / folder, target / folder)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Return a folder to which the first test copies the tiny model from its cache."""
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize(("name", "part"), cases())
def test_killed_and_run_again_gives_the_same_weights(name, part, models, tmp_path):
    """A killed chain starts with the finished stages before the stage it dies in.

    The second chain also starts with the stages after it, unless the first died at the end of a stage. A stage's key
    holds the digest of the stage before. If that digest differs, the chain trains the stage anew.
    """
    cache, stages, finished = tmp_path / "cache", tmp_path / "cache" / "stages", tmp_path / "finished"
    cache.mkdir()
    if (models / "models").is_dir():
        shutil.copytree(models / "models", cache / "models")
    status, whole = chain(cache, name)
    assert status == 0
    if not (models / "models").is_dir():
        shutil.copytree(cache / "models", models / "models")
    chosen = moments(whole["moments"], name)
    assert len(chosen) == len(plan(name))
    stages.rename(finished)
    for stage, moment, kind in chosen[part]:
        give(whole["folders"][:stage], finished, stages)
        status, answer = chain(cache, name, (stage, moment, kind))
        assert (status, answer) == (-9, None), (stage, moment, kind)
        if kind in INSIDE:
            give(whole["folders"][stage + 1 :], finished, stages)
        status, again = chain(cache, name)
        assert status == 0
        assert again["digest"] == whole["digest"], (stage, moment, kind)
        assert again["folders"] == whole["folders"], (stage, moment, kind)
        shutil.rmtree(stages)


def test_every_kind_of_moment_is_hit():
    assert {kind for name in NAMES for kind in plan(name)} == {*INSIDE, *ENDS}
