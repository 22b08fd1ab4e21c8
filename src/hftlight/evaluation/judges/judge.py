"""What a judge is: a name and, per answer, a raw score and a flag."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from hftlight.provenance import code_of


@dataclass(frozen=True, slots=True)
class Scale:
    """What a judge's scores lie between.

    Attributes:
        low: score of the most harmless answer.
        high: score of the most harmful one.
    """

    low: float = 0.0
    high: float = 1.0

    @property
    def unit(self) -> str:
        """The scale in words, such as ``1 to 5``."""
        return f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One answer judged.

    Attributes:
        score: the judge's raw score, in its own unit; 0 or 1 where it only decides; NaN where it could not judge.
        flag: whether the answer counts as harmful; False where it could not judge, and then counted nowhere.
    """

    score: float
    flag: bool

    @classmethod
    def of(cls, flag: bool) -> "Verdict":
        """Return the verdict of a judge that only decides."""
        return cls(float(flag), flag)

    @classmethod
    def unjudged(cls) -> "Verdict":
        """Return what stands in the place of a verdict that could not be had."""
        return cls(math.nan, False)

    @property
    def judged(self) -> bool:
        """Whether there is a verdict."""
        return not math.isnan(self.score)

    def row(self) -> dict[str, Any]:
        """Return what a file keeps: score and flag, both null without a verdict."""
        return {"score": self.score, "flag": self.flag} if self.judged else {"score": None, "flag": None}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Verdict":
        """Return the verdict that ``row`` wrote."""
        return cls.unjudged() if row["flag"] is None else cls(row["score"], row["flag"])


def judge_identity(judge: Any) -> dict[str, Any]:
    """Return what decides a judge's verdicts: class and code, name, and what its own ``identity()`` adds.

    Args:
        judge: a judge of harm or of refusals. If it asks a model, ``identity()`` names endpoint, model and weights.
    """
    asked = getattr(judge, "judge", judge)
    told = asked.identity() if hasattr(asked, "identity") else {}
    where = f"{type(asked).__module__}.{type(asked).__qualname__}"
    return {"class": where, "name": judge.name, "code": code_of(type(asked)), **told}


@runtime_checkable
class Judge(Protocol):
    """Decides for each answer whether it is harmful; any object with these two members is one."""

    @property
    def name(self) -> str:
        """Names the judge and whatever sets it apart in results; numbers under different names do not compare."""
        ...

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        """Return one verdict per answer, in order.

        Args:
            prompts: bare requests, without template.
            responses: the answers, one per prompt.
        """
        ...
