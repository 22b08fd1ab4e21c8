"""A defense of another package: it appears on the command line and passes the same contract."""

import os
from pathlib import Path

import pytest

from tests.helpers import warm

ROOT = Path(__file__).parents[1]
DEFENSE = '''
"""Shrink: gradients pulled towards zero."""

from hftlight.engine import Defense, Slot, Stage, add_to_grad, scaled, trainable


class Shrink(Defense):
    """Add a multiple of the weights to the gradient.

    Args:
        rate: the multiple, >= 0; 0 is plain fine-tuning.

    Cost: nothing.
    Source: a test.
    Differs: nothing known.
    """

    stage, slots = Stage.FINETUNING, (Slot.GRADIENT,)

    def __init__(self, rate: float = 0.1) -> None:
        if not rate >= 0:
            raise ValueError(f"Shrink: rate must be >= 0, got {rate}.")
        super().__init__()
        self.rate = rate

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.rate:
            add_to_grad(pl_module, scaled({n: p.detach() for n, p in trainable(pl_module).items()}, self.rate))
            self.record()
'''
ROW = """
from shrink import Shrink
from tests.helpers.contract import Row, Slow


class SlowShrink(Slow):
    def edit(self, step, grads):
        return [g + 0.3 * p.detach() for g, (_, p) in zip(grads, self.weights, strict=True)]


ROW = Row(
    make=lambda: Shrink(0.3),
    neutral=lambda: Shrink(0.0),
    bad=[({"rate": -1.0}, "rate"), ({"rate": float("nan")}, "rate")],
    slow=SlowShrink,
)
"""


@pytest.fixture
def package(tmp_path):
    """Return the environment of a process that has the package installed."""
    (tmp_path / "shrink.py").write_text(DEFENSE)
    (tmp_path / "shrink_row.py").write_text(ROW)
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
    status, text = said(package, "recipes/train.py", "--help")
    assert status == 0
    assert "shrink hftlight-shrink" in text
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
