"""Matrices of low rank, stored as their factors, and exact arithmetic on adapters."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The matrix ``scale * B A``, stored as its factors and never formed as a whole.

    Attributes:
        b: B, ``[out, rank]``.
        a: A, ``[rank, in]``.
        scale: factor of the product, dimensionless.
    """

    b: Tensor
    a: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix, ``(out, in)``."""
        return self.b.shape[0], self.a.shape[1]

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return some rows of the matrix, ``[rows, in]``."""
        return self.scale * (self.b[start:stop] @ self.a)

    def squared_norm(self) -> Tensor:
        """Return the sum of the squared entries, 0-d, from the Gram matrices of the factors."""
        return self.scale**2 * ((self.b.T @ self.b) * (self.a @ self.a.T)).sum()

    def back(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Return what ``Difference.back`` returns.

        The factors are exact, so the noise is 0.
        """
        b, a = self.b[start : start + len(x)].to(x), self.a.to(x)
        squares = LowRank(b, a, self.scale).squared_norm()
        return self.scale * (a.T @ (b.T @ x)), torch.stack([squares, torch.zeros_like(squares)])

    def forth(self, t: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows ``start`` to ``stop`` of the matrix times ``t``, where ``t`` is ``[in, k]``."""
        return self.scale * (self.b[start:stop].to(t) @ (self.a.to(t) @ t))

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return U ``[out, k]``, the singular values ``[k]`` and V^T ``[k, in]``, at least in float32.

        k is min(rank, out, in).
        """
        dtype = torch.promote_types(self.b.dtype, torch.float32)
        # With B = Q_B R_B and A^T = Q_A R_A, only the small matrix scale R_B R_A^T needs an SVD.
        left, inner_left = torch.linalg.qr(self.b.to(dtype))
        right, inner_right = torch.linalg.qr(self.a.to(dtype).T)
        u, s, vh = torch.linalg.svd(self.scale * inner_left @ inner_right.T)
        return left @ u[:, : len(s)], s, vh[: len(s)] @ right.T


def combined(terms: Sequence[tuple[float, LowRank]]) -> LowRank:
    """Return ``sum of factor * matrix`` exactly, with the ranks added up and scale 1.

    The factors are stacked: ``A = [A1; A2]`` and ``B = [c1 s1 B1, c2 s2 B2]``. PEFT's ``"linear"`` merge adds the
    factors instead, and so has cross terms.

    Args:
        terms: pairs (factor, matrix). All matrices have one shape; a factor may be negative.
    """
    return LowRank(
        torch.cat([factor * m.scale * m.b for factor, m in terms], dim=1), torch.cat([m.a for _, m in terms])
    )


def reduced(matrix: LowRank, rank: int) -> tuple[LowRank, float]:
    """Return the nearest matrix of at most a given rank, and the energy that it leaves out.

    The factors are decomposed by QR and the small core by SVD, so no matrix of the full shape is formed.

    Args:
        matrix: any matrix of low rank, such as the result of ``combined``.
        rank: the largest rank of the result, >= 1.

    Returns:
        The matrix with scale 1, and the fraction of the squared Frobenius norm that is left out, in [0, 1].

    Raises:
        ValueError: if ``rank`` is less than 1.
    """
    if rank < 1:
        raise ValueError(f"reduced: rank must be >= 1, got {rank}.")
    u, s, vh = matrix.svd()
    squares = s.double().square()
    total, left_out = float(squares.sum()), float(squares[rank:].sum())
    root = s[:rank].sqrt()  # both factors get the same share of the singular values
    small = LowRank((u[:, :rank] * root).to(matrix.b.dtype), (root[:, None] * vh[:rank]).to(matrix.a.dtype))
    return small, left_out / total if total else 0.0
