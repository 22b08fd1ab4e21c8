"""The tables of published papers as data: cells, arms, inputs, and what counts as a reproduction."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from hftlight.attacks.protocols.facts import check_keys, nearest
from hftlight.attacks.protocols.protocol import PRESETS, Preset, get_preset, options_in
from hftlight.attacks.sources import SOURCES
from hftlight.config import RunConfig
from hftlight.errors import InputError
from hftlight.registry import defense_class

# Tags of evidence, and their words in a result.
EVIDENCE = {
    "fig": "read from the published table",
    "log": "read from a log of the authors",
    "code": "read in the authors' code",
    "page": "read on a page about the paper",
    "mem": "recalled, not checked",
    "mem+": "recalled, not checked; the recalled averages agree with the cells",
}
METRICS = {
    "harmful_score": "Harmful score %",
    "harmful_score_mean": "Mean score",
    "finetune_accuracy": "Accuracy %",
    "finetune_accuracy_lenient": "Accuracy (lenient) %",
}
JUDGED = ("harmful_score", "harmful_score_mean")  # metrics that depend on the judge
SHARED = ("files", "judge", "run", "arms", "notes", "tables")
OF_TABLE = ("name", "task", "varies", "values", "attack", "evidence", "accept")
AXES = ("p", "n", "lr", "epochs", "model", "task")  # what may vary, besides an argument of a defense
KINDS = ("within", "between", "monotone", "order", "lower")
CHOSEN_BY_USER = ""  # a source that the protocol leaves to the user, and that is still missing
Value = float | str
Cells = Mapping[str, Mapping[str, tuple[float | None, ...]]]


@dataclass(frozen=True)
class Accept:
    """A condition on our numbers, under which a table counts as reproduced. The conditions are this project's own.

    Attributes:
        metric: the metric.
        kind: within (of the paper's number), between (two numbers), monotone (rising over the values), order (of the
            arms), or lower (one arm than another, on average).
        arms: the arms that the condition is about.
        values: the values of what varies.
        points: largest distance for within, smallest distance for lower, in the metric's unit.
        bounds: both ends for between.
        strict: for order, whether each arm must lie strictly below the next one.
    """

    metric: str
    kind: str
    arms: tuple[str, ...]
    values: tuple[Value, ...]
    points: float = 0.0
    bounds: tuple[float, float] = (0.0, 0.0)
    strict: tuple[bool, ...] = ()


@dataclass(frozen=True)
class PaperTable:
    """One table of a paper.

    Attributes:
        name: name of the table in the paper, or what it compares if the number of the table is unchecked.
        varies: one of ``AXES``, or an argument of a defense such as ``antidote.prune_ratio``.
        values: the values of what varies, in the order of the paper.
        task: the user's task; None if the task varies, or if the protocol has no task.
        arms: arguments by defense as the file has them, see ``arguments``; ``none`` is plain fine-tuning.
        cells: the paper's numbers by metric and arm, in the order of ``values``. None is a cell that is not known.
        evidence: a key of ``EVIDENCE``.
        judge: name of the judge of the harmful score.
        files: public set by source of a run, as ``NAME:SPLIT`` with a name of ``SOURCES``, or any other text.
        run: options of a run that this table adds to the protocol, by dotted name.
        attack: fields of the protocol's attack that this table changes.
        accept: conditions of a reproduction.
        notes: differences between the table and a run.
    """

    name: str
    varies: str
    values: tuple[Value, ...]
    task: str | None
    arms: Mapping[str, Mapping[str, Any]]
    cells: Cells
    evidence: str
    judge: str
    files: Mapping[str, str]
    run: Mapping[str, Any] = field(default_factory=dict)
    attack: Mapping[str, Any] = field(default_factory=dict)
    accept: tuple[Accept, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def recalled(self) -> bool:
        """Whether the numbers were recalled. Recalled numbers must never be shown as checked."""
        return self.evidence.startswith("mem")

    def arguments(self, arm: str) -> dict[str, Any]:
        """Return the arguments of an arm: those of the defense's published setting ``preset``, then the table's own.

        Raises:
            InputError: if the defense has no such published setting.
        """
        own = dict(self.arms[arm])
        if (preset := own.pop("preset", None)) is None:
            return own
        published = defense_class(arm).presets
        if preset not in published:
            raise InputError(f"Table {self.name}, arm {arm}: presets are {', '.join(published)}, got {preset!r}.")
        return {**published[preset], **own}

    def paper(self, metric: str, arm: str, value: Value) -> float | None:
        """Return the paper's number of a cell, or None if it is not known."""
        row = self.cells[metric].get(arm)
        return None if row is None else row[self.values.index(value)]

    def average(self, metric: str, arm: str, values: Sequence[Value]) -> float | None:
        """Return the mean of the paper's cells, or None if one is not known. Printed averages are never copied."""
        row = [self.paper(metric, arm, value) for value in values]
        known = [cell for cell in row if cell is not None]
        return fmean(known) if known and len(known) == len(row) else None

    def origin(self, source: str) -> str:
        """Return where the rows of a source come from, with columns and licence if the set is listed."""
        name, _, split = self.files[source].partition(":")
        if name not in SOURCES:
            return self.files[source]
        return replace(SOURCES[name], harmful="").line(f"split {split}" if split else "public set")


def paper_tables(preset: Preset) -> list[PaperTable]:
    """Return the tables of a protocol's paper.

    Raises:
        InputError: if an entry of the protocol's file is not valid.
    """
    if not preset.results:
        return []
    where = f"{preset.name}.yaml, results"
    check_keys(where, preset.results, SHARED, required=("files", "judge", "arms", "tables"))
    return [_table(f"{where}.{own.get('name')}", preset.results, own) for own in preset.results["tables"]]


def paper_table(preset: Preset, task: str | None = None, name: str | None = None) -> PaperTable:
    """Return one table of a protocol.

    Args:
        preset: the protocol.
        task: the user's task; None means the task of the named table, or of the first one.
        name: name of the table; None means the first table of the task.

    Raises:
        InputError: if there is no such table. The message lists the tables.
    """
    tables = paper_tables(preset)
    if not tables:
        known = ", ".join(p for p in PRESETS if get_preset(p).results)
        raise InputError(f"Preset {preset.name}: no table of its paper is known here. Tables are known for {known}.")
    shown = "; ".join(f"{t.name!r} ({t.task or _tasks(t)})" for t in tables)
    named = [t for t in tables if name is None or _plain(t.name) == _plain(name)]
    if not named:
        raise InputError(f"--table: {preset.name} has {shown}, got {name!r}.{nearest(name or '', _names(tables))}")
    # A table without a task either varies it, or belongs to a protocol that ignores it.
    fitting = [
        t for t in named if task in (None, t.task) or (t.task is None and (t.varies != "task" or task in t.values))
    ]
    if not fitting:
        raise InputError(f"Preset {preset.name}: no such table for the task {task!r}. There are {shown}.")
    return fitting[0]


def _plain(name: str) -> str:
    """Return a table's name as it is compared: underscores and hyphens stand for spaces, and case does not matter."""
    return name.replace("_", " ").replace("-", " ").casefold()


def _names(tables: Sequence[PaperTable]) -> tuple[str, ...]:
    return tuple(table.name for table in tables)


def _tasks(table: PaperTable) -> str:
    return ", ".join(map(str, table.values)) if table.varies == "task" else "no task of its own"


def _table(where: str, shared: Mapping[str, Any], own: Mapping[str, Any]) -> PaperTable:
    """Return a table. What it does not state itself comes from the entries that all tables of the file share."""
    required = ("name", "varies", "values", "evidence")
    check_keys(where, own, (*OF_TABLE, *(k for k in SHARED if k != "tables"), *METRICS), required=required)
    values = tuple(own["values"])
    if own["evidence"] not in EVIDENCE:
        raise InputError(f"{where}: evidence is one of {', '.join(EVIDENCE)}, got {own['evidence']!r}.")
    cells = {metric: {arm: tuple(row) for arm, row in own[metric].items()} for metric in METRICS if metric in own}
    listed = {**shared["arms"], **own.get("arms", {})}
    # A table has the arms for which it has numbers, in the order of the file's arms.
    arms = {arm: own_arguments for arm, own_arguments in listed.items() if any(arm in rows for rows in cells.values())}
    for metric, rows in cells.items():
        for arm, row in rows.items():
            if arm not in arms:
                raise InputError(f"{where}.{metric}: arms are {', '.join(listed)}, got {arm!r}.")
            if len(row) != len(values):
                raise InputError(f"{where}.{metric}.{arm}: {len(values)} values need as many cells, got {len(row)}.")
    varies = str(own["varies"])
    if varies not in AXES and varies.partition(".")[0] not in arms:
        raise InputError(f"{where}: what varies is {', '.join(AXES)} or an argument of an arm, got {varies!r}.")
    run: dict[str, Any] = {}
    for part in (shared, own):  # mappings such as data.rows are merged source by source
        for option, value in options_in(f"{where}.run", part.get("run", {}), RunConfig()).items():
            run[option] = {**run.get(option, {}), **value} if isinstance(value, Mapping) else value
    return PaperTable(
        name=own["name"],
        varies=varies,
        values=values,
        task=own.get("task"),
        arms=arms,
        cells=cells,
        evidence=own["evidence"],
        judge=own.get("judge", shared["judge"]),
        files={**shared["files"], **own.get("files", {})},
        run=run,
        attack=own.get("attack", {}),
        accept=tuple(_accept(f"{where}.accept", one, tuple(arms), values, cells) for one in own.get("accept", ())),
        notes=(*shared.get("notes", ()), *own.get("notes", ())),
    )


def _accept(
    where: str, own: Mapping[str, Any], arms: tuple[str, ...], values: tuple[Value, ...], cells: Cells
) -> Accept:
    check_keys(where, own, ("metric", "arms", "values", "higher", "points", *KINDS), required=("metric",))
    kinds = [kind for kind in KINDS if kind in own]
    if len(kinds) != 1 or own["metric"] not in cells:
        raise InputError(f"{where}: needs a metric of the table and one of {', '.join(KINDS)}, got {dict(own)}.")
    kind, chosen, strict = kinds[0], tuple(own.get("arms", arms)), tuple[bool, ...]()
    if kind == "order":
        words = re.split(r"\s*(<=|<)\s*", own["order"])
        chosen, strict = tuple(words[::2]), tuple(word == "<" for word in words[1::2])
    elif kind == "lower":
        chosen = (own["lower"], own["higher"])
    picked = tuple(own.get("values", values))
    if unknown := [one for one in (*chosen, *picked) if one not in (*arms, *values)]:
        raise InputError(f"{where}: names arms and values of the table, got {unknown[0]!r}.")
    return Accept(
        own["metric"],
        kind,
        chosen,
        picked,
        float(own.get("within", own.get("points", 0))),
        tuple(own.get("between", (0.0, 0.0))),
        strict,
    )
