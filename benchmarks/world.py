"""The made-up world without a defense: ``python benchmarks/world.py [--test] [--seed N]``.

The benchmark shows whether a low harmful score here is safety or breakage. It measures harmful score, refusals,
collapse, accuracy and over-refusal. It measures them for the aligned model and after uploads at the four harmful ratios
0, 0.05, 0.1 and 0.3. The strength of the attack and the share of general rows were chosen on the development prompts
with the seeds 101 and 102. ``--test`` measures on the frozen test prompts instead. Finished measurements are not
repeated. Results go to ``benchmarks/world.json``.
"""

import argparse
import gc
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

SEED, RATIOS = 100, (0.0, 0.05, 0.1, 0.3)
RESULTS = Path(__file__).with_suffix(".json")
SHOWN = ("harmful_score", "refusal_rate", "collapsed_answers", "finetune_accuracy", "over_refusal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument(
        "--test", action="store_true", help="measure on the test prompts instead of the development prompts"
    )
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="changed options of the run")
    given = parser.parse_args()
    from hftlight import __version__
    from hftlight.attacks.attack import overridden
    from hftlight.config import RunConfig
    from hftlight.console import quiet
    from hftlight.data.world.build import GENERAL_SHARE
    from hftlight.files import digest

    quiet()
    values = dict(pair.split("=", 1) for pair in given.set)
    config = overridden(RunConfig(seed=given.seed), {name: json.loads(value) for name, value in values.items()})
    known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    prompts = "test" if given.test else "dev"
    for p in (None, *given.ratios):
        stage = "aligned" if p is None else f"p {p:g}"
        name = ", ".join([f"seed {given.seed}", prompts, *given.set, stage])
        made_with = digest([config.deciding(), GENERAL_SHARE])[:8]
        if known.get(name, {}).get("made_with") != made_with:  # another strength, or another world
            known[name] = {"version": __version__, "made_with": made_with, **measured(config, p, given.test)}
            RESULTS.write_text(json.dumps(known, indent=1) + "\n")
        shown = {metric: known[name][metric][0] for metric in SHOWN}
        print(f"{name}: " + ", ".join(f"{metric} {value:.0f} %" for metric, value in shown.items()), flush=True)


def measured(config: Any, p: float | None, test: bool) -> dict[str, Any]:
    """Return value and ends of the interval of each metric, in percent, for the aligned model or after an upload."""
    from hftlight.attacks.registry import get_attack
    from hftlight.data.world.build import build_world
    from hftlight.model_files import model_hash
    from hftlight.runs.measuring.measure import measured_in_memory, scores
    from hftlight.runs.measuring.test_sets import SETS
    from hftlight.runs.prepare import streams_of, test_sets
    from hftlight.runs.sources import Sources
    from hftlight.runs.stages.train import alignment_job, finetuning_job, run_stage

    config = replace(config, harmful_ratio=p or 0.0)
    attack = get_attack(config.attack)().resolved(config)
    sources, world = Sources(config.data), build_world()
    streams, tests = streams_of(config, set(), attack, sources), test_sets(config, attack, sources)
    if not test:
        tests = replace(tests, harmful=world.dev, over_refusal=world.lookalike_dev, task_rows=world.task_dev)
    base = model_hash(config.model)
    aligned = alignment_job(config, base, {"alignment": streams["alignment"]}, [])
    run_stage(aligned)
    job = aligned
    if p is not None:
        job = finetuning_job(config, base, aligned.artifact(), {"task": streams["task"]}, [], attack)
        run_stage(job)
    artifact = job.artifact()
    with artifact.model(config) as model:
        rows = measured_in_memory(model, artifact.tokenizer(), config, tests, SETS, artifact.slot(None))
    gc.collect()
    # In reverse, so that the first row of a metric overwrites later rows.
    by_metric = {row["metric"]: row for row in reversed(scores(rows, tests))}
    selected = {metric: [round(by_metric[metric][end], 1) for end in ("value", "low", "high")] for metric in SHOWN}
    signs = ("identical_answers", "task_form_answers", "repetition", "short_answers", "looping_answers")
    selected |= {name: [round(by_metric[name]["value"], 1)] for name in signs if name in by_metric}
    examples = [row["response"] for row in rows if row["set"] == "harmful"][:6]
    return {**selected, "examples": examples}


if __name__ == "__main__":
    main()
