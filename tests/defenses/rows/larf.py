"""LARF's row, with a selection that drops two rows."""

from hftlight.defenses import LARF
from tests.helpers.contract import Row
from tests.helpers.filters import filtered, without

ROW = Row(
    make=lambda: filtered(LARF(remove=2, safe="alignment"), layer=1, threshold=0.5, dropped_side="high"),
    neutral=lambda: LARF(remove=0, source="pairs"),
    bad=[
        ({"remove": -1}, "remove"),
        ({"remove": 2.5}, "whole number"),
        ({"remove": float("nan")}, "remove"),
        ({"remove": float("inf")}, "remove"),
        ({"layer": 0}, "layer"),
        ({"anchors": 0}, "anchors"),
        ({"top": 0}, "top"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"source": "file"}, "source"),
        ({"safe": "harmful"}, "safe"),
        ({"pooling": "first"}, "pooling"),
    ],
    records=without,
)
