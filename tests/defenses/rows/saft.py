"""SAFT's row, with a selection that drops two rows."""

from hftlight.defenses import SAFT
from tests.helpers.contract import Row
from tests.helpers.filters import filtered, without

ROW = Row(
    make=lambda: filtered(SAFT(rate=0.125), layer=1, threshold=2.0, dropped_side="high"),
    neutral=lambda: SAFT(rate=0.0, trusted="none"),
    bad=[
        ({"rate": 5}, "write 0.05"),
        ({"rate": -0.1}, "rate"),
        ({"rate": 1.0}, r"\[0, 1\)"),
        ({"rate": float("nan")}, "rate"),
        ({"rate": 0.4, "trusted": "none"}, "at most 0.3"),
        ({"layer": 0}, "layer"),
        ({"k": 0}, "k must"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"pooling": "first"}, "pooling"),
        ({"trusted": "task"}, "trusted"),
        ({"trusted": "none", "calibrate": True}, "calibrate needs trusted"),
        ({"validation": "nowhere.jsonl"}, "no such file"),
        ({"validation": "README.md", "calibrate": True}, "keep one of them"),
    ],
    records=without,
)
