"""Contract row of Antidote. It repairs a finished model, so there is no slow training loop to compare with."""

from hftlight.defenses.post_finetuning import Antidote
from tests.helpers.contract import Row

ROW = Row(
    make=lambda: Antidote(prune_ratio=0.25),
    neutral=lambda: Antidote(prune_ratio=0.0),
    bad=[
        ({"prune_ratio": -0.1}, "prune_ratio must lie"),
        ({"prune_ratio": 5.0}, "If that is a percentage, write 0.05"),
        ({"prune_ratio": float("nan")}, "prune_ratio must lie"),
        ({"mode": "wanda"}, "mode must be one of"),
        ({"group": "layer"}, "group must be one of"),
        ({"rounding": "nearest"}, "rounding must be one of"),
        ({"layers": "q_proj"}, "layers must list names"),
    ],
)
