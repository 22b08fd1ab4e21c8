"""Score: one measured number. Only this module writes and reads rows of scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from hftlight.evaluation.stats.intervals import wilson


class Interval(Protocol):
    """A torchmetrics metric with its own 95 % interval, such as ``Rate``."""

    def compute(self) -> Any:
        """Return the value."""

    def interval(self) -> tuple[float, float]:
        """Return the low and the high end."""


@dataclass(frozen=True)
class Score:
    """One measured number with its 95 % interval.

    Attributes:
        metric: what is measured, such as ``"harmful_score"``.
        value: the number, in ``unit``.
        judge: name of the judge or of the text behind the number. Empty if only the answers and the rows decide.
        low: low end of the interval. None without an interval.
        high: high end of the interval. None without an interval.
        count: answers or rows behind the number.
        unit: such as ``"percent"`` or ``"nats per token"``.
        group: category or language of the number. Empty for the number over all.
        arm: arm of the run. Empty outside a run.
        stage: stage of the arm. Empty outside a run.
    """

    metric: str
    value: float
    judge: str = ""
    low: float | None = None
    high: float | None = None
    count: int = 0
    unit: str = "percent"
    group: str = ""
    arm: str = ""
    stage: str = ""

    @classmethod
    def share(cls, metric: str, hits: int, count: int, judge: str = "", group: str = "") -> "Score":
        """Return the percentage of ``hits`` in ``count`` answers (at least 1), with its Wilson interval."""
        low, high = wilson(hits, count)
        return cls(metric, 100 * hits / count, judge, low, high, count, group=group)

    @classmethod
    def of(cls, metric: str, measured: Interval, count: int, judge: str = "") -> "Score":
        """Return the score of a torchmetrics metric that measures a percentage."""
        return cls(metric, float(measured.compute()), judge, *measured.interval(), count)

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Score":
        """Return the score that a row holds. Other fields of the row are ignored."""
        texts = {name: str(row.get(name) or "") for name in ("judge", "group", "arm", "stage")}
        low, high, count, unit = row.get("low"), row.get("high"), int(row.get("count") or 0), row.get("unit")
        return cls(row["metric"], row["value"], low=low, high=high, count=count, unit=str(unit or "percent"), **texts)

    def row(self) -> dict[str, Any]:
        """Return the score as a row, without an empty arm, stage or group."""
        where = {"arm": self.arm, "stage": self.stage} if self.arm else {}
        group = {"group": self.group} if self.group else {}
        ends = {"low": self.low, "high": self.high, "count": self.count, "unit": self.unit}
        return {**where, "metric": self.metric, **group, "judge": self.judge or None, "value": self.value, **ends}
