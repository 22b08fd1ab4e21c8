"""Contract row of TaskArithmetic. It repairs a finished model, so there is no slow training loop to compare with."""

from hftlight.defenses.post_finetuning import TaskArithmetic
from tests.helpers.contract import Row

NAN = float("nan")

ROW = Row(
    make=lambda: TaskArithmetic(0.4),
    neutral=lambda: TaskArithmetic(1.0),
    bad=[
        ({"update_weight": -0.1}, "update_weight is a factor"),
        ({"update_weight": NAN}, "update_weight is a factor"),
        ({"harm_weight": -1.0}, "harm_weight is a factor"),
        ({"harm_weight": NAN}, "harm_weight is a factor"),
        ({"keep": 0.0}, "keep is a fraction"),
        ({"keep": 10}, "write 0.1"),
        ({"keep": NAN}, "keep is a fraction"),
        ({"drop": -0.1}, "drop is a fraction"),
        ({"drop_unit": "row"}, "drop_unit must be"),
    ],
)
