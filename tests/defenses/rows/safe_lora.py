"""Contract row of Safe LoRA. It repairs a finished model, so there is no slow training loop to compare with."""

from hftlight.defenses.post_finetuning import SafeLoRA
from tests.helpers.contract import Row

NAN = float("nan")

ROW = Row(
    make=lambda: SafeLoRA(fraction=0.5),
    neutral=lambda: SafeLoRA(fraction=0.5, strength=0.0),
    bad=[
        ({"number": 0}, "number counts weights"),
        ({"number": 1.5}, "number counts weights"),
        ({"number": NAN}, "number counts weights"),
        ({"threshold": -0.1}, "threshold is a cosine"),
        ({"threshold": NAN}, "threshold is a cosine"),
        ({"number": 3, "threshold": 0.3}, "not both"),
        ({"fraction": 0.0}, "fraction of the weights"),
        ({"fraction": 1.1}, "fraction of the weights"),
        ({"fraction": NAN}, "fraction of the weights"),
        ({"operator": "exact"}, "operator must be"),
        ({"rank": 3}, "rank must be"),
        ({"operator": "projector", "rank": NAN}, "rank must be"),
        ({"strength": 1.5}, "strength must lie"),
        ({"strength": NAN}, "strength must lie"),
    ],
)
