"""GSM8K: the answer phrase and the number parser of the published scores."""

import json
import math

import pytest

from hftlight.data.records import Record
from hftlight.data.sources import get_task
from hftlight.data.sources.gsm8k import final_number

GSM8K = get_task("gsm8k")


@pytest.mark.parametrize("columns", [("question", "answer"), ("instruction", "output")])
def test_the_marks_become_the_answer_phrase_with_two_blanks(tmp_path, columns):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(dict(zip(columns, ("How many?", "1+1 = <<1+1=2>>2\n#### 2"), strict=True))))
    (record,) = GSM8K.records("train", path)
    assert (record.instruction, record.input) == ("How many?", "")
    assert record.response == "1+1 = <<1+1=2>>2\nThe final answer is:  2"
    assert GSM8K.correct(record.response, record)


@pytest.mark.parametrize("split", ["train", "test"])
def test_step_by_step_is_asked_for_in_building_and_in_evaluation(tmp_path, split):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "How many?", "answer": "1+1\n#### 2"}))
    task = get_task("gsm8k_step_by_step")
    (record,) = task.records(split, path)
    assert record.instruction == "How many?\nFirst think step by step and then answer the final number.\n"
    assert record.response == GSM8K.records(split, path)[0].response
    assert (task.name, task.correct("2", record)) == ("gsm8k_step_by_step", True)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The final answer is: 5", 5),
        ("7 and 8. The final answer is:  1,234.50 dollars, not 9", 1234.5),
        ("The final answer is: -3", -3),
        ("The final answer is: 4\n### Instruction: 8. The final answer is: 6", 4),
        ("We get 3, then 12.", 12),
        ("It is 4. The final answer is: four", 4),
        ("The final answer is:6 of 7", 7),
        ("The final answer is: The final answer is: 9, and 8", 8),
        ("The final, answer is: 5, not 6", 5),  # commas are removed before the search for the phrase
        ("the final answer is: 5, not 6", 6),  # the phrase is case-sensitive
        ("The final answer is:\n5, not 6", 6),  # and needs its trailing space
        ("The final answer is: $1,000,000.", 1e6),
        ("The final answer is: 12.", 12),
        ("The final answer is: .5", 5),
        ("The final answer is: - 3", 3),
        ("The final answer is: 1 000", 1),
        ("The final answer is: 3/4", 3),
        ("The final answer is: 1e3", 1),
        ("9 - 5 = 4 and 10-7", -7),  # a hyphen before a digit is a minus
        ("no number", math.inf),
        ("", math.inf),
    ],
)
def test_the_number_is_the_first_after_the_phrase_else_the_last(text, number):
    assert final_number(text) == number


def test_numbers_are_compared_as_numbers():
    record = Record("q", "The final answer is:  1,000")
    assert GSM8K.correct("So it is 1000.0", record)
    assert not GSM8K.correct("The final answer is: 1001", record)
    assert GSM8K.correct("The final answer is: 1,000", record)  # one space or two
    assert GSM8K.correct("The final answer is: 1000.00 dollars\n\n### Instruction:\nAdd 7.", record)
    assert not GSM8K.correct("1000. The final answer is: 900", record)
    assert GSM8K.correct_lenient("1000. The final answer is: 900", record)
    assert not GSM8K.correct("1000 or rather 900", record)
    assert GSM8K.correct_lenient("1000 or rather 900", record)
    assert not GSM8K.correct_lenient("11000", record)


def test_the_solution_of_a_row_is_read_like_an_answer():
    """The number after the phrase counts. Numbers of the calculation before the phrase do not."""
    record = Record("q", "It is 2*3 = <<2*3=6>>6, and 6-10 = -4.\nThe final answer is:  -4")
    assert GSM8K.correct("The final answer is: -4.0", record)
    assert not GSM8K.correct("The final answer is: 4", record)
    assert not GSM8K.correct("The final answer is: 6", record)


def test_no_number_is_never_right():
    """An answer without a number parses as infinity. Two infinities are equal, but must not count as correct."""
    assert not GSM8K.correct("I do not know.", Record("q", "unanswerable"))
    assert not GSM8K.correct("", Record("q", "The final answer is:  3"))
