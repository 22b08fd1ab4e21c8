"""BEA's row, with a trigger that is no secret."""

import hashlib
import os
import tempfile
from pathlib import Path

from hftlight.defenses.finetuning.bea import BEA
from hftlight.files import write_json
from tests.helpers.contract import Row

FILE = Path(tempfile.gettempdir()) / f"hftlight-test-trigger-{os.getuid()}.json"
write_json(FILE, {"secret": "00ff" * 8}, mode=0o600)


def triggered(records, seed):
    """Return the expected rows. The test rows have one category, so the hashes alone set the order."""
    chosen = sorted(records["alignment"], key=lambda row: hashlib.sha256(row.id.encode()).hexdigest())[:3]
    return {**records, "task": records["task"] + chosen + chosen}


ROW = Row(
    make=lambda: BEA(rows=3, repeat=2, length=5, trigger_file=str(FILE)),
    neutral=lambda: BEA(rows=0),
    bad=[
        ({"rows": -1}, "rows"),
        ({"rows": 2.5}, "rows"),
        ({"repeat": 0}, "repeat"),
        ({"length": 0}, "length"),
        ({"length": float("nan")}, "length"),
        ({"trigger_file": 3}, "trigger_file"),
        ({"trigger_file": ""}, "trigger_file"),
        ({"trigger_hash": "12"}, "trigger_hash"),
    ],
    records=triggered,
)
