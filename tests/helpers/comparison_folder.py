"""The folder of a finished comparison: made-up runs of several defenses, ratios and seeds, without a model."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.helpers.run_folder import wilson

HARM = {"none": 60.0, "lisa": 40.0, "booster": 15.0}  # percent flagged at p = 0.1
REFUSED = {"none": 5.0}  # percent of ordinary requests
RIGHT = {"none": 93.0, "lisa": 92.0, "booster": 80.0}


def write_comparison(
    folder: Path,
    arms: Sequence[str] = ("none", "lisa", "booster"),
    ratios: Sequence[float] = (0.0, 0.1, 0.3),
    seeds: int = 3,
    tasks: Sequence[str] = ("builtin",),
    prompts: int = 40,
    failed: Mapping[str, str] | None = None,
    collapsed: Sequence[str] = (),
    swept: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write ``grid.json`` and a finished run per cell. Cells named in ``failed`` have an error and no result.

    Most answers of the cells named in ``collapsed`` are neither harmful nor refusals. ``swept`` holds the swept
    arguments of an arm such as ``antidote[prune_ratio=0.05]``.
    """
    cells = []
    for task in tasks:
        for arm in arms:
            for ratio in ratios:
                for seed in range(seeds):
                    name = f"{arm}-{task}-p{ratio:g}-s{seed}"
                    where = {"name": name, "arm": arm, "task": task, "harmful_ratio": ratio, "seed": seed}
                    names = [] if arm == "none" else [word.partition("[")[0] for word in arm.split("+")]
                    own = {"swept": dict(swept[arm])} if arm in (swept or {}) else {}
                    cells.append({**where, "defenses": names, **own})
                    run = folder / "cells" / name
                    run.mkdir(parents=True)
                    if name in (failed or {}):
                        (run / "error.txt").write_text(f"Traceback\n{(failed or {})[name]}\n")
                    else:
                        _write_cell(run, arm, ratio, seed, prompts)
                        _write_checks(run, arm, 98 if name in collapsed else 2)
    settings = {"settings": "0", "config": {"model": "tiny"}, "arguments": {}, "cells": cells}
    (folder / "grid.json").write_text(json.dumps(settings))
    return folder


def _write_cell(run: Path, arm: str, ratio: float, seed: int, prompts: int) -> None:
    noise = random.Random(f"{arm}/{ratio}/{seed}")
    share = {0.0: 0.1, 0.1: 1.0, 0.3: 1.3}.get(ratio, 1.0)
    first = arm.split("+")[0]
    wanted = {
        "harmful": min(97.0, HARM.get(first, 50.0) * share),
        "task": RIGHT.get(first, 90.0),
        "over_refusal": REFUSED.get(first, 5.0),
    }
    scores: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    names = {"harmful": "harmful_score", "task": "finetune_accuracy", "over_refusal": "over_refusal"}
    for stage in ("alignment", "finetuning"):
        for kind, percent in wanted.items():
            level = 3.0 if (stage, kind) == ("alignment", "harmful") else percent
            flags = [noise.random() < level / 100 for _ in range(prompts)]
            low, high = wilson(sum(flags), prompts)
            row = {"kind": "score", "arm": arm, "stage": stage, "metric": names[kind], "unit": "percent"}
            row |= {"value": 100 * sum(flags) / prompts, "low": low, "high": high, "count": prompts}
            scores.append({**row, "judge": "builtin" if kind == "harmful" else ""})
            for i, flag in enumerate(flags):
                verdicts = {"harmful": "builtin", "over_refusal": "refusal"}.get(kind)
                answer = {"arm": arm, "stage": stage, "set": kind, "id": f"{kind}{i}", "reference": ""}
                answer |= {"prompt": f"{kind} request {i} of the tide clock?", "response": f"answer {int(flag)} <b>&"}
                answer["verdicts"] = {verdicts: {"score": float(flag), "flag": flag}} if verdicts else {}
                answers.append({**answer, "correct": flag if kind == "task" else None})
        seconds = 100.0 * (3 if (first, stage) == ("booster", "alignment") else 1)
        cost = {"kind": "cost", "arm": arm, "stage": stage, "steps": 10, "seconds": seconds}
        scores.append({**cost, "seconds_per_step": seconds / 10, "peak_memory_mib": 1000.0 + 50 * (first == "booster")})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))
    (run / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    slots = {arm: {"defenses": [], "slots": [], "stages": {}}}
    (run / "manifest.json").write_text(json.dumps({"arms": slots, "seed": seed, "finished": "now"}))
    (run / "config.yaml").write_text("model: tiny\n")


def _write_checks(run: Path, arm: str, percent: int) -> None:
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    places = {(row["stage"], row.get("metric")): row.get("value") for row in written}
    # Split 100 answers: compliant ones as scored, up to ``percent`` broken ones. Three quarters of the rest refuse.
    complied = round(places["finetuning", "harmful_score"])
    broken = min(percent, 100 - complied)
    refused = (100 - complied - broken) * 3 // 4
    ends = {"complied": complied, "refused": refused, "broken": broken, "other": 100 - complied - broken - refused}
    outcomes = ((f"answers_{name}", count) for name, count in ends.items())
    for metric, value in (("refusal_rate", 1), ("collapsed_answers", percent), *outcomes):
        row = {"kind": "score", "arm": arm, "stage": "finetuning", "metric": metric, "unit": "percent", "judge": ""}
        low, high = wilson(value, 100)
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({**row, "value": value, "low": low, "high": high, "count": 100}) + "\n")
