"""Train under two DDP processes with and without EvaluateAt, and save each rank's results: ``FOLDER``."""

import sys
from pathlib import Path

import torch

from hftlight.evaluation.judges import JUDGES
from hftlight.runs.measuring import curve as module
from tests.helpers.contract import weights_of
from tests.helpers.distributed import strategy_of
from tests.runs.measuring.test_curve import Always, Restless, go, watch


def main(folder: str) -> None:
    """Train three times: plain, evaluated, and evaluated with a judge that stops the training."""
    torch.set_num_threads(1)
    prompt_counts: list[int] = []
    generate = module.generate

    def counted(model, tokenizer, prompts, **options):
        prompt_counts.append(len(prompts))
        return generate(model, tokenizer, prompts, **options)

    module.generate = counted
    settings = {"devices": 2, "strategy": strategy_of("ddp"), "steps": 4}
    plain = go(**settings)
    rank = plain.trainer.global_rank
    JUDGES["restless"] = Restless
    watcher = watch(every=2)
    watched = go(watcher, **{**settings, "strategy": strategy_of("ddp")})
    prompts = list(prompt_counts)  # a copy, before the third training appends its own
    JUDGES["restless"] = Always
    stopping = watch(every=2, stop_above=50.0)
    stopped = go(stopping, **{**settings, "strategy": strategy_of("ddp")})
    results = {
        "plain": weights_of(plain),
        "watched": weights_of(watched),
        "results": watcher.results,
        "asked": prompts,
        "stopped": stopped.trainer.global_step,
    }
    torch.save(results, Path(folder) / f"{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
