"""Rows of any table: JSON lines, JSON, CSV, Parquet, a folder saved by ``datasets``, or a set on the hub."""

import csv
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hftlight.errors import InputError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
WAYS = f"Give a {', '.join(SUFFIXES)} file, a folder saved by datasets' save_to_disk, or a hub name."

Row = tuple[str, dict[str, Any]]


def read_rows(source: str | Path, split: str = "train") -> list[Row]:
    """Return every row of a table with its place, such as ``("line 3", {...})``, counted from 1.

    Args:
        source: a file with one of ``SUFFIXES``, a folder saved by ``save_to_disk``, or a hub name
            (``name:config`` where the set has several configurations).
        split: the split to take where ``source`` has several; a file has none.

    Raises:
        InputError: if nothing is there, the kind is unknown, a row cannot be parsed, or there is no row.
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
    if suffix == ".json" and text.lstrip().startswith("["):
        return _parse_array(text, path)
    return _parse_lines(text, path)


def _parse_json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"Data: line {first_line + error.lineno - 1} of {path} is not JSON ({error.msg}, column {error.colno})."
            " A .jsonl file has one object per line, a .json file one array of objects."
        ) from error


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
    return _objects(((f"row {number}", value) for number, value in enumerate(values, start=1)), path)


def _parse_csv(text: str, path: Path) -> list[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    try:
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
    except Exception as error:  # the hub's client raises a dozen kinds, from no network to no such split
        raise InputError(
            f"Data: {source!r} is no file or folder here, and the hub gives no split {split!r} of it"
            f" ({type(error).__name__}: {_first_line(error)}). {WAYS}"
        ) from error
    return [(f"row {number}", row) for number, row in enumerate(table, start=1)]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no message")
