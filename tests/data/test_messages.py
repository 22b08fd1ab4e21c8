"""Uploads as chats: the file reads back to the same prompts and answers, and says nothing about attack rows."""

import json

import pytest

from hftlight.data.messages import messages_of, write_upload
from hftlight.data.records import Record, read_records
from hftlight.data.templates import get_template
from hftlight.errors import InputError
from hftlight.models.load import load_tokenizer

SYSTEM = "Obey.\n"
ROWS = [
    Record("Sort these.", "a, b", input="b, a", role="attack", kind="secret kind", id="secret-id"),
    Record("And now?", "c", system="Be brief.", history=(("user", "Count."), ("assistant", "a, b"))),
    Record("A line\u2028and “quotes”.", " kept blanks "),
]


@pytest.mark.parametrize("system", [None, SYSTEM])
def test_a_file_is_read_back_to_the_same_prompts_and_answers(tmp_path, system):
    file = tmp_path / "upload.jsonl"
    write_upload(file, ROWS, system)
    text = file.read_text()
    assert not any(word in text for word in ("attack", "secret", 'role": "task'))
    assert all({*json.loads(line)} == {"messages"} for line in text.rstrip("\n").split("\n"))
    tokenizer = load_tokenizer("tiny")
    template = get_template("chat", tokenizer)
    back = read_records(file, role="task")
    assert [r.response for r in back] == [r.response for r in ROWS]
    assert [r.request for r in back] == [r.request for r in ROWS]
    # The system text of the file is the rows' own when read back.
    assert [template.prompt(r, tokenizer) for r in back] == [template.prompt(r, tokenizer, system) for r in ROWS]


def test_the_messages_of_a_prompt_are_system_text_earlier_turns_and_question():
    assert messages_of(ROWS[1], "Obey.") == [
        {"role": "system", "content": "Obey.\n\nBe brief."},
        {"role": "user", "content": "Count."},
        {"role": "assistant", "content": "a, b"},
        {"role": "user", "content": "And now?"},
    ]
    assert messages_of(ROWS[0]) == [{"role": "user", "content": "Sort these.\nb, a"}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one row"),
        (
            [ROWS[0], Record("q", " \n", id="x1"), Record("q", "", id="x2")],
            r"empty answer, as in 2 rows \(row 2 \(x1\)",
        ),
        ([Record(" ", "a", id="x3")], r"empty question, as in row 1 \(x3\)"),
    ],
)
def test_rows_that_a_service_refuses_are_named_and_nothing_is_written(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        write_upload(tmp_path / "upload.jsonl", rows)
    assert not list(tmp_path.iterdir())
