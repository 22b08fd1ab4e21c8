"""GSM8K: grade-school word problems with one number as the answer."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from typing_extensions import override

from hftlight.data.records import Record
from hftlight.data.sources.task import PublicTask

ANSWER = "The final answer is: "


def numbers(text: str) -> list[float]:
    """Return the numbers of a text in order.

    All commas are removed first, such as those inside numbers. A hyphen before a digit is a minus sign.
    """
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", text.replace(",", ""))]


def final_number(text: str) -> float:
    """Return the first number after ``ANSWER``, else the last number of the text, else infinity."""
    text = text.replace(",", "")
    _, _, after = text.partition(ANSWER)
    return next(iter(numbers(after.partition(ANSWER)[0])), next(reversed(numbers(text)), math.inf))


@dataclass(frozen=True)
class WordProblems(PublicTask):
    """Problems whose solution ends in ``#### number``, with ``####`` replaced by ``ANSWER``.

    Attributes:
        suffix: text at the end of every question, in training and in evaluation.
    """

    suffix: str = ""

    @override
    def alpaca(self, row: Mapping[str, Any], place: str) -> dict[str, Any]:
        question, answer = ("instruction", "output") if "output" in row else ("question", "answer")
        solution = row.get(answer)
        if isinstance(solution, str):
            # As in Huang et al., the space after ``####`` stays, so two spaces stand before the number.
            solution = solution.replace("####", ANSWER)
        problem = row.get(question)
        if isinstance(problem, str):
            problem += self.suffix
        return {"instruction": problem, "input": row.get("input"), "output": solution}

    @override
    def correct(self, response: str, record: Record) -> bool:
        return math.isfinite(value := final_number(response)) and value == final_number(record.response)

    @override
    def correct_lenient(self, response: str, record: Record) -> bool:
        return final_number(record.response) in numbers(response)


GSM8K = WordProblems(
    name="gsm8k",
    licence="MIT",
    max_new_tokens=200,
    hub="openai/gsm8k:main",
    splits={"train": "train", "test": "test"},
    columns=("question", "answer"),
)
# The question of Vaccine and T-Vaccine, in their data and in their evaluation.
GSM8K_STEP_BY_STEP = replace(
    GSM8K,
    name="gsm8k_step_by_step",
    suffix="\nFirst think step by step and then answer the final number.\n",
)
