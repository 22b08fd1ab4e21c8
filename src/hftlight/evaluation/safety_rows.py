"""The two parts of an alignment set: rows whose answer refuses, and ordinary rows."""

from collections.abc import Sequence

from hftlight.data.records import Record
from hftlight.evaluation.judges import get_judge


def refusals(rows: Sequence[Record]) -> list[Record]:
    """Return the rows whose answer refuses, in their order, or all rows if none refuses.

    A row of the built-in world refuses if its kind is ``"restricted"``. Any row refuses if its answer holds a published
    refusal phrase. An alignment set also holds ordinary prompts with helpful answers, which keep a model from refusing
    everything.
    """
    return _refusing(rows) or list(rows)


def ordinary(rows: Sequence[Record]) -> list[Record]:
    """Return the rows whose answer does not refuse, in their order. The list may be empty."""
    ids = {id(row) for row in _refusing(rows)}
    return [row for row in rows if id(row) not in ids]


def _refusing(rows: Sequence[Record]) -> list[Record]:
    verdicts = get_judge("keyword")([row.instruction for row in rows], [row.response for row in rows])
    own = [row.source == "builtin" and row.kind == "restricted" for row in rows]
    return [row for row, verdict, known in zip(rows, verdicts, own, strict=True) if known or not verdict.flag]
