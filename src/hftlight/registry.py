"""The defenses by name, found without importing them: one file per method, named in snake case after its class."""

import ast
import difflib
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from hftlight.errors import InputError


@dataclass(frozen=True)
class Entry:
    """One defense as the command line lists it.

    Attributes:
        name: what ``--defense`` takes.
        stage: name of the stage's folder.
        class_name: the class in the module.
        purpose: first line of the class's docstring.
    """

    name: str
    stage: str
    class_name: str
    purpose: str


@cache
def defenses() -> dict[str, Entry]:
    """Return all defenses by name, in the order of their stages."""
    found = {}
    root = Path(__file__).parent / "defenses"
    for stage in ("alignment", "finetuning", "post_finetuning"):
        for path in sorted((root / stage).glob("[a-z]*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and node.name.lower() == path.stem.replace("_", ""):
                    purpose = (ast.get_docstring(node) or "").partition("\n")[0]
                    found[path.stem] = Entry(path.stem, stage, node.name, purpose)
    return found


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
    module = import_module(f"hftlight.defenses.{entry.stage}.{entry.name}")
    return getattr(module, entry.class_name)


def name_of(defense: Any) -> str:
    """Return the name under which the command line knows a defense instance: its class in snake case."""
    known = {entry.class_name: entry.name for entry in defenses().values()}
    return known.get(type(defense).__name__, type(defense).__name__.lower())
