"""0/1 masks by parameter name: exact counts of the largest scores, set differences, and bits for a checkpoint."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hftlight.engine.weights.shards import Share, share
from hftlight.engine.weights.top_k import Top


def count_of(fraction: float, entries: int) -> int:
    """Return how many of ``entries`` a fraction in [0, 1] amounts to, rounded down.

    A small tolerance covers the rounding of decimal fractions: 0.29 of 100 is 29.
    """
    return math.floor(fraction * entries * (1 + 1e-12) + 1e-9)


def largest(scores: Tensor, count: int, rows: Share | None = None) -> Tensor:
    """Return the mask of the ``count`` largest entries of a whole matrix.

    The mask selects exactly ``count`` entries; ties go to the first entry. Scores are compared as float32. A matrix
    that is sharded over rows is not gathered: every rank gets the mask of its own rows, and every rank must call this.

    Args:
        scores: ``[rows, in]``, >= 0 and finite; the rows that this rank holds.
        count: number of entries over all ranks, >= 0.
        rows: which rows of the matrix these are; None means all rows.
    """
    rows = rows or Share(0, len(scores), len(scores))
    if count == 0 or count >= rows.total * scores.shape[1]:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    scores = scores.float()
    return Top(lambda: iter([(0, scores)]), count, rows, scores.device).mask(0, scores)


def minus(safety: Tensor, utility: Tensor | None) -> Tensor:
    r"""Return the set difference :math:`S \setminus U` of two masks.

    Without U, the result is S.
    """
    return safety if utility is None else safety & ~utility


def chance_overlap(p: float, q: float) -> float:
    """Return the Jaccard overlap ``pq / (p + q - pq)`` that random sets of fractions p and q have.

    If both fractions are 0, the overlap is 0.
    """
    return p * q / (p + q - p * q) if p + q > 0 else 0.0


@dataclass(frozen=True)
class Overlap:
    """Sizes of two sets S and U and of their intersection, in entries of one or several matrices.

    Attributes:
        safety: entries of S.
        utility: entries of U.
        both: entries that are in S and in U.
        total: all entries of the matrices.
    """

    safety: int
    utility: int
    both: int
    total: int

    def __add__(self, other: "Overlap") -> "Overlap":
        return Overlap(
            self.safety + other.safety,
            self.utility + other.utility,
            self.both + other.both,
            self.total + other.total,
        )

    @property
    def jaccard(self) -> float:
        """Jaccard overlap ``|S and U| / |S or U|``, in [0, 1].

        If both sets are empty, the overlap is 0.
        """
        either = self.safety + self.utility - self.both
        return self.both / either if either else 0.0

    @property
    def fraction(self) -> float:
        """Fraction of the entries that are in S and not in U."""
        return (self.safety - self.both) / self.total if self.total else 0.0


def overlap(safety: Tensor, utility: Tensor | None, rows: Share, columns: int) -> Overlap:
    """Count the entries of two masks of one matrix, and of their intersection, over all ranks.

    Args:
        safety: mask of this rank's rows, ``[rows, in]``, or ``[rows, 1]`` for whole rows.
        utility: likewise; None means the empty set.
        rows: which rows of the matrix these are.
        columns: ``in``, number of columns of the matrix.
    """
    sets = [safety, *([] if utility is None else [utility, safety & utility])]
    # In a mask of whole rows, one entry stands for all columns of its row.
    counts = rows.sum(torch.stack([m.sum() for m in sets]))[0] * (columns // safety.shape[1])
    s, u, both = [*counts.tolist(), 0, 0][:3]  # the last two counts are 0 without U
    return Overlap(s, u, both, rows.total * columns)


def pack(mask: Tensor) -> Tensor:
    """Return a mask as one bit per entry, in uint8 bytes on the CPU."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the mask that ``pack`` turned into bits.

    Raises:
        ValueError: if the number of bytes does not fit the shape.
    """
    count = math.prod(shape)
    if len(bits) != -(-count // 8):
        raise ValueError(f"unpack: a mask of shape {list(shape)} needs {-(-count // 8)} bytes, got {len(bits)}.")
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).reshape(shape)).bool()


def digest(packed: Mapping[str, Tensor]) -> str:
    """Return 16 hexadecimal digits that identify masks, from their packed bits by parameter name."""
    total = hashlib.sha256()
    for name in sorted(packed):
        total.update(name.encode() + packed[name].numpy().tobytes())
    return total.hexdigest()[:16]


def whole_rows(mine: Tensor, like: Tensor) -> Tensor:
    """Return all rows of a tensor whose rows are split over ranks like those of ``like``.

    Every rank must call this.

    Args:
        mine: this rank's rows, ``[rows, ...]``; ``[rows, 1]`` is allowed if ``like`` is wider.
        like: the parameter, sharded over rows or not.
    """
    if not isinstance(like, DTensor) or share(like).group is None:
        return mine
    shape = torch.Size((like.shape[0], *mine.shape[1:]))
    # A meta tensor gives the strides of the whole tensor without its memory.
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        mine.contiguous(), like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
    ).full_tensor()
