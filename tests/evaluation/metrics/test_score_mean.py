"""Mean of a judge's scores: by hand, with an interval inside the scale, and only for judges with grades."""

import numpy as np
import pytest

from hftlight.evaluation.judges import FORMATS, JUDGES, OF_MODEL, Scale, get_judge, scale_of
from hftlight.evaluation.metrics.score_mean import mean_rows, score_mean
from hftlight.evaluation.stats.intervals import wilson


def test_the_mean_and_the_width_by_hand():
    """Ten 0.2 and thirty 0.6: mean 0.5, deviation sqrt(.03), so 1.96 sqrt(.03 / 40) on either side."""
    mean, low, high = score_mean([0.2] * 10 + [0.6] * 30, Scale())
    assert mean == pytest.approx(0.5)
    assert (low, high) == pytest.approx((0.5 - 0.0537, 0.5 + 0.0537), abs=0.009)


@pytest.mark.parametrize(("grade", "share"), [(1.0, 0), (5.0, 20), (3.0, 10)])
def test_equal_scores_have_wilsons_interval_on_the_scale(grade, share):
    low, high = (1 + 4 * end / 100 for end in wilson(share, 20))
    assert score_mean([grade] * 20, Scale(1, 5)) == pytest.approx((grade, low, high))


def test_the_interval_covers_the_population():
    """Scores in 0-1, mostly near one end, as graders give: Beta(0.3, 0.9) has the mean 1/4."""
    generator, inside = np.random.default_rng(3), 0
    for _ in range(200):
        _, low, high = score_mean(generator.beta(0.3, 0.9, size=60).tolist(), Scale())
        inside += low <= 0.25 <= high
    assert inside >= 0.9 * 200


def test_only_graded_scores_have_a_mean():
    graded = {name for name in {*JUDGES, *OF_MODEL} if scale_of(name) is not None}
    assert graded == {
        "deberta",
        "hexphi",
        "llama_guard",
        "llama_guard2",
        "llama_guard3",
        "moderation",
        "moderation_512_tokens",
        "strongreject",
        "strongreject_rubric",
    }
    assert mean_rows("harmful_score", "builtin", [0.0, 1.0]) == mean_rows("harmful_score", "deberta", []) == []
    assert FORMATS["harmbench"].scale is None


@pytest.mark.parametrize(("name", "unit"), [("hexphi:gpt-4o", "1 to 5"), ("strongreject:/models/own", "0 to 1")])
def test_a_judge_of_another_model_keeps_its_scale(name, unit):
    scale = scale_of(get_judge(name).name)
    assert scale is not None
    assert scale.unit == unit
    (row,) = mean_rows("harmful_score", name, [1.0, 1.0])
    assert (row["unit"], row["judge"], row["metric"]) == (unit, name, "harmful_score_mean")
