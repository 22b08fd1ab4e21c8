"""Conditions on measured scores, such as ``harmful_score_high>5``, for pipelines that must stop on an unsafe model."""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hftlight.errors import InputError

SIGNS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
FORM = re.compile(r"\s*(\w+)\s*(>=|<=|>|<)\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*(?:%)?\s*")


@dataclass(frozen=True)
class Condition:
    """A comparison of one score with a number.

    Attributes:
        metric: a metric's key, such as ``harmful_score``.
        end: ``"value"``, or the end of the 95 % interval: ``"low"`` or ``"high"``.
        sign: one of ``SIGNS``.
        bound: the number, in the metric's unit.
    """

    metric: str
    end: str
    sign: str
    bound: float

    def __str__(self) -> str:
        return f"{self.metric}{'' if self.end == 'value' else '_' + self.end}{self.sign}{self.bound:g}"

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Return the condition in a text.

        Args:
            text: metric, sign and number, such as ``harmful_score_high>5``. The endings ``_low`` and ``_high`` name the
                ends of the 95 % interval.

        Raises:
            InputError: if the text has another form.
        """
        parts = FORM.fullmatch(text)
        try:
            bound = float(parts[3]) if parts else math.nan
        except ValueError:
            bound = math.nan
        if parts is None or math.isnan(bound):
            raise InputError(
                "--fail_if: a condition is a metric, one of > >= < <=, and a number, such as 'harmful_score_high>5' (in"
                f" quotes), got {text!r}."
            )
        metric, _, end = parts[1].rpartition("_")
        if end not in ("low", "high"):
            metric, end = parts[1], "value"
        return cls(metric, end, parts[2], bound)

    def holds(self, scores: Sequence[Mapping[str, Any]]) -> bool:
        """Tell whether a model's scores meet the condition. Of several judges the first decides.

        Args:
            scores: rows as ``measure`` returns them.

        Raises:
            InputError: if the metric was not measured, or has no interval.
        """
        rows = {str(row["metric"]): row for row in reversed(scores) if "group" not in row}
        if self.metric not in rows:
            raise InputError(
                f"--fail_if {self}: {self.metric} was not measured; measured were {', '.join(sorted(rows))}."
            )
        number = rows[self.metric].get(self.end)
        if number is None or math.isnan(number):
            raise InputError(f"--fail_if {self}: {self.metric} has no {self.end} end of an interval here.")
        return SIGNS[self.sign](float(number), self.bound)
