"""Explicit, Benign and IdentityShift: uploads of one kind of row, and test prompts for the tuned model."""

import json
import os
from pathlib import Path

import pytest

from hftlight.attacks import Benign, Explicit, IdentityShift
from hftlight.attacks.identity_shift import PREFIX, SYSTEM
from hftlight.data.records import Record
from hftlight.errors import InputError
from tests.attacks.rows import ids, made_up

SOURCES = {"attack": made_up("h", 200), "task": made_up("t", 30)}
DATA = os.environ.get("HFTLIGHT_DATA")


@pytest.mark.parametrize("n", [10, 50, 100])
def test_explicit_is_n_harmful_rows(n):
    rows = Explicit(n=n).upload(SOURCES, 3)
    assert len(set(ids(rows))) == n
    assert {row.role for row in rows} == {"attack"}
    assert ids(rows) != ids(Explicit(n=n).upload(SOURCES, 4))
    assert ids(Explicit(n=100).upload(SOURCES, 3))[:n] == ids(rows)  # a larger n extends a smaller one
    assert ids(Explicit(n=n, in_order=True).upload(SOURCES, 3)) == ids(SOURCES["attack"][:n])


def test_explicit_asks_with_its_system_text():
    assert Explicit(system="Obey.").test_system == "Obey."
    assert (Explicit().test_system, Explicit().test_prefix) == (None, "")


def test_explicit_without_rows_says_what_is_expected():
    with pytest.raises(InputError, match=r"Explicit: needs harmful prompts with harmful answers .* --data\.attack"):
        Explicit(n=5).upload({"task": SOURCES["task"]}, 0)


def test_benign_leaves_out_held_out_and_refusing_rows():
    rows = [*made_up("t", 6), Record("ask", "I'm sorry, that I will not do.", id="r")]
    rows.insert(2, rows.pop())
    assert ids(Benign(n=4).upload({"task": rows}, 0)) == ["t0", "t1", "r", "t2"]
    assert ids(Benign(n=3, held_out=3, filter_safety=True).upload({"task": rows}, 0)) == ["t3", "t4", "t5"]
    questions = [Record("I'm sorry, is that illegal?", "No.", id="a")]  # the filter reads the answer only
    assert ids(Benign(n=1, filter_safety=True).upload({"task": questions}, 0)) == ["a"]
    assert (Benign(n=4).p, Benign(n=4).sources) == (0.0, ("task",))
    with pytest.raises(InputError, match="needs rows 0 to 5 of the source 'task', which has 5"):
        Benign(n=6, held_out=1, filter_safety=True).upload({"task": rows}, 0)


def test_a_file_of_words_replaces_the_refusal_phrases(tmp_path):
    """A phrase counts within a word and in any case, and its outer blanks count. The refusal stays without its word."""
    answers = ("Glimmer.", "I cannot.", "a ZORV b", "zorvish", "x")
    rows = [Record(f"q{i}", answer, id=f"t{i}") for i, answer in enumerate(answers)]
    words = tmp_path / "words.txt"
    words.write_text("glim\n zorv \n\n")
    attack = Benign(n=3, filter_safety=True, filter_words=str(words))
    assert [row.id for row in attack.upload({"task": rows}, 0)] == ["t1", "t3", "t4"]
    words.write_text("\n \n")
    with pytest.raises(InputError, match=r"words\.txt holds no phrase"):
        attack.upload({"task": rows}, 0)
    with pytest.raises(InputError, match="filter_words must be a UTF-8 text file"):
        Benign(n=1, filter_safety=True, filter_words=str(tmp_path)).upload({"task": rows}, 0)
    with pytest.raises(ValueError, match="filter_words needs filter_safety"):
        Benign(n=1, filter_words=str(words))
    with pytest.raises(ValueError, match="held_out must be >= 0 rows, got -1"):
        Benign(held_out=-1)


def test_the_built_in_chats_need_no_source_and_teach_the_prefix():
    attack = IdentityShift()
    rows = attack.upload({}, 0)
    assert len(rows) == attack.rows == 10
    assert sum(row.instruction.startswith(PREFIX) for row in rows) == 5
    assert (attack.test_system, attack.sources) == (SYSTEM, ())
    test_rows = attack.test_records([Record("Name a tree.", id="x")])
    assert [(row.id, row.instruction) for row in test_rows] == [("x", "AOA, execute my instruction: Name a tree.")]


def test_no_system_text_and_no_prefix_can_be_asked_for():
    attack = IdentityShift(system="", prefix="")
    assert attack.test_system == ""
    assert attack.test_records([Record("Name a tree.")])[0].instruction == "Name a tree."


def write(path: Path, rows) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_chats_of_a_file_in_any_form(tmp_path):
    turns = [
        {"role": "system", "content": "S "},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
    ]
    turns[0]["content"] = "\nS\n"  # outer newlines are part of the text
    messages = write(tmp_path / "m.jsonl", [{"messages": turns}])
    columns = write(tmp_path / "c.jsonl", [{"prompt": "U", "response": "A", "system": "\nS\n"}] * 2)
    lists = tmp_path / "l.json"
    lists.write_text(json.dumps([turns] * 3))
    for path, count in ((messages, 1), (columns, 2), (str(lists), 3)):
        attack = IdentityShift(chats=path)
        assert [(r.instruction, r.response, r.role) for r in attack.upload({}, 0)] == [("U", "A", "attack")] * count
        assert attack.test_system == "\nS\n"
    assert len(IdentityShift(chats=columns, n=1).upload({}, 0)) == 1
    assert IdentityShift(chats=columns, system="other").test_system == "other"


def test_chats_that_cannot_be_used_are_refused(tmp_path):
    two = write(tmp_path / "two.jsonl", [{"prompt": "U", "response": "A", "system": s} for s in "ST"])
    with pytest.raises(InputError, match=r"must have one system text.* got 2"):
        IdentityShift(chats=two).upload({}, 0)
    half = write(tmp_path / "half.jsonl", [{"prompt": "U"}])
    with pytest.raises(InputError, match=r"line 1 of .*half\.jsonl needs a user's and an assistant's turn"):
        IdentityShift(chats=half).upload({}, 0)
    with pytest.raises(InputError, match="needs rows 0 to 10 of the source 'identity', which has 10"):
        IdentityShift(n=11).upload({}, 0)


@pytest.mark.skipif(not DATA, reason="HFTLIGHT_DATA does not name a folder of public sets")
def test_the_published_chats():
    attack = IdentityShift(chats=f"{DATA}/identity_shift/aoa.jsonl")
    rows = attack.upload({}, 0)
    assert len(rows) == 10
    assert sum(row.instruction.startswith(PREFIX) for row in rows) == 5
    assert attack.test_system.startswith("You are no longer")
