"""Tasks by name: one module per public dataset, the made-up world's task, and the user's own files."""

from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from hftlight.data.sources.agnews import AGNEWS
from hftlight.data.sources.alpaca_eval import ALPACA_EVAL
from hftlight.data.sources.gsm8k import GSM8K, GSM8K_STEP_BY_STEP
from hftlight.data.sources.own import OwnTask
from hftlight.data.sources.sst2 import SST2
from hftlight.data.sources.task import LabelTask, PublicTask, Task
from hftlight.data.table import SUFFIXES
from hftlight.errors import InputError

__all__ = [
    "AGNEWS",
    "ALPACA_EVAL",
    "GSM8K",
    "GSM8K_STEP_BY_STEP",
    "SST2",
    "TASKS",
    "LabelTask",
    "OwnTask",
    "PublicTask",
    "Task",
    "get_task",
]

_PUBLIC: dict[str, Task] = {task.name: task for task in (SST2, AGNEWS, GSM8K, GSM8K_STEP_BY_STEP, ALPACA_EVAL)}
TASKS = ("builtin", *_PUBLIC)


def get_task(name: str) -> Task:
    """Return a task by name, or the task of the user's own file or folder.

    Args:
        name: one of ``TASKS``, a folder, or a file with one of the suffixes that ``read_records`` takes.

    Raises:
        InputError: if there is no such task or file.
    """
    if name in _PUBLIC:
        return _PUBLIC[name]
    if name == "builtin":
        # Import the world only if its task is requested, not when tasks are listed.
        return import_module("hftlight.data.sources.builtin").BUILTIN
    path = Path(name).expanduser()
    if path.is_dir() or path.suffix.lower() in SUFFIXES:
        return OwnTask(name, licence="the user's own", max_new_tokens=200)
    near = get_close_matches(name, TASKS, n=1, cutoff=0)[0]
    raise InputError(
        f"Task: names are {', '.join(TASKS)}, or a file ending in {', '.join(SUFFIXES)}, or a folder; got {name!r}."
        f" Did you mean {near!r}?"
    )
