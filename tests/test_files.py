"""Files that are whole or not there, and rows that come back as they were."""

import pytest

from hftlight.files import cache_dir, digest, new_folder, read_rows, write_rows, write_text


def test_rows_with_any_line_separator_come_back(tmp_path):
    rows = [{"response": "a\u2028b\u2029c\x85d\ne\r\nf"}, {"response": ""}]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows


def test_a_folder_that_fails_half_way_leaves_nothing(tmp_path):
    def fail(place):
        (place / "weights").touch()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "model") as place:
        fail(place)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_as_a_whole_with_its_mode(tmp_path):
    path = tmp_path / "serving.json"
    path.write_text("old")
    write_text(path, "new", mode=0o600)
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_the_order_of_keys_does_not_change_a_digest():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


def test_an_environment_variable_moves_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
