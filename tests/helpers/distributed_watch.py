"""Train under two DDP processes with and without EvaluateAt, and save what each rank saw: ``OUTPUT FOLDER``."""

import sys
from pathlib import Path

import torch

from hftlight.evaluation.judges import JUDGES
from hftlight.runs.measuring import curve as module
from tests.helpers.contract import weights_of
from tests.helpers.distributed import strategy_of
from tests.runs.measuring.test_curve import Always, Restless, go, watch


def main(folder: str) -> None:
    """Three trainings: plain, evaluated, and evaluated with a judge that makes it stop."""
    torch.set_num_threads(1)
    asked: list[int] = []
    generate = module.generate

    def counted(model, tokenizer, prompts, **options):
        asked.append(len(prompts))
        return generate(model, tokenizer, prompts, **options)

    module.generate = counted
    settings = {"devices": 2, "strategy": strategy_of("ddp"), "steps": 4}
    plain = go(**settings)
    rank = plain.trainer.global_rank
    JUDGES["restless"] = Restless
    seen = watch(every=2)
    watched = go(seen, **{**settings, "strategy": strategy_of("ddp")})
    prompts = list(asked)
    JUDGES["restless"] = Always
    stopping = watch(every=2, stop_above=50.0)
    stopped = go(stopping, **{**settings, "strategy": strategy_of("ddp")})
    found = {
        "plain": weights_of(plain),
        "watched": weights_of(watched),
        "results": seen.results,
        "asked": prompts,
        "stopped": stopped.trainer.global_step,
    }
    torch.save(found, Path(folder) / f"{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
