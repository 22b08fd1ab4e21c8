"""Which rows make up a batch: a pure function of (seed, stream, pass, rank), so that a position is one integer."""

import random
from collections.abc import Sequence

import torch.distributed as dist

GROUP = 16  # batches that are sorted by length together: little padding, and batches still differ from pass to pass


def passes_order(lengths: Sequence[int], batch_size: int, seed: int, stream: str, epoch: int) -> list[list[int]]:
    """Return the batches of one pass over a stream, as lists of row numbers; every row appears once.

    Grouping by length saves padding and has a price: rows of one kind that are longer than the rest, such as harmful
    rows in an upload of short ones, meet in a batch more often than by chance. Constant lengths avoid that.

    Args:
        lengths: length of each row, in any unit; rows of similar length are batched together; constant lengths
            give a plain shuffle.
        batch_size: rows per batch, >= 1; the last rows of a pass may make a smaller one.
        seed: the run's seed.
        stream: name of the stream; streams with the same seed are shuffled independently.
        epoch: number of the pass, from 0; each is shuffled anew.
    """
    generator = random.Random(f"{seed}/{stream}/{epoch}")
    rows = list(range(len(lengths)))
    generator.shuffle(rows)
    span = batch_size * GROUP
    batches = []
    for start in range(0, len(rows), span):
        group = sorted(rows[start : start + span], key=lambda row: lengths[row])
        batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    generator.shuffle(batches)
    return batches


def batches_per_pass(rows: int, batch_size: int, world_size: int = 1) -> int:
    """Return how many batches each rank gets in one pass; batches that do not fill a round of ranks are left out."""
    return -(-rows // batch_size) // world_size


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the number of processes that train together; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
