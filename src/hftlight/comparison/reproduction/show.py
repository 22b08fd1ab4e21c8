"""Terminal output of a reproduction: its plan, the runs, and the paper's table beside ours."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from hftlight.attacks.protocols.results import EVIDENCE, METRICS
from hftlight.comparison.grid import Cell, value_text
from hftlight.comparison.read import read_comparison
from hftlight.comparison.reproduction.inputs import check_inputs
from hftlight.comparison.reproduction.page import sentences, terminal_table, write_pages
from hftlight.comparison.reproduction.result import compared, write_result
from hftlight.comparison.reproduction.settings import Part, Reproduction
from hftlight.comparison.show import CellProgress, write_comparison
from hftlight.comparison.sweep import compare, finished, plan
from hftlight.errors import InputError, RunError
from hftlight.folders import CELLS, GRID, arm_word
from hftlight.runs.progress import minutes


def reproduce_and_show(of: Reproduction, dry_run: bool, report_only: bool, **how: Any) -> None:
    """Check every input, print the plan, run the table's cells, and print and write the result.

    Args:
        of: what to repeat.
        dry_run: whether to stop after the plan. The network is not used.
        report_only: whether to run nothing, and report the finished cells.
        **how: further arguments of ``compare``.

    Raises:
        InputError: if inputs are missing or wrong. The message names all of them.
        RunError: if a cell failed. The result of the other cells is written.
    """
    console, errors = Console(markup=False, highlight=False), dict[str, str]()
    if not report_only:
        unread = _checked(of, dry_run, console)
        seconds = {} if dry_run and unread else _seconds(of)
        _print_cost(of, seconds, unread, console)
        if dry_run:
            return
        errors = _run(of, seconds, **how)
    if not any((part.folder / GRID).is_file() for part in of.parts):
        raise InputError(f"--report_only: {of.folder} holds no cells yet. Leave --report_only out to run them.")
    for part in of.parts:
        if (part.folder / GRID).is_file():
            write_comparison(read_comparison(part.folder), part.config, console)
    result = compared(of)
    console.print(terminal_table(result))
    for sentence in sentences(result):
        console.print(sentence)
    for path in [write_result(result), *write_pages(result)]:
        console.print(f"Written: {path}", soft_wrap=True)
    if errors:
        listed = "; ".join(f"{name}: {what}" for name, what in errors.items())
        raise RunError(
            f"{len(errors)} cells failed ({listed}). Their logs are below {of.folder}; the same command tries them"
            " again."
        )


def _checked(of: Reproduction, dry_run: bool, console: Console) -> list[str]:
    """Print the plan, and return what could not be read because it is on the hub.

    Raises:
        InputError: naming everything that is missing or wrong at once.
    """
    _print_plan(of, console)
    wrong, unread = list[str](), list[str]()
    for part in of.parts:
        lacking, remote = check_inputs(part, of.table, dry_run)
        wrong += lacking
        unread += remote
    if wrong := _once(wrong):
        many = "1 input is" if len(wrong) == 1 else f"{len(wrong)} inputs are"
        raise InputError(f"{many} missing or wrong:" + "".join(f"\n  - {text}" for text in wrong))
    return list(dict.fromkeys(unread))


def _once(told: Sequence[str]) -> list[str]:
    """Return each text once, and the origin of rows only where it is told first."""
    known: set[str] = set()
    texts = []
    for text in dict.fromkeys(told):
        what, mark, origin = text.partition(" Origin: ")
        texts.append(what if origin in known else what + mark + origin)
        known.add(origin)
    return texts


def _print_plan(of: Reproduction, console: Console) -> None:
    """Print the table, its arms with arguments and steps, and everything that keeps numbers from being compared."""
    table = of.table
    console.print(f"{of.preset.source}: {table.name}. Its numbers were {EVIDENCE[table.evidence]}.")
    shown = Table("arm", "arguments", "adapter", "alignment steps", "fine-tuning steps", box=None, padding=(0, 1))
    first = of.parts[0]
    steps = {part.grid.attack(part.grid.attacks[0]).applied(part.counted).finetuning.steps for part in of.parts}
    for arm in of.arms:
        own = (first.grid.arguments or {}).get(arm, {})
        changed = {name: own[name] for name in table.arguments(arm) if name in own}
        aligned = "0" if arm == "unaligned" else str(first.config.alignment.steps)
        shown.add_row(
            arm_word(arm),
            ", ".join(f"{name} {_value(value)}" for name, value in changed.items()),
            first.config.protocol_of(arm),
            aligned,
            " or ".join(map(str, sorted(steps))) if first.config.num_samples else "as many as the rows need",
        )
    console.print(shown)
    console.print(f"{table.varies}: {', '.join(map(value_text, of.values))}")
    left = [METRICS[metric] for metric in table.cells if metric not in of.uncompared]
    console.print(f"Compared: {', '.join(left) or 'nothing'}.")
    for metric, why in of.uncompared.items():
        console.print(f"{METRICS[metric]} is not compared: {why}.")
    for departure in of.departures:
        console.print(f"Departs from the paper: {departure}.")
    for note in table.notes:
        console.print(f"Note: {note}.")


def _value(value: Any) -> str:
    return value_text(value) if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _seconds(of: Reproduction) -> Mapping[int, Mapping[Cell, float]]:
    """Return the estimated seconds of each unfinished cell by part."""
    return {number: plan(part.config, part.grid, _unfinished(part)) for number, part in enumerate(of.parts)}


def _unfinished(part: Part) -> list[Cell]:
    return [cell for cell in part.grid.cells() if not finished(part.folder / CELLS / cell.name)]


def _print_cost(
    of: Reproduction, seconds: Mapping[int, Mapping[Cell, float]], unread: Sequence[str], console: Console
) -> None:
    """Print the number of cells and their time, or why there is no time."""
    count = sum(len(part.grid.cells()) for part in of.parts)
    cells = "1 cell" if count == 1 else f"{count} cells"
    if unread:
        console.print(f"On the hub, and not read here: {', '.join(unread)}.")
    if not seconds:
        console.print(f"{cells}. The time is unknown until every input is on this machine.")
        return
    left, total = sum(map(len, seconds.values())), sum(sum(some.values()) for some in seconds.values())
    console.print(
        f"{cells}, {left} to run: about {minutes(total)} on two idle CPU cores (cells share aligned models)."
        " Ctrl-C stops the reproduction, and the same command continues it."
    )


def _run(of: Reproduction, seconds: Mapping[int, Mapping[Cell, float]], **how: Any) -> dict[str, str]:
    """Run every part and return the error of each failed cell."""
    errors = dict[str, str]()
    for number, part in enumerate(of.parts):
        with CellProgress(seconds[number]) as progress:
            outcome = compare(part.config, part.grid, part.folder, on_cell=progress.update, **how)
        prefix = "" if part.folder == of.folder else f"{part.folder.name}/"
        errors |= {f"{prefix}{cell.name}": what for cell, what in outcome.items() if what != "done"}
    return errors
