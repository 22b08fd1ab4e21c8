"""The defenses by name, found without importing them: one file per method, named in snake case after its class."""

import ast
import difflib
import re
import sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from hftlight.errors import InputError

GROUP = "hftlight.defenses"


@dataclass(frozen=True)
class Entry:
    """One defense as the command line lists it.

    Attributes:
        name: what ``--defense`` takes.
        stage: name of the stage's folder; of a defense from another package, that package's name.
        class_name: the class in the module.
        purpose: first line of the class's docstring; empty for a defense from another package.
        module: where the class is imported from.
    """

    name: str
    stage: str
    class_name: str
    purpose: str
    module: str


@cache
def defenses() -> dict[str, Entry]:
    """Return all defenses by name, in the order of their stages; those of other packages come last.

    Another package offers a defense through an entry point of the group ``hftlight.defenses``: its name is what
    ``--defense`` takes, its value is ``module:Class``.

    Raises:
        InputError: if another package offers a name that is taken.
    """
    found = {}
    root = Path(__file__).parent / "defenses"
    for stage in ("alignment", "finetuning", "post_finetuning"):
        for path in sorted((root / stage).glob("[a-z]*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and node.name.lower() == path.stem.replace("_", ""):
                    purpose = (ast.get_docstring(node) or "").partition("\n")[0]
                    module = f"hftlight.defenses.{stage}.{path.stem}"
                    found[path.stem] = Entry(path.stem, stage, node.name, purpose, module)
    for point in entry_points(group=GROUP):
        if point.name in found:
            raise InputError(
                f"Two packages offer a defense {point.name!r}: {found[point.name].module} and {point.value};"
                " uninstall one."
            )
        found[point.name] = Entry(point.name, _package(point), point.attr, "", point.module)
    return found


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module.partition(".")[0]


def defense_class(name: str) -> Any:
    """Return the class of a defense; hyphens count as underscores.

    Raises:
        InputError: if there is none of that name, with the nearest one.
    """
    entry = defenses().get(name.replace("-", "_").lower())
    if entry is None:
        near = difflib.get_close_matches(name.lower(), defenses(), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise InputError(f"Unknown defense {name!r}{hint} Known: {', '.join(defenses())}.")
    return getattr(import_module(entry.module), entry.class_name)


def made(name: str, **arguments: Any) -> Any:
    """Return a defense that remembers by which name it was asked for: two names may stand for one class.

    Args:
        name: as ``--defense`` takes it.
        **arguments: its own.

    Raises:
        InputError: as ``defense_class``.
    """
    return called(defense_class(name)(**arguments), name)


def called(defense: Any, name: str) -> Any:
    """Return a defense, which remembers from now on by which name it was asked for."""
    defense.registered_name = name.replace("-", "_").lower()
    return defense


def name_of(defense: Any) -> str:
    """Return the name of a defense on the command line, in folders and in manifests.

    It is the name that the instance was asked for by, or the first that its class is registered under. A class that is
    registered nowhere is called as its module and itself, so that it never takes the name of another one.
    """
    kind = type(defense)
    if (own := getattr(defense, "registered_name", None)) is not None:
        return str(own)
    for entry in defenses().values():
        if (entry.module, entry.class_name) == (kind.__module__, kind.__qualname__) or _offered(entry) is kind:
            return entry.name
    return re.sub(r"\W+", "_", f"{kind.__module__}_{kind.__qualname__}".replace("<locals>", "")).strip("_").lower()


def _offered(entry: Entry) -> Any:
    """Return the class behind an entry of another package, once that is imported: it may lie deeper than its entry."""
    own = entry.module.startswith("hftlight.")
    return None if own else getattr(sys.modules.get(entry.module), entry.class_name, None)
