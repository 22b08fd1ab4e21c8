"""A defense of another package: it appears on the command line and passes the same contract."""

import os
import shutil
from pathlib import Path

import pytest

from tests.helpers import warm

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "recipes" / "plugin"


@pytest.fixture
def package(tmp_path):
    """Return the environment of a process that has the package installed."""
    for name in ("shrink.py", "shrink_row.py"):
        shutil.copyfile(PLUGIN / name, tmp_path / name)
    metadata = tmp_path / "hftlight_shrink-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: hftlight-shrink\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text("[hftlight.defenses]\nshrink = shrink:Shrink\n")
    path = f"{tmp_path}:{ROOT / 'src'}:{ROOT}"
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def said(environment, *command):
    done = warm.run(command, cwd=ROOT, env=environment)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_it_is_listed_and_shows_its_arguments(package):
    status, text = said(package, "recipes/train.py", "--help", "all")
    assert status == 0
    assert "shrink hftlight-shrink" in text
    status, text = said(package, "recipes/train.py", "--help")
    assert status == 0
    assert "hftlight-shrink shrink" in text
    status, text = said(package, "recipes/train.py", "--defense", "booster", "shrink", "--help")
    assert status == 0
    assert "--shrink.rate" in text
    assert "the multiple, >= 0" in text


def test_it_passes_the_contract(package):
    status, text = said(package, "-m", "pytest", "-q", "tests/defenses/test_contract.py", "-k", "shrink or has_a_row")
    assert status == 0, text[-3000:]
    assert " passed" in text


def test_a_taken_name_is_refused(package, tmp_path):
    (tmp_path / "hftlight_shrink-0.1.dist-info" / "entry_points.txt").write_text(
        "[hftlight.defenses]\nbooster = shrink:Shrink\n"
    )
    status, text = said(package, "recipes/train.py", "--help")
    assert status == 2
    assert "Two packages offer a defense 'booster'" in text
