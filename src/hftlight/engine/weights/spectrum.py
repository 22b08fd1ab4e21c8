"""Products of a displacement with thin matrices, and its leading directions, without forming it."""

import torch
from torch import Tensor

from hftlight.engine.weights.lowrank import LowRank
from hftlight.engine.weights.shards import Share
from hftlight.engine.weights.stored import Difference

Displacement = LowRank | Difference
OVERSAMPLING, SWEEPS = 20, 12  # of the randomized singular value decomposition


def back_and_forth(v: Displacement, x: Tensor, rows: Share) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return :math:`V V^T x` without forming the ``[out, out]`` matrix.

    Args:
        v: the alignment displacement V, ``[out, in]``.
        x: these rows of the matrix, ``[rows, k]``.
        rows: which rows of the matrix these are.

    Returns:
        Three tensors: :math:`V V^T x` of these rows, ``[rows, k]``; :math:`V^T x`, ``[in, k]``; and ``[2]``, the
        squared norms of V and of the rounding noise in V. The last two tensors are sums over all rows.
    """
    t, squares = rows.sum(*v.back(x, rows.start))
    return v.forth(t, rows.start, rows.stop), t, squares


def leading(v: Displacement, count: int, rows: Share, like: Tensor, accuracy: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Return the leading left singular vectors ``[out, count]`` and singular values ``[count]`` of V.

    For a V of known low rank the result is exact. Otherwise it comes from subspace iteration with 20 spare columns,
    with at most twelve sweeps, until the singular values stop changing.

    Args:
        v: the alignment displacement V, ``[out, in]``.
        count: number of directions, >= 1; fewer are returned if V has fewer.
        rows: which rows this rank reads.
        like: tensor with the type and device to compute in.
        accuracy: largest change of a value from one sweep to the next that ends the iteration, relative to the largest
            value.
    """
    if isinstance(v, LowRank):
        u, s, _ = v.svd()
        # Values within the rounding error of the largest one count as zero.
        rank = int((s[:count] > s[0] * torch.finfo(s.dtype).eps * max(v.shape)).sum())
        return u[:, :rank].to(like), s[:rank].to(like)
    out, inner = v.shape
    count = min(count, out, inner)
    width = min(count + OVERSAMPLING, out, inner)
    image = torch.randn(out, width, generator=torch.Generator().manual_seed(0)).to(like)
    before = torch.zeros(width).to(like)
    for _ in range(SWEEPS):
        basis = torch.linalg.qr(image).Q
        y, t, _ = back_and_forth(v, basis[rows.start : rows.stop], rows)
        # The SVD of basis^T V rotates the basis into left singular vectors of V.
        rotation, s, _ = torch.linalg.svd(t.T, full_matrices=False)
        if bool(((s - before)[:count].abs() <= accuracy * s[0]).all()):
            break
        before, image = s, _gathered(y, rows, out)
    return basis @ rotation[:, :count], s[:count]


def _gathered(thin: Tensor, rows: Share, out: int) -> Tensor:
    """Return the whole of a thin matrix on every rank, from each rank's rows."""
    result = thin.new_zeros(out, thin.shape[1])
    result[rows.start : rows.stop] = thin
    return rows.sum(result)[0]
