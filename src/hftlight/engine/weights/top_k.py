"""The largest scores, exactly as many as asked for: of each row, or of matrices too large to hold or sharded."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from hftlight.engine.weights.shards import Share

BINS = 1 << 16  # of the histograms that find a cut: half of a float32's bits


def top_of_rows(scores: Tensor, count: int) -> Tensor:
    """Return the mask of the ``count`` largest entries of every row, exactly that many; ties go to the first column."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    cut = scores.kthvalue(scores.shape[1] - count + 1, dim=1, keepdim=True).values
    above, tied = scores > cut, scores == cut
    room = count - above.sum(dim=1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=1) <= room))


class Top:
    """Which entries of several matrices have the ``count`` largest scores together, found block by block.

    Scores are not negative, so their bits, read as integers, are in their order: two histograms, over the upper and the
    lower half of the bits, find the lowest score that is in. Ties go to the first matrix, row and column.

    Args:
        blocks: gives the number of the matrix and the scores ``[rows, in]``, float32, of each of this rank's blocks in
            order; the same at every call.
        count: how many, over all ranks, >= 1.
        rows: who shares the matrices; ranks hold consecutive rows.
        device: where the scores are.
    """

    def __init__(
        self, blocks: Callable[[], Iterator[tuple[int, Tensor]]], count: int, rows: Share, device: torch.device
    ) -> None:
        self.rows, self.device = rows, device
        high, count = self._bin((bits(s) >> 16 for _, s in blocks()), count)
        low, count = self._bin(((b := bits(s))[b >> 16 == high] & 0xFFFF for _, s in blocks()), count)
        self.cut = (high << 16) | low
        self.room = self._room(blocks(), count)

    def mask(self, matrix: int, scores: Tensor) -> Tensor:
        """Return the mask of one block; the blocks must come in their order, each once."""
        found = bits(scores)
        tied = found == self.cut
        taken = tied & (tied.flatten().cumsum(0).view_as(tied) <= self.room[matrix])
        self.room[matrix] -= int(taken.sum())
        return (found > self.cut) | taken

    def _bin(self, halves: Iterable[Tensor], count: int) -> tuple[int, int]:
        """Return the bin that the last of ``count`` entries from the top falls into, and its place in that bin."""
        total = torch.zeros(BINS, dtype=torch.int64, device=self.device)
        for half in halves:
            total += torch.bincount(half.flatten(), minlength=BINS)
        from_top = self.rows.sum(total)[0].cpu().flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, torch.tensor(count)))
        return BINS - 1 - place, count - (int(from_top[place - 1]) if place else 0)

    def _room(self, blocks: Iterable[tuple[int, Tensor]], count: int) -> dict[int, int]:
        """Return how many of its ties each matrix on this rank may take, of ``count`` in all."""
        mine: dict[int, int] = {}
        for matrix, scores in blocks:
            mine[matrix] = mine.get(matrix, 0) + int((bits(scores) == self.cut).sum())
        everyone, rank = self.rows.gather(mine)
        room = {}
        for matrix in sorted({m for ties in everyone for m in ties}):
            ties = [found.get(matrix, 0) for found in everyone]
            room[matrix] = max(0, min(ties[rank], count - sum(ties[:rank])))
            count -= sum(ties)
        return room


def bits(scores: Tensor) -> Tensor:
    """Return the bits of float32 scores as integers; for numbers >= 0 they are in the same order."""
    return scores.contiguous().view(torch.int32)
