"""SafetyMix's row."""

import random

from hftlight.defenses.finetuning.safety_mix import SafetyMix
from tests.helpers.contract import Row


def mixed(records, seed):
    """Return the expected rows.

    No answer of the test rows is a refusal, so all alignment rows are candidates. A quarter of 16 rows is 4.
    """
    drawn = random.Random(f"{seed}/safety_mix")
    return {**records, "task": [*records["task"], *drawn.sample(records["alignment"], 4)]}


ROW = Row(
    make=lambda: SafetyMix(ratio=0.25),
    neutral=lambda: SafetyMix(count=0),
    bad=[
        ({"ratio": -0.1}, "ratio"),
        ({"ratio": float("nan")}, "ratio"),
        ({"ratio": float("inf")}, "ratio"),
        ({"count": -1}, "count"),
        ({"count": 1.5}, "count"),
        ({"mode": "post-hoc"}, "mode"),
        ({"mode": "parallel", "count": 3}, "count"),
        ({"mode": "parallel", "lam": -1.0}, "lam"),
        ({"mode": "parallel", "lam": float("nan")}, "lam"),
        ({"lam": 2.0}, "lam"),
    ],
    records=mixed,
)
