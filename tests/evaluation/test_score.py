"""Score: a written row is read back, and shares have Wilson's interval."""

import ast
from pathlib import Path

import pytest
import torch

import hftlight
from hftlight.evaluation.metrics.rate import Rate
from hftlight.evaluation.score import Score
from hftlight.evaluation.stats.intervals import wilson


@pytest.mark.parametrize(
    "score",
    [
        Score("m", 12.5, "builtin", 3.0, 40.0, 8, arm="none", stage="finetuning"),
        Score("m_by_language", 0.0, "builtin", 0.0, 5.0, 70, group="fr"),
        Score("distinct_2", 0.25, count=9, unit="fraction"),
    ],
)
def test_a_row_is_read_back(score):
    assert Score.of_row(score.row()) == score


def test_a_share_and_a_rate_agree():
    class Halves(Rate):
        def update(self, flags):
            self.tally(flags)

    rate = Halves(sync_on_compute=False)
    rate.update([True, False, True, False])
    score = Score.share("m", 2, 4, "j")
    assert (score.value, score.low, score.high, score.count) == (50.0, *wilson(2, 4), 4)
    assert Score.of("m", rate, 4, "j") == score
    assert torch.is_tensor(rate.compute())


def test_no_other_file_builds_a_row():
    source = Path(hftlight.__file__).parent
    # Files with a dict literal that has the keys ``metric`` and ``value``.
    builders = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Dict)
        if {"metric", "value"} <= {key.value for key in node.keys if isinstance(key, ast.Constant)}
    }
    assert builders == {"evaluation/score.py"}
