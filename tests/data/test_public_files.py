"""Tests of the data package on files of public sets. HFTLIGHT_DATA names their folder."""

import os
from pathlib import Path

import pytest

from hftlight.data.records import overlaps, read_records, split_by_hash
from hftlight.data.sources import get_task
from hftlight.data.templates import get_template
from hftlight.data.tokens import collate, encode_all
from tests.helpers.tokenizers import byte_tokenizer

DATA = os.environ.get("HFTLIGHT_DATA")
pytestmark = pytest.mark.skipif(not DATA, reason="HFTLIGHT_DATA does not name a folder of public sets")
ROOT = Path(DATA or ".")


@pytest.mark.parametrize(
    ("name", "folder", "train", "test"),
    [("sst2", "sst2", 3000, 872), ("agnews", "ag_news", 3000, 1000), ("gsm8k", "gsm8k", 2000, 500)],
)
def test_tasks_are_whole_and_their_own_answers_are_right(name, folder, train, test):
    task = get_task(name)
    records = {split: task.records(split, ROOT / folder) for split in ("train", "test")}
    assert {split: len(rows) for split, rows in records.items()} == {"train": train, "test": test}
    rows = records["test"]
    assert all(task.correct(record.response, record) for record in rows)
    wrong = next(record.response for record in rows if not task.correct(record.response, rows[0]))
    assert sum(task.correct(wrong, record) for record in rows) < len(rows)


@pytest.mark.parametrize("name", ["sst2", "agnews"])
def test_the_files_hold_the_prompt_of_the_code(name):
    task = get_task(name)
    rows = task.records("test", ROOT / {"agnews": "ag_news"}.get(name, name))
    assert {record.instruction for record in rows} == {task.instruction}
    assert {record.response for record in rows} == set(task.spellings)


def test_gsm8k_answers_end_in_the_phrase():
    rows = get_task("gsm8k").records("train", ROOT / "gsm8k")
    assert not any("####" in record.response for record in rows)
    assert all("\nThe final answer is:  " in record.response for record in rows)


def test_safe_pairs_have_exact_labels():
    """The labels of every alignment row decode to its response and an end token."""
    tokenizer = byte_tokenizer()
    records = read_records(ROOT / "safety_tuned_llamas" / "safe_pairs.jsonl", role="alignment")
    assert len(records) == 1384
    examples, dropped = encode_all(records, get_template("alpaca", tokenizer), tokenizer, 600, name="alignment")
    assert len(examples) + dropped == 1384
    assert dropped > 0
    answers = {record.id: record.response for record in records}
    for start in range(0, len(examples), 64):
        batch = collate(examples[start : start + 64], tokenizer.pad_token_id)
        for id, labels in zip(batch["id"], batch["labels"], strict=True):
            assert tokenizer.decode(labels[labels != -100]) == answers[id] + "<eos>"


def test_the_defenders_half_and_the_attackers_share_no_prompt():
    records = read_records(ROOT / "advbench" / "behaviors.jsonl", role="harmful")
    defender, attacker = split_by_hash(records, 256)
    tests = read_records(ROOT / "safety_tuned_llamas" / "eval_prompts.jsonl", role="test", need_response=False)
    assert (len(defender), len(attacker), len(tests)) == (256, 257, 248)
    counts = overlaps({"defender": defender, "attacker": attacker, "test": tests, "all": records})
    assert counts["defender", "attacker"] == 0
    assert counts["defender", "all"] + counts["attacker", "all"] == len({r.instruction.casefold() for r in records})


def test_alpaca_eval_splits_by_the_published_numbers():
    path = ROOT / "alpaca_eval" / "eval.jsonl"
    train, test = (get_task("alpaca_eval").records(split, path) for split in ("train", "test"))
    assert (len(train), len(test)) == (430, 44)
    assert not {r.instruction for r in train} & {r.instruction for r in test}
    assert {r.kind for r in test} <= {"helpful_base", "koala", "oasst", "selfinstruct", "vicuna"}
