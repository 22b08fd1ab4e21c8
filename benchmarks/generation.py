"""Prompts per second in batches and one at a time, and loads of the base: ``python benchmarks/generation.py``.

Both ways answer the same prompts up to the same limit, and the answers with the same tokens are counted. Then two cells
of a comparison (one step per stage, two prompts per set) run in this process. The benchmark counts how often they read
the base model from disk. Results go to ``benchmarks/generation.json``.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from hftlight.console import quiet
from hftlight.data.templates import get_template
from hftlight.data.tokens import encode_prompt
from hftlight.data.world.build import build_world
from hftlight.evaluation.answering.generate import answer, generate
from hftlight.files import cache_dir
from hftlight.model_files import model_path
from hftlight.models.load import load_model, load_tokenizer

RESULTS = Path(__file__).with_suffix(".json")


def loads(model: str) -> dict[str, Any]:
    """Return how often two cells read the base model from disk, and the seconds that the reads took."""
    from transformers import AutoModelForCausalLM

    from hftlight.comparison.grid import Grid
    from hftlight.comparison.sweep import compare
    from hftlight.config import Evaluation, RunConfig, Training

    took, real = [], AutoModelForCausalLM.from_pretrained

    def counted(*arguments: Any, **options: Any) -> Any:
        since = time.perf_counter()
        loaded = real(*arguments, **options)
        took.append(time.perf_counter() - since)
        return loaded

    once = Training(steps=1, batch_size=2)
    with tempfile.TemporaryDirectory() as place:
        cache = Path(place) / "cache"
        cache.mkdir()
        model_path(model)
        # The new cache shares only the models, so that no stage comes from an earlier run.
        (cache / "models").symlink_to((cache_dir() / "models").resolve())
        before = os.environ.get("HFTLIGHT_CACHE")
        os.environ["HFTLIGHT_CACHE"] = str(cache)
        AutoModelForCausalLM.from_pretrained = counted
        try:
            config = RunConfig(model=model, alignment=once, finetuning=once, evaluation=Evaluation(2, 2, 2, 2, 2))
            outcome = compare(config, Grid(("none", "safety_mix")), Path(place) / "comparison")
        finally:
            AutoModelForCausalLM.from_pretrained = real
            if before is None:
                os.environ.pop("HFTLIGHT_CACHE")
            else:
                os.environ["HFTLIGHT_CACHE"] = before
    if set(outcome.values()) != {"done"}:
        raise SystemExit(f"a cell failed: {outcome}")
    return {"cells": len(outcome), "loads": len(took), "seconds": round(sum(took), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_new_tokens", type=int, default=24)
    options = parser.parse_args()
    quiet()
    tokenizer, model = load_tokenizer(options.model), load_model(options.model)
    template = get_template("chat", tokenizer)
    prompts = [encode_prompt(r, template, tokenizer) for r in build_world().dev[: options.prompts]]
    seconds, answers = {}, {}
    for size in (1, options.batch_size):
        generate(model, tokenizer, prompts[:size], max_new_tokens=2, batch_size=size)
        since = time.perf_counter()
        answers[size] = answer(model, tokenizer, prompts, max_new_tokens=options.max_new_tokens, batch_size=size)
        seconds[size] = time.perf_counter() - since
    equal = sum(a.ids == b.ids for a, b in zip(answers[1], answers[options.batch_size], strict=True))
    del model
    found = {"model": options.model, "prompts": len(prompts), "max_new_tokens": options.max_new_tokens}
    found["prompts_per_second"] = {size: round(len(prompts) / took, 2) for size, took in seconds.items()}
    found |= {"answers_with_the_same_tokens": equal, "base": loads(options.model)}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(
        f"{options.model}, {len(prompts)} prompts, {options.max_new_tokens} new tokens: one at a time"
        f" {len(prompts) / seconds[1]:.2f}/s, in batches of {options.batch_size}"
        f" {len(prompts) / seconds[options.batch_size]:.2f}/s, {seconds[1] / seconds[options.batch_size]:.1f} times"
        f" faster; {equal} of {len(prompts)} answers with the same tokens; {found['base']['loads']} loads of the base"
        f" in {found['base']['cells']} cells ({found['base']['seconds']:.1f} s)"
    )


if __name__ == "__main__":
    main()
