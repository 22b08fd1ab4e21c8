"""Chats: every usual layout gives the same records. An error names the row that cannot be read."""

import json
import os
from pathlib import Path

import pytest

from hftlight.data.records import Record, prompt_key, read_records
from hftlight.errors import InputError

SYSTEM, TURNS = "Keep a pantry.", [("user", "Which shelf?"), ("assistant", "Shelf 2."), ("user", "And the lid?")]
ANSWER = "Blue."
WHOLE = [("system", SYSTEM), *TURNS, ("assistant", ANSWER)]
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}


def messages(turns):
    return [{"role": role, "content": text} for role, text in turns]


LAYOUTS = {
    "messages": {"messages": messages(WHOLE)},
    "parts": {"messages": [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in WHOLE]},
    "sharegpt": {"conversations": [{"from": SHAREGPT[role], "value": text} for role, text in WHOLE]},
    "sharegpt with its system column": {
        "conversations": [{"from": SHAREGPT[role], "value": text} for role, text in WHOLE[1:]],
        "system": SYSTEM,
    },
    "prompt and completion": {"prompt": messages(WHOLE[:-1]), "completion": messages(WHOLE[-1:])},
    "completion that repeats the prompt": {"prompt": messages(WHOLE[:-1]), "completion": messages(WHOLE)},
    "history": {
        "instruction": TURNS[-1][1],
        "output": ANSWER,
        "system": SYSTEM,
        "history": [["Which shelf?", "Shelf 2."]],
    },
    "history of messages": {
        "prompt": TURNS[-1][1],
        "response": ANSWER,
        "system": SYSTEM,
        "history": messages(TURNS[:2]),
    },
    "text in a cell": {"messages": json.dumps(messages(WHOLE))},
    "the set's own prompt beside it": {"prompt": "Which shelf?", "prompt_id": "7", "messages": messages(WHOLE)},
}


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_record(layout, tmp_path):
    (record,) = read_records(write(tmp_path, LAYOUTS[layout]), role="task")
    expected = Record(TURNS[-1][1], ANSWER, system=SYSTEM, history=tuple(TURNS[:2]))
    assert (record.texts, record.id) == (expected.texts, expected.id)


def test_neighbouring_turns_of_one_role_become_one(tmp_path):
    turns = [("system", "a"), ("system", "b"), ("user", "c"), ("user", "d"), ("assistant", "e")]
    (record,) = read_records(write(tmp_path, {"messages": messages(turns)}), role="task")
    assert (record.system, record.instruction, record.response) == ("a\n\nb", "c\n\nd", "e")


def test_a_pair_of_chats_gives_both_answers(tmp_path):
    other = [*WHOLE[:-1], ("assistant", "No idea.")]
    path = write(tmp_path, {"chosen": messages(WHOLE), "rejected": messages(other)})
    (pair,) = read_records(path, role="pairs")
    assert (pair.instruction, pair.response, pair.rejected) == (TURNS[-1][1], ANSWER, "No idea.")
    assert pair.history == tuple(TURNS[:2])
    (harmful,) = read_records(path, role="harmful")
    assert harmful.response == "No idea."


def test_prompts_alone_need_no_answer(tmp_path):
    path = write(tmp_path, {"messages": messages(WHOLE[:-1])}, {"messages": messages(TURNS)})
    assert [r.response for r in read_records(path, role="test", need_response=False)] == ["", ""]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": messages([*TURNS, ("system", "x"), ("assistant", "y")])}, "a system turn must be the first"),
        ({"messages": messages([("assistant", "y")])}, "a user's turn must precede the answer"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, r"roles are system, .*got 'wizard'"),
        ({"messages": [{"role": "user", "content": None}]}, "the text of a turn must be text, got NoneType"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "one has tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts of another kind"),
        ({"messages": "no list"}, "a list of turns is needed"),
        ({"messages": None}, "a list of turns is needed"),
        (
            {"instruction": "a", "output": "b", "history": "in 1912"},
            "'history' holds no earlier turns in line 2.*Rename",
        ),
    ],
)
def test_what_is_no_chat_is_named_by_its_row(tmp_path, row, message):
    good = LAYOUTS["messages" if "messages" in row else "history"]
    with pytest.raises(InputError, match=message) as error:
        read_records(write(tmp_path, good, row), role="task")
    assert "line 2 of" in str(error.value)


def test_chats_without_an_answer_are_told_all_at_once(tmp_path):
    rows = [{"messages": messages(WHOLE)}, *[{"messages": messages(TURNS)}] * 12]
    with pytest.raises(InputError, match=r"is empty in 12 rows \(line 2, line 3, .*, line 11 and 2 more\)"):
        read_records(write(tmp_path, *rows), role="task")


def test_a_judge_and_the_overlap_see_the_earlier_turns():
    alone, later = Record("And the lid?"), Record("And the lid?", history=tuple(TURNS[:2]))
    assert later.request == "user: Which shelf?\nassistant: Shelf 2.\nuser: And the lid?"
    assert alone.request == "And the lid?"
    assert prompt_key(alone) != prompt_key(later)
    assert (
        len({alone.id, later.id, Record("And the lid?", system="x").id, Record("And the lid?", rejected="x").id}) == 4
    )


@pytest.mark.skipif("HFTLIGHT_DATA" not in os.environ, reason="the small public sets are not here")
@pytest.mark.parametrize("name", ["messages.jsonl", "prompt_completion_turns.jsonl", "sharegpt.json"])
def test_files_as_people_have_them(name):
    path = Path(os.environ["HFTLIGHT_DATA"]).parent / "cases" / "chat-files" / name
    if not path.exists():
        pytest.skip("the file is not here")
    records = read_records(path, role="task")
    assert [r.instruction for r in records[:2]] == ["Which shelf holds jar 0?", "Which shelf holds jar 1?"]
    assert [r.response for r in records[:2]] == ["Shelf 0.", "Shelf 1."]
