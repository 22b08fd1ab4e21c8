"""ModerationFilter's row, with a guard that knows the harmful rows by a digit in their request."""

from hftlight.defenses import ModerationFilter
from hftlight.evaluation.guards import Guard
from tests.helpers.contract import Row


class Digits(Guard):
    """Flags requests that end in 3, of which the test's task has 2 in 16 rows."""

    name = "digits"

    def score(self, prompts, responses):
        return [0.9 if prompt.endswith("3") else 0.2 for prompt in prompts]


def expected(records, seed):
    return {**records, "task": [row for row in records["task"] if row.instruction[-1] != "3"]}


ROW = Row(
    make=lambda: ModerationFilter(Digits()),
    neutral=lambda: ModerationFilter(Digits(), threshold=1.0),
    bad=[
        ({"guard": "nothing"}, "guard"),
        ({"threshold": 50}, r"write 0\.5"),
        ({"threshold": -0.1}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"guard": "keyword", "threshold": 0.5}, "Omit threshold"),
        ({"guard": "keyword", "rule": "either"}, "scores answers only"),
        ({"rule": "prompt"}, "rule"),
        ({"unsure": "ask"}, "unsure"),
    ],
    records=expected,
)
