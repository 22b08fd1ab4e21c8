"""Leading directions of a layer's outputs, and of a matrix, without more memory than they need."""

import torch
from torch import Tensor

EXACT = 2048  # entries of the outputs up to which the second moment is stored whole
SPARE = 16  # spare columns of a randomised range
SWEEPS = 8  # of the randomised singular value decomposition


class Moment:
    r"""Sum of :math:`h h^T` over output vectors h, stored whole or as a sketch of its leading directions.

    Above ``EXACT`` entries, the moment G is known through :math:`Y = G \Omega` with an orthonormal random
    :math:`\Omega`. Its directions then are those of Nyström's approximation :math:`Y (\Omega^T Y)^{-1} Y^T`.

    Args:
        size: entries of a vector.
        count: number of directions that will be asked for, >= 1.
        seed: seed of the sketch.

    Attributes:
        vectors: number of vectors so far.
    """

    def __init__(self, size: int, count: int, seed: int = 0) -> None:
        self.vectors, self._count = 0, min(count, size)
        self._probe: Tensor | None = None
        if size > EXACT:
            width = min(size, self._count + SPARE)
            random = torch.randn(size, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            self._probe = torch.linalg.qr(random).Q
        self._sum = torch.zeros(size, size if self._probe is None else self._probe.shape[1], dtype=torch.float64)

    def add(self, vectors: Tensor) -> None:
        """Add output vectors, ``[n, size]``."""
        h = vectors.detach().double().cpu()
        self.vectors += len(h)
        self._sum += h.T @ (h if self._probe is None else h @ self._probe)

    def directions(self) -> Tensor:
        """Return the leading directions, orthonormal ``[size, count]`` in float64, the strongest first."""
        if self._probe is None:
            return torch.linalg.eigh(self._sum).eigenvectors.flip(1)[:, : self._count]
        # A small multiple of the identity makes the core positive definite. It does not change the directions.
        shift = torch.finfo(torch.float64).eps ** 0.5 * self._sum.norm() + torch.finfo(torch.float64).tiny
        image = self._sum + shift * self._probe
        core = torch.linalg.cholesky(self._probe.T @ image)
        root = torch.linalg.solve_triangular(core, image.T, upper=False).T
        return torch.linalg.svd(root, full_matrices=False).U[:, : self._count]


def principal(matrix: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triplets of a matrix: U ``[out, rank]``, S ``[rank]`` and V ``[in, rank]``.

    Up to ``EXACT`` entries on its shorter side the decomposition is exact. Beyond, it is randomised with spare columns.

    Args:
        matrix: ``[out, in]``.
        rank: number of triplets, >= 1.
        seed: seed of the randomised decomposition.
    """
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if min(matrix.shape) <= EXACT:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank].T
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(matrix.cpu(), q=min(rank + SPARE, *matrix.shape), niter=SWEEPS)
    return u[:, :rank].to(matrix), s[:rank].to(matrix), v[:, :rank].to(matrix)
