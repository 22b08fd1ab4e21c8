"""AlpacaEval: which rows are trained on, which are tested, and which one is in neither."""

import json

import pytest

from hftlight.data.sources import ALPACA_EVAL
from hftlight.errors import InputError


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def row(i, **more):
    return {"instruction": f"ask {i}", "input": "", "output": f"say {i}", **more}


def test_row_700_is_in_neither_split(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(i) for i in range(805)])
    train, test = (ALPACA_EVAL.records(split, path) for split in ("train", "test"))
    assert [r.instruction for r in train] == [f"ask {i}" for i in range(700)]
    assert [r.instruction for r in test] == [f"ask {i}" for i in range(701, 805)]
    assert {r.role for r in train} == {"task"}
    assert {r.role for r in test} == {"test"}
    assert (test[0].response, test[0].kind) == ("say 701", "")


@pytest.mark.parametrize("column", ["subset", "dataset"])
def test_a_part_goes_by_its_own_numbers(tmp_path, column):
    path = write(tmp_path / "a.jsonl", [row(i, idx=i, **{column: f"part{i}"}) for i in (804, 699, 700, 0, 701)])
    train, test = (ALPACA_EVAL.records(split, path) for split in ("train", "test"))
    assert [r.instruction for r in train] == ["ask 699", "ask 0"]
    assert [(r.instruction, r.kind) for r in test] == [("ask 804", "part804"), ("ask 701", "part701")]


@pytest.mark.parametrize(
    ("rows", "split", "message"),
    [
        ([row(0), row(1)], "test", "all 805 rows in their order or a column idx .* it has 2 rows and no idx"),
        ([row(0, idx=0), row(1, idx=805)], "test", r"idx must lie in \[0, 804\], got 805 in line 2"),
        ([row(0, idx=0), row(1, idx=-1)], "test", r"got -1 in line 2"),
        ([row(0, idx=3), row(1, idx=3)], "train", "its own idx, .* has 2 rows and 1 different numbers"),
        ([row(0, idx=3)], "test", "has no test row; its numbers are 3 to 3"),
        ([row(0, idx=3)], "dev", r"splits are \['train', 'test'\], got 'dev'"),
    ],
)
def test_rows_without_a_place_are_refused(tmp_path, rows, split, message):
    with pytest.raises(InputError, match=message):
        ALPACA_EVAL.records(split, write(tmp_path / "a.jsonl", rows))
