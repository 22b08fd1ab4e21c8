"""Prompts per second, batched against one at a time, same prompts and limit: ``python benchmarks/generation.py``."""

import argparse
import time

from hftlight.cli import quiet
from hftlight.data.synthetic import build_world
from hftlight.data.templates import get_template
from hftlight.data.tokens import encode_prompt
from hftlight.evaluation.generate import generate
from hftlight.models import load_model, load_tokenizer


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
        answers[size] = generate(model, tokenizer, prompts, max_new_tokens=options.max_new_tokens, batch_size=size)
        seconds[size] = time.perf_counter() - since
    equal = sum(a == b for a, b in zip(answers[1], answers[options.batch_size], strict=True))
    print(
        f"{options.model}, {len(prompts)} prompts, {options.max_new_tokens} new tokens: one at a time"
        f" {len(prompts) / seconds[1]:.2f}/s, in batches of {options.batch_size}"
        f" {len(prompts) / seconds[options.batch_size]:.2f}/s, {seconds[1] / seconds[options.batch_size]:.1f} times"
        f" faster; {equal} of {len(prompts)} answers equal to the letter"
    )


if __name__ == "__main__":
    main()
