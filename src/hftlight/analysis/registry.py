"""The analyses by name, listed without importing them. Each has its own file, named like the analysis."""

import ast
import inspect
import re
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from hftlight.errors import InputError

# Name, which is also the file's -> class.
ANALYSES = {
    "landscape": "Landscape",
    "visage": "Visage",
    "probes": "Probes",
    "tone": "Tone",
    "completion": "Completion",
    "patching": "Patching",
    "attribution": "Attribution",
    "refusal_direction": "RefusalDirection",
    "drift": "LayerDrift",
    "regions": "Regions",
    "subspace": "Subspace",
}
DEFAULT = ("landscape", "probes", "tone", "completion", "drift", "regions")  # in the order of the page
SECTIONS = ("Rows", "Args", "Raises", "Cost", "Source", "Differs")  # of a docstring


def analysis_class(name: str) -> Any:
    """Import and return the class of an analysis.

    Args:
        name: one of ``ANALYSES``; hyphens count as underscores.

    Raises:
        InputError: if there is no such analysis. The message suggests the nearest name.
    """
    key = name.replace("-", "_").lower()
    if key not in ANALYSES:
        near = get_close_matches(key, ANALYSES, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"--analyses: names are {', '.join(ANALYSES)}, got {name!r}.{hint}")
    return getattr(import_module(f"hftlight.analysis.{key}"), ANALYSES[key])


def docstring(name: str) -> str:
    """Return the docstring of an analysis without importing its module."""
    tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == ANALYSES[name])
    return inspect.cleandoc(ast.get_docstring(found) or "")


def overview() -> str:
    """Return a Markdown table of all analyses: name, what it shows, cost, source."""
    lines = ["| name | what it shows | cost | source |", "| --- | --- | --- | --- |"]
    for name in ANALYSES:
        text = docstring(name)
        mark = " (default)" if name in DEFAULT else ""
        cells = [text.partition("\n")[0], _section(text, "Cost"), _section(text, "Source")]
        lines.append(f"| `{name}`{mark} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _section(text: str, name: str) -> str:
    """Return a section of a docstring as one line, without marks of reStructuredText."""
    found = re.search(rf"^{name}:(.*?)(?=^(?:{'|'.join(SECTIONS)}):|\Z)", text, flags=re.DOTALL | re.MULTILINE)
    return " ".join(found[1].replace("``", "`").split()) if found else ""
