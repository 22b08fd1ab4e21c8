"""The progress display of a run: the current step, its loss, and the estimated time left."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

LINE_EVERY = 20.0  # seconds between progress lines if the output is not a terminal


class Piece(Protocol):
    """The part of a run's step that the progress display needs."""

    @property
    def label(self) -> str:
        """Arm and stage."""

    @property
    def count(self) -> int:
        """Number of optimizer steps, prompts, rows or other units."""

    @property
    def seconds(self) -> float:
        """Estimated seconds."""


def minutes(seconds: float) -> str:
    """Return a duration as text: in seconds below 90 seconds, else in minutes."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


class RunProgress:
    """A progress bar for the current step with the time left for the whole run.

    Without a terminal it prints plain lines instead.

    Args:
        steps: the run's steps in order.
        console: output; standard error by default, so that standard output holds only tables and can be piped.
    """

    def __init__(self, steps: Sequence[Piece], console: Console | None = None) -> None:
        self.steps = list(steps)
        self.console = console or Console(stderr=True, markup=False)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self._task: TaskID | None = None
        self._position = -1
        self._done = self._count = 0
        self._resumed_at: int | None = None
        self._spent = self._expected = 0.0
        self._since = self._line_at = time.monotonic()

    def __enter__(self) -> "RunProgress":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()

    def begin(self) -> None:
        """Start the display of the next step."""
        self._position += 1
        step = self.steps[self._position]
        self._done, self._count, self._resumed_at, self._since = 0, step.count, None, time.monotonic()
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(step.label, total=step.count, note=self._left())
        self._line_at = time.monotonic()

    def update(self, done: int, loss: float | None = None, of: int | None = None) -> None:
        """Show the progress of the current step.

        Args:
            done: finished units, at most the step's count.
            loss: loss in nats per response token; None for a step without a loss.
            of: the step's count, if it is known only now.
        """
        if of is not None:
            self._count = of
        # A training reports after each optimizer step: a first report above 1 means that it resumed at ``done - 1``.
        # Other steps report without a loss, may jump by a whole batch, and never resume.
        if self._resumed_at is None:
            self._resumed_at = 0 if done > 1 and loss is None else done - 1
        self._done = done
        note = self._left() if loss is None else f"loss {loss:.3f}, {self._left()}"
        if self._task is not None:
            self._bar.update(self._task, completed=done, total=self._count, note=note)
        if not self.console.is_terminal and time.monotonic() - self._line_at > LINE_EVERY:
            self._line_at = time.monotonic()
            self.console.print(f"{self.steps[self._position].label}: {done}/{self._count}, {note}")

    def end(self, note: str, reused: bool = False) -> None:
        """End the current step with a line.

        Args:
            note: outcome of the step in words.
            reused: whether the result came from the cache. The estimate of the time left then does not change.
        """
        step = self.steps[self._position]
        spent = time.monotonic() - self._since
        if not reused:
            share = 1 - (self._resumed_at or 0) / max(1, self._count)
            self._spent, self._expected = self._spent + spent, self._expected + step.seconds * share
        self._done = self._count
        how = "reused" if reused else minutes(spent)
        self.console.print(Text.assemble(("done", "green"), f" {step.label} ({how}): {note}"), highlight=False)

    def _left(self) -> str:
        """Return the time left for the run, in words."""
        step = self.steps[self._position]
        share = 1 - self._done / max(1, self._count)
        ahead = step.seconds * share + sum(s.seconds for s in self.steps[self._position + 1 :])
        running = time.monotonic() - self._since
        begun = step.seconds * (self._done - (self._resumed_at or 0)) / max(1, self._count)
        spent, expected = self._spent + running, self._expected + begun
        # Measured seconds per estimated second. The 20 seconds on both sides damp the rate at the start of a run.
        rate = (spent + 20) / (expected + 20)
        return f"about {minutes(ahead * rate)} left in all"
