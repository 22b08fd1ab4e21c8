"""Three combinations of defenses against their parts: ``python benchmarks/combinations.py``.

Every arm meets the same attack (p = 0.1) in the built-in world. Finished arms are not run again, so the command can be
stopped at any time. Stages that arms share (the aligned model, the attacked model) run once. Results go to
``benchmarks/combinations.json``.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

COMBINATIONS = (
    ("booster", "lisa", "antidote"),
    ("vaccine", "freeze", "safe_lora"),
    ("safety_mix", "constrained_sft"),
)
RESULTS = Path(__file__).with_suffix(".json")
METRICS = ("harmful_score", "finetune_accuracy", "over_refusal")


def arms() -> list[tuple[str, ...]]:
    """Return the undefended arm, all parts and all combinations, in this order."""
    parts = [(name,) for combination in COMBINATIONS for name in combination]
    return [(), *parts, *COMBINATIONS]


def measured(folder: Path) -> dict[str, Any]:
    """Return the scores of a run's last arm by stage, and the seconds of each stage."""
    scores: dict[str, dict[str, Any]] = {}
    costs: dict[str, Any] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["kind"] == "score" and row["metric"] in METRICS and row["judge"] in (None, "builtin"):
            score = {key: row[key] for key in ("value", "low", "high", "count")}
            scores.setdefault(row["stage"], {})[row["metric"]] = score
        if row["kind"] == "cost":
            costs[row["stage"]] = row["seconds"]
    return {"scores": scores, "seconds": costs}


def table(known: dict[str, Any]) -> str:
    """Return the results as a Markdown table, seed by seed, of the aligned model and of the served model."""
    seeds = sorted(known)
    head = ["defense", "harmful score, aligned", "harmful score, served", "finetune accuracy", "over-refusal", "passes"]
    lines = [head, ["---"] * len(head)]
    for names in arms():
        key = "+".join(names) or "none"
        runs = [known[seed][key]["scores"] for seed in seeds if key in known[seed]]
        if not runs:
            continue
        served = [scores.get("post_finetuning", scores["finetuning"]) for scores in runs]

        def cell(scores: list[dict[str, Any]], metric: str) -> str:
            return ", ".join(f"{each[metric]['value']:.0f}" for each in scores)

        aligned = cell([scores["alignment"] for scores in runs], "harmful_score")
        columns = [aligned, *(cell(served, metric) for metric in METRICS)]
        lines.append([f"`{key}`" if names else "none", *columns, work(names)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def work(names: tuple[str, ...]) -> str:
    """Return the forward and backward passes per step, of alignment and of fine-tuning."""
    from hftlight.engine import Stage, count_passes
    from hftlight.registry import defense_class

    instances = [defense_class(name)() for name in names]
    counts = [count_passes([d for d in instances if d.stage is s]) for s in (Stage.ALIGNMENT, Stage.FINETUNING)]
    return ", ".join(f"{forward:g} + {backward:g}" for forward, backward in counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output", default="runs")
    options = parser.parse_args()
    from hftlight import run
    from hftlight.config import RunConfig
    from hftlight.console import quiet
    from hftlight.registry import defense_class

    quiet()
    for seed in options.seeds:
        for names in arms():
            key = "+".join(names) or "none"
            known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
            if key in known.get(str(seed), {}):
                continue
            result = run(RunConfig(seed=seed, output=options.output), [defense_class(name)() for name in names])
            # Read the file again: another process may have added a seed of its own in the meantime.
            known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
            known.setdefault(str(seed), {})[key] = measured(result.folder)
            RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    print(table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
