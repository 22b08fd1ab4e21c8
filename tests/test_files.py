"""Files that are whole or not there, and rows that come back as they were."""

import threading

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


def test_two_folders_for_one_place_at_one_time(tmp_path):
    """The other one is put there while this one is filled, and again between the look and the renaming."""
    place = tmp_path / "model"
    with new_folder(place) as mine:
        (mine / "weights").write_text("mine")
        with new_folder(place) as other:
            (other / "weights").write_text("other")
        assert (place / "weights").read_text() == "other"
    assert (place / "weights").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [place]


def test_many_threads_put_folders_and_files_at_one_place(tmp_path):
    """Whoever looks finds nothing or a whole one; nobody fails, nothing is left."""
    barrier, errors = threading.Barrier(8), []

    def work(number):
        try:
            for _ in range(25):
                barrier.wait(timeout=60)
                with new_folder(tmp_path / "model") as place:
                    (place / "weights").write_text(str(number))
                write_text(tmp_path / "file", f"{number}\n" * 1000)
                assert len(set((tmp_path / "file").read_text().split())) == 1
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "model"]
