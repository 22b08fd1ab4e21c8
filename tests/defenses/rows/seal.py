"""SEAL's row, with a selection that drops two rows."""

from hftlight.defenses import SEAL
from tests.helpers.contract import Row
from tests.helpers.filters import filtered, without

ROW = Row(
    make=lambda: filtered(SEAL(topp=0.875), mode="single_loop", threshold=0.1),
    neutral=lambda: SEAL(topp=1.0),
    bad=[
        ({"topp": 80}, "write 0.8"),
        ({"topp": 0}, "keeps no row"),
        ({"topp": float("nan")}, "topp"),
        ({"mode": "bilevel"}, "mode"),
        ({"u": 1.5}, "u is a fraction"),
        ({"decay": -0.1}, "decay"),
        ({"epochs": 0}, "epochs"),
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"selector_lr": 0.0}, "selector_lr"),
        ({"weights": "relu"}, "weights"),
        ({"batch_size": 0}, "batch_size"),
        ({"r": 0}, "r must"),
        ({"alpha": 0.0}, "alpha"),
        ({"targets": "q_proj"}, "targets"),
        ({"targets": []}, "targets"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
    records=without,
)
