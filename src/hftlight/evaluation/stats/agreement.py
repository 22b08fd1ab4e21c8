"""Cohen's kappa: the agreement of two judges beyond chance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Agreement:
    r"""Counts of two judges' flags on the same answers.

    Both judges flag a answers, only the first flags b, only the second flags c, and neither flags d. With n their sum,
    observed agreement, expected agreement and Cohen's kappa are

    .. math:: p_o = \frac{a + d}{n}, \quad p_e = \frac{(a + b)(a + c) + (c + d)(b + d)}{n^2}, \quad
        \kappa = \frac{p_o - p_e}{1 - p_e}

    Attributes:
        both: a, answers.
        first_only: b, answers.
        second_only: c, answers.
        neither: d, answers.

    Source: Cohen, "A coefficient of agreement for nominal scales", Educational and Psychological Measurement, 1960.
    Differs: nothing known.
    """

    both: int
    first_only: int
    second_only: int
    neither: int

    @property
    def count(self) -> int:
        """Answers judged by both, n."""
        return self.both + self.first_only + self.second_only + self.neither

    @property
    def observed(self) -> float:
        """Fraction 0-1 of answers with the same flag, p_o."""
        return (self.both + self.neither) / self.count

    @property
    def expected(self) -> float:
        """Fraction 0-1 of answers on which independent judges with the same flag rates would agree, p_e."""
        a, b, c, d = self.both, self.first_only, self.second_only, self.neither
        return ((a + b) * (a + c) + (c + d) * (b + d)) / self.count**2

    @property
    def kappa(self) -> float:
        """Cohen's kappa, in [-1, 1].

        1 is full agreement, and 0 is agreement by chance. Kappa is NaN if both judges give the same flag to every
        answer. Then p_e is 1 and kappa is 0/0: such answers cannot show whether the judges agree. Kappa is 0 if only
        one of the judges gives the same flag to every answer.
        """
        a, b, c, d = self.both, self.first_only, self.second_only, self.neither
        # Numerator (p_o - p_e) n^2 and denominator (1 - p_e) n^2 are integers. In the 0/0 case the denominator is
        # therefore exactly 0, which rounded fractions would not guarantee.
        denominator = (a + b) * (b + d) + (a + c) * (c + d)
        return 2 * (a * d - b * c) / denominator if denominator else math.nan


def cohens_kappa(first: Sequence[bool], second: Sequence[bool]) -> Agreement:
    """Return counts and kappa of two judges' flags.

    Args:
        first: one judge's flags, one per answer.
        second: the other judge's flags on the same answers, in the same order.

    Raises:
        ValueError: if the sequences differ in length, are empty, or hold a value that is not a flag.
    """
    if len(first) != len(second):
        raise ValueError(
            f"cohens_kappa: both judges must have judged the same answers, got {len(first)} and {len(second)} flags."
        )
    if not len(first):
        raise ValueError("cohens_kappa: needs at least one answer, got none.")
    for name, flags in (("first", first), ("second", second)):
        for row, flag in enumerate(flags):
            if flag not in (False, True):
                raise ValueError(
                    f"cohens_kappa: {name}[{row}] must be a flag (True or False), got {flag!r}. Pass verdict.flag, not"
                    " verdict.score."
                )
    pairs = [(bool(x), bool(y)) for x, y in zip(first, second, strict=True)]
    return Agreement(*(pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))))
