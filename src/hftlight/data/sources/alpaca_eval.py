"""AlpacaEval: open instructions without a correct answer, for an external judge that compares two models."""

from dataclasses import dataclass, replace
from pathlib import Path

from typing_extensions import override

from hftlight.data.records import Record, to_records
from hftlight.data.sources.task import Task
from hftlight.data.table import Reader, Table, read_table
from hftlight.errors import InputError

ROWS, TRAIN_ROWS = 805, 700


@dataclass(frozen=True)
class AlpacaEval(Task):
    """Instructions of AlpacaEval with another model's answers.

    The answers are no correct answers, so a run has no accuracy on them. Let i be a row's number among the 805 rows,
    from 0. ``"train"`` has the rows with i < 700 and ``"test"`` the rows with i > 700; row 700 is in neither.

    A file has the columns instruction and output. It has either all rows in their order, or their numbers in the column
    ``idx``. A record's ``kind`` is its part of AlpacaEval, from the column ``subset`` or ``dataset`` if there is one.

    Source: Huang et al., Booster, arXiv:2409.01586, the AlpacaEval task; set: tatsu-lab/alpaca_eval, CC BY-NC 4.0.
    """

    @override
    def records(self, split: str, path: str | Path | None = None, read: Reader = read_table) -> list[Record]:
        if split not in ("train", "test"):
            raise InputError(f"AlpacaEval: splits are ['train', 'test'], got {split!r}.")
        if path is None:
            raise InputError("AlpacaEval: its rows are read from a file. Name the file with --data.task_train.")
        table = read(path, split)
        numbers = _numbers(table)
        chosen = [n < TRAIN_ROWS if split == "train" else n > TRAIN_ROWS for n in numbers]
        rows = [row for row, mine in zip(table.rows, chosen, strict=True) if mine]
        if not rows:
            raise InputError(
                f"AlpacaEval: {path} has no {split} row; its numbers are {min(numbers)} to {max(numbers)}."
            )
        part = next(({"kind": column} for column in ("subset", "dataset") if column in table.found), {})
        take = replace(table.take, columns={**part, **table.take.columns})
        return to_records(replace(table, rows=rows, take=take), "task" if split == "train" else "test")

    @override
    def correct(self, response: str, record: Record) -> bool:
        raise TypeError("AlpacaEval has no right answers; compare the answers with its annotator instead.")

    @override
    def correct_lenient(self, response: str, record: Record) -> bool:
        return self.correct(response, record)


ALPACA_EVAL = AlpacaEval(name="alpaca_eval", licence="CC BY-NC 4.0", max_new_tokens=200, graded=False, one_file=True)


def _numbers(table: Table) -> list[int]:
    """Return the rows' numbers in AlpacaEval, from 0.

    Raises:
        InputError: if the numbers are missing, out of range or not unique.
    """
    if "idx" not in table.found:
        if table.read != ROWS:
            raise InputError(
                f"AlpacaEval: the split goes by row number, so {table.source} needs all {ROWS} rows in their order or a"
                f" column idx with their numbers; it has {table.read} rows and no idx."
            )
        return list(table.numbers)
    numbers = []
    for place, row in table.rows:
        number = str(row.get("idx"))
        if not number.isdecimal() or int(number) >= ROWS:
            raise InputError(
                f"AlpacaEval: idx must lie in [0, {ROWS - 1}], got {row.get('idx')!r} in {place} of {table.source}."
            )
        numbers.append(int(number))
    if len(set(numbers)) < len(numbers):
        raise InputError(
            f"AlpacaEval: each row needs its own idx, but {table.source} has {len(numbers)} rows and"
            f" {len(set(numbers))} different numbers."
        )
    return numbers
