"""Terminal output of a comparison: its plan, a progress bar, the table and sentences about the result."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from hftlight.comparison.claims import claims
from hftlight.comparison.dashboard import write_comparison_summary
from hftlight.comparison.grid import Cell, Grid
from hftlight.comparison.leaderboard import leaderboard_table, write_leaderboard
from hftlight.comparison.page import write_comparison_report
from hftlight.comparison.read import Comparison, read_comparison
from hftlight.comparison.sweep import compare, finished, plan
from hftlight.config import RunConfig
from hftlight.errors import RunError
from hftlight.folders import CELLS
from hftlight.runs.progress import minutes


def compare_and_show(config: RunConfig, grid: Grid, folder: Path, dry_run: bool, report_only: bool, **how: Any) -> None:
    """Run a comparison with a progress bar, print its table, and write table and report into its folder.

    Args:
        config: everything that the grid does not decide.
        grid: the cells.
        folder: the comparison's folder.
        dry_run: whether to print the cells and their estimated time, and stop.
        report_only: whether to run no cell.
        **how: further arguments of ``compare``.

    Raises:
        InputError: if the comparison cannot start.
        RunError: if a cell failed. The table of the other cells is written.
    """
    console, errors = Console(markup=False), {}
    if not report_only:
        seconds = plan(config, grid, [c for c in grid.cells() if not finished(folder / CELLS / c.name)])
        console.print(
            f"{len(grid.cells())} cells, {len(seconds)} to run: about {minutes(sum(seconds.values()))} on two idle CPU"
            " cores (cells share aligned models). Ctrl-C stops the comparison, and the same command continues it."
        )
        if dry_run:
            table = Table("cell", "about")
            for cell, took in seconds.items():
                table.add_row(cell.name, minutes(took))
            console.print(table)
            return
        with CellProgress(seconds) as progress:
            outcome = compare(config, grid, folder, on_cell=progress.update, **how)
        errors = {cell.name: what for cell, what in outcome.items() if what != "done"}
    comparison = read_comparison(folder)
    console.print(leaderboard_table(comparison))
    for sentence in claims(comparison):
        console.print(sentence, highlight=False)
    write_comparison(comparison, config, console)
    if errors:
        listed = "; ".join(f"{name}: {what}" for name, what in errors.items())
        raise RunError(
            f"{len(errors)} of {len(grid.cells())} cells failed ({listed}). Their logs are in {folder / CELLS}; the"
            " same command tries them again."
        )


def write_comparison(comparison: Comparison, config: RunConfig, console: Console) -> None:
    """Write table and report of a comparison into its folder, and its summary to W&B if that is the logger."""
    for path in [*write_leaderboard(comparison), write_comparison_report(comparison.folder)]:
        console.print(f"Written: {path}", soft_wrap=True)
    if config.logger == "wandb":
        write_comparison_summary(comparison, config)


class CellProgress:
    """Progress bar over the cells of a comparison. It prints a line for each cell that ends.

    Args:
        seconds: estimated seconds of each cell.
    """

    def __init__(self, seconds: Mapping[Cell, float]) -> None:
        self.seconds, self.left = seconds, dict(seconds)
        self.console = Console(stderr=True, markup=False)
        self._since = time.monotonic()
        self._bar = Progress(
            TextColumn("cells"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("cells", total=len(seconds), note="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *ended: object) -> None:
        self._bar.stop()

    def update(self, cell: Cell, what: str) -> None:
        """Show that a cell has started, is done, or failed."""
        if what == "started":
            self._bar.update(self._task, note=cell.name)
            return
        self.left.pop(cell, None)
        # Wall time per estimated second of the finished cells; it corrects the estimate of the cells that are left.
        done = sum(self.seconds.values()) - sum(self.left.values())
        rate = (time.monotonic() - self._since) / max(done, 1e-9)
        left = f"about {minutes(rate * sum(self.left.values()))} left"
        self._bar.update(self._task, completed=len(self.seconds) - len(self.left), note=left)
        color, said = ("green", "done") if what == "done" else ("red", "failed")
        note = left if what == "done" else what
        self.console.print(Text.assemble((said, color), f" {cell.name}: {note}"), highlight=False)
