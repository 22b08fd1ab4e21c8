"""Record: one row of data, whatever file or set it came from; reading, comparing and splitting records."""

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_args

from hftlight.data.rows import Row, read_rows
from hftlight.errors import InputError

Role = Literal["alignment", "harmful", "attack", "task", "retain", "test"]
UPLOADED: tuple[Role, ...] = ("task", "attack")  # roles of the user's rows; a defense cannot tell them apart
FIELDS = ("instruction", "response", "input", "kind", "language")
LAYOUTS: tuple[dict[str, str], ...] = (
    {"instruction": "instruction", "input": "input", "response": "output"},
    {"instruction": "prompt", "response": "response"},
    {"instruction": "prompt", "response": "completion"},
    {"instruction": "instruction", "input": "input", "response": "response"},
    {"instruction": "question", "response": "answer"},
)


@dataclass(frozen=True, slots=True)
class Record:
    """One instruction with its response.

    Attributes:
        instruction: what the user asks, in characters, without any template.
        response: the answer to train on; empty for prompts that are only tested.
        input: the optional second field of the Alpaca format; empty where there is none.
        source: the file or set the row came from.
        role: what the row is for; ``"attack"`` marks a harmful row hidden in an upload.
        kind: a free label within the source, such as a category.
        id: stable name of the row; by default a digest of its three texts.
        language: the language of the row, as its source writes it; empty where it is not known.
    """

    instruction: str
    response: str = ""
    input: str = ""
    source: str = ""
    role: Role = "task"
    kind: str = ""
    id: str = ""
    language: str = ""

    def __post_init__(self) -> None:
        if not self.id:
            text = "\x1f".join((self.instruction, self.input, self.response))
            object.__setattr__(self, "id", hashlib.sha256(text.encode()).hexdigest()[:16])

    @property
    def request(self) -> str:
        """The bare request, as a judge reads it: instruction and input, without template."""
        return f"{self.instruction}\n{self.input}" if self.input else self.instruction


def read_records(
    source: str | Path,
    *,
    role: Role,
    columns: Mapping[str, str] | None = None,
    need_response: bool = True,
    split: str = "train",
    where: str | None = None,
) -> list[Record]:
    """Read the records of a file, of a folder saved by ``datasets``, or of a set on the hub, in their order.

    Args:
        source: a .jsonl, .json, .csv or .parquet file, a folder written by ``save_to_disk``, or a hub name
            (``name:config`` where the set has several configurations).
        role: what the rows are for.
        columns: column by field of ``FIELDS``, for files whose columns are none of ``LAYOUTS``. A column
            ``language`` of texts is read without being named.
        need_response: whether every row must hold an answer; off for prompts that are only tested.
        split: the split to take where ``source`` has several.
        where: keep only the rows whose column has this value, such as ``"label=safe"``; numbers compare as text.

    Raises:
        InputError: if there is nothing to read, a row cannot be parsed, a column is missing, or a text is empty.
    """
    rows = read_rows(source, split)
    if where is not None:
        rows = _filter(rows, str(source), where)
    return to_records(rows, str(source), role, columns, need_response)


def _filter(rows: Sequence[Row], source: str, where: str) -> list[Row]:
    column, equals, value = where.partition("=")
    if not equals or column not in rows[0][1]:
        raise InputError(f"read_records: where is column=value, {source} has {list(rows[0][1])}, got {where!r}.")
    kept = [(place, row) for place, row in rows if str(row.get(column)) == value]
    if not kept:
        some = sorted({str(row.get(column)) for _, row in rows})[:8]
        raise InputError(f"read_records: no row of {source} has {where}; values of {column!r} are {some}.")
    return kept


def to_records(
    rows: Sequence[Row],
    source: str,
    role: Role,
    columns: Mapping[str, str] | None = None,
    need_response: bool = True,
) -> list[Record]:
    """Turn rows with their places into records; arguments and errors as for ``read_records``."""
    if role not in get_args(Role):
        raise InputError(f"read_records: role must be one of {list(get_args(Role))}, got {role!r}.")
    needed = ("instruction", "response") if need_response else ("instruction",)
    names = _choose_columns(list(rows[0][1]), source, dict(columns or {}), needed)
    if all(isinstance(row.get("language", 0), str) for _, row in rows):
        names = {"language": "language", **names}
    return [
        Record(
            **{field: _text(row, names[field], f"{place} of {source}", field in needed) for field in names},
            source=source,
            role=role,
        )
        for place, row in rows
    ]


def _choose_columns(
    found: Sequence[str], source: str, columns: Mapping[str, str], needed: Sequence[str]
) -> dict[str, str]:
    if unknown := set(columns) - set(FIELDS):
        raise InputError(f"read_records: columns names the fields {list(FIELDS)}, got {sorted(unknown)}.")
    if absent := [name for name in columns.values() if name not in found]:
        raise InputError(f"read_records: {source} has the columns {list(found)}, columns asks for {absent}.")
    for wanted in (("instruction", "response"), needed):
        for layout in LAYOUTS:
            names = {**layout, **columns}
            if all(names[field] in found for field in wanted):
                return names
    known = ", ".join(f"{layout['instruction']}/{layout['response']}" for layout in LAYOUTS)
    raise InputError(
        f"read_records: {source} needs columns for {list(needed)}, such as {known}; it has {list(found)}."
        " Name them with --data.columns, such as {instruction: goal, response: target}."
    )


def _text(row: Mapping[str, Any], column: str, place: str, needed: bool) -> str:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise InputError(
            f"read_records: column {column!r} must hold text, got {type(value).__name__} in {place}."
            " Name another column with --data.columns or convert the file."
        )
    if needed and not (value or "").strip():
        raise InputError(f"read_records: column {column!r} is empty in {place}; fill it in or remove the row.")
    return value or ""


def prompt_key(record: Record) -> str:
    """Return the prompt's text without case, punctuation and layout, to tell equal prompts in different sets.

    Letters, marks, digits and symbols stay; everything else is one space. A prompt of punctuation alone stays as it is.
    """
    text = unicodedata.normalize("NFKC", f"{record.instruction} {record.input}").casefold()
    words = "".join(char if unicodedata.category(char)[0] in "LMNS" else " " for char in text).split()
    return " ".join(words or text.split())


def overlaps(sets: Mapping[str, Sequence[Record]]) -> dict[tuple[str, str], int]:
    """Return, for every pair of sets in their order, how many distinct prompts they share."""
    keys = {name: {prompt_key(record) for record in records} for name, records in sets.items()}
    return {(a, b): len(keys[a] & keys[b]) for a, b in combinations(keys, 2)}


def split_by_hash(records: Iterable[Record], first: int, salt: str = "") -> tuple[list[Record], list[Record]]:
    """Split into ``first`` records and the rest; equal prompts stay together.

    The order is that of the prompts' SHA-256, so it depends neither on the file's order nor on any random state.
    Equal prompts that would exceed the count go to the second part, and the next that fit take their place; where none
    fit, the first part is shorter, by less than the largest number of equal prompts.

    Args:
        records: what to split.
        first: number of records in the first part, >= 0.
        salt: another salt gives another order, independent of this one.

    Raises:
        InputError: if there are fewer than ``first`` records.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(hashlib.sha256(f"{salt}\x1f{prompt_key(record)}".encode()).hexdigest(), []).append(record)
    total = sum(map(len, groups.values()))
    if not 0 <= first <= total:
        raise InputError(f"split_by_hash: first must lie in [0, {total}], the number of records, got {first}.")
    chosen: list[Record] = []
    rest: list[Record] = []
    for _, group in sorted(groups.items()):
        side = chosen if len(chosen) + len(group) <= first else rest
        side.extend(sorted(group, key=lambda record: record.id))
    return chosen, rest
