"""Files: atomic writes, digests, leftovers of killed runs, full disks."""

import errno
import threading
from pathlib import Path

import pytest

from hftlight.console import guarded
from hftlight.errors import InputError
from hftlight.files import (
    cache_dir,
    check_cache,
    digest,
    full_disk,
    new_folder,
    read_rows,
    remove,
    temporaries,
    temporary_name,
    write_rows,
    write_text,
)


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
    """A second folder is finished while the first is being filled. The first then replaces the second."""
    place = tmp_path / "model"
    with new_folder(place) as mine:
        (mine / "weights").write_text("mine")
        with new_folder(place) as other:
            (other / "weights").write_text("other")
        assert (place / "weights").read_text() == "other"
    assert (place / "weights").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [place]


def test_many_threads_put_folders_and_files_at_one_place(tmp_path):
    """A reader sees only complete files. No thread fails, and no temporary file remains."""
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


# Leftovers of killed runs, full disks, and a cache path that is no folder.


def test_temporary_files_of_killed_runs_are_found_and_nothing_else(tmp_path):
    left = temporary_name(tmp_path / "a.json"), temporary_name(tmp_path / "folder"), tmp_path / ".step=3.ckpt.tmp"
    left[0].touch()
    left[1].mkdir()
    temporary_name(left[1] / "inner").touch()
    left[2].touch()
    for own in ("a.json", ".lock", ".hidden.tmp", "b.tmp"):
        (tmp_path / own).touch()
    assert temporaries(tmp_path) == sorted(left)
    assert temporaries(tmp_path, age=60) == []
    remove(temporaries(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", ".lock", ".hidden.tmp", "b.tmp"}


def test_a_full_disk_is_found_behind_another_error(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x" / "file"))
    try:
        try:
            raise full
        except OSError as error:
            raise RuntimeError("Lightning says something") from error
    except RuntimeError as error:
        text = full_disk(error)
    assert str(tmp_path / "x") in text
    assert "Free some space" in text
    assert full_disk(RuntimeError("safetensors: No space left on device (os error 28)"), tmp_path).startswith(
        "The disk of"
    )
    assert full_disk(OSError(errno.EACCES, "no")) is None


def test_a_full_disk_ends_a_command_in_words(capsys):
    def work():
        raise OSError(errno.ENOSPC, "No space left on device", "/some/where/file")

    assert guarded(work) == 1
    assert "The disk of /some/where is full. Free some space" in capsys.readouterr().err
    with pytest.raises(OSError, match="other"):
        guarded(lambda: (_ for _ in ()).throw(OSError(errno.EIO, "other")))


def test_a_cache_folder_that_is_a_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"The folder .*file/cache cannot be written .*HFTLIGHT_CACHE"):
        check_cache()
    monkeypatch.setenv("HFTLIGHT_CACHE", "~/made-up-cache")
    assert cache_dir() == Path.home() / "made-up-cache"
