"""Contract row of Rewind. It repairs a finished model, so there is no slow training loop to compare with."""

from hftlight.defenses.post_finetuning import Rewind
from tests.helpers.contract import Row
from tests.helpers.regions import BAD

ROW = Row(
    make=lambda: Rewind(0.5, 0.25, samples=6, safety="alignment"),
    neutral=lambda: Rewind(0.0, safety="alignment"),
    bad=[
        *BAD,
        ({"score": "actsvd", "keep_s": 3}, "keep_u"),
        ({"score": "actsvd", "keep_s": -1, "keep_u": 3}, "keep_s"),
        ({"score": "actsvd", "keep_s": 1, "keep_u": 0.5}, "keep_u"),
        ({"score": "actsvd", "unit": "row", "keep_s": 1, "keep_u": 1}, "unit='auto'"),
    ],
)
