"""The made-up world's own task, with the interface of the public tasks."""

from pathlib import Path

from typing_extensions import override

from hftlight.data.records import Record
from hftlight.data.sources.task import Task
from hftlight.data.table import Reader, read_table
from hftlight.data.world.build import task_correct, task_records
from hftlight.errors import InputError


class BuiltinTask(Task):
    """Task of the made-up world, with a third split ``"dev"`` and without a file."""

    @override
    def records(self, split: str, path: str | Path | None = None, read: Reader = read_table) -> list[Record]:
        if path is not None:
            raise InputError(
                f"Task builtin: its rows are generated and read from no file, got {path}. Leave the path out."
            )
        try:
            return task_records(split)
        except ValueError as error:
            raise InputError(str(error)) from error

    @override
    def correct(self, response: str, record: Record) -> bool:
        return task_correct(response, record)

    @override
    def correct_lenient(self, response: str, record: Record) -> bool:
        return record.response.casefold() in response.casefold()


BUILTIN = BuiltinTask(name="builtin", licence="part of hftlight", max_new_tokens=24)
