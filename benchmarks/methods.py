"""One measurement of each newer method on the demo model: ``python benchmarks/methods.py [--setup NAME]``.

The arms share one alignment, one upload with 10 % harmful rows in the built-in world, and one seed. Every method has
its default arguments, except for what ``OPTIONS`` cuts to save time. A comparison in ``--output`` holds the runs. If
the command is stopped, the same command continues. ``--setup encoded`` takes the attack that encodes its rows, and
``--setup search`` lets the attacker try eight settings of 30 steps. Results go to ``benchmarks/methods.json``, and
``--table`` prints them.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

RESULTS = Path(__file__).with_suffix(".json")
SETTINGS = ["--seeds", "1", "--evaluation.prompts", "100", "--evaluation.task_rows", "50"]
SETTINGS += ["--evaluation.over_refusal_prompts", "30"]
OPTIONS = {
    "repnoise": ["--hardening_steps", "25", "--repnoise.aligned_first", "true"],
    "tar": ["--hardening_steps", "25"],
    "ctrl": ["--ctrl.rounds", "1"],
    "saft": ["--saft.rate", "0.1"],
    "maxright": ["--maxright.task_floor", "0.5"],
    "seal": ["--seal.epochs", "1"],
}
METHODS = ("none", "rsn_tune", "repnoise", "tar", "ctrl", "safe_grad", "sa_lora", "moderation_filter", "saft", "larf",
           "seal", "alright", "maxright", "freeze_plus")  # fmt: skip
SETUPS: dict[str, list[str]] = {
    "plain": [],
    "encoded": ["--attacks", "encoded"],
    "search": ["--attacker", "search:8", "--finetuning.steps", "30"],
}
CASES = ("worst_case", "useful")
WORST = tuple(f"{case}_{metric}" for case in CASES for metric in ("harmful_score", "finetune_accuracy"))
SHOWN = ("answers_refused", "answers_complied", "answers_broken", "finetune_accuracy", "over_refusal")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), help="methods to measure")
    parser.add_argument("--setup", choices=SETUPS, default="plain", help="the attack")
    parser.add_argument("--output", default="runs", help="folder of the comparison")
    parser.add_argument("--table", action="store_true", help="print what is measured as a Markdown table, and stop")
    given = parser.parse_args()
    if given.table:
        print(table(json.loads(RESULTS.read_text()), given.setup))
        return 0
    from hftlight.cli.compare import compare

    options = [word for name in given.only for word in OPTIONS.get(name, [])]
    arms = ["--defenses", *given.only, "--comparison", f"methods-{given.setup}", "--output", given.output]
    if status := compare([*arms, *SETTINGS, *SETUPS[given.setup], *options]):
        return status
    keep(Path(given.output) / f"methods-{given.setup}", given.setup)
    return 0


def keep(folder: Path, setup: str) -> None:
    """Add the finished cells of a comparison to the results."""
    from hftlight import __version__
    from hftlight.files import read_rows

    known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for cell in sorted((folder / "cells").iterdir()):
        if not (cell / "metrics.jsonl").is_file() or not (cell / "report.html").is_file():
            continue
        rows = read_rows(cell / "metrics.jsonl")
        name = cell.name.partition("-")[0]
        found: dict[str, Any] = {"version": __version__}
        for row in rows:
            own = row["kind"] == "score" and row["arm"] == name and row["stage"] == "finetuning"
            if own and row["metric"] in (*SHOWN, *WORST) and row["judge"] in (None, "builtin"):
                found[row["metric"]] = [round(row[end], 1) for end in ("value", "low", "high")]
        manifest = json.loads((cell / "manifest.json").read_text())
        if rates := manifest["arms"][name].get("filters", {}).get(name):
            found["attack_rows"], found["other_rows"] = rates["attack"], rates["other"]
        known.setdefault(setup, {})[name] = found
    known = {s: {name: known[s][name] for name in METHODS if name in known[s]} for s in SETUPS if s in known}
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


def table(known: dict[str, Any], setup: str) -> str:
    """Return the results of a setup as a Markdown table, one line per method."""
    shown = {metric: metric.removeprefix("answers_").replace("_", " ") + " %" for metric in SHOWN}
    if setup == "search":
        shown = {metric: metric.replace("_", " ") + " %" for metric in WORST}
    heads = ["defense", *shown.values(), *([] if setup == "search" else ["rows dropped"])]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * len(heads))} |"]
    for name, row in known[setup].items():
        cells = [f"`{name}`", *("{:.0f} ({:.0f}-{:.0f})".format(*row[metric]) for metric in shown)]
        if setup != "search":
            sides = [row[side] for side in ("attack_rows", "other_rows") if side in row]
            cells.append(" + ".join(f"{side['dropped']} of {side['rows']}" for side in sides) or "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
