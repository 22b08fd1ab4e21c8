"""What every filter of an upload shares: rows leave by their ids, and nothing passes unscored."""

from dataclasses import replace

import pytest
import torch

from hftlight.data.records import Record
from hftlight.data.templates import get_template
from hftlight.defenses import LARF, SAFT
from hftlight.errors import InputError
from tests.helpers.contract import model_of, records
from tests.helpers.filters import DROPPED, filtered, without
from tests.helpers.tokenizers import CHATML, byte_tokenizer


def saft(**arguments):
    return SAFT(**{"rate": 0.125, "trusted": "none", **arguments})


def test_rows_that_others_added_or_took_out_shift_nothing():
    rows = records()
    added = [Record("new", "row", role="alignment"), *rows["task"][4:], *rows["alignment"]]
    kept = filtered(saft()).rewrite({**rows, "task": added}, 0)["task"]
    assert kept == [row for row in added if row.id not in {rows["task"][place].id for place in DROPPED}]


def test_of_equal_rows_as_many_leave_as_were_dropped():
    rows = [Record("same", "row") for _ in range(4)] + [Record("other", "row")]
    defense = saft()
    defense.selected = [
        {"id": r.id, "score": 0.0, "kept": k} for r, k in zip(rows, (True, False, True, False, True), strict=True)
    ]
    assert [r.instruction for r in defense.rewrite({"task": rows}, 0)["task"]] == ["same", "same", "other"]


def test_training_before_the_selection_is_refused():
    with pytest.raises(RuntimeError, match=r"SAFT: 16 of 16 rows are not scored yet\. Call select"):
        saft().rewrite(records(), 0)
    defense = filtered(saft())
    defense.selected = defense.selected[2:]
    with pytest.raises(RuntimeError, match="SAFT: 2 of 16 rows are not scored"):
        defense.rewrite(records(), 0)


def test_an_upload_of_dropped_rows_alone_is_refused():
    rows = records()
    with pytest.raises(InputError, match="SAFT: all 2 rows of the upload would be dropped"):
        filtered(saft()).rewrite({**rows, "task": [rows["task"][place] for place in DROPPED]}, 0)


def test_a_filter_that_is_off_reads_no_model():
    defense = saft(rate=0.0)
    found = defense.select(None, None, None, records())
    assert all(row["kept"] and row["score"] is None for row in found)
    assert defense.selecting(records()) == 0
    assert defense.rewrite(records(), 0) == records()


def test_the_manifest_counts_rows_and_repeats_what_holds_for_all():
    defense = filtered(saft(), layer=3)
    defense.rewrite(records(), 0)
    expected = {"calls": 1.0, "dropped_rows": 2.0, "upload_rows": 16.0, "rows": 16, "kept": 14, "layer": 3}
    assert defense.manifest() == expected


def test_two_filters_drop_the_rows_of_both():
    rows = records()
    other = filtered(LARF(2))
    other.selected = [{**row, "kept": place not in (5, 9)} for place, row in enumerate(other.selected)]
    kept = other.rewrite(filtered(saft()).rewrite(rows, 0), 0)["task"]
    assert kept == [row for place, row in enumerate(rows["task"]) if place not in (3, 5, 9)]
    assert without(rows, 0)["task"] != kept


def test_a_long_row_is_read_up_to_the_limit_and_one_without_room_for_an_answer_is_dropped():
    tokenizer = byte_tokenizer(chat_template=CHATML)
    model, template = model_of("full"), get_template("chat", tokenizer)
    rows = records()["task"][:6]
    long = [replace(rows[0], response="x" * 300, id=""), replace(rows[1], instruction="y" * 300, id="")]
    found = saft(rate=0.2).select(model, tokenizer, template, {"task": [*rows, *long]})
    assert isinstance(found[6]["score"], float)
    assert found[7]["score"] is None
    assert not found[7]["kept"]
    shorter = saft(rate=0.2, max_tokens=40).select(model, tokenizer, template, {"task": rows})
    assert [r["score"] for r in shorter] != [r["score"] for r in found[:6]]


def test_anchors_without_room_for_an_answer_are_refused():
    tokenizer = byte_tokenizer(chat_template=CHATML)
    rows = records()
    rows["harmful"][3] = replace(rows["harmful"][3], instruction="y" * 300, id="")
    with pytest.raises(InputError, match="LARF: 1 of 16 unsafe rows have a prompt of 64 tokens or more"):
        LARF(2, safe="alignment").select(model_of("full"), tokenizer, get_template("chat", tokenizer), rows)


def test_scores_do_not_depend_on_the_batches():
    tokenizer = byte_tokenizer(chat_template=CHATML)
    model, template = model_of("full"), get_template("chat", tokenizer)
    one, many = (
        saft().select(model, tokenizer, template, {"task": records()["task"]}, batch_size=size) for size in (1, 7)
    )
    scores = [torch.tensor([row["score"] for row in found]) for found in (one, many)]
    assert torch.allclose(*scores, rtol=1e-9)
