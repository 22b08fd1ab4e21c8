"""Every repair on one attacked demo model: ``python benchmarks/repairs.py [--only NAMES] [--table]``.

One alignment and one upload with 10 % harmful rows in the built-in world serve all arms, with one seed. Controls are
the aligned model, the attacked model, and the attacked model with its update shrunk to several lengths. A comparison in
``--output`` holds the runs. If the command is stopped, the same command continues. Results go to
``benchmarks/repairs.json`` and ``benchmarks/repairs.png``, and ``--table`` prints them.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

RESULTS = Path(__file__).with_suffix(".json")
SETTINGS = ["--seeds", "1", "--evaluation.prompts", "60", "--evaluation.task_rows", "40"]
SETTINGS += ["--evaluation.over_refusal_prompts", "20", "--evaluation.perplexity", "task"]
SHRUNK = ("0.75", "0.5", "0.25")
# Repair -> its options. The controls come first.
ARMS: dict[str, list[str]] = {
    "none": [],
    "task_arithmetic": ["--task_arithmetic.update_weight", *SHRUNK],
    "safe_lora": [],
    "antidote": [],
    "rewind": [],
    "resta": [],
    "nlsr": [],
    "somf": ["--somf.steps", "50"],
    "safety_lock": [],
    "panacea": [],
}
SHOWN = ("answers_refused", "answers_complied", "answers_broken", "finetune_accuracy", "over_refusal")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS), help="arms to measure")
    parser.add_argument("--output", default="runs", help="folder of the comparison")
    parser.add_argument("--table", action="store_true", help="print what is measured as a Markdown table, and stop")
    given = parser.parse_args()
    if given.table:
        print(table(json.loads(RESULTS.read_text())))
        return 0
    from hftlight.cli.compare import compare

    options = [word for name in given.only for word in ARMS[name]]
    arms = ["--defenses", *given.only, "--comparison", "repairs", "--output", given.output]
    if status := compare([*arms, *SETTINGS, *options]):
        return status
    known = keep(Path(given.output) / "repairs")
    draw(known, RESULTS.with_suffix(".png"))
    return 0


def keep(folder: Path) -> dict[str, Any]:
    """Add the finished cells of a comparison to the results, and return all results."""
    from hftlight import __version__
    from hftlight.engine.weights.stored import stored
    from hftlight.files import read_rows

    known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for cell in sorted((folder / "cells").iterdir()):
        if not (cell / "metrics.jsonl").is_file() or not (cell / "report.html").is_file():
            continue
        arm = next(iter(json.loads((cell / "manifest.json").read_text())["arms"]))
        label = cell.name.partition("-builtin")[0]
        stages = {"alignment": "aligned", "finetuning": "attacked"} if arm == "none" else {"post_finetuning": label}
        places = {"alignment": "aligned", "finetuning": "finetuned", "post_finetuning": "repaired"}
        aligned, tuned = (stored(cell / arm / places[name]) for name in ("alignment", "finetuning"))
        for stage, name in stages.items():
            found: dict[str, Any] = {"version": __version__}
            for row in read_rows(cell / "metrics.jsonl"):
                own = row["kind"] == "score" and row["stage"] == stage and row["judge"] in (None, "", "builtin", "task")
                if own and row["metric"] in (*SHOWN, "perplexity"):
                    found[row["metric"]] = [row[end] and round(row[end], 3) for end in ("value", "low", "high")]
            found["update_kept"] = round(kept_share(stored(cell / arm / places[stage]), tuned, aligned), 3)
            known[name] = found
    order = ["aligned", "attacked", *ARMS]
    known = dict(sorted(known.items(), key=lambda item: order.index(item[0].partition(".")[0])))
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    return known


def kept_share(model: Any, tuned: Any, aligned: Any) -> float:
    """Return the length of a model's displacement from the aligned model, relative to the attacked model's."""
    from hftlight.engine.weights.stored import Adapted

    names = [name for w in (tuned, model) if isinstance(w, Adapted) for name in w.updates]
    squares = [0.0, 0.0]
    for name in dict.fromkeys(names):
        start = aligned.rows(name).double()
        for number, weights in enumerate((model, tuned)):
            squares[number] += float((weights.rows(name).double() - start).square().sum())
    return float((squares[0] / squares[1]) ** 0.5)


def label(name: str) -> str:
    """Return a model's label."""
    return name.replace("task_arithmetic.update_weight=", "update shrunk to ")


def table(known: dict[str, Any]) -> str:
    """Return the results as a Markdown table, one line per model."""
    heads = ["model", "refused %", "complied %", "broken %", "finetune accuracy %", "over-refusal %", "perplexity"]
    lines = [f"| {' | '.join(heads)} | update kept |", f"| {' | '.join(['---'] * 8)} |"]
    for name, row in known.items():
        shown = ["{:.0f} ({:.0f}-{:.0f})".format(*row[metric]) for metric in SHOWN]
        lines.append(f"| {label(name)} | {' | '.join(shown)} | {row['perplexity'][0]:.2f} | {row['update_kept']:.2f} |")
    return "\n".join(lines)


def draw(known: dict[str, Any], path: Path) -> None:
    """Draw answers, accuracy and over-refusal, one line per model."""
    from matplotlib.figure import Figure

    from hftlight.report.figure import INK, OUTCOME_COLORS, PALETTE

    names = list(known)
    figure = Figure(figsize=(9, 0.36 * len(names) + 1.2), layout="constrained")
    answers, accuracy, refusal = figure.subplots(1, 3, sharey=True, width_ratios=[2, 1, 1])
    places = range(len(names))[::-1]
    left = [0.0] * len(names)
    for metric in ("answers_refused", "answers_complied", "answers_broken"):
        values = [known[name][metric][0] for name in names]
        word = metric.removeprefix("answers_")
        color, ink = OUTCOME_COLORS[word]  # type: ignore[index]
        answers.barh(places, values, left=left, color=color, label=word)
        for place, value, start in zip(places, values, left, strict=True):
            if value >= 6:
                answers.text(start + value / 2, place, f"{value:.0f}", color=ink, ha="center", va="center", fontsize=8)
        left = [a + b for a, b in zip(left, values, strict=True)]
    for axes, metric, title in (
        (accuracy, "finetune_accuracy", "finetune accuracy, %"),
        (refusal, "over_refusal", "over-refusal, %"),
    ):
        middle, low, high = zip(*(known[name][metric] for name in names), strict=True)
        around = [[m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)]]
        axes.errorbar(middle, places, xerr=around, fmt="o", color=PALETTE[1], markersize=4, lw=1.3)
        axes.set(xlim=(-2, 102), xlabel=title)
        axes.grid(axis="x", color="#d8dee4")
    answers.set(
        xlim=(0, 100),
        xlabel="answers to harmful prompts, %",
        yticks=list(places),
        yticklabels=[label(name) for name in names],
    )
    answers.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8)
    for axes in (answers, accuracy, refusal):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
