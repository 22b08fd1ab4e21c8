"""Where a result comes from: versions, and a digest of the code that it was made by, another package's included."""

import ast
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from hftlight import __version__
from hftlight.errors import InputError
from hftlight.files import digest, file_digest, files_digest

OWN = "hftlight"
LIBRARIES = ("torch", "lightning", "transformers", "peft", "tokenizers")  # what a result's last bits depend on
PLAIN = {"builtins", "abc", "typing", "typing_extensions", "torch", "lightning", "collections", "dataclasses"}


class UnknownSourceError(InputError):
    """The code of an object cannot be read, so nothing made with it can be told apart from another version's."""


@cache
def versions() -> Mapping[str, str]:
    """Return the versions of hftlight and of the libraries that a result depends on."""
    return {OWN: __version__, **{name: version(name) for name in LIBRARIES}}


def code_of(*parts: Any) -> dict[str, str]:
    """Return a digest by package of the code that modules and classes run through.

    Of hftlight it covers each module and every module that it imports, at the top or inside a function. Of another
    package it covers all its Python files; of a script, the script.

    Args:
        parts: names of modules of hftlight, or classes, whose base classes count too.

    Raises:
        UnknownSourceError: if a class's source cannot be read.
    """
    own, found = set[str](), dict[str, str]()
    for part in parts:
        if isinstance(part, str):
            own.add(part)
            continue
        for each in inspect.getmro(part):
            top = each.__module__.partition(".")[0]
            if top == OWN:
                own.add(each.__module__)
            elif top not in PLAIN:
                found |= _foreign(each, top)
    return dict(sorted({**found, OWN: _own(frozenset(own))}.items()))


def _own(modules: frozenset[str]) -> str:
    closure: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        path = _file_of(name)
        if path is not None and name not in closure:
            closure[name] = path
            waiting += imported(path)
    return files_digest(closure)[:16]


def imported(path: Path) -> tuple[str, ...]:
    """Return the modules of hftlight that a file of hftlight names in an import, or in a text such as a module path."""
    return _imported(path, file_digest(path))


@cache
def _imported(path: Path, _: str) -> tuple[str, ...]:
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= {node.value} if re.fullmatch(rf"{OWN}(\.\w+)+", node.value) else set()
    return tuple(sorted(n for n in names if n.startswith(f"{OWN}.") and _file_of(n) is not None))


def _file_of(module: str) -> Path | None:
    """Return the file of a module of hftlight; None for a name that is none, and for the package itself."""
    place = Path(__file__).parent.joinpath(*module.split(".")[1:])
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file() and module != OWN:
            return path
    return None


def _foreign(kind: type, top: str) -> dict[str, str]:
    """Return name, version and digest of the package that a class comes from."""
    module = sys.modules.get(kind.__module__)
    file = getattr(module, "__file__", None)
    if file is None or not Path(file).is_file():
        try:
            return {f"{kind.__module__}.{kind.__qualname__}": digest(inspect.getsource(kind))}
        except (OSError, TypeError) as error:
            raise UnknownSourceError(
                f"{kind.__qualname__}: its source cannot be read, so its results are not kept in the cache. Put the"
                " class into a file."
            ) from error
    package = sys.modules.get(top)
    roots = [Path(p) for p in getattr(package, "__path__", [])]
    files = {str(p.relative_to(root.parent)): p for root in roots for p in root.rglob("*.py")}
    files = files or {Path(file).name: Path(file)}
    names = packages_distributions().get(top, []) if roots or top != "__main__" else []
    label = f"{names[0]} {version(names[0])}" if names else top
    return {label: files_digest(files)[:16]}


def described(parts: Iterable[Any]) -> list[dict[str, str]]:
    """Return class and arguments of defenses, as a key holds them; their code is ``code_of`` their classes.

    Args:
        parts: the defenses, in the order in which they act.
    """
    return [{"class": f"{type(p).__module__}.{type(p).__qualname__}", "state": p.state_key} for p in parts]
