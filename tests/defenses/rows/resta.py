"""Contract row of RESTA. It repairs a finished model, so there is no slow training loop to compare with."""

from hftlight.defenses.post_finetuning import RESTA
from tests.helpers.contract import Row

NAN = float("nan")

ROW = Row(
    make=lambda: RESTA(0.5),
    neutral=lambda: RESTA(0.0),
    bad=[
        ({"strength": -0.1}, "strength is a factor"),
        ({"strength": NAN}, "strength is a factor"),
        ({"strength": float("inf")}, "strength is a factor"),
        ({"drop": 1.0}, "drop is a fraction"),
        ({"drop": 20}, "write 0.2"),
        ({"drop": NAN}, "drop is a fraction"),
        ({"drop_unit": "row"}, "drop_unit must be"),
    ],
)
