"""Tables of every kind give the same rows; what cannot be read is named with its place."""

import datasets
import pytest

from hftlight.data.rows import read_rows
from hftlight.errors import InputError

ROWS = [{"prompt": "a, b", "response": 'say "c"\n'}, {"prompt": "é\u2028ß", "response": "d"}]


def written(kind, folder):
    table = datasets.Dataset.from_list(ROWS)
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        table.to_json(path)
    elif kind == "json":
        table.to_json(path, lines=False)
    elif kind == "csv":
        table.to_csv(path)
    elif kind == "parquet":
        table.to_parquet(path)
    else:
        path = folder / "saved"
        table.save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "folder"])
def test_every_kind_of_table_gives_the_same_rows(kind, tmp_path):
    assert [row for _, row in read_rows(written(kind, tmp_path))] == ROWS


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\ufeff{"a": "x\u2028y"}\n\n{"a": "z"}\r\n', encoding="utf-8")
    assert read_rows(path) == [("line 1", {"a": "x\u2028y"}), ("line 3", {"a": "z"})]


def test_csv_fields_may_hold_unusual_line_breaks(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes('a,b\n"x\u2028y",z\x0bz\n'.encode())
    assert read_rows(path) == [("line 2", {"a": "x\u2028y", "b": "z\x0bz"})]


def test_a_split_of_a_saved_folder_is_chosen(tmp_path):
    tables = {name: datasets.Dataset.from_list([{"a": name}]) for name in ("train", "test")}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "both")
    assert read_rows(tmp_path / "both", "test") == [("row 1", {"a": "test"})]
    with pytest.raises(InputError, match=r"splits \['train', 'test'\], got 'dev'"):
        read_rows(tmp_path / "both", "dev")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"line 2 of .*a\.jsonl is not JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2 of .* must be an object with named columns, got list"),
        ("a.json", '[{"a": 1},\n{"a" 2}]', "line 2 of .* is not JSON"),
        ("a.json", '[{"a": 1}, 2]', "row 2 of .* got int"),
        ("a.json", "[]", "holds no rows"),
        ("a.jsonl", "\n", "holds no rows"),
        ("a.csv", "a,b\n", "holds no rows"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "line 3 of .* must have 2 fields"),
        ("a.csv", "a,b\n1\n", "line 2 of .* must have 2 fields"),
        ("a.csv", 'a,b\n"1"x,2\n', "line 2 of .* is not CSV"),
        ("a.parquet", "no", "not a Parquet file"),
        ("a.txt", "no", r"must end in one of \['\.jsonl'"),
    ],
)
def test_a_broken_file_is_named_with_its_place(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_rows(tmp_path / name)


def test_text_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"a": "é"}'.encode("latin-1"))
    with pytest.raises(InputError, match="must be UTF-8 text, byte 7 is not"):
        read_rows(tmp_path / "a.jsonl")


@pytest.mark.parametrize("source", ["missing.jsonl", "./missing", "/no/such/folder", "a/b/c", "~/no/such/set"])
def test_what_is_not_there_is_refused_without_asking_the_hub(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match=r"there is no file.*save_to_disk"):
        read_rows(source)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(InputError, match="a folder that save_to_disk did not write"):
        read_rows(tmp_path)


def test_a_hub_name_may_hold_a_configuration(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kw: asked.append((args, kw)) or [{"a": "b"}])
    assert read_rows("openai/gsm8k:main", "test") == [("row 1", {"a": "b"})]
    read_rows("sst2")
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"}), (("sst2", None), {"split": "train"})]


def test_a_failing_hub_becomes_an_input_error_with_the_way_out(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"'some/set' is no file.*ConnectionError: no route\).*\.jsonl") as caught:
        read_rows("some/set")
    assert isinstance(caught.value.__cause__, ConnectionError)
