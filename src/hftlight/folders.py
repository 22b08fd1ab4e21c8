"""What things inside a run's and a comparison's folder are called."""

from pathlib import Path

CELLS, GRID = "cells", "grid.json"  # of a comparison: the folder of its runs, and what it compares

RESULTS = ("metrics.jsonl", "generations.jsonl")  # of a run: what its tables and its page are made of

# The stages of an arm, in order, and what tables and pages call them.
STAGES = {"base": "base", "alignment": "aligned", "finetuning": "fine-tuned", "post_finetuning": "repaired"}
UNDEFENDED = "none"  # the arm without a defense


def comparison_of(run: Path) -> Path | None:
    """Return the folder of the comparison that a run is a cell of, if it is one."""
    folder = run.resolve().parent.parent
    return folder if run.resolve().parent.name == CELLS and (folder / GRID).is_file() else None


def arm_word(arm: str) -> str:
    """Return the name a reader sees for an arm's key."""
    return "undefended" if arm == UNDEFENDED else arm
