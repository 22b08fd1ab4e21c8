"""Atomic writes of files and folders (a temporary name, then a rename), and digests of their contents."""

import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hftlight.errors import InputError

WEIGHTS = {".safetensors", ".bin", ".pt"}  # suffixes of files that nobody edits by hand, so hard links are safe
HASHES = "hashes"  # folder of the cache that stores digests of files
REMEMBERED = 2**20  # smallest file size, in bytes, for which the cache stores the digest
SETTLED = 2 * 10**9  # nanoseconds that must pass after a file's last change before its digest is stored
_digests: dict[tuple[Any, ...], str] = {}
TEMPORARY = re.compile(r"\..+(\.[0-9a-f]{12}|\.ckpt)\.tmp")  # what ``temporary_name`` and checkpoints are called
OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # errors of a rename onto an existing path


def cache_dir() -> Path:
    """Return the folder of the cache: ``HFTLIGHT_CACHE``, or ``~/.cache/hftlight`` if that is not set."""
    named = os.environ.get("HFTLIGHT_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "hftlight"


def check_cache() -> None:
    """Refuse a cache folder that cannot be one, before any work.

    Raises:
        InputError: if the folder cannot be written.
    """
    ensure_writable(cache_dir(), "HFTLIGHT_CACHE")


def ensure_writable(folder: Path, option: str) -> None:
    """Create ``folder`` and check that a file can be written in it.

    Args:
        folder: the folder.
        option: the command-line option that sets the folder, for the error message.

    Raises:
        InputError: if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = temporary_name(folder / "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"The folder {folder} cannot be written ({error.strerror}). Choose another folder with {option}."
        ) from error


def temporary_name(path: Path) -> Path:
    """Return a name beside ``path`` that no other process, thread or node uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def temporaries(folder: Path, age: float = 0.0) -> list[Path]:
    """Return the temporary files and folders that killed processes left below a folder.

    Args:
        folder: where to look.
        age: seconds since the last change, at least. 0 is safe only if no other process writes below the folder.
    """
    paths = [p for p in folder.rglob(".*.tmp") if TEMPORARY.fullmatch(p.name)]
    now = time.time()
    # Inner files of a temporary folder go with the folder.
    outer = [p for p in paths if not any(parent in paths for parent in p.parents)]
    return sorted(p for p in outer if now - p.stat().st_mtime >= age)


def remove(paths: Iterable[Path]) -> None:
    """Delete files and folders. A file that another process deleted is no error."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def no_space(error: BaseException) -> BaseException | None:
    """Return the error of a full disk behind an error, or None. Safetensors says so only in its message."""
    cause: BaseException | None = error
    while cause is not None:
        full = getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(cause):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def full_disk(error: BaseException, folder: Path | None = None) -> str | None:
    """Return the way out of a full disk in words, or None if no disk is full.

    Args:
        error: what was raised.
        folder: a folder that was written to, such as that of a run.
    """
    cause = no_space(error)
    if cause is None:
        return None
    file = getattr(cause, "filename", None)
    places = dict.fromkeys([*([str(folder)] if folder else []), str(Path(file).parent if file else cache_dir())])
    return (
        f"The disk of {' or '.join(places)} is full. Free some space: `hftlight cache list` shows the cache,"
        " HFTLIGHT_CACHE moves the cache, and --output moves the runs. Then repeat the command; finished parts stay."
    )


def write_text(path: Path, text: str, mode: int | None = None) -> None:
    """Write a text file atomically and flush it to the disk.

    Args:
        path: the file.
        text: its content.
        mode: permission bits; None for the default ones.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            if mode is not None:  # before any text is in the file
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
    """Yield a temporary folder to fill, and rename it to ``path`` when the block ends.

    After an exception the temporary folder is deleted. Several processes may do this at the same time. Each then finds
    a complete folder at ``path``, and the folder of the last process stays.
    """
    temporary = temporary_name(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _move_into_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_into_place(folder: Path, path: Path) -> None:
    """Rename a folder to ``path`` and delete what is there. Other processes may create or delete ``path`` meanwhile."""
    while True:
        try:
            os.replace(folder, path)
            return
        except OSError as error:
            if error.errno not in OCCUPIED:
                raise
        # A rename cannot replace a non-empty folder: rename the old one first, then try again.
        aside = temporary_name(path)
        try:
            os.replace(path, aside)
        except FileNotFoundError:  # another process has renamed it first
            continue
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink()


def digest(value: Any) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a JSON-like value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content.

    The process remembers the digest; for a large file the cache stores it too. A remembered digest is valid while path,
    device, inode, size, mtime and ctime of the file are the same. No program can set the ctime back.
    """
    status = path.stat()
    stamp = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    key = (str(path), *stamp)
    if key in _digests:
        return _digests[key]
    place = str(path.resolve())
    note = cache_dir() / HASHES / f"{digest(place)}.json"
    large = status.st_size >= REMEMBERED
    known = _read_note(note) if large else None
    if known is not None and known["seen"] == stamp:
        return _digests.setdefault(key, known["sha256"])
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    # A file that has just changed may change again within one clock tick, with the same times; do not remember it.
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED:
        _digests[key] = content
        if large:
            _write_note(note, {"path": place, "seen": stamp, "sha256": content})
    return content


def _read_note(path: Path) -> dict[str, Any] | None:
    """Return a stored digest with its file's stamp, or None if the note is missing or damaged."""
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
        return  # without the note the file is only hashed again


def file_digests(paths: Iterable[Path]) -> list[str]:
    """Return the SHA-256 of each file, in the order of ``paths``. Threads hash large files at the same time."""
    paths = list(paths)
    if sum(path.stat().st_size for path in paths) < REMEMBERED:  # starting threads would take longer
        return [file_digest(path) for path in paths]
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)) as pool:
        return list(pool.map(file_digest, paths))


def folder_digest(folder: Path, pattern: str = "*") -> str:
    """Return the SHA-256 over the names and contents of a folder's files that match the glob ``pattern``."""
    return files_digest({str(p.relative_to(folder)): p for p in folder.glob(pattern) if p.is_file()})


def files_digest(files: Mapping[str, Path]) -> str:
    """Return the SHA-256 over the names and contents of files."""
    total, names = hashlib.sha256(), sorted(files)
    for name, content in zip(names, file_digests([files[name] for name in names]), strict=True):
        total.update(name.encode() + b"\0" + bytes.fromhex(content))
    return total.hexdigest()


def link_tree(source: Path, target: Path) -> None:
    """Copy a folder to ``target``. Weight files become hard links if the file system allows it."""

    def link(src: str, dst: str) -> str:
        if Path(src).suffix in WEIGHTS:
            try:
                os.link(src, dst)
                return dst
            except OSError:
                pass  # for example another file system: copy the file
        shutil.copy2(src, dst)
        return dst

    with new_folder(target) as folder:
        shutil.copytree(source, folder, copy_function=link, dirs_exist_ok=True)
