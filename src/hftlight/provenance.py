"""The provenance of a result: library versions, and digests of the code that computes it."""

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
# Another version of these libraries can change a result.
LIBRARIES = ("torch", "lightning", "transformers", "peft", "tokenizers", "torchmetrics")
# Base classes from these packages are not hashed.
PLAIN = {"builtins", "abc", "typing", "typing_extensions", "collections", "dataclasses", *LIBRARIES}
# The imports of a source file: ``import a, b``, and ``from a import b`` with one line or with parentheses.
IMPORTS = re.compile(
    r"^[ \t]*(?:import[ \t]+([^\n#;]+)|from[ \t]+([\w.]+)[ \t]+import[ \t]*(\([^)]*\)|[^\n#;]+))", re.M
)
NAMED = re.compile(rf"""(["'])({OWN}(?:\.\w+)+)\1""")  # a module that a string names


class UnknownSourceError(InputError):
    """The source of a class cannot be read, so its results cannot be told apart from those of another version."""


@cache
def versions() -> Mapping[str, str]:
    """Return the versions of hftlight and of the libraries that a result depends on."""
    return {OWN: __version__, **{name: version(name) for name in LIBRARIES}}


def code_of(*parts: Any) -> dict[str, str]:
    """Return one digest per package of the code that some modules and classes use.

    For hftlight, the digest covers each module and every module that it imports, directly or indirectly. Imports
    inside functions count too. For another package it covers all Python files, and for a script the script.

    Args:
        parts: names of modules of hftlight, or classes. The base classes of a class count too.

    Raises:
        UnknownSourceError: if a class's source cannot be read.
        ValueError: if hftlight has no such module.
    """
    own, others = set[str](), dict[str, str]()
    for part in parts:
        if isinstance(part, str):
            if _file_of(part) is None:
                raise ValueError(f"code_of: hftlight has no module {part!r}.")
            own.add(part)
            continue
        for each in inspect.getmro(part):
            top = each.__module__.partition(".")[0]
            if top == OWN:
                own.add(each.__module__)
            elif top not in PLAIN:
                others |= _package_digest(each, top)
    return dict(sorted({**others, OWN: _own_digest(frozenset(own))}.items()))


def _own_digest(modules: frozenset[str]) -> str:
    """Return a digest of modules of hftlight and of all its modules that they import, directly or indirectly."""
    closure: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        path = _file_of(name)
        if path is not None and name not in closure:
            closure[name] = file_digest(path)
            waiting += _imported(path, closure[name])
    return digest(closure)[:16]


def imported(path: Path) -> tuple[str, ...]:
    """Return the modules of hftlight that a file imports, or names in a string such as ``"hftlight.cache"``."""
    return _imported(path, file_digest(path))


@cache
def _imported(path: Path, _: str) -> tuple[str, ...]:
    """Return the modules that a file names. The second argument, the file's digest, is only part of the cache key."""
    text = path.read_text(encoding="utf-8")
    names = {name for _, name in NAMED.findall(text)}
    for plain, module, chosen in IMPORTS.findall(text):
        # ``import a as b, c`` names a and c. ``from a import b`` may import the module a.b.
        parts = [part.split()[0] for part in (plain or chosen.strip("()")).split(",") if part.split()]
        names |= {f"{module}.{part}" for part in parts} | {module} if module else set(parts)
    # Names that are no modules of hftlight drop out.
    return tuple(sorted(n for n in names if n.startswith(f"{OWN}.") and _file_of(n) is not None))


def _file_of(module: str) -> Path | None:
    """Return the file of a module of hftlight, or None if there is no such module or it is the package itself."""
    place = Path(__file__).parent.joinpath(*module.split(".")[1:])
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file() and module != OWN:
            return path
    return None


def _package_digest(kind: type, top: str) -> dict[str, str]:
    """Return the digest of a class's package, by the package's name and version.

    For a class in a script the digest covers the script. For a class without a file it covers the source of the class.

    Args:
        kind: the class.
        top: name of its top-level package.

    Raises:
        UnknownSourceError: if the source cannot be read.
    """
    module = sys.modules.get(kind.__module__)
    file = getattr(module, "__file__", None)
    if file is None or not Path(file).is_file():
        try:
            return {f"{kind.__module__}.{kind.__qualname__}": digest(inspect.getsource(kind))}
        except (OSError, TypeError) as error:
            raise UnknownSourceError(
                f"{kind.__qualname__}: its source cannot be read, so its results are not kept in the cache. Define the"
                " class in a file."
            ) from error
    package = sys.modules.get(top)
    roots = [Path(p) for p in getattr(package, "__path__", [])]
    files = {str(p.relative_to(root.parent)): p for root in roots for p in root.rglob("*.py")}
    files = files or {Path(file).name: Path(file)}
    names = packages_distributions().get(top, []) if roots or top != "__main__" else []
    label = f"{names[0]} {version(names[0])}" if names else top
    return {label: files_digest(files)[:16]}


def described(parts: Iterable[Any]) -> list[dict[str, Any]]:
    """Return the classes and arguments of defenses as they go into a cache key. ``code_of`` covers their code.

    An argument that names a file counts by the content of the file too. A defense with a model of its own adds that
    model's ``identity()``.

    Args:
        parts: the defenses, in the order in which they act.
    """
    return [
        {
            "class": f"{type(p).__module__}.{type(p).__qualname__}",
            "state": p.state_key,
            **{name: file_digest(Path(path).expanduser()) for name in p.files if (path := getattr(p, name))},
            **({"identity": own} if (own := p.identity()) else {}),
        }
        for p in parts
    ]
