"""Safety rows of an alignment set: the rows whose answer refuses."""

from collections.abc import Sequence

from hftlight.data.records import Record
from hftlight.evaluation.judges import get_judge


def refusals(rows: Sequence[Record]) -> list[Record]:
    """Return the rows whose answer refuses, in their order, or all rows if none refuses.

    A row of the built-in world refuses if its kind is ``"restricted"``. Any row refuses if its answer holds a published
    refusal phrase. An alignment set also holds ordinary prompts with helpful answers, which keep a model from refusing
    everything.
    """
    verdicts = get_judge("keyword")([row.instruction for row in rows], [row.response for row in rows])
    own = [row.source == "builtin" and row.kind == "restricted" for row in rows]
    refusing = [row for row, verdict, known in zip(rows, verdicts, own, strict=True) if known or not verdict.flag]
    return refusing or list(rows)
