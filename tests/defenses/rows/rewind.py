"""Contract row of Rewind, which works on a finished model and so has no loop to compare with."""

from hftlight.defenses.post_finetuning import Rewind
from tests.helpers.contract import Row

ROW = Row(
    make=lambda: Rewind(0.5, 0.25, samples=6, safety="alignment"),
    neutral=lambda: Rewind(0.0, safety="alignment"),
    bad=[
        ({"safety_ratio": -0.1}, "safety_ratio"),
        ({"safety_ratio": float("nan")}, "safety_ratio"),
        ({"safety_ratio": 5}, "write 0.05"),
        ({"utility_ratio": 1.1}, "utility_ratio"),
        ({"utility_ratio": float("nan")}, "utility_ratio"),
        ({"mode": "both"}, "mode"),
        ({"score": "magnitude"}, "score"),
        ({"unit": "column"}, "unit"),
        ({"samples": 0}, "samples"),
        ({"samples": 1.5}, "samples"),
        ({"samples": float("nan")}, "samples"),
        ({"samples": float("inf")}, "samples"),
        ({"keep_s": 3}, "keep_s"),
        ({"score": "actsvd", "keep_s": 3}, "keep_u"),
        ({"score": "actsvd", "keep_s": -1, "keep_u": 3}, "keep_s"),
        ({"score": "actsvd", "keep_s": 1, "keep_u": 0.5}, "keep_u"),
        ({"score": "actsvd", "unit": "row", "keep_s": 1, "keep_u": 1}, "unit='auto'"),
        ({"safety": ""}, "safety"),
        ({"utility": "refusals"}, "utility"),
    ],
)
