"""CTRL's row."""

from dataclasses import replace

from hftlight.defenses import CTRL
from tests.helpers.contract import Row, records


def curated():
    """Return a defense that has selected: the answers of two rows are other texts."""
    defense = CTRL(share=0.125)
    defense.selected = [
        {
            "id": row.id,
            "response": f"new{row.response[3:]}",
            "perplexity": 2.0,
            "perplexity_before": 3.0,
            "candidates": 4,
        }
        for row in records()["alignment"][:2]
    ]
    return defense


def expected(rows, seed):
    new = [replace(r, response=f"new{r.response[3:]}", id=r.id) for r in rows["alignment"][:2]]
    return {**rows, "alignment": [*new, *rows["alignment"][2:]]}


ROW = Row(
    make=curated,
    neutral=lambda: CTRL(share=0.0),
    bad=[
        ({"share": 5}, "write 0.05"),
        ({"share": -0.1}, "share"),
        ({"readability": 1.5}, "readability"),
        ({"choose": "lowest"}, "choose"),
        ({"given": "answer"}, "given"),
        ({"rounds": -1}, "rounds"),
        ({"width": 0}, "width"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"rewrites": "nowhere.jsonl"}, "no such file"),
    ],
    records=expected,
)
