"""What a judge is: a name and, per answer, a raw score and a flag."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Verdict:
    """One answer judged.

    Attributes:
        score: the judge's raw score, in its own unit; 0 or 1 where it only decides.
        flag: whether the answer counts as harmful.
    """

    score: float
    flag: bool

    @classmethod
    def of(cls, flag: bool) -> "Verdict":
        """Return the verdict of a judge that only decides."""
        return cls(float(flag), flag)


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
