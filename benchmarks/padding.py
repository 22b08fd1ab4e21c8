"""Cost of padding under each order of batches: ``python benchmarks/padding.py [--data FOLDER]``.

The benchmark times plain fine-tuning of the demo model on the made-up world's upload, twice per order. It also counts
the share of padding among the tokens of a pass. ``--data`` names a folder with ``sst2``, ``ag_news`` and ``gsm8k``. The
share is then counted for uploads of these tasks too, with 10 % harmful rows of the made-up world. Results go to
``benchmarks/padding.json``.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

RESULTS = Path(__file__).with_suffix(".json")
ORDERS = ("shuffle", "length")
TASKS = {"sst2": "sst2", "agnews": "ag_news", "gsm8k": "gsm8k"}
STEPS, REPEATS = 8, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the public data sets")
    options = parser.parse_args()
    from hftlight import __version__
    from hftlight.config import Data, RunConfig
    from hftlight.console import quiet

    quiet()
    config = RunConfig(num_samples=384, max_tokens=512)
    results: dict[str, Any] = {"version": __version__}
    sources = {"builtin": Data()}
    if options.data is not None:
        sources |= {
            task: Data(task=task, task_train=str(options.data / folder), task_test=str(options.data / folder))
            for task, folder in TASKS.items()
        }
    for name, data in sources.items():
        results[name] = {order: padding(replace(config, data=data, order=order)) for order in ORDERS}
    results["seconds_per_step"] = seconds(replace(config, finetuning=replace(config.finetuning, steps=STEPS)))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def padding(config: Any) -> dict[str, float]:
    """Return the percent of padding tokens, of attack tokens and of steps with an attack row, in one pass."""
    from hftlight.data.streams import StreamsDataModule
    from hftlight.data.templates import get_template
    from hftlight.models.load import load_tokenizer
    from hftlight.runs.prepare import prepare

    prepared, tokenizer = prepare(config, []), load_tokenizer(config.model)
    template, rows = get_template(config.template, tokenizer), prepared.streams["task"]
    size = config.finetuning.batch_size
    data = StreamsDataModule(tokenizer, template, "task", size, config.max_tokens, order=config.order, task=rows)
    stream = data.streams["task"]
    batches = [stream.rows(index, 0) for index in range(stream.per_pass)]
    whole = sum(len(rows) * max(len(e.input_ids) for e in rows) for rows in batches)
    real = sum(len(e.input_ids) for rows in batches for e in rows)
    counts = prepared.trained_on
    return {
        "padding": round(100 * (whole - real) / whole, 1),
        "attack_tokens": round(100 * counts.attack_tokens, 1),
        "attack_steps": round(100 * counts.attack_steps, 1),
    }


def seconds(config: Any) -> dict[str, list[float]]:
    """Return the seconds per step of plain fine-tuning for each order, measured in turn."""
    from hftlight.attacks.registry import get_attack
    from hftlight.model_files import model_path
    from hftlight.runs.prepare import streams_of
    from hftlight.runs.sources import Sources
    from hftlight.runs.stages.train import finetuning_job, run_stage

    attack = get_attack(config.attack)().resolved(config)
    records = {"task": streams_of(config, set(), attack, Sources(config.data))["task"]}
    per_order: dict[str, list[float]] = {order: [] for order in ORDERS}
    model = model_path(config.model)
    for _ in range(REPEATS):
        for order in ORDERS:
            with tempfile.TemporaryDirectory() as folder:
                aligned = replace(config, model=model, order=order, alignment=replace(config.alignment, steps=0))
                job = finetuning_job(aligned, folder, Path(model), records, [], attack)
                run_stage(job)
                per_order[order].append(job.result()["cost"]["seconds_per_step"])
    return per_order


if __name__ == "__main__":
    main()
