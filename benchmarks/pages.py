"""Write the generated parts of the READMEs: ``python benchmarks/pages.py``, or ``make pages``.

A generated part stands between ``<!-- generated: NAME -->`` and ``<!-- /generated -->``. It comes from the code of the
defenses, from their rows in ``tests/defenses/rows``, from ``benchmarks/defenses.json`` and from the YAML files of the
published protocols. Text outside of the marks is left unchanged.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.defenses import table
from hftlight.attacks.protocols.page import page as protocols
from hftlight.defenses.cards import cards, overview, pairs
from tests.helpers.lightning import table as lightning

ROOT = Path(__file__).parents[1]
PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- /generated -->)", flags=re.DOTALL)


def parts() -> dict[str, str]:
    """Return every generated part by name."""
    measured = json.loads((ROOT / "benchmarks/defenses.json").read_text())
    costs = "\n\n".join(f"*{place}*\n\n{table(rows)}" for place, rows in measured.items())
    first = next(iter(measured.values()))
    return {
        "overview": overview(),
        "pairs": pairs(),
        "lightning": lightning(),
        "cards": cards(first),
        "costs": costs,
        "protocols": protocols(),
    }


def pages() -> dict[Path, set[str]]:
    """Return the files with generated parts, and the names of these parts."""
    names_of = {path: {name for _, name, _ in PART.findall(path.read_text())} for path in ROOT.glob("*/**/README.md")}
    return {path: names for path, names in names_of.items() if names}


def rewritten(text: str, known: dict[str, str]) -> str:
    """Return a page with its generated parts replaced."""
    return PART.sub(lambda part: f"{part[1]}\n{known[part[2]]}\n\n{part[3]}", text)


def main() -> None:
    known = parts()
    for path in pages():
        path.write_text(rewritten(path.read_text(), known))
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
