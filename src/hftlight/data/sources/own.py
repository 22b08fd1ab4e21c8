"""The user's own task: a file of prompts and answers, scored by exact match."""

from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from hftlight.data.records import Record, Role, split_by_hash, to_records
from hftlight.data.sources.task import Task, split_source
from hftlight.data.table import Reader, read_table
from hftlight.errors import InputError

SPLITS: dict[str, Role] = {"train": "task", "test": "test"}


@dataclass(frozen=True)
class OwnTask(Task):
    """Task with the rows of a file or folder.

    A folder has one file or split for ``"train"`` and one for ``"test"``. A single file is split by a hash of its
    prompts: a fifth of its rows is ``"test"``.
    """

    @override
    def records(self, split: str, path: str | Path | None = None, read: Reader = read_table) -> list[Record]:
        if split not in SPLITS:
            raise InputError(f"Task {self.name}: splits are {list(SPLITS)}, got {split!r}.")
        source = split_source(path or self.name, split)
        records = to_records(read(source, split), SPLITS[split])
        # Only a single file that is the task itself holds both splits.
        if path is not None or Path(self.name).expanduser() != source or source.is_dir():
            return records
        test, train = split_by_hash(records, len(records) // 5, salt="test")
        return test if split == "test" else train

    @override
    def correct(self, response: str, record: Record) -> bool:
        return response.strip() == record.response.strip()

    @override
    def correct_lenient(self, response: str, record: Record) -> bool:
        return record.response.strip().casefold() in response.casefold()
