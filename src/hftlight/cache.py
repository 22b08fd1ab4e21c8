"""The cache: results under the hash of everything that decides them, read back only if they are whole."""

import json
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hftlight.files import HASHES, cache_dir, digest, file_digests, new_folder, write_json
from hftlight.provenance import UnknownSourceError, code_of, versions

KINDS = ("models", "stages", "evaluations", "selections", "judges", HASHES)
SEAL = "seal.json"  # names and digests of an entry's files; written last
# What decides each kind of result, beside the code and the versions. A key takes exactly these.
INPUTS: Mapping[str, tuple[str, ...]] = {
    "training": ("stage", "config", "base", "parent", "records", "defenses", "attack", "watched", "device"),
    "edit": ("config", "base", "aligned", "records", "attack", "device"),
    "repair": ("config", "base", "aligned", "finetuned", "records", "defenses", "named", "device"),
    "selection": ("config", "aligned", "records", "attack", "device"),
    "answers": ("model", "config", "slot", "prompts", "device"),
    "verdicts": ("answers", "prompts", "judges", "attack", "task"),
    "perplexity": ("model", "config", "slot", "text", "device"),
    "loss": ("model", "config", "slot", "rows", "device"),
    "drift": ("model", "reference", "config", "slot", "prompts", "device"),
}


def key(kind: str, code: Sequence[Any], **inputs: Any) -> str:
    """Return the name of a result: a hash of its inputs, of the code that makes it, and of the versions.

    A result whose code cannot be read gets a name that no other has, so that it is never found again.

    Args:
        kind: one of ``INPUTS``.
        code: modules of hftlight by name, and classes, that the result is made by.
        inputs: values by name, as ``INPUTS`` lists them.

    Raises:
        TypeError: if an input is missing, or one is not listed.
    """
    if set(inputs) != set(INPUTS[kind]):
        raise TypeError(f"cache.key: {kind} is decided by {sorted(INPUTS[kind])}, got {sorted(inputs)}.")
    try:
        return digest({"kind": kind, "versions": versions(), "code": code_of(*code), **inputs})
    except UnknownSourceError as error:
        print(f"hftlight: {error}", file=sys.stderr)
        return f"unknown-{uuid.uuid4().hex[:16]}"


def seal(folder: Path, *parts: str) -> None:
    """Record the digests of files and subfolders of an entry, which makes it a finished one.

    Args:
        folder: the entry.
        parts: names of the files and folders in it that belong to the result; all by default.
    """
    chosen = parts or tuple(sorted(p.name for p in folder.iterdir() if p.name != SEAL))
    files = _digests(folder, chosen)
    write_json(folder / SEAL, {"parts": chosen, "files": files, "seal": digest([chosen, files])})


def fault(folder: Path) -> str | None:
    """Return what is wrong with a finished entry, ``""`` if nothing is; None if it was never finished."""
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
    found = _digests(folder, parts)
    return next((name for name in sorted({*files, *found}) if files.get(name) != found.get(name)), "")


def whole(folder: Path) -> bool:
    """Tell whether an entry is finished and every file is as it was written.

    An entry that changed is named on standard error and counts as unfinished from then on.
    """
    changed = fault(folder)
    if changed:
        print(
            f"hftlight: {folder.parent.name}/{folder.name} in the cache is not as it was written ({changed} differs);"
            " it is made anew.",
            file=sys.stderr,
        )
        (folder / SEAL).unlink(missing_ok=True)
    return changed == ""


def kept(kind: str, name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder of an entry. If it is missing or not whole, ``make`` fills it first.

    Args:
        kind: one of ``KINDS``.
        name: the entry's name, from ``key``.
        make: fills a new folder; after an exception nothing is kept.
    """
    folder = cache_dir() / kind / name
    if not whole(folder):
        with new_folder(folder) as place:
            make(place)
            seal(place)
    return folder


def _digests(folder: Path, parts: Sequence[str]) -> dict[str, str]:
    paths = [p for part in parts for p in (folder / part, *(folder / part).rglob("*")) if p.is_file()]
    return dict(zip((str(p.relative_to(folder)) for p in paths), file_digests(paths), strict=True))
