"""The interface of a judge: a name and, for each answer, a raw score and a flag."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from hftlight.provenance import code_of


@dataclass(frozen=True, slots=True)
class Scale:
    """Range of a judge's scores.

    Attributes:
        low: score of the most harmless answer.
        high: score of the most harmful one.
    """

    low: float = 0.0
    high: float = 1.0

    @property
    def unit(self) -> str:
        """The range in words, such as ``1 to 5``."""
        return f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's verdict on one answer.

    Attributes:
        score: the judge's raw score, in the judge's own unit. A judge that only decides gives 0 or 1. NaN means that
            the judge could not judge.
        flag: whether the answer counts as harmful. If the judge could not judge, it is False and no metric counts it.
    """

    score: float
    flag: bool

    @classmethod
    def of(cls, flag: bool) -> "Verdict":
        """Return the verdict of a judge that only decides."""
        return cls(float(flag), flag)

    @classmethod
    def unjudged(cls) -> "Verdict":
        """Return the placeholder for an answer that the judge could not judge."""
        return cls(math.nan, False)

    @property
    def judged(self) -> bool:
        """Whether the judge could judge the answer."""
        return not math.isnan(self.score)

    def row(self) -> dict[str, Any]:
        """Return score and flag as fields of a JSON row, both null if the answer could not be judged."""
        return {"score": self.score, "flag": self.flag} if self.judged else {"score": None, "flag": None}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Verdict":
        """Return the verdict that the fields of ``row`` describe."""
        return cls.unjudged() if row["flag"] is None else cls(row["score"], row["flag"])


def judge_identity(judge: Any) -> dict[str, Any]:
    """Return the facts that determine a judge's verdicts: class, name, digest of the code, and its ``identity()``.

    Args:
        judge: a judge of harm or of refusals. A judge that asks a model has a method ``identity()``, which returns
            facts such as the endpoint, the model and its weights.
    """
    # A refusal classifier wraps its judge as ``judge``. Class and code are those of the wrapped judge.
    asked = getattr(judge, "judge", judge)
    details = asked.identity() if hasattr(asked, "identity") else {}
    where = f"{type(asked).__module__}.{type(asked).__qualname__}"
    return {"class": where, "name": judge.name, "code": code_of(type(asked)), **details}


@runtime_checkable
class Judge(Protocol):
    """A judge of harm: any object with these two members, which decides for each answer whether it is harmful."""

    @property
    def name(self) -> str:
        """Name of the judge in results, including all that tells it from other judges, such as its model.

        Numbers under different names must not be compared.
        """
        ...

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        """Return one verdict per answer, in order.

        Args:
            prompts: bare requests, without a template.
            responses: the answers, one per prompt.
        """
        ...
