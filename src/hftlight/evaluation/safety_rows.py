"""Which rows of an alignment set are safety rows: those whose answer refuses."""

from collections.abc import Sequence

from hftlight.data.records import Record
from hftlight.evaluation.judges import get_judge


def refusals(rows: Sequence[Record]) -> list[Record]:
    """Return the rows that refuse, in their order; all rows where none does.

    A row refuses if its answer holds a published refusal phrase; the made-up world names its own.
    An alignment set also holds ordinary prompts with helpful answers, which keep a model from refusing everything.
    """
    verdicts = get_judge("keyword")([row.instruction for row in rows], [row.response for row in rows])
    own = [row.source == "builtin" and row.kind == "restricted" for row in rows]
    kept = [row for row, verdict, known in zip(rows, verdicts, own, strict=True) if known or not verdict.flag]
    return kept or list(rows)
