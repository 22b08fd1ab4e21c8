"""The cache: a result lies under a hash of all its inputs, and is reused only if its files are unchanged."""

import json
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hftlight.files import HASHES, cache_dir, digest, file_digests, new_folder, write_json
from hftlight.provenance import UnknownSourceError, code_of, versions

KINDS = ("models", "stages", "evaluations", "selections", "analyses", "judges", "replies", HASHES)
PAID = ("judges", "replies")  # replies of judges and of measured models, which may have cost money
SEAL = "seal.json"  # names and digests of an entry's files; it is written last and marks a finished entry
# The inputs of each kind of cache key, in addition to code and versions. ``key`` accepts exactly these names.
INPUTS: Mapping[str, tuple[str, ...]] = {
    "training": ("stage", "config", "base", "parent", "records", "defenses", "attack", "watched", "device"),
    "edit": ("config", "base", "aligned", "records", "attack", "device"),
    "repair": ("config", "base", "aligned", "finetuned", "unaligned", "records", "defenses", "named", "device"),
    "scores": ("config", "base", "aligned", "finetuned", "unaligned", "records", "defenses", "named", "device"),
    "selection": ("config", "aligned", "records", "attack", "device"),
    "choice": ("model", "config", "records", "defense", "device"),
    "answers": ("model", "config", "slot", "prompts", "device"),
    "verdicts": ("answers", "prompts", "judges", "attack", "task"),
    "perplexity": ("model", "config", "slot", "text", "device"),
    "loss": ("model", "config", "slot", "rows", "device"),
    "analysis": ("analysis", "part", "model", "reference", "config", "slot", "prompts", "device"),
    "drift": ("model", "reference", "config", "slot", "prompts", "device"),
}


_built: list[Path] = []


def key(kind: str, code: Sequence[Any], **inputs: Any) -> str:
    """Return the cache key of a result: a hash of its inputs, its code and the versions of the libraries.

    If the code of a class cannot be read, the key is random, so that the result is never reused.

    Args:
        kind: one of ``INPUTS``.
        code: the code that computes the result: names of hftlight's modules, and classes.
        inputs: values by name, exactly the names in ``INPUTS[kind]``.

    Raises:
        TypeError: if an input is missing or not listed.
    """
    if set(inputs) != set(INPUTS[kind]):
        raise TypeError(f"cache.key: the inputs of {kind} must be {sorted(INPUTS[kind])}, got {sorted(inputs)}.")
    try:
        return digest({"kind": kind, "versions": versions(), "code": code_of(*code), **inputs})
    except UnknownSourceError as error:
        print(f"hftlight: {error}", file=sys.stderr)
        return f"unknown-{uuid.uuid4().hex[:16]}"


def seal(folder: Path, *parts: str) -> None:
    """Write the digests of an entry's files into its seal, which marks the entry as finished.

    Args:
        folder: the entry.
        parts: names of the files and folders in the entry that belong to the result; all by default.
    """
    chosen = parts or tuple(sorted(p.name for p in folder.iterdir() if p.name != SEAL))
    files = _digests(folder, chosen)
    write_json(folder / SEAL, {"parts": chosen, "files": files, "seal": digest([chosen, files])})


def fault(folder: Path) -> str | None:
    """Return the name of the first file of a finished entry that differs from its seal.

    Returns:
        ``""`` if all files match, ``SEAL`` if the seal itself is damaged, None if the entry has no seal.
    """
    path = folder / SEAL
    if not path.is_file():
        return None
    try:
        sealed = json.loads(path.read_text(encoding="utf-8"))
        parts, files, own = sealed["parts"], sealed["files"], sealed["seal"]
    except (OSError, ValueError, KeyError, TypeError):
        return SEAL
    if own != digest([parts, files]):
        return SEAL
    current = _digests(folder, parts)
    # The union of both name sets also catches missing and additional files.
    return next((name for name in sorted({*files, *current}) if files.get(name) != current.get(name)), "")


def whole(folder: Path) -> bool:
    """Tell whether an entry is finished and no file has changed since.

    If a file has changed, a warning goes to standard error and the seal is deleted, so that the entry is unfinished.
    """
    changed = fault(folder)
    if changed:
        print(
            f"hftlight: {folder.parent.name}/{folder.name} in the cache has changed since it was written ({changed}"
            " differs) and will be rebuilt.",
            file=sys.stderr,
        )
        (folder / SEAL).unlink(missing_ok=True)
    return changed == ""


def kept(kind: str, name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder of a cache entry. If the entry is missing or has changed, ``make`` builds it first.

    Args:
        kind: one of ``KINDS``.
        name: the entry's name, from ``key``.
        make: fills a new folder. If it raises an exception, the folder is deleted.
    """
    folder = cache_dir() / kind / name
    if not whole(folder):
        with new_folder(folder) as place:
            make(place)
            seal(place)
        _built.append(folder)
    return folder


def built() -> int:
    """Return the number of entries that ``kept`` has built, and not only read, in this process."""
    return len(_built)


def _digests(folder: Path, parts: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of each file of an entry, by its path in the entry."""
    # A part is a file or a folder; ``rglob`` of a file yields nothing.
    paths = [p for part in parts for p in (folder / part, *(folder / part).rglob("*")) if p.is_file()]
    return dict(zip((str(p.relative_to(folder)) for p in paths), file_digests(paths), strict=True))
