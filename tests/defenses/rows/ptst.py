"""PTST's row. PTST changes the prompt at serving and no training row."""

from hftlight.defenses.finetuning.ptst import PTST
from tests.helpers.contract import Row

ROW = Row(
    make=lambda: PTST("Be safe."),
    neutral=lambda: PTST(""),
    bad=[({"system": None}, "system"), ({"system": 3}, "system")],
    records=lambda records, seed: records,
)
