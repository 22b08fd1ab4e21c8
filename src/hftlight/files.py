"""Files and folders that are whole or not there: written beside their place and renamed."""

import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hftlight.errors import InputError

WEIGHTS = {".safetensors", ".bin", ".pt"}  # suffixes of files that nobody edits by hand
HASHES = "hashes"  # folder of the cache that remembers digests
REMEMBERED = 2**20  # bytes from which on a digest is remembered
SETTLED = 2 * 10**9  # nanoseconds after its last change from which on a file's times can be trusted
_digests: dict[tuple[Any, ...], str] = {}
OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # what renaming a folder to a place says that is taken


def cache_dir() -> Path:
    """Return the folder of converted models and finished stages: ``HFTLIGHT_CACHE``, or ``~/.cache/hftlight``."""
    return Path(os.environ.get("HFTLIGHT_CACHE") or Path.home() / ".cache" / "hftlight")


def ensure_writable(folder: Path, option: str) -> None:
    """Make ``folder`` and prove that a file can be written in it.

    Raises:
        InputError: naming the folder and the option that moves it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = temporary_name(folder / "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}); choose another folder with {option}."
        ) from error


def temporary_name(path: Path) -> Path:
    """Return a name beside ``path`` that no other process, thread or node uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def write_text(path: Path, text: str, mode: int | None = None) -> None:
    """Write a text file atomically and to the disk; ``mode`` is its permission bits."""
    temporary = temporary_name(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            if mode is not None:
                os.chmod(temporary, mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any, mode: int | None = None) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", mode)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one JSON object per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill, and rename it to ``path`` once the block ends; after an exception nothing is left.

    Of several processes that do so at one time each finds a whole folder at ``path``; the last one's stays.
    """
    temporary = temporary_name(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _put(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(folder: Path, path: Path) -> None:
    """Rename a folder to ``path``, where another process may put one at any moment."""
    while True:
        try:
            os.replace(folder, path)
            return
        except OSError as error:
            if error.errno not in OCCUPIED:
                raise
        aside = temporary_name(path)
        try:
            os.replace(path, aside)
        except FileNotFoundError:  # another process has just taken it away
            continue
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink()


def digest(value: Any) -> str:
    """Return 16 hexadecimal digits that name a JSON-like value; the order of keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content.

    The digest is remembered, that of a large file in the cache too, while the file's place, size and times stay. The
    time of the last change of the inode is one of them, which no program can put back.
    """
    status = path.stat()
    seen = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    key = (str(path), *seen)
    if key in _digests:
        return _digests[key]
    place = str(path.resolve())
    note = cache_dir() / HASHES / f"{digest(place)}.json"
    large = status.st_size >= REMEMBERED
    known = _read_note(note) if large else None
    if known is not None and known["seen"] == seen:
        return _digests.setdefault(key, known["sha256"])
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    # A file that changed just now may change again within one tick of the clock.
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED:
        _digests[key] = found
        if large:
            _write_note(note, {"path": place, "seen": seen, "sha256": found})
    return found


def _read_note(path: Path) -> dict[str, Any] | None:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return known if isinstance(known["sha256"], str) and isinstance(known["seen"], list) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_note(path: Path, value: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, value)
    except OSError:
        return  # a cache that cannot be written costs time and nothing else


def file_digests(paths: Iterable[Path]) -> list[str]:
    """Return the SHA-256 of each file, large files side by side."""
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)) as pool:
        return list(pool.map(file_digest, paths))


def folder_digest(folder: Path, pattern: str = "*") -> str:
    """Return the SHA-256 over names and contents of the files of a folder that match ``pattern``."""
    return files_digest({str(p.relative_to(folder)): p for p in folder.glob(pattern) if p.is_file()})


def files_digest(files: Mapping[str, Path]) -> str:
    """Return the SHA-256 over the names and contents of files."""
    total, names = hashlib.sha256(), sorted(files)
    for name, found in zip(names, file_digests([files[name] for name in names]), strict=True):
        total.update(name.encode() + b"\0" + bytes.fromhex(found))
    return total.hexdigest()


def link_tree(source: Path, target: Path) -> None:
    """Put a copy of a folder at ``target``; weights are hard links where the file system allows, the rest is copied."""

    def link(src: str, dst: str) -> str:
        if Path(src).suffix in WEIGHTS:
            try:
                os.link(src, dst)
                return dst
            except OSError:
                pass  # another file system: copied like the rest
        shutil.copy2(src, dst)
        return dst

    with new_folder(target) as folder:
        shutil.copytree(source, folder, copy_function=link, dirs_exist_ok=True)
