"""Contract row of SOMF. It repairs a finished model, so there is no slow training loop to compare with."""

from hftlight.defenses.post_finetuning import SOMF
from tests.helpers.contract import Row

NAN = float("nan")

ROW = Row(
    make=lambda: SOMF("row", steps=2),
    no_neutral="the mask is learned, and no setting leaves the update whole.",
    bad=[
        ({"granularity": "head"}, "granularity must be one of"),
        ({"export": "mean"}, "export must be one of"),
        ({"units": "top"}, "units must be one of"),
        ({"steps": 0}, "steps counts"),
        ({"steps": 1.5}, "steps counts"),
        ({"steps": NAN}, "steps counts"),
        ({"lr": 0.0}, "lr must be > 0"),
        ({"beta": NAN}, "beta must be > 0"),
        ({"temperature": -1.0}, "temperature must be > 0"),
        ({"threshold": NAN}, "threshold is a logit"),
        ({"others": "folder"}, "others must list folders"),
        ({"weights": (0.3, 0.3)}, "weights must have one finite number"),
        ({"weights": (NAN,)}, "weights must have one finite number"),
        ({"others": ("folder",)}, r"\(2 in all\)"),
    ],
)
