"""Selections for filters of the upload, made by hand: rows 3 and 5 are dropped."""

from collections.abc import Sequence
from typing import Any

from hftlight.data.records import Record
from hftlight.models.row_filter import RowFilter
from tests.helpers.contract import records

DROPPED = (3, 5)


def filtered(defense: RowFilter, rows: Sequence[Record] | None = None, **facts: Any) -> RowFilter:
    """Return the defense as if it had selected among some rows, by default the 16 test rows.

    Each row's score is its place.
    """
    defense.selected = [
        {"id": row.id, "score": float(place), "kept": place not in DROPPED, **facts}
        for place, row in enumerate(records()["task"] if rows is None else rows)
    ]
    return defense


def without(rows: dict[str, list[Record]], seed: int) -> dict[str, list[Record]]:
    """Return the rows without those that ``filtered`` drops."""
    return {**rows, "task": [row for place, row in enumerate(rows["task"]) if place not in DROPPED]}
