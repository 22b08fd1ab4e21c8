"""What a filter let pass and what it dropped needlessly, computed from its decisions and the rows' roles."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hftlight.data.records import Record
from hftlight.evaluation.score import Score


def filter_rates(selection: Sequence[Mapping[str, Any]], records: Sequence[Record]) -> dict[str, Any]:
    r"""Return the error rates of a filter on an upload whose attack rows are known.

    .. math:: \mathrm{false\ negatives} = \frac{\text{attack rows kept}}{\text{attack rows}}, \qquad
        \mathrm{false\ positives} = \frac{\text{other rows dropped}}{\text{other rows}}

    Args:
        selection: for each row its ``id``, whether it is ``kept``, and its ``score``, or whether the guard was
            ``unsure``. Rows of one id are counted one by one.
        records: the rows with their roles, ``"attack"`` for the attacker's rows.

    Returns:
        ``attack`` and ``other``, each with the number of ``rows``, ``dropped`` and ``unsure``, and
        ``false_negatives`` and ``false_positives`` as rows of scores in percent. A rate without rows is left out.
    """
    dropped = Counter(row["id"] for row in selection if not row["kept"])
    unsure = {row["id"] for row in selection if row.get("unsure", row.get("score") is None)}
    counts = {side: dict.fromkeys(("rows", "dropped", "unsure"), 0) for side in ("attack", "other")}
    for record in records:
        own = counts["attack" if record.role == "attack" else "other"]
        own["rows"] += 1
        own["dropped"] += dropped[record.id] > 0
        own["unsure"] += record.id in unsure
        dropped[record.id] -= 1
    attack, other = counts["attack"], counts["other"]
    rates = {
        "false_negatives": (attack["rows"] - attack["dropped"], attack["rows"]),
        "false_positives": (other["dropped"], other["rows"]),
    }
    return {**counts, **{name: Score.share(name, *pair).row() for name, pair in rates.items() if pair[1]}}
