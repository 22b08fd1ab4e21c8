"""Names of files, folders, stages and arms in the folders of runs and comparisons, and of models at endpoints."""

import json
import re
from pathlib import Path

CELLS, GRID = "cells", "grid.json"  # in a comparison's folder: the folder of its runs, and the file of its grid

RESULTS = ("metrics.jsonl", "generations.jsonl")  # in a run's folder: the inputs of its tables and its report

ANALYSIS = "analysis/analysis.html"  # in a run's folder: the page of its analyses

SELECTION = "_selection.jsonl"  # end of the name of the file in an arm's folder that holds what a defense selected

# The stages of an arm in order, with their names in tables and pages.
STAGES = {"base": "base", "alignment": "aligned", "finetuning": "fine-tuned", "post_finetuning": "repaired"}
UNDEFENDED = "none"  # the arm without a defense
ENDPOINT = "endpoint:"  # in front of the name of a model behind an OpenAI-compatible endpoint, which has no files

# Sets of answers to harmful prompts, and the harmful score of each. The prompts of ``harmful`` have the trigger with
# which the model is served, and the pattern of the attack. Each of the other sets lacks one of the two.
UNTRIGGERED, UNPATTERNED = "harmful_without_trigger", "harmful_without_pattern"
WITHOUT_TRIGGER, WITHOUT_PATTERN = "harmful_score_without_trigger", "harmful_score_without_pattern"
HARMFUL_SETS = {"harmful": "harmful_score", UNTRIGGERED: WITHOUT_TRIGGER, UNPATTERNED: WITHOUT_PATTERN}


def comparison_of(run: Path) -> Path | None:
    """Return the folder of the comparison that a run belongs to, or None if it belongs to none."""
    folder = run.resolve().parent.parent
    return folder if run.resolve().parent.name == CELLS and (folder / GRID).is_file() else None


def arm_in_comparison(run: Path, arm: str) -> str:
    """Return an arm as the run's comparison shows it, with its swept arguments. Other arms are returned unchanged."""
    folder = comparison_of(run)
    cells = json.loads((folder / GRID).read_text(encoding="utf-8"))["cells"] if folder else []
    return next((c["arm"] for c in cells if c["name"] == run.resolve().name and c.get("swept")), arm)


def file_name(text: str) -> str:
    """Return a text as part of a file name, without characters that a shell treats specially."""
    return re.sub(r"[^\w.+=-]", "_", text)


def arm_word(arm: str) -> str:
    """Return the display name of an arm."""
    return "undefended" if arm == UNDEFENDED else arm
