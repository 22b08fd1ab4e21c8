"""What a run was made of: its model, its code, its versions."""

from collections.abc import Iterable
from typing import Any

from hftlight.model_files import model_hash
from hftlight.provenance import UnknownSourceError, code_of, versions

# The code that decides a run's results; how they are shown is not among it.
WORK = tuple(
    f"hftlight.runs.{name}" for name in ("prepare", "stage", "edit", "repair", "select", "measure", "attacker")
)


def working_code() -> dict[str, str]:
    """Return the versions of libraries and a digest of the code that decides a run's results, as shown in messages."""
    return {**versions(), "code": code_of(*WORK)["hftlight"]}


def identity(model: str, parts: Iterable[Any]) -> dict[str, Any]:
    """Return the hash of the model's files, the versions of libraries, and a digest of the code by package.

    Args:
        model: as ``model_path`` takes it.
        parts: defenses and attack; a class whose source cannot be read is named instead of hashed.
    """
    code = code_of(*WORK)
    for kind in {type(part) for part in parts}:
        try:
            code |= {package: found for package, found in code_of(kind).items() if package != "hftlight"}
            code[f"{kind.__module__}.{kind.__qualname__}"] = code_of(kind)["hftlight"]
        except UnknownSourceError:
            code[f"{kind.__module__}.{kind.__qualname__}"] = "unknown"
    return {"model": {"name": model, "hash": model_hash(model)}, "versions": dict(versions()), "code": code}
