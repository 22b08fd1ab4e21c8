"""Export of answers to the file that AlpacaEval reads."""

import json

import pytest

from hftlight.errors import InputError
from hftlight.evaluation.alpaca_eval import export_alpaca_eval

ROWS = [
    {"arm": "none", "set": "task", "prompt": "Name a colour.", "response": "Blue – “bleu”.", "dataset": "koala"},
    {"arm": "none", "set": "task", "prompt": "Count.\nTo two.", "response": "", "kind": "vicuna"},
    {"arm": "none", "set": "task", "prompt": "Wait.", "response": "Yes\u2028."},
]


def test_rows_have_the_fields_of_alpaca_eval(tmp_path):
    path = tmp_path / "new" / "outputs.json"
    export_alpaca_eval(ROWS, path, "booster")
    assert json.loads(path.read_text(encoding="utf-8")) == [
        {"dataset": "koala", "instruction": "Name a colour.", "output": "Blue – “bleu”.", "generator": "booster"},
        {"dataset": "vicuna", "instruction": "Count.\nTo two.", "output": "", "generator": "booster"},
        {"instruction": "Wait.", "output": "Yes\u2028.", "generator": "booster"},
    ]
    export_alpaca_eval(ROWS[:1], path, "again")
    assert [row["generator"] for row in json.loads(path.read_text())] == ["again"]


@pytest.mark.parametrize(
    ("rows", "generator", "message"),
    [
        ([], "m", "at least one answer"),
        (ROWS, " ", "generator names the model"),
        ([ROWS[0], ROWS[2], ROWS[0]], "m", "rows 1 and 3 have the same .'Name a colour"),
        ([{"prompt": "x", "response": None}], "m", "row 1 needs the texts prompt and response, got 'x' and None"),
        ([ROWS[0], {"instruction": "x", "output": "y"}], "m", "row 2 needs"),
        ([{"prompt": "", "response": "y"}], "m", "row 1 needs"),
    ],
)
def test_rows_that_cannot_be_paired_are_refused_and_nothing_is_written(tmp_path, rows, generator, message):
    with pytest.raises(InputError, match=message):
        export_alpaca_eval(rows, tmp_path / "a.json", generator)
    assert not (tmp_path / "a.json").exists()
