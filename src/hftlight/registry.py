"""The defenses by name, listed without importing them. Each has its own file, the snake case of its class name."""

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

from hftlight.config import RunConfig
from hftlight.errors import InputError

GROUP = "hftlight.defenses"
# Names that the command line uses already.
TAKEN = {*RunConfig.__dataclass_fields__, "config", "preset", "dry_run", "print_config", "help", "none", "unaligned"}


@dataclass(frozen=True)
class Entry:
    """One defense as the command line lists it.

    Attributes:
        name: value for ``--defense``.
        stage: name of the stage's folder, or the other package's name if the defense is not hftlight's.
        class_name: name of the class in the module.
        purpose: first line of the class's docstring; empty for a defense from another package.
        module: module that holds the class.
    """

    name: str
    stage: str
    class_name: str
    purpose: str
    module: str


@cache
def defenses() -> dict[str, Entry]:
    """Return all defenses by name in the order of their stages, defenses of other packages last.

    Another package offers a defense through an entry point of the group ``hftlight.defenses``. The entry point's name
    is the value for ``--defense``, and its value is ``module:Class``.

    Raises:
        InputError: if another package offers a name that already exists.
    """
    found = {}
    root = Path(__file__).parent / "defenses"
    for stage in ("alignment", "finetuning", "post_finetuning"):
        for path in sorted((root / stage).glob("[a-z]*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                # The defense is the class whose name is the file's name; other classes in the file are helpers.
                if isinstance(node, ast.ClassDef) and node.name.lower() == path.stem.replace("_", ""):
                    purpose = (ast.get_docstring(node) or "").partition("\n")[0]
                    module = f"hftlight.defenses.{stage}.{path.stem}"
                    found[path.stem] = Entry(path.stem, stage, node.name, purpose, module)
    for point in entry_points(group=GROUP):
        name = point.name.replace("-", "_").lower()
        who = f"The package {_package(point)} offers a defense {point.name!r} (entry point {point.value})"
        if not re.fullmatch(r"[a-z]\w*", name):
            raise InputError(f"{who}; a name must be letters, digits and hyphens, and begin with a letter. Rename it.")
        if name in TAKEN:
            raise InputError(f"{who}, but --{name} is an option of hftlight. Rename the entry point.")
        if name in found:
            raise InputError(
                f"Two packages offer a defense {name!r}: {found[name].module} and {point.value}; uninstall one of the"
                " packages."
            )
        found[name] = Entry(name, _package(point), point.attr, "", point.module)
    return found


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module.partition(".")[0]


def defense_class(name: str) -> Any:
    """Import and return the class of a defense.

    Args:
        name: the defense's name in any case; hyphens count as underscores.

    Raises:
        InputError: if no defense has that name. The message suggests the most similar name.
    """
    entry = defenses().get(name.replace("-", "_").lower())
    if entry is None:
        near = difflib.get_close_matches(name.lower(), defenses(), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise InputError(f"Unknown defense {name!r}{hint} Known: {', '.join(defenses())}.")
    return _imported(entry)


def _imported(entry: Entry) -> Any:
    """Return the class of an entry.

    Raises:
        InputError: if another package's class cannot be imported, or is no defense. It names package and entry point.
    """
    if entry.module.startswith("hftlight."):
        return getattr(import_module(entry.module), entry.class_name)
    who = f"The defense {entry.name!r} of the package {entry.stage} (entry point {entry.module}:{entry.class_name})"
    try:
        kind: Any = import_module(entry.module)
        for part in entry.class_name.split("."):
            kind = getattr(kind, part)
    except Exception as error:  # another package's code can fail in any way
        what = next(iter(str(error).splitlines()), "no message")
        raise InputError(f"{who} cannot be imported: {type(error).__name__}: {what}. Mend or uninstall it.") from error
    if not (isinstance(kind, type) and any(base.__qualname__ == "Defense" for base in kind.__mro__)):
        raise InputError(f"{who} is no subclass of hftlight.engine.Defense. Mend or uninstall the package.")
    return kind


def made(name: str, **arguments: Any) -> Any:
    """Create a defense that stores the name it was requested by, since one class may have two names.

    Args:
        name: value for ``--defense``.
        **arguments: arguments of the class.

    Raises:
        InputError: as ``defense_class``.
    """
    return called(defense_class(name)(**arguments), name)


def called(defense: Any, name: str) -> Any:
    """Store the requested name in a defense and return the defense."""
    defense.registered_name = name.replace("-", "_").lower()
    try:
        defense.arguments()
    except AttributeError as error:
        kind = type(defense)
        raise InputError(
            f"The defense {name!r} ({kind.__module__}.{kind.__qualname__}) keeps no attribute for one of its arguments"
            f" ({error}). A defense stores each constructor argument under its own name."
        ) from error
    return defense


def name_of(defense: Any) -> str:
    """Return the name of a defense on the command line, in folders and in manifests.

    This is the name that the instance was requested by, or else the first registered name of its class. If the class is
    not registered, its module and class name form the name, which cannot clash with a registered one.
    """
    kind = type(defense)
    if (own := getattr(defense, "registered_name", None)) is not None:
        return str(own)
    for entry in defenses().values():
        if (entry.module, entry.class_name) == (kind.__module__, kind.__qualname__) or _plugin_class(entry) is kind:
            return entry.name
    return re.sub(r"\W+", "_", f"{kind.__module__}_{kind.__qualname__}".replace("<locals>", "")).strip("_").lower()


def _plugin_class(entry: Entry) -> Any:
    """Return the class of another package's entry, or None if its module is not imported or is hftlight's.

    The class may be defined in another module than the one that its entry point names.
    """
    own = entry.module.startswith("hftlight.")
    return None if own else getattr(sys.modules.get(entry.module), entry.class_name, None)
