"""The paper's numbers beside ours: difference, tolerance and verdict, cell by cell."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from hftlight.attacks.protocols.results import EVIDENCE, METRICS, Accept, Value
from hftlight.comparison.grid import value_text
from hftlight.comparison.read import Comparison, Place, read_comparison
from hftlight.comparison.reproduction.settings import Part, Reproduction, settings_of
from hftlight.evaluation.stats.seeds import Spread
from hftlight.files import write_json
from hftlight.folders import GRID, arm_word

AVERAGE = "average"
RESULT = "reproduction.json"


@dataclass(frozen=True)
class Line:
    """One cell of a paper's table beside ours.

    Attributes:
        metric: the metric.
        arm: the arm.
        value: the value of what varies, or ``AVERAGE``.
        paper: the paper's number, None if it is not known.
        ours: mean and 95 % interval, None if the cell is not finished or its metric cannot be compared.
        inside: whether ours is inside the tolerance. None if there is no tolerance, or nothing to compare.
    """

    metric: str
    arm: str
    value: Value
    paper: float | None
    ours: Spread | None
    inside: bool | None = None

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's number, in the metric's unit."""
        return None if self.paper is None or self.ours is None else self.ours.mean - self.paper


@dataclass(frozen=True)
class Outcome:
    """A condition of a reproduction with its result.

    Attributes:
        text: the condition in words.
        holds: whether it holds. None if a cell that it needs is missing or cannot be compared.
    """

    text: str
    holds: bool | None


@dataclass(frozen=True)
class Compared:
    """A repeated table with its numbers.

    Attributes:
        of: what was repeated.
        lines: the cells, by metric and arm.
        outcomes: the conditions of a reproduction.
        missing: cells that are not finished, each with the reason.
    """

    of: Reproduction
    lines: Sequence[Line]
    outcomes: Sequence[Outcome]
    missing: Mapping[str, str]

    @property
    def verdict(self) -> str:
        """The result in one sentence. A departure from the paper's setting allows neither pass nor fail."""
        known = [outcome for outcome in self.outcomes if outcome.holds is not None]
        if self.of.departures:
            count = len(self.of.departures)
            return f"Not the paper's setting: {count} option{'s depart' if count > 1 else ' departs'} from it."
        if self.missing:
            count = len(self.missing)
            return f"Not finished: {count} cell{'s are' if count > 1 else ' is'} missing."
        if not known:
            return "No verdict: no tolerance is set for the cells that were compared."
        held = sum(outcome.holds is True for outcome in known)
        basis = " The paper's numbers were recalled, so this is no check of them." if self.of.table.recalled else ""
        if held < len(known):
            return f"Not reproduced: {held} of {len(known)} conditions hold.{basis}"
        left = len(self.outcomes) - len(known)
        rest = f" {left} further conditions could not be compared." if left else ""
        return f"Reproduced within the tolerances: all {held} conditions hold.{rest}{basis}"

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        table, preset = self.of.table, self.of.preset
        return {
            "preset": preset.name,
            "paper": preset.source,
            "table": table.name,
            "task": table.task,
            "varies": table.varies,
            "evidence": table.evidence,
            "evidence_in_words": EVIDENCE[table.evidence],
            "recalled": table.recalled,
            "verdict": self.verdict,
            "departures": [asdict(departure) for departure in self.of.departures],
            "not_compared": dict(self.of.uncompared),
            "missing": dict(self.missing),
            "cells": [{**asdict(line), "difference": line.difference} for line in self.lines],
            "conditions": [asdict(outcome) for outcome in self.outcomes],
            "notes": [*table.notes, *preset.notes],
            "settings": settings_of(self.of),
        }


def compared(of: Reproduction) -> Compared:
    """Read the comparisons of a reproduction and set the paper's numbers beside ours."""
    read = {part.folder: read_comparison(part.folder) for part in of.parts if (part.folder / GRID).is_file()}

    def ours(metric: str, arm: str, value: Value) -> Spread | None:
        part = of.part(value)
        if metric in of.uncompared or part.folder not in read:
            return None
        return read[part.folder].spread(place_of(part, of.table.varies, arm, value), metric)

    lines = []
    for metric in of.table.cells:
        for arm in of.arms:
            if arm not in of.table.cells[metric]:
                continue
            found = {value: ours(metric, arm, value) for value in of.values}
            for value, spread in found.items():
                paper = of.table.paper(metric, arm, value)
                lines.append(Line(metric, arm, value, paper, spread, _inside(of, metric, arm, value, paper, spread)))
            if len(of.values) > 1:
                means = [spread.mean for spread in found.values() if spread is not None]
                mean = Spread(fmean(means), None, None, None, 0) if len(means) == len(found) else None
                lines.append(Line(metric, arm, AVERAGE, of.table.average(metric, arm, of.values), mean))
    by_cell = {(line.metric, line.arm, line.value): line for line in lines}
    outcomes = [outcome for accept in of.table.accept if (outcome := _outcome(of, accept, by_cell)) is not None]
    return Compared(of, lines, outcomes, _missing(of, read))


def place_of(part: Part, varies: str, arm: str, value: Value) -> Place:
    """Return the place of a cell's numbers in its comparison."""
    grid = part.grid
    ratio = float(value) if varies == "p" else grid.ratios(grid.attacks[0])[0]
    return Place(arm, grid.tasks[0], ratio, grid.attacks[0])


def _missing(of: Reproduction, read: Mapping[Path, Comparison]) -> dict[str, str]:
    """Return the unfinished cells of the reproduction with the reason of each."""
    missing = {}
    for part in of.parts:
        known = read[part.folder].missing if part.folder in read else {}
        done = set(read[part.folder].cells) if part.folder in read else set()
        for cell in part.grid.cells():
            place = Place(cell.arm, cell.task, cell.harmful_ratio, cell.attack)
            if cell.name in known or place not in done:
                where = cell.name if part.folder == of.folder else f"{part.folder.name}/{cell.name}"
                missing[where] = known.get(cell.name, "not run yet")
    return missing


def _inside(
    of: Reproduction, metric: str, arm: str, value: Value, paper: float | None, ours: Spread | None
) -> bool | None:
    """Tell whether a cell is inside every tolerance that is set for it.

    None stands for a cell without a tolerance or without a number, for a recalled cell, and for another setting.
    """
    if ours is None or of.departures or of.table.recalled:
        return None
    held = [
        _holds(accept, paper, ours.mean)
        for accept in of.table.accept
        if accept.metric == metric and arm in accept.arms and value in accept.values
    ]
    known = [one for one in held if one is not None]
    return all(known) if known else None


def _holds(accept: Accept, paper: float | None, ours: float) -> bool | None:
    if accept.kind == "within":
        return None if paper is None else abs(ours - paper) <= accept.points
    if accept.kind == "between":
        return accept.bounds[0] <= ours <= accept.bounds[1]
    return None


def _outcome(of: Reproduction, accept: Accept, lines: Mapping[tuple[str, str, Value], Line]) -> Outcome | None:
    """Return a condition with its result, or None if its arms or values were not asked for."""
    arms = [arm for arm in accept.arms if arm in of.arms]
    values = [value for value in accept.values if value in of.values]
    across = accept.kind in ("order", "lower")
    if not arms or not values or (across and len(arms) < len(accept.arms)):
        return None
    if accept.kind == "monotone" and len(values) < 2:
        return None
    text = _in_words(of, accept, arms, values)
    cells = {(arm, value): lines[accept.metric, arm, value] for arm in arms for value in values}
    if any(line.ours is None for line in cells.values()) or of.departures:
        return Outcome(text, None)
    ours = {key: line.ours.mean for key, line in cells.items() if line.ours is not None}
    if accept.kind == "monotone":
        return Outcome(text, all(ours[arm, a] <= ours[arm, b] for arm in arms for a, b in pairwise(values)))
    if accept.kind == "lower":
        low, high = (fmean(ours[arm, value] for value in values) for arm in arms)
        return Outcome(text, high - low >= accept.points)
    if accept.kind == "order":
        steps = [(a, b, strict) for (a, b), strict in zip(pairwise(arms), accept.strict, strict=True)]
        held = all(
            ours[a, value] < ours[b, value] if strict else ours[a, value] <= ours[b, value]
            for value in values
            for a, b, strict in steps
        )
        return Outcome(text, held)
    return Outcome(text, all(_holds(accept, line.paper, ours[key]) is not False for key, line in cells.items()))


def _in_words(of: Reproduction, accept: Accept, arms: Sequence[str], values: Sequence[Value]) -> str:
    """Return a condition as text."""
    metric = METRICS[accept.metric]
    who = ", ".join(map(arm_word, arms))
    at = "" if tuple(values) == of.table.values else f", {of.table.varies} = {', '.join(map(value_text, values))}"
    if accept.kind == "monotone":
        return f"{metric}, {who}: does not fall as {of.table.varies} rises"
    if accept.kind == "lower":
        low, high = map(arm_word, arms)
        return f"{metric}: {low} at least {accept.points:g} points below {high} on average{at}"
    if accept.kind == "order":
        signs = ["<" if strict else "<=" for strict in accept.strict]
        rest = [f" {sign} {arm_word(arm)}" for sign, arm in zip(signs, arms[1:], strict=True)]
        return f"{metric}: {arm_word(arms[0])}{''.join(rest)}{at}"
    if accept.kind == "between":
        return f"{metric}, {who}: between {accept.bounds[0]:g} and {accept.bounds[1]:g}{at}"
    return f"{metric}, {who}: within {accept.points:g} points of the paper{at}"


def write_result(result: Compared) -> Path:
    """Write ``reproduction.json`` into the folder of the reproduction and return its path."""
    path = result.of.folder / RESULT
    result.of.folder.mkdir(parents=True, exist_ok=True)
    write_json(path, json.loads(json.dumps(result.as_json(), default=str)))
    return path
