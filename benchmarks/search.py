"""Cost of an attacker's search against as many separate runs: ``python benchmarks/search.py [--model tiny]``.

Both ways try the same settings (learning rates x harmful ratios) against one aligned model. The search trains and
measures all settings in one process and in memory, each on the selecting half of the prompts. The chosen settings are
measured once more on the other half. A separate run is a process of ``recipes/train.py``. It reads the aligned model
from the cache, trains, writes, and measures on as many prompts as one half has. Counted bytes are those that the
processes wrote to a disk; a folder in memory counts none. Results go to ``benchmarks/search.json``.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))
RESULTS = Path(__file__).with_suffix(".json")
LR = (1e-3, 3e-4, 2e-3, 3e-3)
RATIOS = (0.1, 0.3)


def settings(options: argparse.Namespace, prompts: int) -> list[str]:
    """Return the arguments of every process, with its number of prompts of each kind."""
    values = {
        "model": options.model, "alignment.steps": options.steps, "evaluation.prompts": prompts,
        "evaluation.task_rows": prompts, "evaluation.over_refusal_prompts": 1, "accelerator": "cpu",
        "num_samples": options.num_samples, "output": options.folder,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in values.items()]


def trials(options: argparse.Namespace) -> list[tuple[float, float]]:
    """Return the settings to try, as pairs of learning rate and harmful ratio."""
    return [(lr, p) for p in RATIOS for lr in LR][: options.trials]


def train(options: argparse.Namespace, name: str, *more: str) -> None:
    """Start one separate run and wait for its end."""
    command = [sys.executable, str(ROOT / "recipes" / "train.py"), *settings(options, options.prompts // 2)]
    command += [f"--name={name}", *more]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def separate(options: argparse.Namespace) -> None:
    """Try every setting in a process of its own."""
    for lr, p in trials(options):
        train(
            options, f"lr{lr:g}-p{p:g}", f"--finetuning.steps={options.steps}", f"--finetuning.lr={lr}",
            f"--harmful_ratio={p}",
        )  # fmt: skip


def together(options: argparse.Namespace) -> None:
    """Try every setting in one process."""
    command = [sys.executable, __file__, "--part", "search"]
    for name in ("model", "trials", "steps", "prompts", "num_samples", "folder"):
        command += [f"--{name}", str(getattr(options, name))]
    subprocess.run(command, check=True)


def search_here(options: argparse.Namespace) -> None:
    """Search in this process."""
    from hftlight.cli.train import parse_train
    from hftlight.console import quiet
    from hftlight.runs.prepare import prepare
    from hftlight.runs.stages.attacker import Attacker
    from hftlight.search.search import search
    from hftlight.search.space import Budget

    quiet()
    first = [f"--finetuning.lr={LR[0]}", f"--finetuning.steps={options.steps}", f"--harmful_ratio={RATIOS[0]}"]
    config, _, attack, *_ = parse_train([*settings(options, options.prompts), *first])
    folder = Path(options.folder)
    attacker = Attacker(config, [], folder / "warm" / "none" / "aligned", prepare(config, [], attack).attack)
    budget = Budget((options.steps,), LR, (config.lora.r,), (config.num_samples,), RATIOS)
    found = search(attacker, options.trials, folder / "search", budget)
    done = [o.trial for o in found.outcomes if not o.failed]
    print(f"{len(done)} trials trained; the worst: {found.worst.trial}")


def measured(work: Any, options: argparse.Namespace) -> dict[str, float]:
    """Return the wall-clock seconds and the written MiB of the processes that ``work`` starts."""
    blocks, since = resource.getrusage(resource.RUSAGE_CHILDREN).ru_oublock, time.perf_counter()
    work(options)
    seconds = time.perf_counter() - since
    written = (resource.getrusage(resource.RUSAGE_CHILDREN).ru_oublock - blocks) * 512  # blocks of 512 bytes
    return {"seconds": round(seconds, 1), "written_mib": round(written / 2**20, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--trials", type=int, default=8, help=f"1 to {len(LR) * len(RATIOS)}")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--num_samples", type=int, default=384)
    parser.add_argument("--folder", default=None, help="folder of the runs; a temporary folder by default")
    parser.add_argument("--part", choices=("both", "search"), default="both", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "search":
        search_here(options)
        return
    with tempfile.TemporaryDirectory(dir=ROOT) as place:
        options.folder = options.folder or place
        from hftlight.files import cache_dir
        from hftlight.model_files import model_path

        model_path(options.model)
        cache = Path(place) / "cache"  # shares only the models: no run here reuses a stage of an earlier benchmark
        cache.mkdir()
        (cache / "models").symlink_to((cache_dir() / "models").resolve())
        os.environ["HFTLIGHT_CACHE"] = str(cache)
        train(options, "warm", "--finetuning.steps=1")  # aligns, and measures the base and the aligned model
        found: dict[str, Any] = {"search": measured(together, options), "separate": measured(separate, options)}
    for what in ("seconds", "written_mib"):
        least = found["search"][what]
        found[f"ratio_{what}"] = round(found["separate"][what] / least, 2) if least else None
    found |= {key: getattr(options, key) for key in ("model", "trials", "steps", "prompts", "num_samples")}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    for name in ("search", "separate"):
        print(f"{name}: {found[name]['seconds']:.1f} s, {found[name]['written_mib']:.2f} MiB written")
    print(f"separate / search: {found['ratio_seconds']} in time, {found['ratio_written_mib']} in bytes")


if __name__ == "__main__":
    main()
