"""Tables of every kind give the same rows. An error names the place that cannot be read."""

import csv

import datasets
import pytest

from hftlight.data.table import read_rows, read_table
from hftlight.errors import InputError
from hftlight.take import Take

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


# A take selects a range of the source's rows, then the rows that pass the filter, then the first N of these.


def lines(folder, count=10):
    path = folder / "rows.jsonl"
    path.write_text(
        "\n".join(f'{{"n": {i}, "safe": {"true" if i % 2 else "false"}, "lang": "en"}}' for i in range(count))
    )
    return path


@pytest.mark.parametrize(
    ("take", "kept"),
    [
        ({}, [*range(10)]),
        ({"rows": "3:7"}, [3, 4, 5, 6]),
        ({"rows": "7:99"}, [7, 8, 9]),  # a range may end beyond the last row, as a slice may
        ({"where": "safe=TRUE"}, [1, 3, 5, 7, 9]),
        ({"where": "safe=false, lang=en", "first": 2}, [0, 2]),
        ({"rows": "5:", "where": "safe=1", "first": 2}, [5, 7]),
    ],
)
def test_a_range_counts_the_files_rows_and_a_first_number_the_filtered_ones(take, kept, tmp_path):
    table = read_table(lines(tmp_path), take=Take(**take))
    assert [row["n"] for _, row in table.rows] == list(table.numbers) == kept
    assert [place for place, _ in table.rows] == [f"line {n + 1}" for n in kept]
    entry = table.taken()
    assert (entry["read"], entry["kept"], entry["first_row"], entry["last_row"]) == (10, len(kept), kept[0], kept[-1])
    assert (entry["source"], entry["split"], entry["rows"]) == (str(tmp_path / "rows.jsonl"), None, take.get("rows"))
    # Multiplication by False gives the empty list if there is no filter.
    assert entry["where"] == take.get("where", "").split(", ") * ("where" in take)


@pytest.mark.parametrize(
    ("take", "message"),
    [
        ({"rows": "10:12"}, r"has 10 rows, counted from 0; --data\.rows=10:12 selects none"),
        ({"where": "save=true"}, r"has the columns \['n', 'safe', 'lang'\].* names 'save'\. Did you mean 'safe'\?"),
        ({"where": "lang=fr"}, r"no row of .* has lang=fr; values of 'lang' are \['en'\]"),
        ({"where": ["safe=true", "n=2"]}, "has safe=true, n=2; values of 'safe' are .* and values of 'n' are"),
        ({"columns": {"response": "answer"}}, r"--data\.columns names \['answer'\]"),
        ({"split": "train"}, "has no splits, but --data.split asks for 'train'"),
    ],
)
def test_what_cannot_be_taken_is_refused_with_what_there_is(take, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_table(lines(tmp_path), take=Take(**take))


def test_usual_columns_count_only_where_all_of_them_are(tmp_path):
    path = lines(tmp_path)
    assert read_table(path, take=Take(usual={"kind": "lang", "input": "n"})).columns == {"kind": "lang", "input": "n"}
    assert read_table(path, take=Take(usual={"kind": "lang", "input": "m"})).columns == {}
    both = Take(usual={"kind": "lang", "input": "n"}, columns={"kind": "safe"})
    assert read_table(path, take=both).columns == {"kind": "safe", "input": "n"}


def test_a_split_is_taken_of_what_has_several(tmp_path):
    tables = {name: datasets.Dataset.from_list([{"a": name}]) for name in ("train", "30k_test")}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "both")
    table = read_table(tmp_path / "both", take=Take(split="30k_test"))
    assert (table.rows, table.taken()["split"]) == ([("row 1", {"a": "30k_test"})], "30k_test")
    assert read_table(tmp_path / "both").split == "train"
    tables["train"].save_to_disk(tmp_path / "one")
    with pytest.raises(InputError, match="has no splits"):
        read_table(tmp_path / "one", take=Take(split="train"))


def test_a_split_of_a_hub_set_is_asked_of_the_hub(monkeypatch):
    splits = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: splits.append(split) or [{"a": "b"}])
    assert read_table("some/set", "validation").split == "validation"
    assert read_table("some/set", "validation", Take(split="30k_train")).split == "30k_train"
    assert splits == ["validation", "30k_train"]


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(InputError, match="a folder that save_to_disk did not write"):
        read_rows(tmp_path)


def test_a_hub_name_may_hold_a_configuration(monkeypatch):
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kw: calls.append((args, kw)) or [{"a": "b"}])
    assert read_rows("openai/gsm8k:main", "test") == [("row 1", {"a": "b"})]
    read_rows("sst2")
    assert calls == [(("openai/gsm8k", "main"), {"split": "test"}), (("sst2", None), {"split": "train"})]


def test_a_failing_hub_becomes_an_input_error_with_the_way_out(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"'some/set' is no file.*ConnectionError: no route\).*\.jsonl") as caught:
        read_rows("some/set")
    assert isinstance(caught.value.__cause__, ConnectionError)


@pytest.mark.parametrize(
    "text", ['{"data": [{"a": 1}, {"a": 2}]}', '{\n "version": 3,\n "data": [{"a": 1},\n {"a": 2}]\n}\n']
)
def test_the_rows_of_an_object_are_read(text, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert read_rows(path) == [("row 1", {"a": 1}), ("row 2", {"a": 2})]


def test_an_object_with_texts_is_a_row_and_lines_may_end_in_json(tmp_path):
    one, lines = tmp_path / "one.json", tmp_path / "lines.json"
    one.write_text('{"a": "x", "history": [{"role": "user", "content": "y"}]}')
    lines.write_text('{"a": "x"}\n{"a": "y"}\n')
    assert [row["a"] for _, row in read_rows(one)] == ["x"]
    assert [row["a"] for _, row in read_rows(lines)] == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"train": [{"a": 1}], "test": [{"a": 2}]}', "several keys with lists of objects: train, test"),
        ("a.json", '{"a": [1, 2], "b": [3, 4]}', "one object with the keys a, b"),
        ("a.json", '{\n "data": [{"a": 1},\n {"a" 2}]}', r"line 3 of .*a\.json is not JSON"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', r"line 2 of .*the key 'a' stands there twice.*Keep one"),
        ("a.json", '[{"a": 1, "a": 2}]', r"a\.json: the key 'a' stands there twice"),
        ("a.csv", "a,b,a\n1,2,3\n", "several columns named a"),
        (
            "a.jsonl",
            '{"a": "x"}\n{"a": "\\ud83d"}\n{"a": ["\\udc00"]}\n',
            r"2 rows \(line 2, line 3\) of .*half a char",
        ),
    ],
)
def test_what_would_lose_something_is_refused(name, text, message, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_rows(path)


def test_a_whole_character_may_be_written_as_two_escapes(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "\\ud83d\\ude00"}\n')
    assert read_rows(path) == [("line 1", {"a": "\U0001f600"})]


def test_a_csv_field_may_be_long(tmp_path):
    path, before = tmp_path / "rows.csv", csv.field_size_limit()
    path.write_text(f"a,b\n{'x' * 140_000},y\n")
    assert len(read_rows(path)[0][1]["a"]) == 140_000
    assert csv.field_size_limit() == before


def test_columns_of_later_rows_count(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2, "b": 3}\n')
    assert read_table(path).found == ["a", "b"]
    assert read_table(path, take=Take(where=["b=3"])).rows[0][1] == {"a": 2, "b": 3}
