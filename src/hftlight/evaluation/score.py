"""Score: one measured number, and the only place where a row of it is written or read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from hftlight.evaluation.stats.intervals import wilson


class Interval(Protocol):
    """A metric of torchmetrics that knows its own 95 % interval, such as ``Rate``."""

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
        judge: who decided, or what was read; empty if nothing but the answers and the rows decides.
        low: low end of the interval; None without one.
        high: high end; None without one.
        count: answers or rows behind the number.
        unit: such as ``"percent"`` or ``"nats per token"``.
        group: category or language that the number is about; empty for all.
        arm: arm of the run; empty outside of a run.
        stage: stage of the arm; empty outside of a run.
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
        """Return the percentage of ``hits`` in ``count``, at least 1, with Wilson's interval."""
        low, high = wilson(hits, count)
        return cls(metric, 100 * hits / count, judge, low, high, count, group=group)

    @classmethod
    def of(cls, metric: str, measured: Interval, count: int, judge: str = "") -> "Score":
        """Return what a metric of torchmetrics measured, a percentage."""
        return cls(metric, float(measured.compute()), judge, *measured.interval(), count)

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Score":
        """Return the score of a row. Fields that are not a score's are ignored."""
        texts = {name: str(row.get(name) or "") for name in ("judge", "group", "arm", "stage")}
        low, high, count, unit = row.get("low"), row.get("high"), int(row.get("count") or 0), row.get("unit")
        return cls(row["metric"], row["value"], low=low, high=high, count=count, unit=str(unit or "percent"), **texts)

    def row(self) -> dict[str, Any]:
        """Return the score as a row, without an empty arm, stage or group."""
        where = {"arm": self.arm, "stage": self.stage} if self.arm else {}
        group = {"group": self.group} if self.group else {}
        ends = {"low": self.low, "high": self.high, "count": self.count, "unit": self.unit}
        return {**where, "metric": self.metric, **group, "judge": self.judge or None, "value": self.value, **ends}
