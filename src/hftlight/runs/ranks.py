"""The processes of one run: the first one decides what is read from disk, the others act on its word."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from hftlight.config import RunConfig
from hftlight.engine import rank_and_world
from hftlight.errors import InputError, RunError

T = TypeVar("T")
log = logging.getLogger(__name__)  # at level DEBUG: every decision of every process

TELL_EVERY = 600.0  # seconds between lines that say what a process waits for
LONGEST_PAUSE = 0.5  # seconds between two looks at the store
GRACE = 6.0  # seconds that the first process has for its own message, before the others fail too
GOODBYE = 60.0  # seconds for which the first process waits until the others know what it has told them last
FAILED_GOODBYE = 3.0  # the same after a failure, when the others may stand in a collective that never ends
_PREFIX = "hftlight"
_decided = 0  # decisions so far: all processes take the same ones in the same order


def main_process() -> bool:
    """Tell whether this process is the one that decides and writes; the others train along."""
    if rank_and_world()[1] > 1:
        return rank_and_world()[0] == 0
    return getattr(rank_zero_only, "rank", 0) == 0


def launch(config: RunConfig) -> None:
    """Start the other processes of a run and connect them, before anything is decided; nothing for one process.

    Lightning's own launcher runs the command again for each of them, so they come here from the start of the script.

    Raises:
        InputError: where processes cannot be started, as in a notebook.
    """
    if config.devices * config.num_nodes == 1 or rank_and_world()[1] > 1:
        return
    try:
        trainer = Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy="ddp",  # of the strategy only its process group is used, which later Trainers find
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except MisconfigurationException as error:
        raise InputError(
            f"--devices {config.devices} on {config.num_nodes} nodes cannot be started ({str(error).strip()})."
        ) from error
    launcher: Any = trainer.strategy.launcher
    launcher.launch(trainer.strategy.setup_environment, trainer=trainer)


def decide(what: str, look: Callable[[], T]) -> T:
    """Return what the first process finds, in every process; ``look`` runs in the first one alone.

    All processes must ask for the same decisions in the same order. The others look at a store now and then instead of
    standing in a collective, so ``look`` may take longer than the time limit of the process group.

    Args:
        what: name of the decision, the same in every process.
        look: reads the disk, or works; returns JSON-like values.

    Raises:
        InputError: in the other processes, if the first one failed with it.
        RunError: there, if the first one failed otherwise, is gone, or decides something else.
    """
    global _decided
    if rank_and_world()[1] == 1:
        return look()
    if rank_and_world()[0] == 0:
        value = look()  # a failure is told by ``ending_together``
        _decided += 1
        _tell({"what": what, "value": value})
        log.debug("process 0 decides %s: %s", what, value)
        return value
    _decided += 1
    told = _listen(what)
    if "error" in told:
        _store().add(_known(), 1)
        time.sleep(GRACE)
        kind = InputError if told["kind"] == InputError.__name__ else RunError
        error: Any = kind(f"process {rank_and_world()[0]} ends with process 0: {told['error']}")
        error.told = True
        raise error
    if told["what"] != what:
        raise RunError(
            f"Process {rank_and_world()[0]} is at {what!r}, process 0 at {told['what']!r}. All processes must run the"
            " same command on the same files."
        )
    log.debug("process %d is told %s: %s", rank_and_world()[0], what, told["value"])
    return told["value"]


def agree(what: str, value: str) -> None:
    """Refuse to go on where this process read or computed another value than the first one.

    Raises:
        InputError: naming both.
    """
    first = decide(what, lambda: value)
    if first != value:
        raise InputError(
            f"{what} of process {rank_and_world()[0]} is {value}, of process 0 {first}. All processes must have the"
            " same versions of hftlight and its libraries, and read the same files: put data, --output and"
            " HFTLIGHT_CACHE where every node sees them."
        )


@contextmanager
def ending_together() -> Iterator[None]:
    """Tell the other processes when the block fails in the first one, so that none of them waits for ever."""
    global _decided
    try:
        yield
    except BaseException as error:
        if rank_and_world()[1] > 1 and not getattr(error, "told", False):
            error.told = True  # type: ignore[attr-defined]  # an outer block need not tell it again
            _decided += 1
            if rank_and_world()[0] == 0:
                _tell({"kind": type(error).__name__, "error": str(error) or type(error).__name__})
                _wait_until_known(FAILED_GOODBYE)
        raise


def meet(what: str, work: Callable[[], None] = lambda: None) -> None:
    """Let the first process work while the others wait; it goes on, and may end, once all of them know."""
    decide(what, work)
    if rank_and_world()[0] > 0:
        _store().add(_known(), 1)
    elif rank_and_world()[1] > 1:
        _wait_until_known(GOODBYE)


def _known() -> str:
    return f"{_PREFIX}/{_decided}/known"


def _wait_until_known(limit: float) -> None:
    """Wait until all have read the last word: the store may be in this process, and end with it."""
    until = time.monotonic() + limit
    while _store().add(_known(), 0) < rank_and_world()[1] - 1 and time.monotonic() < until:
        time.sleep(0.02)


def _store() -> Any:
    """Return the store through which the process group was made."""
    return dist.distributed_c10d._get_default_store()


def _tell(said: dict[str, Any]) -> None:
    _store().set(f"{_PREFIX}/{_decided}", json.dumps(said))


def _listen(what: str) -> dict[str, Any]:
    """Return what the first process says, however long that takes; say now and then that this one waits."""
    key, pause, since = f"{_PREFIX}/{_decided}", 0.005, time.monotonic()
    said_at = since
    try:
        while not _store().check([key]):
            time.sleep(pause)
            pause, now = min(LONGEST_PAUSE, 1.5 * pause), time.monotonic()
            if now - said_at >= TELL_EVERY:
                said_at, rank = now, rank_and_world()[0]
                print(
                    f"hftlight: process {rank} has waited {(now - since) / 60:.0f} min for process 0 ({what}).",
                    file=sys.stderr,
                )
        told: dict[str, Any] = json.loads(_store().get(key))
    except RuntimeError as error:  # torch's errors of a store whose other end is gone
        raise RunError(
            f"Process {rank_and_world()[0]} has lost process 0 while it waited for {what!r}; see what ended it."
        ) from error
    return told
