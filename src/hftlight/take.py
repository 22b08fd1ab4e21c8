"""Take: which split, rows and columns of a source are read."""

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
)  # fields of a record that a column can be assigned to
_TRUTHS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class Take:
    """The selection of rows and columns from one source. Every source of a run has the same options.

    Args:
        split: a split of a hub data set or of a saved ``DatasetDict``; None for the source's default split.
        rows: range of the source's rows, ``START:STOP`` as in a Python slice, counted from 0 before ``where`` applies.
            None means all rows.
        where: conditions ``column=value``, all of which a row must meet: a list, or one text with commas. The values
            true, false, 1 and 0 compare as truth values in any case, other values as text.
        first: number of rows to take from the start of the remaining ones, >= 1; 0 for all.
        columns: column name by field of a record. The source must have these columns.
        usual: column name by field of a record, ignored unless the source has all of these columns.

    Raises:
        InputError: if a range or condition is not valid, a field of ``columns`` or ``usual`` is unknown, or ``first``
            is negative.
    """

    split: str | None = None
    rows: str | None = None
    where: str | Sequence[str] = ()
    first: int = 0
    columns: Mapping[str, str] = field(default_factory=dict)
    usual: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A comma separates two conditions only if another column=value follows it, since a value may contain commas.
        parts = re.split(r",\s*(?=[^,=]+=)", self.where) if isinstance(self.where, str) else self.where
        object.__setattr__(self, "where", tuple(parts))
        _ = self.range, self.conditions  # both raise if their text is not valid
        if unknown := {*self.columns, *self.usual} - set(FIELDS):
            raise InputError(f"Take: columns must name fields among {list(FIELDS)}, got {sorted(unknown)}.")
        if self.first < 0:
            raise InputError(f"Take: first must be >= 0 rows (0 for all), got {self.first}.")

    @property
    def range(self) -> slice:
        """The range of rows as a slice."""
        # Text that is no range becomes (1, 0), which the check below refuses like any other empty range.
        match = re.fullmatch(r"(\d*):(\d*)", self.rows if self.rows is not None else ":")
        start, stop = (int(end) if end else None for end in match.groups()) if match else (1, 0)
        if stop is not None and (start or 0) >= stop:
            raise InputError(
                f"Take: rows must be START:STOP with whole numbers, 0 <= START < STOP, such as '5001:10000' (in quotes)"
                f" or '2000:', got {self.rows!r}."
            )
        return slice(start, stop)

    @property
    def conditions(self) -> tuple[tuple[str, str], ...]:
        """The conditions as pairs (column, value)."""
        if wrong := [text for text in self.where if text.find("=") < 1]:
            raise InputError(f"Take: where must be column=value, such as is_safe=true, got {wrong[0]!r}.")
        parts = [text.partition("=") for text in self.where]
        return tuple((column.strip(), value.strip()) for column, _, value in parts)

    @property
    def place(self) -> tuple[Any, ...]:
        """Everything that decides which rows are taken, except ``first``."""
        return self.split, self.rows, self.where

    def describe(self) -> dict[str, Any]:
        """Return the choices as plain values, for a manifest."""
        return {"rows": self.rows, "where": list(self.where), "first": self.first or None}


def truth(value: Any) -> bool | None:
    """Return the truth value of true, false, 1 or 0, given as values or as text in any case.

    Any other value returns None.
    """
    return _TRUTHS.get(str(value).strip().casefold())


def meets(value: Any, wanted: str) -> bool:
    """Tell whether a cell equals the wanted value, as text or as a truth value."""
    return str(value) == wanted or (truth(value) is not None and truth(value) is truth(wanted))
