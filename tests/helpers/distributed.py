"""Train every defense's row under one strategy, in one launch, and save the weights: ``STRATEGY OUTPUT TUNING``.

The tuning ``first`` is the first that a row names.

One process takes all eight rows of a step. Two processes take four each, with equally many response tokens.
"""

import sys
import traceback

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from hftlight.engine import Stage
from tests.helpers.contract import rows, train, weights_of


def strategy_of(name: str):
    """Return a fresh strategy: one process, DDP or FSDP2, the last two with two processes on the CPU."""
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    return "auto"


def main(strategy: str, output: str, tuning: str) -> None:
    """Train with every row. A defense's error is saved in place of its weights."""
    torch.set_num_threads(1)
    devices = 1 if strategy == "one" else 2
    results: dict[str, object] = {}
    rank = 0
    for name, row in rows().items():
        defense = row.make()
        if defense.stage is Stage.POST_FINETUNING or (tuning != "first" and tuning not in row.tunings):
            continue
        try:
            module = train(
                [defense],
                row.tunings[0] if tuning == "first" else tuning,
                accumulate=4 if row.per_rank and strategy == "one" else 2,
                clip=1.0,
                dtype=torch.float32,
                devices=devices,
                strategy=strategy_of(strategy),
            )
            results[name] = weights_of(module)
            rank = module.trainer.global_rank
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            results[name] = f"{error}\n{traceback.format_exc()}"
    if rank == 0:
        torch.save(results, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
