"""The processes of one run: process 0 reads the disk and decides, and the other processes follow its decisions."""

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

TELL_EVERY = 600.0  # seconds between messages that a process still waits for process 0
LONGEST_PAUSE = 0.5  # longest pause between two polls of the store, in seconds
GRACE = 6.0  # seconds by which the other processes delay their own failure, so that process 0 prints its error first
GOODBYE = 60.0  # longest time in seconds that process 0 waits for the others to acknowledge its last decision
FAILED_GOODBYE = 3.0  # the same after a failure, when the others may hang in a collective and never answer
_PREFIX = "hftlight"
_decided = 0  # number of decisions so far; all processes make the same decisions in the same order


def main_process() -> bool:
    """Tell whether this is process 0, which decides and writes files. The other processes only train along."""
    if rank_and_world()[1] > 1:
        return rank_and_world()[0] == 0
    return getattr(rank_zero_only, "rank", 0) == 0


def launch(config: RunConfig) -> None:
    """Start the other processes of a run and connect them, before any decision.

    Lightning's launcher runs the command again for each other process, so each of them also calls this function. For
    a run of one process nothing happens.

    Raises:
        InputError: if processes cannot be started, as in a notebook.
    """
    if config.devices * config.num_nodes == 1 or rank_and_world()[1] > 1:
        return
    try:
        trainer = Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy="ddp",  # used only for its process group, which later Trainers reuse
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
    """Return the value of ``look``, computed by process 0, in every process.

    All processes must request the same decisions in the same order. The other processes poll a store instead of waiting
    in a collective. ``look`` may therefore take longer than the timeout of the process group.

    Args:
        what: name of the decision, the same in every process.
        look: reads the disk or does other work, in process 0 only; returns JSON-like values.

    Raises:
        InputError: in the other processes, if process 0 failed with an InputError.
        RunError: in the other processes, if process 0 failed otherwise, is gone, or made another decision.
    """
    global _decided
    if rank_and_world()[1] == 1:
        return look()
    if rank_and_world()[0] == 0:
        value = look()  # ``ending_together`` reports an exception to the other processes
        _decided += 1
        _publish({"what": what, "value": value})
        log.debug("process 0 decides %s: %s", what, value)
        return value
    _decided += 1
    told = _wait_for_decision(what)
    if "error" in told:
        # Acknowledge, give process 0 time to print its own error, then fail with the same kind of error.
        _store().add(_ack_key(), 1)
        time.sleep(GRACE)
        kind = InputError if told["kind"] == InputError.__name__ else RunError
        error: Any = kind(f"process {rank_and_world()[0]} stops because process 0 failed: {told['error']}")
        error.told = True
        raise error
    if told["what"] != what:
        raise RunError(
            f"Process {rank_and_world()[0]} expects the decision {what!r}, but process 0 made {told['what']!r}. All"
            " processes must run the same command on the same files."
        )
    log.debug("process %d receives %s: %s", rank_and_world()[0], what, told["value"])
    return told["value"]


def agree(what: str, value: str) -> None:
    """Check that this process and process 0 have the same value.

    Args:
        what: name of the value, for the message.
        value: this process's value.

    Raises:
        InputError: naming both values, if they differ.
    """
    first = decide(what, lambda: value)
    if first != value:
        raise InputError(
            f"{what} of process {rank_and_world()[0]} is {value}, of process 0 {first}. All processes must have the"
            " same versions of hftlight and its libraries, and read the same files: put data, --output and"
            " HFTLIGHT_CACHE on a file system that every node shares."
        )


@contextmanager
def ending_together() -> Iterator[None]:
    """Report an exception of process 0 within the block to the other processes, so that none of them waits forever."""
    global _decided
    try:
        yield
    except BaseException as error:
        if rank_and_world()[1] > 1 and not getattr(error, "told", False):
            error.told = True  # type: ignore[attr-defined]  # so that an outer block does not report it again
            _decided += 1
            if rank_and_world()[0] == 0:
                _publish({"kind": type(error).__name__, "error": str(error) or type(error).__name__})
                _wait_for_acks(FAILED_GOODBYE)
        raise


def meet(what: str, work: Callable[[], None] = lambda: None) -> None:
    """Let process 0 work while the other processes wait.

    Process 0 continues, and may exit, once all other processes have acknowledged the end of the work.

    Args:
        what: name of the work, the same in every process.
        work: runs in process 0 only.
    """
    decide(what, work)
    if rank_and_world()[0] > 0:
        _store().add(_ack_key(), 1)
    elif rank_and_world()[1] > 1:
        _wait_for_acks(GOODBYE)


def _ack_key() -> str:
    """Return the store's key that counts the acknowledgments of the last decision."""
    return f"{_PREFIX}/{_decided}/known"


def _wait_for_acks(limit: float) -> None:
    """Wait at most ``limit`` seconds until all processes have read the last decision.

    The store may live in this process, so it would disappear if this process exited earlier.
    """
    until = time.monotonic() + limit
    # Adding 0 reads the counter.
    while _store().add(_ack_key(), 0) < rank_and_world()[1] - 1 and time.monotonic() < until:
        time.sleep(0.02)


def _store() -> Any:
    """Return the store of the default process group."""
    return dist.distributed_c10d._get_default_store()


def _publish(message: dict[str, Any]) -> None:
    """Write a decision or an error of process 0 into the store."""
    _store().set(f"{_PREFIX}/{_decided}", json.dumps(message))


def _wait_for_decision(what: str) -> dict[str, Any]:
    """Wait without a time limit for the next message of process 0 and return it.

    A line on standard error says every ``TELL_EVERY`` seconds that this process still waits.

    Args:
        what: name of the decision, for the messages.

    Raises:
        RunError: if the connection to process 0 is lost.
    """
    # The pause between two polls grows, so that short waits stay short and long waits cost little.
    key, pause, since = f"{_PREFIX}/{_decided}", 0.005, time.monotonic()
    reported_at = since
    try:
        while not _store().check([key]):
            time.sleep(pause)
            pause, now = min(LONGEST_PAUSE, 1.5 * pause), time.monotonic()
            if now - reported_at >= TELL_EVERY:
                reported_at, rank = now, rank_and_world()[0]
                print(
                    f"hftlight: process {rank} has waited {(now - since) / 60:.0f} min for process 0 ({what}).",
                    file=sys.stderr,
                )
        message: dict[str, Any] = json.loads(_store().get(key))
    except RuntimeError as error:  # torch raises it if the process that hosts the store is gone
        raise RunError(
            f"Process {rank_and_world()[0]} lost the connection to process 0 while it waited for {what!r}. The output"
            " of process 0 shows why it ended."
        ) from error
    return message
