"""Sources: reads the rows of each source of a run by its options, and records what was read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from hftlight.config import Data
from hftlight.data.records import Record, Role, prompt_key, split_by_hash, to_records
from hftlight.data.sources import get_task
from hftlight.data.table import Table, read_table
from hftlight.data.world.build import build_world
from hftlight.errors import InputError
from hftlight.take import Take

BUILTIN = "builtin"
DEFENDERS: tuple[Role, ...] = ("harmful", "pairs")  # the defender's sources, whose rows the attacker must not use


class Sources:
    """The reader of a run's rows, source by source.

    Args:
        data: the sources, and which rows to take from each.

    Attributes:
        tables: tables read so far, by source.
        taken: descriptions of what was read so far, by source, as plain values for a manifest.
    """

    def __init__(self, data: Data) -> None:
        self.data = data
        self.tables: dict[str, Table] = {}
        self.taken: dict[str, dict[str, Any]] = {}
        self._unused: list[str] = []

    @property
    def notes(self) -> list[str]:
        """Sentences about choices that could not be followed, and about what of a file is not used."""
        return list(dict.fromkeys([*self._unused, *(note for t in self.tables.values() for note in t.notes)]))

    def records(self, name: Role, need_response: bool = True, first: bool = True) -> list[Record]:
        """Return the rows of a source other than the task.

        Args:
            name: one of alignment, harmful, pairs, attack, test.
            need_response: whether every row must hold an answer.
            first: whether ``--data.first`` limits the rows here; False leaves the limit to the caller.

        Raises:
            InputError: if the rows cannot be read.
        """
        return self._of(name, name, need_response, first)

    def over_refusal(self) -> list[Record]:
        """Return the ordinary prompts, which test for over-refusal."""
        return self._of("over_refusal", "test", need_response=False)

    def task(self, split: str) -> list[Record]:
        """Return the task's rows.

        Args:
            split: ``"train"`` or ``"test"``.

        Raises:
            InputError: if the rows cannot be read.
        """
        task, name = get_task(self.data.task), f"task_{split}"
        path = getattr(self.data, name)
        if path is None and task.one_file:
            path = self.data.task_train or self.data.task_test
        if task.name == BUILTIN:
            return self._built_in(name, task.records(split, path))

        def read(source: str | Path, usual: str) -> Table:
            return self._table(name, source, usual, self.data.take(name))

        return task.records(split, path, read)

    def defenders_and_attack(self, needed: set[str], attacks: bool) -> dict[str, list[Record]]:
        """Return the attacker's rows, and the defender's harmful rows and pairs that are needed.

        If defender and attacker name the same rows, a hash of the prompt splits them. This happens whether or not a
        defense needs its part, so that the attacker has the same rows against every defense.

        Args:
            needed: streams that the defenses draw from.
            attacks: whether the attack reads harmful rows.

        Raises:
            InputError: if rows cannot be read, or defender and attacker take overlapping but different rows of one
                file.
        """
        # Shared rows are split before ``--data.first`` applies, so the attack's limit comes last.
        shared = [name for name in DEFENDERS if self._shares(name)]
        attack = self.records("attack", first=not shared) if attacks or shared else []
        rows: dict[str, list[Record]] = {"attack": attack}
        for name in DEFENDERS:
            if name in shared:
                rows[name], rows["attack"] = self._divide(name, rows["attack"])
            elif name in needed:
                rows[name] = self.records(name)
                self._check_apart(name)
        if shared:
            rows["attack"] = rows["attack"][: self.data.take("attack").first or None]
            self.taken["attack"] |= {"kept": len(rows["attack"])}
        return rows

    def _of(self, name: str, role: Role, need_response: bool, first: bool = True) -> list[Record]:
        source, take = getattr(self.data, name), self.data.take(name)
        if source == BUILTIN:
            world = build_world()
            return self._built_in(name, world.lookalike if name == "over_refusal" else getattr(world, name))
        table = self._table(name, source, "train", take if first else replace(take, first=0))
        return to_records(table, role, need_response)

    def _table(self, name: str, source: str | Path, split: str, take: Take) -> Table:
        self.tables[name] = table = read_table(source, split, take)
        self.taken[name] = table.taken()
        return table

    def _built_in(self, name: str, rows: list[Record]) -> list[Record]:
        """Return the first rows of a part of the made-up world, and note options that do not apply to it."""
        take = self.data.take(name)
        if take.split or take.rows or take.where or take.columns:
            note = f"--data.split, rows, where and columns of {name} have no effect on rows of the made-up world."
            self._unused += [note]
        chosen = rows[: take.first or None]
        counts = {"source": BUILTIN, "first": take.first or None, "read": len(rows), "kept": len(chosen)}
        self.taken[name] = {**counts, "first_row": 0, "last_row": len(chosen) - 1}
        return chosen

    def _shares(self, name: str) -> bool:
        """Tell whether a defender's source takes exactly the rows that the attacker takes, ``first`` aside."""
        return self._one_file(name) and self.data.take(name).place == self.data.take("attack").place

    def _one_file(self, name: str) -> bool:
        """Tell whether a defender's source and the attack read the same file."""
        mine, theirs = getattr(self.data, name), self.data.attack
        return BUILTIN not in (mine, theirs) and Path(mine).resolve() == Path(theirs).resolve()

    def _divide(self, name: Role, attack: list[Record]) -> tuple[list[Record], list[Record]]:
        """Split rows that defender and attacker both name, by a hash of the prompt.

        The defender gets the first ``--data.first`` rows, or half of the rows. The attacker gets the rest, without
        the defender's prompts.

        Args:
            name: the defender's source.
            attack: the attacker's rows so far.

        Returns:
            The defender's rows, and the attacker's rows.
        """
        rows = self.records(name, first=False)
        mine, _ = split_by_hash(rows, self.data.take(name).first or len(rows) // 2)
        prompts = {prompt_key(record) for record in mine}
        self.taken[name] |= {"kept": len(mine), "first": len(mine), "divided": "divided by a hash of the prompt"}
        self.taken["attack"] |= {"divided": "divided by a hash of the prompt"}
        ordered, _ = split_by_hash(attack, len(attack))
        return mine, [record for record in ordered if prompt_key(record) not in prompts]

    def _check_apart(self, name: str) -> None:
        """Refuse rows of one file that both defender and attacker take.

        Raises:
            InputError: naming the first such row.
        """
        mine, theirs = self.tables.get(name), self.tables.get("attack")
        if not self._one_file(name) or mine is None or theirs is None or mine.split != theirs.split:
            return
        if both := sorted({*mine.numbers} & {*theirs.numbers}):
            raise InputError(
                f"--data.{name} and --data.attack both take {len(both)} rows of {mine.source}, the first of them number"
                f" {both[0]}. Use ranges without common rows in --data.rows, or the same options for both. With the"
                " same options a hash of the prompt splits the rows."
            )
