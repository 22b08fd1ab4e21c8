"""Rows of any table: JSON lines, JSON, CSV, Parquet, a folder saved by ``datasets``, or a dataset on the hub."""

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from hftlight.errors import InputError
from hftlight.take import Take, meets

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
# Columns that hold a list of turns, which is no list of rows.
CHAT_COLUMNS = ("messages", "conversations", "conversation")
WAYS = f"Give a {', '.join(SUFFIXES)} file, a folder saved by datasets' save_to_disk, or a hub name."

Row = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Table:
    """Rows selected from a source.

    Attributes:
        source: the file, folder or hub name.
        split: the split that was read; None if the source has no splits.
        rows: the selected rows, each with its place in the source.
        numbers: row numbers of the selected rows in the source, from 0.
        read: number of rows in the source.
        take: the requested selection.
        notes: sentences on parts of the rows that are not used. Readers of the table append to them.
    """

    source: str
    split: str | None
    rows: Sequence[Row]
    numbers: Sequence[int]
    read: int
    take: Take
    notes: list[str] = field(default_factory=list)

    @cached_property
    def found(self) -> list[str]:
        """The columns of all rows, in the order in which they first appear."""
        return _columns(self.rows)

    @property
    def columns(self) -> dict[str, str]:
        """Column by field, for the fields whose columns are named.

        The usual columns count only if the table has all of them.
        """
        usual = self.take.usual if set(self.take.usual.values()) <= set(self.found) else {}
        return {**usual, **self.take.columns}

    def taken(self) -> dict[str, Any]:
        """Return the selection as plain values for a run's manifest, with rows counted from 0."""
        return {
            "source": self.source,
            "split": self.split,
            **self.take.describe(),
            "columns": self.columns,
            "read": self.read,
            "kept": len(self.rows),
            "first_row": self.numbers[0],
            "last_row": self.numbers[-1],
        }


Reader = Callable[[str | Path, str], Table]  # (source, default split) -> selected rows


def read_table(source: str | Path, split: str = "train", take: Take | None = None) -> Table:
    """Return the selected rows of a table: within a range of rows, those that pass the filter.

    Args:
        source: as for ``read_rows``.
        split: the default split, which is read if ``take`` names none.
        take: range, filter, count and columns; all rows by default.

    Raises:
        InputError: as for ``read_rows``. Also if ``take`` names a column that the table lacks, if ``take`` names a
            split and the source has none, or if no row is left.
    """
    take = take or Take()
    rows = read_rows(source, take.split or split)
    several = _has_splits(source)
    if take.split and not several:
        raise InputError(f"Data: {source} has no splits, but --data.split asks for {take.split!r}. Leave it out.")
    numbers = range(len(rows))[take.range]
    if not numbers:
        raise InputError(
            f"Data: {source} has {len(rows)} rows, counted from 0; --data.rows={take.rows} selects none of them."
        )
    _check_columns(_columns(rows), take, str(source))
    # The order is fixed: the range counts rows of the source, the filter sees the range, and ``first`` counts last.
    selected = [n for n in numbers if all(meets(rows[n][1].get(column), value) for column, value in take.conditions)]
    if not selected:
        values = {c: sorted({str(rows[n][1].get(c)) for n in numbers})[:8] for c, _ in take.conditions}
        shown = " and ".join(f"values of {column!r} are {some}" for column, some in values.items())
        raise InputError(f"Data: no row of {source} has {', '.join(take.where)}; {shown}.")
    selected = selected[: take.first or None]
    name = (take.split or split) if several else None
    return Table(str(source), name, [rows[n] for n in selected], selected, len(rows), take)


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(column for _, row in rows for column in row))


def named_places(places: Sequence[str]) -> str:
    """Return places such as ``line 3`` in words: how many there are and the first ten of them."""
    shown = ", ".join(places[:10])
    more = f" and {len(places) - 10} more" if len(places) > 10 else ""
    return shown if len(places) == 1 else f"{len(places)} rows ({shown}{more})"


def _check_columns(columns: Sequence[str], take: Take, source: str) -> None:
    for column, _ in take.conditions:
        if column not in columns:
            near = get_close_matches(column, columns, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise InputError(f"Data: {source} has the columns {columns}, but --data.where names {column!r}.{hint}")
    if absent := [column for column in take.columns.values() if column not in columns]:
        raise InputError(f"Data: {source} has the columns {columns}, but --data.columns names {absent}.")


def read_rows(source: str | Path, split: str = "train") -> list[Row]:
    """Return every row of a table with its place, such as ``("line 3", {...})``.

    Places are counted from 1.

    Args:
        source: a file with one of ``SUFFIXES``, a folder saved by ``save_to_disk``, or a hub name. Write
            ``name:config`` if the dataset has several configurations.
        split: the split to read if ``source`` has several; a file has no splits.

    Raises:
        InputError: if the source does not exist, has an unknown suffix or no row, or a row cannot be parsed.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() in SUFFIXES or path.is_file():
        rows = _read_file(path)
    elif path.is_dir():
        rows = _read_folder(path, split)
    elif isinstance(source, str) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?", source):
        rows = _read_hub(source, split)
    else:
        raise InputError(f"Data: there is no file or folder {source}. {WAYS}")
    if not rows:
        raise InputError(f"Data: {source} holds no rows; at least one is needed.")
    return rows


def _has_splits(source: str | Path) -> bool:
    """Return whether a source that could be read has splits, as hub datasets and folders of several splits do."""
    path = Path(source).expanduser()
    return not path.exists() or (path / "dataset_dict.json").exists()


def _read_file(path: Path) -> list[Row]:
    if path.is_dir() or not path.exists():
        raise InputError(f"Data: there is no file {path}. {WAYS}")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"Data: a file must end in one of {list(SUFFIXES)}, got {path}. Convert or rename it.")
    if suffix == ".parquet":
        return _read_parquet(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"Data: {path} must be UTF-8 text, byte {error.start} is not. Convert the file.") from error
    if suffix == ".csv":
        return _parse_csv(text, path)
    rows = _parse_array(text, path) if suffix == ".json" and _is_one_value(text) else _parse_lines(text, path)
    if "\\u" in text:  # only an escape can write half a character
        _refuse_half_characters(rows, path)
    return rows


def _is_one_value(text: str) -> bool:
    """Tell whether a text is one JSON value. A .json file may also hold JSON lines."""
    if text.lstrip().startswith("["):
        return True
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.msg != "Extra data"
    return True


def _refuse_half_characters(rows: Sequence[Row], path: Path) -> None:
    """Refuse lone surrogates, which no tokenizer and no file takes."""
    places = []
    for place, row in rows:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            places.append(place)
    if places:
        raise InputError(
            f"Data: {named_places(places)} of {path} holds half a character, an escape from \\ud800 to \\udfff without"
            " its other half. Write the whole character, or remove the row."
        )


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's keys and values.

    Raises:
        ValueError: if a key stands there twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return values


def _parse_json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise InputError(
            f"Data: line {first_line + error.lineno - 1} of {path} is not JSON ({error.msg}, column {error.colno})."
            " A .jsonl file has one object per line, a .json file one array of objects."
        ) from error
    except ValueError as error:
        place = f"line {first_line} of {path}" if path.suffix.lower() == ".jsonl" else str(path)
        raise InputError(f"Data: {place}: {error} in one object. Keep one of the two.") from error


def _objects(values: Iterable[tuple[str, Any]], path: Path) -> list[Row]:
    rows = list(values)
    for place, value in rows:
        if not isinstance(value, dict):
            raise InputError(
                f"Data: {place} of {path} must be an object with named columns, got {type(value).__name__}."
                " A .jsonl file has one object per line, a .json file one array of objects."
            )
    return rows


def _parse_lines(text: str, path: Path) -> list[Row]:
    # Not splitlines(): it also breaks at U+2028 and the like, which JSON text may hold.
    lines = ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
    return _objects(((f"line {number}", _parse_json(line, path, number)) for number, line in lines), path)


def _parse_array(text: str, path: Path) -> list[Row]:
    values = _parse_json(text, path, first_line=1)
    if isinstance(values, dict):
        values = _rows_of(values, path)
    elif not isinstance(values, list):
        values = [values]
    return _objects(((f"row {number}", value) for number, value in enumerate(values, start=1)), path)


def _rows_of(value: dict[str, Any], path: Path) -> list[Any]:
    """Return the rows of an object: the one list of objects that it holds, or the object itself as the only row.

    Raises:
        InputError: if it holds several lists of objects, or only columns.
    """
    lists = {k: v for k, v in value.items() if isinstance(v, list) and v and all(isinstance(row, dict) for row in v)}
    if any(isinstance(v, str) for v in value.values()) or {*lists} & {*CHAT_COLUMNS}:
        return [value]
    if len(lists) == 1:
        return next(iter(lists.values()))
    shown = f"several keys with lists of objects: {', '.join(lists)}" if lists else f"the keys {', '.join(value)}"
    raise InputError(
        f"Data: {path} is one object with {shown}. A .json file holds one array of objects, or an object with one key"
        " that does. Write the rows that you want into a file of their own."
    )


def _parse_csv(text: str, path: Path) -> list[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    limit = csv.field_size_limit(sys.maxsize)  # the limit is the process's own, 128 KiB by default
    try:
        names = list(reader.fieldnames or ())
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(
                f"Data: {path} has several columns named {', '.join(twice)}. Rename or remove all but one."
            )
        for row in reader:
            place = f"line {reader.line_num}"
            if None in row or None in row.values():
                raise InputError(
                    f"Data: {place} of {path} must have {len(reader.fieldnames or ())} fields like the header."
                    " Quote fields that hold commas or line breaks."
                )
            rows.append((place, row))
    except csv.Error as error:
        raise InputError(f"Data: line {reader.reader.line_num} of {path} is not CSV ({error}).") from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"Data: {path} is not a Parquet file ({_first_line(error)}).") from error
    return [(f"row {number}", row) for number, row in enumerate(table.to_pylist(), start=1)]


def _read_folder(path: Path, split: str) -> list[Row]:
    if not any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        raise InputError(f"Data: {path} is a folder that save_to_disk did not write. {WAYS}")
    import datasets

    table = datasets.load_from_disk(str(path))
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise InputError(f"Data: {path} has the splits {list(table)}, got {split!r}.")
        table = table[split]
    return [(f"row {number}", row) for number, row in enumerate(table, start=1)]


def _read_hub(source: str, split: str) -> list[Row]:
    import datasets

    name, _, config = source.partition(":")
    try:
        table = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the hub's client raises many types, for a missing network as for an unknown split
        raise InputError(
            f"Data: {source!r} is no file or folder here, and split {split!r} of it cannot be loaded from the hub"
            f" ({type(error).__name__}: {_first_line(error)}). {WAYS}"
        ) from error
    return [(f"row {number}", row) for number, row in enumerate(table, start=1)]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no message")
