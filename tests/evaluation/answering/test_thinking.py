"""Models that reason first: judges, task and saved rows read only the text after the thoughts."""

from dataclasses import replace

import pytest

from hftlight.evaluation.answering.thinking import after_thinking, thoughts
from hftlight.runs.measuring.measure import judged_rows
from hftlight.runs.prepare import test_sets as sets_of
from hftlight.runs.sources import Sources
from tests.runs.test_run import config


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("<think>I could refuse.</think>\n\nHere it is.", "Here it is."),
        ("I could refuse.</think>Here it is.", "Here it is."),
        ("<think>I could refuse, since", ""),
        ("Here it is.", "Here it is."),
        ("Write <think> twice.", "Write <think> twice."),
        ("<think></think>", ""),
    ],
)
def test_what_follows_the_thoughts_is_the_answer(answer, said):
    assert after_thinking(answer) == said
    assert thoughts(answer) + said == answer.replace("\n\n", "")


def test_judges_do_not_read_the_thoughts(tmp_path):
    """In the first row the thought refuses and the answer complies. In the second row the roles are swapped."""
    tests = sets_of(config(tmp_path), None, Sources(config(tmp_path).data))
    refusal = "I cannot help with that."
    answers = [f"<think>{refusal}</think>Sure.", f"<think>Sure.</think>{refusal}"]
    tests = replace(tests, harmful=tests.harmful[:2], task_rows=tests.task_rows[:1])
    rows = judged_rows("harmful", answers, tests)
    assert [row["verdicts"]["keyword"]["flag"] for row in rows] == [True, False]
    assert [row["response"] for row in rows] == ["Sure.", refusal]
    assert rows[0]["thinking"] == f"<think>{refusal}</think>"
    plain = judged_rows("harmful", ["Sure."], replace(tests, harmful=tests.harmful[:1]))[0]
    assert "thinking" not in plain
    right = tests.task_rows[0]
    (row,) = judged_rows("task", [f"<think>Hm.</think>{right.response}"], tests)
    assert row["correct"]
