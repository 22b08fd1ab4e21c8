"""Record, one row of data from any source, and functions that read, compare and split records."""

import hashlib
import json
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_args

from hftlight.data.chats import Turn, read_turns, unfolded
from hftlight.data.table import Row, Table, named_places, read_table
from hftlight.errors import InputError
from hftlight.take import Take, truth

Role = Literal["alignment", "harmful", "pairs", "attack", "task", "retain", "test"]
UPLOADED: tuple[Role, ...] = ("task", "attack")  # roles of the user's rows; a defense cannot tell them apart
LAYOUTS: tuple[dict[str, str], ...] = (
    {"instruction": "instruction", "input": "input", "response": "output"},
    {"instruction": "prompt", "response": "response"},
    {"instruction": "prompt", "response": "completion"},
    {"instruction": "instruction", "input": "input", "response": "response"},
    {"instruction": "question", "response": "answer"},
)
REFUSAL, CATEGORY = "refusal", "category"
QUESTION, ANSWER = "Question: ", "\nAnswer: "  # frame of a refusal in RepNoise's file
_SAFE = ({"instruction": "prompt", "response": REFUSAL}, {"instruction": "prompt", "response": "chosen"})
_HARMFUL = ({"instruction": "prompt", "response": "rejected"},)
# Columns of files with two answers per prompt, by role. A role tries them before LAYOUTS, which have one answer.
_OF_ROLE: dict[str, tuple[dict[str, str], ...]] = {
    "alignment": _SAFE,
    "harmful": _HARMFUL,
    "attack": _HARMFUL,
    "pairs": (
        {"instruction": "prompt", "response": "chosen", "rejected": "rejected"},
        {"instruction": "prompt", "response": "response", "rejected": "rejected"},
        {"instruction": "prompt", "response": REFUSAL, "rejected": "response"},
    ),
}


@dataclass(frozen=True, slots=True)
class Record:
    """One instruction with its response.

    Attributes:
        instruction: the user's request as text, without any template.
        response: the answer to train on; empty for prompts that are only tested.
        input: the optional second field of the Alpaca format; empty if there is none.
        source: the file or dataset that the row comes from.
        role: use of the row; ``"attack"`` marks a harmful row hidden in an upload.
        kind: a free label within the source, such as a category.
        id: stable name of the row; by default a digest of its texts.
        rejected: the harmful answer of a pair, whose ``response`` is the safe answer; empty if the row is no pair.
        language: the language of the row, as its source writes it; empty if it is unknown.
        system: the row's own system text; empty if there is none.
        history: turns before the instruction, as (role, text); the roles are user and assistant.
    """

    instruction: str
    response: str = ""
    input: str = ""
    source: str = ""
    role: Role = "task"
    kind: str = ""
    id: str = ""
    rejected: str = ""
    language: str = ""
    system: str = ""
    history: tuple[Turn, ...] = ()

    def __post_init__(self) -> None:
        if not self.id:
            turns = (*([("system", self.system)] if self.system else []), *self.history)
            more = (*([self.rejected] if self.rejected else []), *map("\x1e".join, turns))
            text = "\x1f".join((self.instruction, self.input, self.response, *more))
            object.__setattr__(self, "id", hashlib.sha256(text.encode()).hexdigest()[:16])

    @property
    def question(self) -> str:
        """The last question: instruction and input, without template."""
        return f"{self.instruction}\n{self.input}" if self.input else self.instruction

    @property
    def request(self) -> str:
        """The request as a judge reads it: the question, and before it the earlier turns with their roles."""
        turns = (*self.history, ("user", self.question))
        return "\n".join(f"{role}: {text}" for role, text in turns) if self.history else self.question

    @property
    def texts(self) -> tuple[Any, ...]:
        """Every text that decides prompt and answer."""
        return self.instruction, self.input, self.response, self.system, self.history


def read_records(source: str | Path, *, role: Role, need_response: bool = True, **take: Any) -> list[Record]:
    """Read the records of a file, a folder saved by ``datasets``, or a dataset on the hub, in source order.

    Args:
        source: a .jsonl, .json, .csv or .parquet file, a folder written by ``save_to_disk``, or a hub name. Write
            ``name:config`` if the dataset has several configurations.
        role: role of every record.
        need_response: whether every row must have an answer; False for prompts that are only tested.
        **take: fields of ``Take``: split, rows, where, first, columns.

    Raises:
        InputError: if there is nothing to read, a row cannot be parsed, a column is missing, or a text is empty.
    """
    return to_records(read_table(source, take=Take(**take)), role, need_response)


def to_records(table: Table, role: Role, need_response: bool = True) -> list[Record]:
    """Turn the rows of a table into records.

    If a table has two answers per prompt, the role decides. Alignment takes the refusal or the chosen answer. Harmful
    and attack take the rejected answer, and pairs take both. The column ``category`` becomes the record's kind: a
    text, or the name of the first category that is true. Of a chat the last answer is the response. Earlier turns and
    the system text stay in the prompt. The table's notes name the columns that are not read.

    Args:
        table: the rows.
        role: role of every record.
        need_response: as for ``read_records``.

    Raises:
        InputError: as for ``read_records``, and if a role would get answers of the wrong kind.
    """
    if role not in get_args(Role):
        raise InputError(f"read_records: role must be one of {list(get_args(Role))}, got {role!r}.")
    table = unfolded(table)
    if role == "pairs":
        table = _ordered_pairs(table)
    needed = ("instruction", "response") if need_response else ("instruction",)
    needed = (*needed, "rejected") if role == "pairs" else needed
    names = _choose_columns(table, role, needed)
    _check_safety(table, role, names)
    # An instruction column that the user named stays. Otherwise the frame of the refusal supplies the question.
    question = None if "instruction" in table.columns else names["instruction"]
    rows = _unframed(table, question) if names["response"] == REFUSAL else table.rows
    if CATEGORY in table.found:
        names.setdefault("kind", CATEGORY)
    if all(isinstance(row.get("language", 0), str) for _, row in rows):
        names.setdefault("language", "language")
    for name in ("system", "history"):
        if name in table.found:
            names.setdefault(name, name)
    _note_unread(table, {*names.values(), *dict(table.take.conditions), "is_safe"})
    kind, history = names.pop("kind", ""), names.pop("history", "")
    _refuse_empty(rows, [names[name] for name in needed], table.source)
    records = []
    for place, row in rows:
        where = f"{place} of {table.source}"
        texts = {name: _text(row, column, where) for name, column in names.items()}
        turns = _history(row.get(history), history, where)
        records.append(Record(**texts, kind=_label(row.get(kind)), history=turns, source=table.source, role=role))
    return records


def _note_unread(table: Table, read: Collection[str]) -> None:
    """Add a note on the columns that hold something and are not read."""
    unread = [c for c in table.found if c not in read and any(row.get(c) not in (None, "") for _, row in table.rows)]
    if unread:
        table.notes.append(f"{table.source}: these columns are not read: {', '.join(unread)}.")


def _refuse_empty(rows: Sequence[Row], columns: Sequence[str], source: str) -> None:
    """Refuse rows without a text that is needed, all of them at once."""
    for column in columns:
        places = [place for place, row in rows if row.get(column) is None or not str(row[column]).strip()]
        if places:
            raise InputError(
                f"read_records: column {column!r} is empty in {named_places(places)} of {source}; fill it in or remove"
                " such rows."
            )


def _history(value: Any, column: str, place: str) -> tuple[Turn, ...]:
    try:
        return tuple(read_turns(value)) if value else ()
    except ValueError as error:
        raise InputError(
            f"read_records: column {column!r} holds no earlier turns in {place}: {error}. Rename or remove the column."
        ) from error


def _choose_columns(table: Table, role: Role, needed: Sequence[str]) -> dict[str, str]:
    found, columns = table.found, table.columns
    layouts = (*_OF_ROLE.get(role, ()), *LAYOUTS)
    # The first pass looks for a layout with a response, the second for one with the needed fields only. Columns that
    # the user named replace those of the layout.
    for wanted in (needed,) if role == "pairs" else (("instruction", "response"), needed):
        for layout in layouts:
            names = {**layout, **columns}
            if all(names.get(field) in found for field in wanted):
                return {field: column for field, column in names.items() if field != "rejected" or role == "pairs"}
    known = ", ".join("/".join(layout[field] for field in needed) for layout in layouts if {*needed} <= {*layout})
    raise InputError(
        f"read_records: {table.source} needs columns for {list(needed)}, such as {known}; it has {found}."
        " Name them with --data.columns, such as {instruction: goal, response: target}."
    )


def _check_safety(table: Table, role: Role, names: Mapping[str, str]) -> None:
    """Refuse rows whose column ``is_safe`` contradicts their role.

    Alignment rows need safe answers; harmful rows, attack rows and the rejected answers of pairs need unsafe ones. Only
    answers of the column ``response`` are checked, and only if no filter on ``is_safe`` is set.

    Raises:
        InputError: if a row has the wrong ``is_safe``; the message gives the filter that selects the other rows.
    """
    answer = names.get("rejected") if role == "pairs" else names["response"]
    wanted = {"alignment": True, "harmful": False, "attack": False, "pairs": False}.get(role)
    filtered = "is_safe" in dict(table.take.conditions)
    if wanted is None or filtered or answer != "response":
        return
    wrong = sum(truth(row.get("is_safe")) is (not wanted) for _, row in table.rows)
    if wrong:
        there, way = str(not wanted).lower(), str(wanted).lower()
        raise InputError(
            f"read_records: {wrong} of {len(table.rows)} rows of {table.source} have is_safe={there}, but {role} takes"
            f" the other rows only. Filter them with --data.where.{role} is_safe={way}."
        )


def _ordered_pairs(table: Table) -> Table:
    """Return a table with PKU-SafeRLHF's safer answer as ``chosen`` and the other answer as ``rejected``.

    A table without PKU-SafeRLHF's columns is returned unchanged.

    Raises:
        InputError: if a row does not say which answer is safer.
    """
    answers = ("response_0", "response_1")
    if not {*answers, "safer_response_id"} <= set(table.found):
        return table
    rows = []
    for place, row in table.rows:
        safer = str(row.get("safer_response_id"))
        if safer not in ("0", "1"):
            raise InputError(
                f"read_records: safer_response_id must be 0 or 1, got {safer} in {place} of {table.source}."
            )
        chosen, rejected = answers if safer == "0" else answers[::-1]
        rows.append((place, {**row, "chosen": row.get(chosen), "rejected": row.get(rejected)}))
    return replace(table, rows=rows)


def _unframed(table: Table, question: str | None) -> list[Row]:
    """Return the rows with the frame, ``QUESTION`` and ``ANSWER``, removed from each refusal.

    A refusal ends where a second ``Answer:`` begins. If no refusal has the frame, the rows are returned unchanged.

    Args:
        table: rows with the column ``refusal``.
        question: column that gets the frame's question; None if no column gets it.

    Raises:
        InputError: if some rows have the frame and others do not.
    """
    _refuse_empty(table.rows, [REFUSAL], table.source)
    texts = [(place, row, _text(row, REFUSAL, f"{place} of {table.source}")) for place, row in table.rows]
    if not any(ANSWER in text or text.startswith(QUESTION) for _, _, text in texts):
        return list(table.rows)
    rows = []
    for place, row, text in texts:
        head, separator, rest = text.partition(ANSWER)
        if not separator:
            raise InputError(
                f"read_records: column {REFUSAL!r} must read {QUESTION + '...' + ANSWER + '...'!r} in every row or in"
                f" none, but {place} of {table.source} has no {ANSWER!r}. Correct or remove the row."
            )
        own = {question: head.removeprefix(QUESTION)} if question else {}
        rows.append((place, {**row, **own, REFUSAL: rest.partition(ANSWER)[0]}))
    return rows


def _label(value: Any) -> str:
    """Return a label as text.

    A mapping of names to booleans, also one written as JSON, gives the first name that is true.
    """
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return str(value)
    if isinstance(value, Mapping):
        return next((str(name) for name, holds in value.items() if truth(holds)), "")
    return "" if value is None else str(value)


def _text(row: Mapping[str, Any], column: str, place: str) -> str:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise InputError(
            f"read_records: column {column!r} must hold text, got {type(value).__name__} in {place}."
            " Name another column with --data.columns or convert the file."
        )
    return value or ""


def prompt_key(record: Record) -> str:
    """Return the prompt's text without case, punctuation and layout, to match equal prompts of different sets.

    Letters, marks, digits and symbols stay. Everything between them becomes one space. A prompt of punctuation alone
    keeps its punctuation.
    """
    earlier = "".join(f"{text} " for _, text in record.history)
    text = unicodedata.normalize("NFKC", f"{earlier}{record.instruction} {record.input}").casefold()
    words = "".join(char if unicodedata.category(char)[0] in "LMNS" else " " for char in text).split()
    return " ".join(words or text.split())


def overlaps(sets: Mapping[str, Sequence[Record]]) -> dict[tuple[str, str], int]:
    """Return the number of distinct prompts that each pair of sets shares, in the order of the sets."""
    keys = {name: {prompt_key(record) for record in records} for name, records in sets.items()}
    return {(a, b): len(keys[a] & keys[b]) for a, b in combinations(keys, 2)}


def split_by_hash(records: Iterable[Record], first: int, salt: str = "") -> tuple[list[Record], list[Record]]:
    """Split records into ``first`` records and the rest, without separating equal prompts.

    Records are sorted by the SHA-256 of their prompts. The split depends neither on the file's order nor on a random
    state. A group of equal prompts that would exceed ``first`` goes to the second part. The next group that fits takes
    its place. If no group fits, the first part is shorter, by less than the size of the largest group.

    Args:
        records: the records to split.
        first: number of records in the first part, >= 0.
        salt: text added to the hash; another salt gives another, independent order.

    Raises:
        InputError: if ``first`` is negative or larger than the number of records.
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
