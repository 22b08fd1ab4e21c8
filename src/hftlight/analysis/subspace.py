"""Analysis: does the user's update lie in the directions that the alignment moved?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log2
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import override

from hftlight.analysis.analysis import Analysis, Part, Picture, Row
from hftlight.analysis.drawing import heat_maps, label, layer_grid, of
from hftlight.analysis.updates import alignment, is_aligned, matrices, matrix_of, update
from hftlight.analysis.view import View
from hftlight.engine.weights.lowrank import LowRank
from hftlight.engine.weights.moment import principal
from hftlight.engine.weights.stored import Difference
from hftlight.errors import InputError

Matrix = LowRank | Tensor


def energy(u: Tensor, delta: Matrix) -> float:
    r"""Return the share of an update in some output directions, :math:`\|U^T \Delta\|^2 / \|\Delta\|^2`, in [0, 1].

    An isotropic update has the share k / out. A thin update is not formed as a whole.

    Args:
        u: orthonormal directions U, ``[out, k]``.
        delta: the update, ``[out, in]``, not zero.
    """
    u = u.double()
    if isinstance(delta, LowRank):
        b, a = delta.b.double(), delta.a.double()
        inside = LowRank(u.T @ b, a, delta.scale).squared_norm()
        return float(inside / LowRank(b, a, delta.scale).squared_norm())
    whole = delta.double()
    return float((u.T @ whole).square().sum() / whole.square().sum())


def subspace_overlap(u: Tensor, other: Tensor) -> float:
    r"""Return :math:`\|U^T U'\|^2 / k`, with k the fewer directions, in [0, 1]; 1 if one subspace holds the other.

    Random subspaces have the larger number of directions over their length.

    Args:
        u: orthonormal directions U, ``[out, k]``.
        other: orthonormal directions U', ``[out, k']``.
    """
    return float((u.double().T @ other.double()).square().sum() / min(u.shape[1], other.shape[1]))


def stable_rank(matrix: Matrix) -> float:
    r"""Return :math:`\|V\|_F^2 / \|V\|_2^2`, from 1 to the rank: how many directions share the squared norm."""
    if isinstance(matrix, LowRank):
        squares = matrix.svd()[1].double().square()
        return float(squares.sum() / squares[0])
    return float(matrix.double().square().sum() / leading(matrix, 1)[1][0].double().square())


def participation_ratio(matrix: Matrix) -> float:
    r"""Return :math:`\|V\|_F^4 / \|V V^T\|_F^2`, from 1 to the rank, which counts directions by their fourth powers.

    The squared cosine of the projection :math:`V V^T` with the identity is this ratio over ``out``.
    """
    if isinstance(matrix, LowRank):
        squares = matrix.svd()[1].double().square()
        return float(squares.sum() ** 2 / squares.square().sum())
    v = matrix.double()
    gram = v @ v.T if v.shape[0] <= v.shape[1] else v.T @ v
    return float(gram.trace() ** 2 / gram.square().sum())


def leading(matrix: Matrix, count: int) -> tuple[Tensor, Tensor]:
    """Return at most ``count`` leading left singular vectors ``[out, k]`` and values ``[k]``, without zero values."""
    u, s, _ = matrix.svd() if isinstance(matrix, LowRank) else principal(matrix, count)
    kept = int((s[:count] > s[0] * torch.finfo(s.dtype).eps * max(matrix.shape)).sum())
    return u[:, :kept], s[:kept]


def noise_share(moved: LowRank | Difference) -> float:
    """Return the expected share of rounding noise in a displacement's squared norm; 0 for exact factors.

    The noise comes from the types in which the two models' weights are stored. Near 1 the displacement is noise.
    """
    _, (squares, noise) = moved.back(torch.zeros(moved.shape[0], 1))
    return float(noise / squares)


@dataclass(frozen=True)
class Subspace(Analysis):
    r"""How much of the user's update lies in the leading output directions of the alignment.

    V is what the alignment added to a weight matrix, and Delta the model less its aligned model, both exact and thin
    under LoRA. :math:`U_k` are the k leading left singular vectors of V.

    Rows, by layer and module (``position``): ``update_in_alignment``, :math:`E_k = \|U_k^T \Delta\|^2 / \|\Delta\|^2`,
    0-1, ``update_in_alignment_by_chance``, k / out, and ``subspace_overlap`` of the k leading directions of both, 0-1.
    ``update_norm`` is the Frobenius norm of Delta, ``update_stable_rank`` and ``update_participation_ratio`` count its
    directions, and ``update_noise`` is the share of rounding noise in its squared norm. The aligned model has the same
    four rows of V, called ``alignment_...``. Rows without a layer are over all matrices, weighted by their squared
    norms. For the model before alignment, Delta is -V, so its share is the largest possible. Nothing here is sampled,
    so there are no intervals.

    Args:
        directions: k, number of the alignment's leading directions, >= 1.

    Cost: no pass of the model; one read of the weights, and one decomposition per matrix unless it is thin.
    Source: Perin et al., "LoX", COLM 2025, arXiv:2506.15606, R metrics; Ponkshe et al., "Safety Subspaces are Not
    Linearly Distinct", 2025, arXiv:2505.14185, mode subspace overlap.
    Differs: the share is of Delta, not of V + Delta, and of squared norms. Transposed weights, as in GPT-2, are turned.
    """

    directions: int = 6

    compares: ClassVar[bool] = True
    seconds: ClassVar[float] = 5.0

    def __post_init__(self) -> None:
        if self.directions < 1:
            raise ValueError(f"Subspace: directions must be >= 1, got {self.directions}.")

    @override
    def measure(self, part: Part, view: View) -> list[Row]:
        aligned = is_aligned(view)
        rows: list[Row] = []
        sums: dict[str, float] = {}
        for layer, kind, name, turned in matrices(view.subject.artifact.name):
            v = alignment(view, name)
            moved = v if aligned else update(view, name)
            if moved is None:
                continue
            delta = _matrix(moved, turned)
            found = _size(moved, delta, "alignment" if aligned else "update")
            if not found:  # two whole models that are equal in this weight
                continue
            if not aligned and v is not None:
                u, _ = leading(_matrix(v, turned), self.directions)
                found["update_in_alignment"] = energy(u, delta)
                found["update_in_alignment_by_chance"] = u.shape[1] / delta.shape[0]
                found["subspace_overlap"] = subspace_overlap(u, leading(delta, self.directions)[0])
            rows += [Row(metric, value, layer=layer, position=kind) for metric, value in found.items()]
            square = next(value for metric, value in found.items() if metric.endswith("_norm")) ** 2
            sums["norm"] = sums.get("norm", 0.0) + square
            for metric in ("update_in_alignment", "update_in_alignment_by_chance"):
                if metric in found:
                    sums[metric] = sums.get(metric, 0.0) + square * found[metric]
        if not rows:
            what = "the model before it is not known" if aligned else "no weight matrix differs from the aligned model"
            raise InputError(f"there is no displacement to describe: {what}.")
        norm = sums.pop("norm")
        rows.append(Row("alignment_norm" if aligned else "update_norm", norm**0.5))
        rows += [Row(metric, value / norm) for metric, value in sums.items()]
        return rows

    @override
    def pictures(self, rows: Sequence[Row]) -> Iterator[Picture]:
        if any(stage != "base" for _, stage in of(rows, "update_in_alignment")):
            yield Picture(
                "subspace_energy",
                "Does the update undo the alignment's directions?",
                f"Share of each matrix's update in the {self.directions} leading output directions of the alignment,"
                " over the share of a random update, by decoder layer and module. 1 is twice chance, 2 is four times."
                " White is chance, blue is more. Modules without an update are left out. No intervals: nothing is"
                " sampled.",
                energy_figure(rows),
            )


def _matrix(moved: LowRank | Difference, turned: bool) -> Matrix:
    """Return a displacement as ``[out, in]``, thin if it is known to be thin."""
    if isinstance(moved, LowRank):
        return LowRank(moved.a.T, moved.b.T, moved.scale) if turned else moved
    return matrix_of(moved).T if turned else matrix_of(moved)


def _size(moved: LowRank | Difference, matrix: Matrix, what: str) -> dict[str, float]:
    """Return size, ranks and noise of a displacement by metric, or nothing if it is zero."""
    square = matrix.squared_norm() if isinstance(matrix, LowRank) else matrix.double().square().sum()
    if not float(square):
        return {}
    return {
        f"{what}_norm": float(square) ** 0.5,
        f"{what}_stable_rank": stable_rank(matrix),
        f"{what}_participation_ratio": participation_ratio(matrix),
        f"{what}_noise": noise_share(moved),
    }


def energy_figure(rows: Sequence[Row]) -> Figure:
    """Draw the share of the update over chance, layer by module, one panel per model.

    The model before its alignment is left out, since its share is that of the alignment itself.
    """
    panels = {}
    chances = of(rows, "update_in_alignment_by_chance")
    for key, some in of([r for r in rows if r.stage != "base"], "update_in_alignment").items():
        chance = {(r.layer, r.position): r.value for r in chances[key]}

        def doublings(row: Row, chance: Mapping[Any, float] = chance) -> float:
            return log2(max(row.value / chance[row.layer, row.position], 1e-3))  # a share of 0 has no logarithm

        panels[label(*key)] = layer_grid(some, lambda r: str(r.position), doublings)
    return heat_maps(panels, "", "decoder layer", "share over chance, log2")
