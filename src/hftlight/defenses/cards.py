"""What pages say of the defenses, taken from the code: ``python -m hftlight.defenses.cards`` prints both tables."""

import inspect
import re
from functools import cache
from itertools import combinations
from typing import Any

from hftlight.engine import check
from hftlight.registry import defense_class, defenses

SIGNS = {"together": "●", "stages": "○", "refused": "–"}


@cache
def matrix() -> dict[tuple[str, str], str]:
    """Return for each pair of public defenses, with default arguments and names in order, how they go together.

    ``"together"`` in one Trainer, ``"stages"`` one after the other in ``run()``, or ``"refused"``.
    """
    made = {name: defense_class(name)() for name in sorted(defenses())}
    return {pair: _kind(made[pair[0]], made[pair[1]]) for pair in combinations(made, 2)}


def _kind(first: Any, second: Any) -> str:
    try:
        check([first, second], one_stage=False)
    except ValueError:
        return "refused"
    return "together" if first.stage is second.stage else "stages"


def overview() -> str:
    """Return what each defense does, where it acts, its cost in a clause, and who published it, as a Markdown table."""
    lines = ["| name | stage | slots | what it does | cost | source |", "| --- | --- | --- | --- | --- | --- |"]
    for name in defenses():
        made = defense_class(name)()
        text = inspect.getdoc(type(made)) or ""
        cost, source = (" ".join(part.split()) for part in re.split(r"\nCost:|\nSource:|\nDiffers:", text)[1:3])
        papers = [f"[{paper}](https://arxiv.org/abs/{paper})" for paper in re.findall(r"arXiv:(\d{4}\.\d{5})", source)]
        slots = ", ".join(slot.name.lower() for slot in made.slots)
        purpose = text.partition("\n")[0]
        clause = re.split(r"[.;:] ", cost)[0].rstrip(".").replace("``", "`")
        cells = [f"`{name}`", made.stage.value, slots, purpose, clause, ", ".join(papers)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown() -> str:
    """Return the matrix as a Markdown table, by stage and name."""
    names = list(defenses())
    known = matrix()
    lines = ["| | " + " | ".join(str(i + 1) for i in range(len(names))) + " |", "|---" * (len(names) + 1) + "|"]
    for i, name in enumerate(names):
        cells = ["" if name == other else SIGNS[known[(min(name, other), max(name, other))]] for other in names]
        lines.append(f"| {i + 1} `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(overview(), markdown(), sep="\n\n")
