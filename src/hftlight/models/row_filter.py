"""Filters of an upload: data-slot defenses that drop rows by a score, computed before the stage."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from typing_extensions import override

from hftlight.data.records import UPLOADED, Record
from hftlight.data.templates import Template
from hftlight.engine.step.defense import Defense
from hftlight.engine.step.slots import Slot, Stage
from hftlight.errors import InputError
from hftlight.models.load import positions_of
from hftlight.models.module import decoder_layers
from hftlight.models.row_reader import Pooling, RowReader

UNLIMITED = 10**9  # tokens
OWN = ("id", "score", "kept")  # what the selection says of each row; its other values are the same for all rows


def check_fraction(who: str, name: str, value: float, below_one: bool = False) -> None:
    """Refuse a number outside [0, 1], or outside [0, 1).

    Raises:
        ValueError: naming the defense, the argument and the value.
    """
    if not 0 <= value <= 1 or (below_one and value == 1):
        hint = f" If that is a percentage, write {value / 100:g}." if 1 < value <= 100 else ""
        end = ")" if below_one else "]"
        raise ValueError(f"{who}: {name} is a fraction and must lie in [0, 1{end}, got {value}.{hint}")


class RowFilter(Defense):
    """A defense that drops rows of the user's upload and trains on the others.

    A subclass implements ``off`` and ``select``, which ends with ``decided``. Rows are dropped by their ids, so rows
    that other defenses add or take out shift nothing. The filter cannot tell the attacker's rows from the user's.

    Attributes:
        max_tokens: tokens of a row that are read; None for all that the model has positions for.
    """

    stage, slots, selects = Stage.FINETUNING, (Slot.DATA,), True
    max_tokens: int | None = None

    @property
    def off(self) -> bool:
        """Whether the settings drop no row."""
        raise NotImplementedError(f"{type(self).__name__} drops rows and must implement off.")

    def reader(self, model: Any, tokenizer: Any, template: Template, system: str | None, batch_size: int) -> RowReader:
        """Return the reader of rows, which cuts rows that are too long."""
        limit = self.max_tokens or positions_of(model.config) or UNLIMITED
        return RowReader(model, tokenizer, template, system, limit, batch_size, "truncate")

    def decided(
        self, rows: Sequence[Record], scores: Mapping[int, float], kept: set[int], **facts: Any
    ) -> list[dict[str, Any]]:
        """Store the selection and return it: id, score and fate of each row, and what holds for all rows.

        A row without a score is dropped. Its prompt alone fills the limit, so nothing of it could be trained on.

        Args:
            rows: the upload.
            scores: score of each row by its place.
            kept: places of the rows that stay.
            **facts: plain values of the whole selection, such as the layer.

        Raises:
            InputError: if no row stays.
        """
        if not kept:
            self._refuse_all(len(rows))
        self.selected = [
            {"id": row.id, "score": scores.get(place), "kept": place in kept, **facts} for place, row in enumerate(rows)
        ]
        return self.selected

    @override
    def rewrite(self, records: dict[str, list[Record]], seed: int) -> dict[str, list[Record]]:
        """Leave out the dropped rows.

        Raises:
            RuntimeError: if rows of the upload have not been scored.
            InputError: if no row would be left.
        """
        if self.off:
            return records
        who, selected = type(self).__name__, self.selected or []
        scored, dropped = {row["id"] for row in selected}, Counter(row["id"] for row in selected if not row["kept"])
        # Rows that other defenses added have another role. Within the upload the role is not looked at.
        unknown = sum(r.role in UPLOADED and r.id not in scored for r in records["task"])
        if unknown:
            raise RuntimeError(
                f"{who}: {unknown} of {len(records['task'])} rows are not scored yet. Call select(model, tokenizer,"
                " template, records) with these rows before fit()."
            )
        left = []
        for row in records["task"]:
            # Equal rows have one id and one score. As many of them leave as were dropped.
            if dropped[row.id]:
                dropped[row.id] -= 1
            else:
                left.append(row)
        if not left:
            self._refuse_all(len(records["task"]))
        self.record(dropped_rows=len(records["task"]) - len(left), upload_rows=len(records["task"]))
        return {**records, "task": left}

    @override
    def manifest(self) -> dict[str, Any]:
        """Return the trace, the number of scored and of kept rows, and what holds for the whole selection."""
        rows = self.selected or []
        if not rows:
            return super().manifest()
        facts = {name: value for name, value in rows[0].items() if name not in OWN}
        return {**super().manifest(), "rows": len(rows), "kept": sum(row["kept"] for row in rows), **facts}

    def _refuse_all(self, count: int) -> None:
        raise InputError(
            f"{type(self).__name__}: all {count} rows of the upload would be dropped, and at least one must be left."
            " Drop fewer rows."
        )


@dataclass(frozen=True)
class Verdict:
    """What a filter concludes from hidden states.

    Attributes:
        scores: score of each row of the upload that was read, ``[rows]``.
        sign: 1 if high scores are dropped, -1 if low ones are.
        count: number of rows to drop; None if the threshold decides.
        threshold: score beyond which rows are dropped; used if ``count`` is None.
        facts: plain values of the whole selection.
    """

    scores: Tensor
    sign: int = 1
    count: int | None = None
    threshold: float = math.inf
    facts: Mapping[str, Any] = field(default_factory=dict)


class StateFilter(RowFilter):
    """A filter that scores rows by their hidden states in the model that the stage starts from.

    A subclass implements ``off``, ``groups`` and ``judged``, and stores its arguments. The model is read in evaluation
    mode, with the template of the training.

    Attributes:
        layer: decoder layer whose output is read, counted from 1; None leaves the choice to ``layers``.
        pooling: tokens that are read, as in ``RowReader.layer_states``.
    """

    layer: int | None = None
    pooling: Pooling = "last"

    def groups(self, records: Mapping[str, Sequence[Record]]) -> dict[str, list[Record]]:
        """Return the defender's rows that are read beside the upload, by a name for ``judged``.

        Raises:
            InputError: if there are too few rows.
        """
        raise NotImplementedError(f"{type(self).__name__} reads rows and must implement groups().")

    def layers(self, count: int) -> list[int]:
        """Return the layers to read of a model with ``count`` decoder layers if ``layer`` names none."""
        raise NotImplementedError(f"{type(self).__name__} reads layers and must implement layers().")

    def judged(self, states: Mapping[str, Tensor], layers: Sequence[int]) -> Verdict:
        """Return scores and rule.

        Args:
            states: hidden states of ``"task"`` and of each group, ``[layers, rows, hidden]``.
            layers: the layers that were read.
        """
        raise NotImplementedError(f"{type(self).__name__} scores rows and must implement judged().")

    @override
    def selecting(self, records: Mapping[str, Sequence[Record]]) -> int:
        """Return the number of rows that are read."""
        return 0 if self.off else len(records["task"]) + sum(map(len, self.groups(records).values()))

    @override
    def select(
        self,
        model: Any,
        tokenizer: Any,
        template: Template,
        records: Mapping[str, Sequence[Record]],
        system: str | None = None,
        batch_size: int = 8,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> list[dict[str, Any]]:
        rows = list(records["task"])
        if self.off:
            return self.decided(rows, {}, set(range(len(rows))))
        groups, depth, done = self.groups(records), len(decoder_layers(model)), 0
        if self.layer is not None and self.layer > depth:
            raise InputError(f"{type(self).__name__}: layer must lie in [1, {depth}], got {self.layer}.")
        layers = self.layers(depth) if self.layer is None else [self.layer]

        def read(more: int) -> None:
            nonlocal done
            done += more
            if progress is not None:
                progress(done)

        reader = self.reader(model, tokenizer, template, system, batch_size)
        states, places = dict[str, Tensor](), dict[str, list[int]]()
        for name, some in {"task": rows, **groups}.items():
            states[name], places[name] = reader.layer_states(some, layers, self.pooling, read)
            if name != "task" and len(places[name]) < len(some):
                raise InputError(
                    f"{type(self).__name__}: {len(some) - len(places[name])} of {len(some)} {name} rows have a prompt"
                    f" of {reader.max_tokens} tokens or more. Remove them, or raise max_tokens."
                )
        verdict = self.judged(states, layers)
        scores = dict(zip(places["task"], verdict.scores.tolist(), strict=True))
        # The rows to drop come first. Of equal scores, the id decides, so that the rows' order has no effect.
        order = sorted(scores, key=lambda place: (-verdict.sign * scores[place], rows[place].id))
        count = verdict.count
        if count is None:
            count = sum(verdict.sign * scores[place] > verdict.sign * verdict.threshold for place in order)
        threshold = scores[order[count - 1]] if count else None
        facts = {"threshold": threshold, "dropped_side": "high" if verdict.sign > 0 else "low", **verdict.facts}
        return self.decided(rows, scores, set(order[count:]), **facts)
