"""Safety landscapes of defended models: ``python benchmarks/landscapes.py [--only NAMES] [--table] [--speed]``.

Six arms of the alignment stage, each aligned and then attacked at 10 % harmful rows in the built-in world, with two
seeds. Three random directions of nine points, with the gaps around each wall halved twice, and 30 prompts of 16 tokens
at each point. The question is whether a defense widens the safety basin, and whether VISAGE sees it. A comparison in
``--output`` holds the runs. Runs and points are kept one by one. If the command is stopped, the same command continues.
``--speed`` compares the seconds of a point with those of the published way on the same three points: load the model,
add a stored direction to its weights, and answer one prompt at a time. Results go to ``benchmarks/landscapes.json``,
and ``--table`` prints them.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

RESULTS = Path(__file__).with_suffix(".json")
SEEDS = 2
SETTINGS = ["--seeds", str(SEEDS), "--evaluation.prompts", "60", "--evaluation.task_rows", "40"]
SETTINGS += ["--evaluation.over_refusal_prompts", "20"]
# Defense -> its options, with hardening phases cut to save time.
ARMS: dict[str, list[str]] = {
    "none": [],
    "vaccine": [],
    "t_vaccine": [],
    "booster": [],
    "repnoise": ["--hardening_steps", "25", "--repnoise.aligned_first", "true"],
    "tar": ["--hardening_steps", "25"],
}
GRID = {"directions": 3, "points": 9, "halvings": 2, "prompts": 30, "tokens": 16}
STAGES = {"alignment": "aligned", "finetuning": "attacked"}
SHOWN = {"basin_width": ".2f", "basin_area": ".0f", "visage": ".0f", "wall_slope": ".0f", "broken_share": ".0f"}
HARMFUL_LOSS = "harmful_validation_loss"  # nats per response token at the model itself, from the run
SPEED_POINTS = (-0.25, 0.0, 0.25)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS), help="arms to measure")
    parser.add_argument("--output", default="runs", help="folder of the comparison")
    parser.add_argument("--table", action="store_true", help="print what is measured as a Markdown table, and stop")
    parser.add_argument("--speed", action="store_true", help="time both ways to measure a point, and stop")
    parser.add_argument("--model", default="smollm2-135m", help="model of --speed")
    given = parser.parse_args()
    if given.table:
        print(table(known()))
        return 0
    if given.speed:
        keep({"speed": speed(given.model)})
        return 0
    from hftlight.cli.compare import compare

    for name in given.only:
        words = ["--defenses", name, "--comparison", "landscapes", "--output", given.output]
        if status := compare([*words, *SETTINGS, *ARMS[name]]):
            return status
        for cell in sorted((Path(given.output) / "landscapes" / "cells").glob(f"{name}-*")):
            keep({f"{name}-s{cell.name.rpartition('-s')[2]}": landscape(cell, name)})
    return 0


def known() -> dict[str, Any]:
    """Return what is measured so far."""
    result: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    return result


def keep(found: dict[str, Any]) -> None:
    """Add numbers to the results."""
    RESULTS.write_text(json.dumps({**known(), **found}, indent=1) + "\n")


def landscape(run: Path, arm: str) -> dict[str, Any]:
    """Return the numbers of a run's aligned and attacked model, each with its 95 % interval."""
    from hftlight import __version__
    from hftlight.analysis.landscape import Landscape
    from hftlight.analysis.study import study
    from hftlight.analysis.subjects import subjects_of_run
    from hftlight.analysis.visage import Visage
    from hftlight.cli.train import parse_train
    from hftlight.files import read_rows

    command = parse_train(["--config", str(run / "config.yaml")])
    subjects = subjects_of_run(run, command.config, command.attack, list(STAGES))
    rows = study(subjects, [Landscape(path_points=0, **GRID), Visage(**GRID)]).rows  # type: ignore[arg-type]
    found: dict[str, Any] = {"version": __version__}
    for stage, word in STAGES.items():
        means = [row for row in rows["visage"] if row.stage == stage and row.position is None]
        found[word] = {row.metric: [row.value, row.low, row.high] for row in means}
        for row in read_rows(run / "metrics.jsonl"):
            if (row.get("metric"), row.get("stage"), row.get("arm")) == (HARMFUL_LOSS, stage, arm):
                found[word]["harmful_loss"] = [row[end] for end in ("value", "low", "high")]
    return found


def speed(model: str) -> dict[str, Any]:
    """Return wall-clock and CPU seconds per point of both ways, and the share of prompts with the same answer."""
    import torch

    from hftlight import __version__
    from hftlight.analysis.directions import movable, moved_to, random_direction
    from hftlight.analysis.study import sets_of
    from hftlight.analysis.subjects import plain_subjects
    from hftlight.analysis.view import View
    from hftlight.config import RunConfig
    from hftlight.evaluation.answering.generate import generate
    from hftlight.models.load import load_model

    (subject,) = plain_subjects([model], RunConfig(model=model, accelerator="cpu"), None)
    length, answers = {"max_new_tokens": GRID["tokens"]}, dict[str, list[str]]()
    found: dict[str, Any] = {"version": __version__, "model": model, "threads": torch.get_num_threads()}
    found |= {"points": len(SPEED_POINTS), "prompts": GRID["prompts"], "tokens": GRID["tokens"]}
    with View(subject, sets_of(subject)) as view:
        prompts, tokenizer = view.prompts("harmful", GRID["prompts"]), view.tokenizer

    def ours() -> list[str]:
        moved, texts = load_model(model), []
        for a in SPEED_POINTS:
            with moved_to(moved, [(a, random_direction(moved, 0, 0))]):
                texts += generate(moved, tokenizer, prompts, **length)
        return texts

    def published(stored: Path) -> list[str]:
        texts = []
        for a in SPEED_POINTS:
            moved = load_model(model)
            direction = torch.load(stored, weights_only=True)
            with torch.no_grad():
                for name, weight in movable(moved).items():
                    weight.add_(direction[name], alpha=a)
            for prompt in prompts:
                texts += generate(moved, tokenizer, [prompt], **length)
        return texts

    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "direction.pt"
        moved = load_model(model)
        direction, weights = random_direction(moved, 0, 0), movable(moved)
        steps = {name: direction.of(name, w) for name, w in weights.items()}
        torch.save({n: torch.zeros_like(weights[n]) if s is None else s for n, s in steps.items()}, stored)
        del moved, weights, steps
        for way, work in (("ours", ours), ("published", lambda: published(stored))):
            wall, cpu = time.perf_counter(), time.process_time()
            answers[way] = work()
            spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
            found[way] = {name: round(value / len(SPEED_POINTS), 2) for name, value in spent.items()}
            print(f"{way}: {found[way]['seconds']} s per point, {found[way]['cpu_seconds']} s of CPU")
    found["ratio_cpu"] = round(found["published"]["cpu_seconds"] / found["ours"]["cpu_seconds"], 2)
    same = [a == b for a, b in zip(answers["ours"], answers["published"], strict=True)]
    found["same_answers"] = round(sum(same) / len(same), 3)
    return found


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table, one line per model."""
    names = {name: row for name, row in results.items() if name != "speed"}
    heads = ["model", *(metric.replace("_", " ") for metric in SHOWN), "harmful loss"]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * len(heads))} |"]
    for name, row in sorted(names.items(), key=lambda item: [*ARMS].index(item[0].rpartition("-")[0])):
        for word in STAGES.values():
            cells = [shown(row[word].get(metric), form) for metric, form in SHOWN.items()]
            lines.append(f"| {name}, {word} | {' | '.join(cells)} | {shown(row[word].get('harmful_loss'), '.2f')} |")
    return "\n".join(lines)


def shown(number: list[float] | None, form: str) -> str:
    """Return a number with its interval, or a dash for a number that a model does not have."""
    return "-" if number is None else f"{number[0]:{form}} ({number[1]:{form}}-{number[2]:{form}})"


if __name__ == "__main__":
    raise SystemExit(main())
