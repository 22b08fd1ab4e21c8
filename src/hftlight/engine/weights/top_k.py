"""Masks with an exact count of the largest scores, of each row or of matrices too large to hold or sharded."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from hftlight.engine.weights.shards import Share

BINS = 1 << 16  # of the histograms that find a cut: half of a float32's bits


def top_of_rows(scores: Tensor, count: int) -> Tensor:
    """Return the mask of the ``count`` largest entries of every row.

    Each row of the mask selects exactly ``count`` entries; ties go to the first column.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    cut = scores.kthvalue(scores.shape[1] - count + 1, dim=1, keepdim=True).values
    # All entries above the cut are in; tied entries fill the room that is left.
    above, tied = scores > cut, scores == cut
    room = count - above.sum(dim=1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=1) <= room))


class Top:
    """The entries of several matrices that have the ``count`` largest scores together, selected block by block.

    Scores are not negative, so their bits, read as integers, have the same order. Two histograms, over the upper and
    the lower half of the bits, give the cut: the lowest score that is selected. Ties go to the first matrix, row and
    column.

    Args:
        blocks: yields the number of the matrix and the scores ``[rows, in]``, float32, of each of this rank's blocks in
            order; the same blocks at every call.
        count: number of entries over all ranks, >= 1.
        rows: the rows of this rank and the ranks that share the matrices; ranks hold consecutive rows.
        device: device of the scores.
    """

    def __init__(
        self, blocks: Callable[[], Iterator[tuple[int, Tensor]]], count: int, rows: Share, device: torch.device
    ) -> None:
        self.rows, self.device = rows, device
        # The upper half of the bits gives the bin of the cut; the second pass counts only scores in that bin.
        high, count = self._bin((bits(s) >> 16 for _, s in blocks()), count)
        low, count = self._bin(((b := bits(s))[b >> 16 == high] & 0xFFFF for _, s in blocks()), count)
        self.cut = (high << 16) | low
        self.room = self._room(blocks(), count)

    def mask(self, matrix: int, scores: Tensor) -> Tensor:
        """Return the mask of one block.

        The blocks must come in their order, each exactly once, because every block uses up room for ties.
        """
        score_bits = bits(scores)
        tied = score_bits == self.cut
        selected_ties = tied & (tied.flatten().cumsum(0).view_as(tied) <= self.room[matrix])
        self.room[matrix] -= int(selected_ties.sum())
        return (score_bits > self.cut) | selected_ties

    def _bin(self, halves: Iterable[Tensor], count: int) -> tuple[int, int]:
        """Return the bin of the last of the ``count`` largest entries, and the place of that entry in the bin."""
        total = torch.zeros(BINS, dtype=torch.int64, device=self.device)
        for half in halves:
            total += torch.bincount(half.flatten(), minlength=BINS)
        from_top = self.rows.sum(total)[0].cpu().flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, torch.tensor(count)))
        return BINS - 1 - place, count - (int(from_top[place - 1]) if place else 0)

    def _room(self, blocks: Iterable[tuple[int, Tensor]], count: int) -> dict[int, int]:
        """Return how many of its ties each matrix on this rank may select, of ``count`` ties in all."""
        mine: dict[int, int] = {}
        for matrix, scores in blocks:
            mine[matrix] = mine.get(matrix, 0) + int((bits(scores) == self.cut).sum())
        everyone, rank = self.rows.gather(mine)
        room = {}
        # Ties are granted matrix by matrix, and within a matrix rank by rank.
        for matrix in sorted({m for ties in everyone for m in ties}):
            ties = [counts.get(matrix, 0) for counts in everyone]
            room[matrix] = max(0, min(ties[rank], count - sum(ties[:rank])))
            count -= sum(ties)
        return room


def bits(scores: Tensor) -> Tensor:
    """Return the bits of float32 scores as integers.

    For scores >= 0, the integers have the same order as the scores.
    """
    return scores.contiguous().view(torch.int32)
