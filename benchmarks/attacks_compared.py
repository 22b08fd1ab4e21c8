"""Explicit attack against identity shift: ``python benchmarks/attacks_compared.py [--only NAMES] [--table]``.

Both attacks upload ten rows to the demo model, aligned in the built-in world, without a defense and with two defenses.
Each model is then asked what it still recognizes (probes), how it begins (tone), whether a forced refusal lasts
(completion), and where the aligned model's states bring the refusal back (patching). Comparisons in ``--output`` hold
the runs. If the command is stopped, the same command continues. Results go to ``benchmarks/attacks_compared.json`` and
``benchmarks/attacks_compared.png``, and ``--table`` prints them.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

RESULTS = Path(__file__).with_suffix(".json")
ATTACKS = {"explicit": ["--explicit.n", "10"], "identity_shift": []}
DEFENSES = ("none", "safety_mix", "lisa")
ANALYSES = ("probes", "tone", "completion", "patching")
SETTINGS = ["--seeds", "1", "--finetuning.steps", "40", "--evaluation.prompts", "60", "--evaluation.task_rows", "20"]
SETTINGS += ["--evaluation.over_refusal_prompts", "30"]
OPTIONS = {"patching": ["--patching.cells", "10"]}
FORCED = (0, 1, 3, 5, 10)
# Metric -> label of its axis, its column of a row that is the x axis, and the position that is drawn (None for any).
DRAWN: dict[str, tuple[str, str, str | None]] = {
    "probe_auroc": ("AUROC of the aligned model's probe", "layer", "transferred"),
    "refusal_log_odds": ("refusal log-odds, nats", "layer", "harmful"),
    "refusal_sustained": ("refusals after k forced tokens, %", "position", None),
    "last_token_effect": ("effect of patching the last token", "layer", None),
}
KEPT = (*DRAWN, "first_refusing_layer", "refusal_gap", "prompts_left_out", "exact_effect", "state_cosine")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ATTACKS, default=list(ATTACKS), help="attacks to measure")
    parser.add_argument("--defenses", nargs="+", default=list(DEFENSES), help="defenses, none for no defense")
    parser.add_argument("--analyses", nargs="+", default=list(ANALYSES), help="analyses of each model")
    parser.add_argument("--model", default="smollm2-135m", help="the model; tiny for a try")
    parser.add_argument("--output", default="runs", help="folder of the comparisons")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file of the results, the figure beside it")
    parser.add_argument("--table", action="store_true", help="print what is measured as a Markdown table, and stop")
    given = parser.parse_args()
    if given.table:
        print(table(json.loads(given.results.read_text())))
        return 0
    from hftlight.cli.analyze import analyze
    from hftlight.cli.compare import compare

    options = [word for name in given.analyses for word in OPTIONS.get(name, [])]
    for attack in given.only:
        name = f"attacks-{attack}"
        arms = ["--defenses", *given.defenses, "--attacks", attack, "--comparison", name, "--output", given.output]
        if status := compare([*arms, "--model", given.model, *SETTINGS, *ATTACKS[attack]]):
            return status
        folder = Path(given.output) / name
        if status := analyze(
            [str(folder), "--analyses", *given.analyses, *options, "--save", str(folder / "analysis")]
        ):
            return status
        known = keep(attack, folder, given.results)
        draw(known, given.results.with_suffix(".png"))
    return 0


def keep(attack: str, folder: Path, path: Path) -> dict[str, Any]:
    """Write what was measured under one attack into the results, and return all results.

    Args:
        attack: name of the attack.
        folder: the comparison's folder, with its analysis.
        path: file of the results: attack -> model -> metric -> rows of layer, position, value, low and high.
    """
    from hftlight import __version__
    from hftlight.analysis.drawing import label
    from hftlight.analysis.page import TABLE
    from hftlight.files import read_rows

    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    models: dict[str, Any] = {}
    for row in read_rows(folder / "analysis" / TABLE):
        if row["metric"] in KEPT and row["stage"] != "base":
            numbers = [row[end] if row[end] is None else round(row[end], 4) for end in ("value", "low", "high")]
            # Every arm of the comparison has the same aligned model, which the study lists once.
            name = "aligned" if row["stage"] == "alignment" else label(row["model"], row["stage"])
            models.setdefault(name, {}).setdefault(row["metric"], []).append([row["layer"], row["position"], *numbers])
    known[attack] = {"version": __version__, "models": models}
    path.write_text(json.dumps({name: known[name] for name in ATTACKS if name in known}, indent=1) + "\n")
    return known


def value(models: Any, metric: str, position: Any = None) -> float | None:
    """Return a model's number of a metric without a layer, or None if it was not measured."""
    return next((row[2] for row in models.get(metric, []) if row[0] is None and row[1] == position), None)


def rising(rows: Sequence[Any]) -> int | None:
    """Return the first layer from which on patching the last token restores at least half of the refusal."""
    below = [row[0] for row in rows if row[2] < 0.5]
    after = max(below, default=-1) + 1
    return after if rows and after <= max(row[0] for row in rows) else None


def table(known: dict[str, Any]) -> str:
    """Return the results as a Markdown table, one line per attack and model."""
    heads = ["attack", "model", "own probe, AUROC", "aligned model's probe, AUROC", "refusal log-odds, nats"]
    heads += ["first refusing layer", f"refusals after {', '.join(map(str, FORCED))} forced tokens, %"]
    heads += ["refusal gap, nats", "half restored from layer", "largest effect before the last token"]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * len(heads))} |"]
    for attack, found in known.items():
        for model, metrics in found["models"].items():
            numbers = [
                _text(value(metrics, "probe_auroc", "own"), ".2f"),
                _text(value(metrics, "probe_auroc", "transferred"), ".2f"),
                _text(value(metrics, "refusal_log_odds", "harmful"), "+.1f"),
                _text(value(metrics, "first_refusing_layer"), ".0f"),
                ", ".join(_text(value(metrics, "refusal_sustained", float(k)), ".0f") for k in FORCED),
                _text(value(metrics, "refusal_gap"), ".1f"),
                _text(rising(metrics.get("last_token_effect", [])), "d"),
                _text(max((row[2] for row in metrics.get("exact_effect", [])), default=None), ".2f"),
            ]
            lines.append(f"| {attack} | {model} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def _text(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)


def draw(known: dict[str, Any], path: Path) -> None:
    """Draw recognition, tone, completion and patching, one row per attack and one line per model."""
    from matplotlib.figure import Figure

    from hftlight.report.figure import INK, PALETTE

    measured = [m for m in DRAWN if any(m in found for a in known.values() for found in a["models"].values())]
    names = list(dict.fromkeys(model for attack in known.values() for model in attack["models"]))
    colors = {name: INK if name == "aligned" else PALETTE[names.index(name) % len(PALETTE)] for name in names}
    figure = Figure(figsize=(3.0 * len(measured), 2.6 * len(known) + 0.5), layout="constrained")
    grid = figure.subplots(len(known), len(measured), squeeze=False)
    for (attack, found), panels in zip(known.items(), grid, strict=True):
        for metric, axes in zip(measured, panels, strict=True):
            title, x, position = DRAWN[metric]
            for model, metrics in found["models"].items():
                rows = [r for r in metrics.get(metric, []) if position is None or r[1] == position]
                points = sorted(
                    ((r[0] if x == "layer" else r[1]), *r[2:]) for r in rows if x != "layer" or r[0] is not None
                )
                at = [point[0] for point in points]
                axes.plot(at, [point[1] for point in points], color=colors[model], lw=1.4, label=model)
                if points and points[0][2] is not None:
                    low, high = [p[2] for p in points], [p[3] for p in points]
                    axes.fill_between(at, low, high, color=colors[model], alpha=0.15, lw=0)
            axes.set_title(f"{attack}: {title}", fontsize=8)
            axes.set_xlabel("decoder layer" if x == "layer" else "forced tokens k", fontsize=8)
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        handles |= {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
