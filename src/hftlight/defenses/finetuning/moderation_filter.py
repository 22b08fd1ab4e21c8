"""ModerationFilter: a guard reads the upload, and the model trains on the rows that it lets pass."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from typing_extensions import override

from hftlight.data.records import Record
from hftlight.engine import Defense, Slot, Stage
from hftlight.errors import InputError
from hftlight.evaluation.guards import JudgeGuard, get_guard, same_model, scores_of
from hftlight.evaluation.guards.guard import GuardScore


def decision(scores: Sequence[GuardScore], threshold: float, unsure: str) -> dict[str, bool]:
    r"""Return whether a row is kept, and whether the guard was unsure about it.

    With the scores s of one row, of its response alone or of response and request, the row is dropped if

    .. math:: \max_k s_k > \tau

    A missing score makes the row unsure, unless another score exceeds the threshold already.

    Args:
        scores: probabilities in [0, 1]; None where the guard has no score.
        threshold: tau, in [0, 1].
        unsure: ``"keep"`` or ``"drop"``, what happens to an unsure row.
    """
    harmful = any(score is not None and score > threshold for score in scores)
    unclear = not harmful and None in scores
    return {"kept": not harmful and not (unclear and unsure == "drop"), "unsure": unclear}


class ModerationFilter(Defense):
    r"""Drop the rows of the upload that a guard finds harmful, and fine-tune on the others as usual.

    A guard gives each row a probability s of harm from the row's texts. With the threshold tau, training runs on

    .. math:: \{(x, y) \in U : s(x, y) \le \tau\} \quad\text{or, for ``either``,}\quad
        \{(x, y) \in U : \max(s(x, y), s(x)) \le \tau\}

    The rule ``"response"`` keeps a harmful request with a refusal, which is a safety row. The guard ``"minilm"`` is a
    small sentence encoder whose head learns from the defender's own rows. Every judge of harm is a guard too; a judge
    of refusal phrases calls every other answer harmful and drops ordinary rows. A guard that also judges the run makes
    the filter look better than it is, so it is refused.

    Args:
        guard: ``"minilm"``, ``"minilm:FOLDER"`` for another encoder, a judge such as ``"moderation"``, or a guard
            object.
        threshold: probability above which a row is dropped, in [0, 1]; 1 drops no row with a score. None takes the
            guard's own threshold. A judge decides by its own threshold.
        rule: ``"response"`` drops a row for its response, ``"either"`` for its response or its request.
        unsure: ``"drop"`` or ``"keep"``, what happens to a row that the guard cannot score. Such rows are counted.
        allow_same: whether the guard may be the model that also judges the run.

    Raises:
        ValueError: if an argument is out of range or does not fit the guard.

    Cost: nothing in training. Before it, one pass of the guard per row of the upload, or two for ``"either"``; the
    guard ``"minilm"`` also reads each row of the defender once. Under a fixed number of steps the kept rows occur more
    often.
    Source: Huang et al., "Harmful Fine-tuning Attacks and Defenses for Large Language Models: A Survey",
    arXiv:2409.18169, and "Lisa", NeurIPS 2024, arXiv:2405.18641, Table 12: beaver-dam-7b filters the upload. The survey
    prints that 7.71 % of the harmful rows pass, and that 3.64 % of the other rows are dropped.
    Differs: the guard ``"minilm"``, the rule ``"either"`` and the policy for unsure rows are ours. Unsure rows are
    dropped by default. The harmful scores of the Lisa paper come from the guard itself, which needs ``allow_same``
    here. Rows of one id are dropped together. Of a pair, the guard reads the preferred answer. It reads text without a
    template, and no system text. Rows that another defense adds to the upload are not filtered.
    """

    stage, slots, selects = Stage.FINETUNING, (Slot.DATA,), True
    selecting_passes = 0.0  # the model itself reads no row
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"lisa": {"guard": "moderation"}}

    def __init__(
        self,
        guard: Any = "minilm",
        threshold: float | None = None,
        rule: Literal["response", "either"] = "response",
        unsure: Literal["keep", "drop"] = "drop",
        allow_same: bool = False,
    ) -> None:
        if threshold is not None and not 0 <= threshold <= 1:
            hint = f" If that is a percentage, write {threshold / 100:g}." if 1 < threshold <= 100 else ""
            raise ValueError(
                f"ModerationFilter: threshold is a probability and must lie in [0, 1], got {threshold}.{hint}"
            )
        if rule not in ("response", "either"):
            raise ValueError(f"ModerationFilter: rule must be 'response' or 'either', got {rule!r}.")
        if unsure not in ("keep", "drop"):
            raise ValueError(f"ModerationFilter: unsure must be 'keep' or 'drop', got {unsure!r}.")
        try:
            self._guard = get_guard(guard)
        except InputError as error:
            raise ValueError(f"ModerationFilter: guard must be 'minilm' or a judge, got {guard!r}. {error}") from error
        if self._guard.decides and threshold is not None:
            raise ValueError(
                f"ModerationFilter: the guard {self._guard.name!r} decides by its own threshold, got threshold"
                f" {threshold}. Omit threshold."
            )
        if rule == "either" and not self._guard.reads_prompts:
            raise ValueError(
                f"ModerationFilter: the rule 'either' needs a guard that scores requests, and {self._guard.name!r}"
                " scores answers only. Use rule='response', or guard='minilm'."
            )
        super().__init__()
        self.guard = guard if isinstance(guard, str) else guard.name
        self.threshold, self.rule, self.unsure, self.allow_same = threshold, rule, unsure, allow_same
        self.streams = self._guard.streams

    @override
    def identity(self) -> dict[str, Any]:
        return {"guard": self._guard.identity()}

    @override
    def check_judges(self, judges: Sequence[Any]) -> None:
        """Refuse a guard that is also a judge of the run.

        Raises:
            InputError: naming guard and judge.
        """
        if self.allow_same or not isinstance(self._guard, JudgeGuard):
            return
        if same := next((j for j in judges if same_model(self._guard.judge, j)), None):
            raise InputError(
                f"ModerationFilter: the guard {self._guard.name!r} and the judge {same.name!r} of this run are the same"
                " model. Rows that fool it also fool the score, so the filter looks better than it is. Choose another"
                " guard or another judge, or set allow_same."
            )

    @override
    def selecting(self, records: Mapping[str, Sequence[Record]]) -> int:
        """Return the number of rows that the guard reads."""
        return len(records["task"])

    @override
    def select(
        self,
        model: Any,
        tokenizer: Any,
        template: Any,
        records: Mapping[str, Sequence[Record]],
        system: str | None = None,
        batch_size: int = 8,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Let the guard score the upload. The model and its prompts do not matter.

        Returns:
            For each row ``id``, ``score``, with rule ``"either"`` also ``prompt_score``, ``kept`` and ``unsure``.

        Raises:
            InputError: if all rows would be dropped, or the guard lacks rows to learn from.
        """
        self.selected = self._decided(records, records["task"])
        if progress is not None:
            progress(len(self.selected))
        self._refuse_nothing_left(sum(row["kept"] for row in self.selected), len(self.selected))
        return self.selected

    @override
    def rewrite(self, records: dict[str, list[Record]], seed: int) -> dict[str, list[Record]]:
        """Drop rows by id. A row of the user that no selection has scored is scored here, so none passes unread.

        Raises:
            InputError: as ``select``.
        """
        task = records["task"]
        # Rows that another defense added have the role "alignment". They are the service's own, so they stay.
        known = {row["id"] for row in self.selected or ()}
        unread = [row for row in task if row.role != "alignment" and row.id not in known]
        decisions = [*(self.selected or ()), *(self._decided(records, unread) if unread else ())]
        dropped = {row["id"] for row in decisions if not row["kept"]}
        kept = [row for row in task if row.role == "alignment" or row.id not in dropped]
        self._refuse_nothing_left(len(kept), len(task))
        unclear = {row["id"] for row in decisions if row["unsure"]}
        self.record(
            upload_rows=len(task), dropped_rows=len(task) - len(kept), unsure_rows=sum(r.id in unclear for r in task)
        )
        return {**records, "task": kept}

    @override
    def manifest(self) -> dict[str, Any]:
        """Return the trace, and the guard with its revision and threshold."""
        guard = {"guard": f"{self._guard.name}@{self._guard.revision}", "threshold": self._threshold}
        return {**super().manifest(), **guard, "rule": self.rule, "unsure": self.unsure}

    @property
    def _threshold(self) -> float:
        return self._guard.threshold if self.threshold is None else self.threshold

    def _decided(self, records: Mapping[str, Sequence[Record]], rows: Sequence[Record]) -> list[dict[str, Any]]:
        """Return scores and decision of each row."""
        self._guard.learn({name: rows for name, rows in records.items() if name in self._guard.streams})
        prompts = [row.request for row in rows]
        found = {"score": scores_of(self._guard, prompts, [row.response for row in rows])}
        if self.rule == "either":
            found["prompt_score"] = scores_of(self._guard, prompts)
        return [
            {"id": row.id, **dict(zip(found, scores, strict=True)), **decision(scores, self._threshold, self.unsure)}
            for row, scores in zip(rows, zip(*found.values(), strict=True), strict=True)
        ]

    def _refuse_nothing_left(self, kept: int, count: int) -> None:
        if not kept:
            raise InputError(
                f"ModerationFilter: the guard {self._guard.name!r} leaves none of the upload's {count} rows to train"
                f" on, at threshold {self._threshold:g} and rule {self.rule!r}. Raise threshold, use rule='response',"
                " or choose another guard."
            )
