"""Sources: the rows of a run by source, each read as its options say, and what was taken of each."""

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
DEFENDERS: tuple[Role, ...] = ("harmful", "pairs")  # the defender's sources that an attacker must not share


class Sources:
    """The rows of a run, source by source.

    Args:
        data: where they come from, and what is taken.

    Attributes:
        tables: what was read so far, by source.
        taken: the same as plain values, for a manifest.
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
        """Return the rows of a source that is not the task's.

        Args:
            name: one of alignment, harmful, pairs, attack, test.
            need_response: whether every row must hold an answer.
            first: whether ``--data.first`` counts already.

        Raises:
            InputError: if they cannot be read.
        """
        return self._of(name, name, need_response, first)

    def over_refusal(self) -> list[Record]:
        """Return the ordinary prompts."""
        return self._of("over_refusal", "test", need_response=False)

    def task(self, split: str) -> list[Record]:
        """Return the task's rows, ``"train"`` or ``"test"``.

        Raises:
            InputError: if they cannot be read.
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
        """Return the defender's harmful rows and pairs, as far as they are needed, and the attacker's rows.

        Rows that both name are split by a hash of the prompt, whether a defense needs its part or not: so the attacker
        has the same rows against every defense.

        Args:
            needed: streams that the defenses draw from.
            attacks: whether the attack reads harmful rows.

        Raises:
            InputError: if rows cannot be read, or the two take some of the same rows.
        """
        shared = [name for name in DEFENDERS if self._shares(name)]
        attack = self.records("attack", first=not shared) if attacks or shared else []
        found: dict[str, list[Record]] = {"attack": attack}
        for name in DEFENDERS:
            if name in shared:
                found[name], found["attack"] = self._divided(name, found["attack"])
            elif name in needed:
                found[name] = self.records(name)
                self._check_apart(name)
        if shared:
            found["attack"] = found["attack"][: self.data.take("attack").first or None]
            self.taken["attack"] |= {"kept": len(found["attack"])}
        return found

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
        """Return the first rows of a part of the made-up world, which has no columns, splits or order of a file."""
        take = self.data.take(name)
        if take.split or take.rows or take.where or take.columns:
            note = f"--data.split, rows, where and columns of {name} are not used: its rows are the made-up world's."
            self._unused += [note]
        kept = rows[: take.first or None]
        said = {"source": BUILTIN, "first": take.first or None, "read": len(rows), "kept": len(kept)}
        self.taken[name] = {**said, "first_row": 0, "last_row": len(kept) - 1}
        return kept

    def _shares(self, name: str) -> bool:
        """Tell whether a source of the defender's takes the very rows that the attacker takes."""
        return self._one_file(name) and self.data.take(name).place == self.data.take("attack").place

    def _one_file(self, name: str) -> bool:
        mine, theirs = getattr(self.data, name), self.data.attack
        return BUILTIN not in (mine, theirs) and Path(mine).resolve() == Path(theirs).resolve()

    def _divided(self, name: Role, attack: list[Record]) -> tuple[list[Record], list[Record]]:
        """Return the defender's part of rows that both name, and what is left to the attacker."""
        rows = self.records(name, first=False)
        mine, _ = split_by_hash(rows, self.data.take(name).first or len(rows) // 2)
        prompts = {prompt_key(record) for record in mine}
        self.taken[name] |= {"kept": len(mine), "first": len(mine), "divided": "divided by a hash of the prompt"}
        self.taken["attack"] |= {"divided": "divided by a hash of the prompt"}
        ordered, _ = split_by_hash(attack, len(attack))
        return mine, [record for record in ordered if prompt_key(record) not in prompts]

    def _check_apart(self, name: str) -> None:
        """Refuse a row of one file that defender and attacker both take, unless both take the same rows."""
        mine, theirs = self.tables.get(name), self.tables.get("attack")
        if not self._one_file(name) or mine is None or theirs is None or mine.split != theirs.split:
            return
        if both := sorted({*mine.numbers} & {*theirs.numbers}):
            raise InputError(
                f"--data.{name} and --data.attack both take {len(both)} rows of {mine.source}, the first of them number"
                f" {both[0]}. Give ranges that lie apart with --data.rows, or the same choices for both: then the rows"
                " are split by a hash of the prompt."
            )
