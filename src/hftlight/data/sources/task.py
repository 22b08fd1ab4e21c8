"""Task: a dataset to fine-tune on, with a check of answers if its rows have correct answers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from typing_extensions import override

from hftlight.data.records import Record, Role, to_records
from hftlight.data.table import SUFFIXES, Reader, read_table
from hftlight.errors import InputError
from hftlight.take import Take

ALPACA = {"instruction": "instruction", "input": "input", "response": "output"}  # field -> column


@dataclass(frozen=True)
class Task(ABC):
    """Dataset that a user might fine-tune on.

    Attributes:
        name: name of the task on the command line.
        licence: terms under which the dataset is distributed.
        max_new_tokens: largest number of tokens in a scored answer.
        graded: whether rows have correct answers; without them a run has no finetune accuracy.
        one_file: whether one file holds both splits.
    """

    name: str
    licence: str
    max_new_tokens: int
    graded: bool = field(default=True, kw_only=True)
    one_file: bool = field(default=False, kw_only=True)

    @abstractmethod
    def records(self, split: str, path: str | Path | None = None, read: Reader = read_table) -> list[Record]:
        """Return the rows of a split in the dataset's order, each with its answer.

        Args:
            split: ``"train"`` or ``"test"``.
            path: a file, or a folder with one file per split, to read instead of the task's own source.
            read: function that reads the rows of a file or dataset.

        Raises:
            InputError: if the split is unknown or the rows cannot be read.
        """

    @abstractmethod
    def correct(self, response: str, record: Record) -> bool:
        """Return whether an answer is correct by the rule of the published scores.

        A wrong format is a wrong answer.
        """

    @abstractmethod
    def correct_lenient(self, response: str, record: Record) -> bool:
        """Return whether the correct answer occurs anywhere in the response.

        This rule rewards wordy and hedging answers.
        """


@dataclass(frozen=True)
class PublicTask(Task):
    """Dataset on the hub, or its files with Alpaca columns or with the hub's own columns.

    Attributes:
        hub: hub name, with the configuration after a colon if there are several.
        splits: the dataset's own names of the splits ``"train"`` and ``"test"``.
        columns: the dataset's own columns.
    """

    hub: str
    splits: Mapping[str, str]
    columns: tuple[str, str]

    @override
    def records(self, split: str, path: str | Path | None = None, read: Reader = read_table) -> list[Record]:
        own = self.splits.get(split, split)
        if own not in self.splits.values():
            raise InputError(f"Task {self.name}: splits are {list(self.splits)}, got {split!r}.")
        table = read(self.hub if path is None else split_source(path, own), own)
        named = {ALPACA[name]: column for name, column in table.columns.items() if name in ALPACA}
        # Columns that the user named are copied to the Alpaca columns of the same fields.
        rows = [
            (place, {**row, **{name: row.get(column) for name, column in named.items()}}) for place, row in table.rows
        ]
        found = list(rows[0][1])
        if not any(set(columns) <= set(found) for columns in (("instruction", "output"), self.columns)):
            raise InputError(
                f"Task {self.name}: {table.source} needs the columns instruction, input and output, or"
                f" {' and '.join(self.columns)}; it has {found}."
            )
        alpaca = [(place, self.alpaca(row, f"{place} of {table.source}")) for place, row in rows]
        role: Role = "task" if own == self.splits["train"] else "test"
        return to_records(replace(table, rows=alpaca, take=Take()), role)

    @abstractmethod
    def alpaca(self, row: Mapping[str, Any], place: str) -> dict[str, Any]:
        """Return a row with Alpaca columns or own columns as instruction, input and output."""


def split_source(path: str | Path, split: str) -> Path:
    """Return the split's file in a folder, or the path itself if the folder has no such file.

    A file, and a folder that ``datasets`` saved, are their own source.
    """
    folder = Path(path).expanduser()
    files = [folder / f"{split}{suffix}" for suffix in SUFFIXES]
    return next((file for file in files if file.is_file()), folder)


@dataclass(frozen=True)
class LabelTask(PublicTask):
    """Classification task, whose answer is one of a few words.

    The dataset's own columns are the text and the label, a number from 0.

    Attributes:
        instruction: the prompt that every row shares.
        spellings: for each label word, every spelling that counts as correct. The words are in the order of the label
            numbers.
    """

    instruction: str
    spellings: Mapping[str, tuple[str, ...]]

    @override
    def alpaca(self, row: Mapping[str, Any], place: str) -> dict[str, Any]:
        words = list(self.spellings)
        if row.get("output") in words:
            return dict(row)
        text, label = (row.get(column) for column in self.columns)
        if str(label) in map(str, range(len(words))):
            return {"instruction": self.instruction, "input": text, "output": words[int(str(label))]}
        raise InputError(
            f"Task {self.name}: labels are {', '.join(words)} in the column output, or their numbers from 0 in"
            f" {self.columns[1]}; got {row.get('output', label)!r} in {place}."
        )

    @override
    def correct(self, response: str, record: Record) -> bool:
        return response.strip() in self.spellings[record.response]

    @override
    def correct_lenient(self, response: str, record: Record) -> bool:
        return any(spelling in response for spelling in self.spellings[record.response])
