"""Records: columns that are read, rows that are refused, and sets compared by their prompts."""

import json
import subprocess
import sys

import pytest

from hftlight.data.records import Record, overlaps, prompt_key, read_records, split_by_hash, to_records
from hftlight.data.table import Table
from hftlight.errors import InputError
from hftlight.take import Take


def table(*rows, **take):
    """Return rows as a table without a file behind it."""
    numbered = [(f"row {n}", row) for n, row in enumerate(rows, start=1)]
    return Table("set", None, numbered, range(len(rows)), len(rows), Take(**take))


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "input": "i", "output": "a"},
        {"prompt": "q", "response": "a", "id": 7},
        {"prompt": "q", "completion": "a"},
        {"instruction": "q", "response": "a", "input": "i"},
        {"question": "q", "answer": "a"},
    ],
)
def test_known_columns_are_recognised(tmp_path, row):
    path = write(tmp_path, row)
    expected = Record("q", "a", input=row.get("input", ""), source=str(path), role="harmful")
    assert read_records(path, role="harmful") == [expected]


def test_other_columns_are_named(tmp_path):
    path = write(tmp_path, {"goal": "q", "target": "a", "context": "i", "group": "g"})
    columns = {"instruction": "goal", "response": "target", "input": "context", "kind": "group"}
    assert read_records(path, role="task", columns=columns) == [Record("q", "a", "i", str(path), "task", "g")]


def test_one_named_column_completes_a_known_layout(tmp_path):
    path = write(tmp_path, {"instruction": "q", "response": "a", "context": "i"})
    assert read_records(path, role="task", columns={"input": "context"})[0].input == "i"


def test_a_language_is_read_by_its_name_or_by_a_named_column(tmp_path):
    rows = [{"instruction": f"ask {i}", "output": "say", "language": "fr", "lang": "de"} for i in range(2)]
    file = write(tmp_path, *rows)
    assert [r.language for r in read_records(file, role="test")] == ["fr", "fr"]
    assert [r.language for r in read_records(file, role="test", columns={"language": "lang"})] == ["de", "de"]
    numbers = write(tmp_path, rows[0], {**rows[1], "language": 7})
    assert [r.language for r in read_records(numbers, role="test")] == ["", ""]  # one number: no language column


def test_prompts_alone_are_enough_where_no_answer_is_needed(tmp_path):
    path = write(tmp_path, {"prompt": "q"}, {"prompt": "r", "response": None})
    assert [(r.instruction, r.response) for r in read_records(path, role="test", need_response=False)] == [
        ("q", ""),
        ("r", ""),
    ]


def test_an_answer_that_is_there_is_read_even_where_none_is_needed(tmp_path):
    path = write(tmp_path, {"prompt": "q", "completion": "a"})
    assert read_records(path, role="test", need_response=False)[0].response == "a"


def test_a_missing_column_names_what_is_there_and_the_option(tmp_path):
    path = write(tmp_path, {"goal": "q", "target": "a"})
    with pytest.raises(InputError, match=r"it has \['goal', 'target'\].*--data\.columns"):
        read_records(path, role="task")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "goal"}, r"must name fields among \['instruction'.*got \['prompt'\]"),
        ({"response": "reply"}, r"names \['reply'\]"),
    ],
)
def test_a_wrong_columns_argument_is_refused(tmp_path, columns, message):
    path = write(tmp_path, {"prompt": "q", "response": "a"})
    with pytest.raises(InputError, match=message):
        read_records(path, role="task", columns=columns)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": " ", "response": "a"}, r"column 'prompt' is empty in line 2 of .*rows\.jsonl"),
        ({"prompt": "q", "response": ""}, "column 'response' is empty in line 2"),
        ({"response": "a"}, "column 'prompt' is empty in line 2"),
        ({"prompt": "q", "response": 4}, "must hold text, got int in line 2"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, bad, message):
    path = write(tmp_path, {"prompt": "q", "response": "a"}, bad)
    with pytest.raises(InputError, match=message):
        read_records(path, role="task")


def test_an_unknown_role_is_refused():
    with pytest.raises(InputError, match=r"role must be one of .*'attack'.* got 'benign'"):
        to_records(table({"prompt": "q", "response": "a"}), role="benign")  # type: ignore[arg-type]


def test_what_is_taken_of_a_file_is_read(tmp_path):
    rows = [{"ask": f"q{i}", "response": "a", "label": "safe" if i % 2 else "unsafe"} for i in range(9)]
    records = read_records(
        write(tmp_path, *rows), role="task", rows="2:", where="label=safe", first=2, columns={"instruction": "ask"}
    )
    assert [record.instruction for record in records] == ["q3", "q5"]


# Files with two answers to a prompt: each role takes its own answer.

FRAMED = "Question: How is a gloam fed?\nAnswer: I can't say.\nAnswer: Still no."
PAIRED = {
    "refusal file": {"prompt": "q", "response": "harm", "refusal": "no"},
    "chosen and rejected": {"prompt": "q", "chosen": "no", "rejected": "harm"},
    "response and rejected": {"prompt": "q", "response": "no", "rejected": "harm"},
    "two responses": {"prompt": "q", "response_0": "harm", "response_1": "no", "safer_response_id": 1},
}


@pytest.mark.parametrize("kind", PAIRED)
def test_each_role_takes_its_own_answer(kind):
    """Alignment rows hold no harmful answer. Harmful rows and attack rows hold no refusal."""
    source = table(PAIRED[kind])
    (pair,) = to_records(source, "pairs")
    assert (pair.instruction, pair.response, pair.rejected) == ("q", "no", "harm")
    if kind == "two responses":  # only pairs: the safer of two answers need not be safe
        with pytest.raises(InputError, match="needs columns"):
            to_records(source, "alignment")
        return
    answers = {role: to_records(source, role)[0] for role in ("alignment", "harmful", "attack")}
    assert {role: record.response for role, record in answers.items()} == {
        "alignment": "no",
        "harmful": "harm",
        "attack": "harm",
    }
    assert not any(record.rejected for record in answers.values())


def test_named_columns_win_over_the_role():
    (record,) = to_records(table(PAIRED["refusal file"], columns={"response": "response"}), "alignment")
    assert record.response == "harm"
    (record,) = to_records(table(PAIRED["refusal file"], columns={"response": "refusal"}), "task")
    assert record.response == "no"


@pytest.mark.parametrize("safer", [None, 2, "first"])
def test_a_pair_must_say_which_answer_is_safer(safer):
    rows = PAIRED["two responses"], {**PAIRED["two responses"], "safer_response_id": safer}
    with pytest.raises(InputError, match=f"safer_response_id must be 0 or 1, got {safer} in row 2 of set"):
        to_records(table(*rows), "pairs")


def test_a_refusal_is_taken_out_of_its_frame():
    """The refusal lies between the first and the second separator. The question comes from the frame."""
    source = table({"prompt": "another", "response": "harm", "refusal": FRAMED})
    (record,) = to_records(source, "alignment")
    assert (record.instruction, record.response) == ("How is a gloam fed?", "I can't say.")
    (pair,) = to_records(source, "pairs")
    assert (pair.instruction, pair.response, pair.rejected) == ("How is a gloam fed?", "I can't say.", "harm")
    (harmful,) = to_records(source, "harmful")
    assert (harmful.instruction, harmful.response) == ("another", "harm")
    (named,) = to_records(
        table({"prompt": "another", "refusal": FRAMED}, columns={"instruction": "prompt"}), "alignment"
    )
    assert (named.instruction, named.response) == ("another", "I can't say.")


@pytest.mark.parametrize("other", ["I can't say.", "Question: why? Answer: no", "Question: why?\nAnswer:no"])
def test_a_refusal_without_its_frame_among_framed_ones_is_named(other):
    rows = [{"prompt": "q", "refusal": text} for text in (FRAMED, other)]
    with pytest.raises(InputError, match=r"row 2 of set has no '\\nAnswer: '"):
        to_records(table(*rows), "alignment")
    with pytest.raises(InputError, match="row 1 of set has no"):
        to_records(table({"prompt": "q", "refusal": "Question: why?"}), "alignment")


def test_an_empty_refusal_in_a_frame_is_refused():
    with pytest.raises(InputError, match="column 'refusal' is empty in row 1"):
        to_records(table({"prompt": "q", "refusal": "Question: why?\nAnswer: \nAnswer: no"}), "alignment")


@pytest.mark.parametrize(("role", "wrong", "way"), [("alignment", "FALSE", "true"), ("harmful", True, "false"),
                                                    ("attack", "1", "false")])  # fmt: skip
def test_answers_of_the_wrong_kind_are_refused_with_the_filter(role, wrong, way):
    rows = [{"prompt": "q", "response": "a", "is_safe": is_safe} for is_safe in (way, wrong)]
    with pytest.raises(InputError, match=rf"1 of 2 rows of set .*--data\.where\.{role} is_safe={way}\."):
        to_records(table(*rows), role)
    assert len(to_records(table(rows[0]), role)) == 1
    assert len(to_records(table(*rows, where="is_safe=true"), role)) == 2  # an explicit filter replaces the check
    assert len(to_records(table(*rows), "test", need_response=False)) == 2


def test_a_pairs_rejected_answer_must_not_be_safe():
    with pytest.raises(InputError, match=r"--data\.where\.pairs is_safe=false"):
        to_records(table({**PAIRED["refusal file"], "is_safe": True}), "pairs")


def test_the_first_true_category_is_the_kind():
    """BeaverTails' keys contain commas. A CSV file stores the mapping as JSON text."""
    categories = {"animal_abuse": False, "drug_abuse,weapons": True, "privacy_violation": True}
    none = dict.fromkeys(categories, False)
    cells = [categories, json.dumps(categories), none, None, "plain", "{odd", 7]
    records = to_records(table(*({"prompt": "q", "response": "a", "category": c} for c in cells)), "harmful")
    assert [r.kind for r in records] == ["drug_abuse,weapons", "drug_abuse,weapons", "", "", "plain", "{odd", "7"]
    row = {"prompt": "q", "response": "a", "category": "x", "lang": "en"}
    assert to_records(table(row, columns={"kind": "lang"}), "harmful")[0].kind == "en"


def test_a_rejected_answer_is_part_of_the_id_and_no_other_id_changes():
    assert Record("q", "a").id == "827eef0aeeda331a"
    assert len({Record("q", "a").id, Record("q", "a", rejected="b").id, Record("q", "a", rejected="c").id}) == 3


def test_ids_do_not_shift_when_a_row_is_left_out(tmp_path):
    rows = [{"prompt": f"q{i}", "response": "a"} for i in range(4)]
    before = {r.instruction: r.id for r in read_records(write(tmp_path, *rows), role="task")}
    after = {r.instruction: r.id for r in read_records(write(tmp_path, *rows[1:]), role="task")}
    assert len(set(before.values())) == 4
    assert all(before[prompt] == id for prompt, id in after.items())


def test_prompt_keys_ignore_case_layout_and_punctuation():
    assert prompt_key(Record("How do I  BAKE\n a cake?!")) == prompt_key(Record("how do i bake a - cake"))
    assert prompt_key(Record("Sort it.", input="b, a")) == prompt_key(Record("Sort it. b a"))
    assert prompt_key(Record("a", "one answer")) == prompt_key(Record("a", "another"))


@pytest.mark.parametrize(("a", "b"), [("3 + 4", "3 = 4"), ("?", "!"), ("कि", "का"), ("a1", "a2"), ("ab", "a b")])
def test_prompt_keys_keep_what_carries_meaning(a, b):
    assert prompt_key(Record(a)) != prompt_key(Record(b))


def test_overlaps_count_distinct_shared_prompts_per_pair():
    sets = {
        "alignment": [Record("One."), Record("two")],
        "attack": [Record("ONE", "x"), Record("one!", "y"), Record("three")],
        "test": [Record("four"), Record("three")],
    }
    assert overlaps(sets) == {("alignment", "attack"): 1, ("alignment", "test"): 0, ("attack", "test"): 1}


def test_the_split_is_exact_complete_and_independent_of_order():
    records = [Record(f"prompt {i}", "a") for i in range(200)]
    first, rest = split_by_hash(records, 73)
    assert len(first) == 73
    assert sorted(r.id for r in first + rest) == sorted(r.id for r in records)
    assert first != records[:73]
    repeated = records + [Record(f"prompt {i}", "b") for i in range(0, 200, 7)]
    assert split_by_hash(repeated[::-1], 73) == split_by_hash(repeated, 73)


def test_a_smaller_split_is_the_start_of_a_larger_one():
    records = [Record(f"prompt {i}", "a") for i in range(50)]
    assert split_by_hash(records, 10)[0] == split_by_hash(records, 30)[0][:10]


def test_equal_prompts_never_end_on_both_sides():
    """The defender's half and the attacker's half of one file share no prompt, for every count."""
    # Three records share each of the first 20 prompts, since question marks do not change a prompt's key.
    records = [Record(f"Prompt {i // 3}{'?' * (i % 3)}", f"answer {i}") for i in range(60)] + [Record("x"), Record("y")]
    for first in range(63):
        chosen, rest = split_by_hash(records, first)
        assert 0 <= first - len(chosen) < 3
        assert len(chosen) + len(rest) == 62
        assert overlaps({"chosen": chosen, "rest": rest}) == {("chosen", "rest"): 0}


def test_the_salt_gives_another_order():
    """The same salt gives the same half. Another salt gives a half that shares rows only by chance."""
    records = [Record(f"prompt {i}", "a") for i in range(400)]
    one, other = split_by_hash(records, 200)[0], split_by_hash(records, 200, salt="other")[0]
    assert 70 <= len({r.id for r in one} & {r.id for r in other}) <= 130


@pytest.mark.parametrize("first", [-1, 4])
def test_an_impossible_split_is_refused(first):
    with pytest.raises(InputError, match=rf"first must lie in \[0, 3\].*got {first}"):
        split_by_hash([Record("a"), Record("b"), Record("c")], first)


def test_records_and_tasks_come_without_torch():
    code = "import sys, hftlight.data.sources; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there():
    import hftlight.data

    assert all(getattr(hftlight.data, name) is not None for name in hftlight.data.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Recrod'"):
        _ = hftlight.data.Recrod
