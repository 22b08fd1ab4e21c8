"""Take: which split, rows and columns of a source are read; the same choices for every source of a run."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hftlight.errors import InputError

SOURCES = ("alignment", "harmful", "pairs", "attack", "task_train", "task_test", "test", "over_refusal")
FIELDS = (
    "instruction",
    "response",
    "input",
    "kind",
    "language",
    "rejected",
    "system",
    "history",
)  # of a record, which columns are named for
_TRUTHS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class Take:
    """What to take of a source of rows.

    Args:
        split: a split of a hub set or of a saved ``DatasetDict``; None for the usual one.
        rows: range of the source's rows, ``START:STOP`` as in a Python slice, counted from 0 before ``where``; None
            for all.
        where: conditions ``column=value`` that a row must meet, all of them: a list, or one text with commas. True,
            false, 1 and 0 compare in any case, other values as text.
        first: rows kept of what is left, from the first, >= 1; 0 for all.
        columns: column by field of a record; the source must have them.
        usual: column by field too, but ignored unless the source has them all.

    Raises:
        InputError: if a range or a condition cannot be read, or ``first`` is negative.
    """

    split: str | None = None
    rows: str | None = None
    where: str | Sequence[str] = ()
    first: int = 0
    columns: Mapping[str, str] = field(default_factory=dict)
    usual: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A comma parts two conditions only where another column=value follows: values may hold commas.
        parts = re.split(r",\s*(?=[^,=]+=)", self.where) if isinstance(self.where, str) else self.where
        object.__setattr__(self, "where", tuple(parts))
        _ = self.range, self.conditions
        if unknown := {*self.columns, *self.usual} - set(FIELDS):
            raise InputError(f"Take: columns names the fields {list(FIELDS)}, got {sorted(unknown)}.")
        if self.first < 0:
            raise InputError(f"Take: first must be >= 0 rows (0 for all), got {self.first}.")

    @property
    def range(self) -> slice:
        """The range of rows as a slice."""
        found = re.fullmatch(r"(\d*):(\d*)", self.rows if self.rows is not None else ":")
        start, stop = (int(end) if end else None for end in found.groups()) if found else (1, 0)
        if stop is not None and (start or 0) >= stop:
            raise InputError(
                f"Take: rows must be START:STOP with whole numbers, 0 <= START < STOP, such as '5001:10000' (in quotes)"
                f" or '2000:', got {self.rows!r}."
            )
        return slice(start, stop)

    @property
    def conditions(self) -> tuple[tuple[str, str], ...]:
        """The conditions as (column, value)."""
        if wrong := [text for text in self.where if text.find("=") < 1]:
            raise InputError(f"Take: where must be column=value, such as is_safe=true, got {wrong[0]!r}.")
        parts = [text.partition("=") for text in self.where]
        return tuple((column.strip(), value.strip()) for column, _, value in parts)

    @property
    def place(self) -> tuple[Any, ...]:
        """What decides which rows are taken, ``first`` aside."""
        return self.split, self.rows, self.where

    def describe(self) -> dict[str, Any]:
        """Return the choices as plain values, for a manifest."""
        return {"rows": self.rows, "where": list(self.where), "first": self.first or None}


def truth(value: Any) -> bool | None:
    """Return what a value says of yes and no, a text in any case; None for any other value."""
    return _TRUTHS.get(str(value).strip().casefold())


def meets(value: Any, wanted: str) -> bool:
    """Return whether a cell has a wanted value: the same text, or the same truth."""
    return str(value) == wanted or (truth(value) is not None and truth(value) is truth(wanted))
