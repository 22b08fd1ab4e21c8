"""What a displacement does to thin matrices, and its leading directions, without forming it."""

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
        rows: which rows they are.

    Returns:
        :math:`V V^T x` of these rows ``[rows, k]``; :math:`V^T x` ``[in, k]``; and ``[2]``, the squared norm of V and
        of the rounding noise in it; the last two are sums over all rows.
    """
    t, squares = rows.sum(*v.back(x, rows.start))
    return v.forth(t, rows.start, rows.stop), t, squares


def leading(v: Displacement, count: int, rows: Share, like: Tensor, accuracy: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Return the leading left singular vectors ``[out, count]`` and values ``[count]`` of V; exact for a thin V.

    Otherwise by subspace iteration with 20 columns to spare, at most twelve sweeps, until the values stand still.

    Args:
        v: the alignment displacement V, ``[out, in]``.
        count: how many, >= 1; fewer come back where V has fewer.
        rows: which rows this rank reads.
        like: type and device to compute in.
        accuracy: relative change of the values from one sweep to the next that ends the iteration.
    """
    if isinstance(v, LowRank):
        u, s, _ = v.svd()
        kept = int((s[:count] > s[0] * torch.finfo(s.dtype).eps * max(v.shape)).sum())
        return u[:, :kept].to(like), s[:kept].to(like)
    out, inner = v.shape
    count = min(count, out, inner)
    width = min(count + OVERSAMPLING, out, inner)
    image = torch.randn(out, width, generator=torch.Generator().manual_seed(0)).to(like)
    before = torch.zeros(width).to(like)
    for _ in range(SWEEPS):
        basis = torch.linalg.qr(image).Q
        y, t, _ = back_and_forth(v, basis[rows.start : rows.stop], rows)
        rotation, s, _ = torch.linalg.svd(t.T, full_matrices=False)
        if bool(((s - before)[:count].abs() <= accuracy * s[0]).all()):
            break
        before, image = s, _gathered(y, rows, out)
    return basis @ rotation[:, :count], s[:count]


def _gathered(thin: Tensor, rows: Share, out: int) -> Tensor:
    """Return a thin matrix whole on every rank."""
    result = thin.new_zeros(out, thin.shape[1])
    result[rows.start : rows.stop] = thin
    return rows.sum(result)[0]
