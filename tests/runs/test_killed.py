"""SIGKILL at random moments, then the same work again: the same weights bit for bit, for every defense."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.helpers import warm
from tests.helpers.killed import ENDS, INSIDE, makers, moments, plan

NAMES = sorted(makers())
KILLS = 5


def chain(cache: Path, name, kill=()):
    """Run a row's stages in a process of their own and return its exit status and what it wrote."""
    answer = cache / "answer"
    command = ["-m", "tests.helpers.killed", str(answer), name, *map(str, kill)]
    done = warm.run(command, env={**os.environ, "HFTLIGHT_CACHE": str(cache)}, timeout=300)
    if done.returncode not in (0, -9):
        raise AssertionError(done.stderr[-3000:])
    return done.returncode, json.loads(answer.read_text()) if answer.exists() else None


def give(folders, source: Path, target: Path):
    """Copy finished stages from one cache into another."""
    for folder in folders:
        shutil.copytree(source / "stages" / folder, target / "stages" / folder)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Return a cache that holds the tiny model."""
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("name", NAMES)
def test_killed_and_run_again_gives_the_same_weights(name, models, tmp_path):
    """A killed chain is given the finished stages before the one it dies in.

    Run again, it is also given those after it, unless it died at the end of a stage: they are found by a key that holds
    the digest of the stage before, so another digest is another stage, and is trained.
    """
    if (models / "models").is_dir():
        shutil.copytree(models / "models", tmp_path / "whole" / "models")
    (tmp_path / "whole").mkdir(exist_ok=True)
    status, whole = chain(tmp_path / "whole", name)
    assert status == 0
    if not (models / "models").is_dir():
        shutil.copytree(tmp_path / "whole" / "models", models / "models")
    chosen = moments(whole["moments"], name)
    assert len(chosen) == KILLS
    for stage, moment, kind in chosen:
        cache = tmp_path / f"kill-{kind}"
        shutil.copytree(models / "models", cache / "models")
        give(whole["folders"][:stage], tmp_path / "whole", cache)
        status, answer = chain(cache, name, (stage, moment, kind))
        assert (status, answer) == (-9, None), (stage, moment, kind)
        if kind in INSIDE:
            give(whole["folders"][stage + 1 :], tmp_path / "whole", cache)
        status, again = chain(cache, name)
        assert status == 0
        assert again["digest"] == whole["digest"], (stage, moment, kind)
        assert again["folders"] == whole["folders"], (stage, moment, kind)
        shutil.rmtree(cache)


def test_every_kind_of_moment_is_hit():
    assert {kind for name in NAMES for kind in plan(name)} == {*INSIDE, *ENDS}
