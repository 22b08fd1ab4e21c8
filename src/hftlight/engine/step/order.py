"""The rows of each batch: a pure function of (seed, stream, pass, rank).

A position in a stream is therefore one integer.
"""

import os
import random
from collections.abc import Sequence
from typing import Literal

import torch.distributed as dist

GROUP = 16  # batches whose rows are sorted by length together: little padding, yet batches differ from pass to pass
Order = Literal["shuffle", "length"]


def passes_order(
    rows: int, batch_size: int, seed: int, stream: str, epoch: int, lengths: Sequence[int] | None = None
) -> list[list[int]]:
    """Return the batches of one pass over a stream, as lists of row numbers.

    Every row appears once. The default is a plain shuffle, as in the official scripts of the field; its last batch
    may be smaller.

    Groups by length save padding, but they change what a step sees. Suppose that rows of one kind are longer than the
    rest, such as harmful rows in an upload of short rows. These rows share a batch more often than by chance.

    Args:
        rows: number of rows, >= 0.
        batch_size: rows per batch, >= 1.
        seed: the run's seed.
        stream: name of the stream; streams with the same seed are shuffled independently.
        epoch: number of the pass, from 0; each pass has its own shuffle.
        lengths: length of each row, in any unit, to group rows by length. None means a plain shuffle.
    """
    generator = random.Random(f"{seed}/{stream}/{epoch}")
    order = list(range(rows))
    generator.shuffle(order)
    if lengths is None:
        return _cut(order, batch_size)
    # Sort inside each group of the shuffled order, cut the group into batches, then shuffle the batches.
    span = batch_size * GROUP
    batches = []
    for start in range(0, rows, span):
        batches += _cut(sorted(order[start : start + span], key=lambda row: lengths[row]), batch_size)
    generator.shuffle(batches)
    return batches


def _cut(order: Sequence[int], batch_size: int) -> list[list[int]]:
    return [list(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]


def trainer_seed() -> int:
    """Return the seed that Lightning's ``seed_everything`` set, or 0 if it was not called.

    The seed is the same in all processes.
    """
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def batches_per_pass(rows: int, batch_size: int, world_size: int = 1) -> int:
    """Return how many batches each rank gets in one pass.

    Batches that do not fill a round of ranks are left out.
    """
    return -(-rows // batch_size) // world_size


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the number of processes that train together.

    Without a process group the result is (0, 1).
    """
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
