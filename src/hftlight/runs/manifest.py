"""The identity of a run for its manifest: hash of the model, digests of the code, versions of the libraries."""

from collections.abc import Iterable
from typing import Any

from hftlight.model_files import model_hash
from hftlight.provenance import UnknownSourceError, code_of, versions

# The modules that decide a run's results. Modules that only show results are left out.
STAGES = ("train", "model_edit", "repair", "selection", "choice", "attacker")
WORK = (
    "hftlight.runs.prepare",
    *(f"hftlight.runs.stages.{name}" for name in STAGES),
    "hftlight.runs.measuring.measure",
)


def working_code() -> dict[str, str]:
    """Return library versions and a digest of the code that decides a run's results, for error messages."""
    return {**versions(), "code": code_of(*WORK)["hftlight"]}


def identity(model: str, parts: Iterable[Any]) -> dict[str, Any]:
    """Return the hash of the model's files, the library versions, and the digests of the code by package.

    Args:
        model: as ``model_path`` takes it.
        parts: defenses and attack. If the source of a class cannot be read, its digest is ``"unknown"``.
    """
    code = code_of(*WORK)
    for kind in {type(part) for part in parts}:
        try:
            code |= {package: value for package, value in code_of(kind).items() if package != "hftlight"}
            code[f"{kind.__module__}.{kind.__qualname__}"] = code_of(kind)["hftlight"]
        except UnknownSourceError:
            code[f"{kind.__module__}.{kind.__qualname__}"] = "unknown"
    return {"model": {"name": model, "hash": model_hash(model)}, "versions": dict(versions()), "code": code}
