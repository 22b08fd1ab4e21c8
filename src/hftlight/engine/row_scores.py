"""Scores of rows from their hidden states or gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def representation_scores(candidates: Tensor, anchors: Tensor, top: int = 1) -> Tensor:
    r"""Return :math:`s_i = \frac{1}{t} \sum_{j \in T_i} \cos(x_i, a_j)`, with T_i the t anchors nearest to row i.

    Args:
        candidates: hidden states x of the harmless rows, ``[rows, hidden]``.
        anchors: hidden states a of the harmful rows, ``[anchors, hidden]``.
        top: t, number of anchors to average over, from 1 to the number of all anchors.

    Raises:
        ValueError: if ``top`` is out of range.
    """
    if not 1 <= top <= len(anchors):
        raise ValueError(
            f"representation_scores: top must lie in [1, {len(anchors)}], the number of anchors, got {top}."
        )
    cosines = F.normalize(candidates, dim=1) @ F.normalize(anchors, dim=1).T
    return cosines.topk(top, dim=1).values.mean(1)


def gradient_scores(
    candidates: Tensor, harmful: Tensor, safe: Sequence[Tensor] = (), renormalize: bool = True
) -> Tensor:
    r"""Return :math:`s_i = \langle g_i, \bar h \rangle - \sum_k \langle g_i, \bar f_k \rangle`, g of unit length.

    A bar is the mean of gradients that are scaled to unit length first. With ``renormalize``, each bar is scaled to
    unit length too: only its direction counts, and the products are cosines. Without it, as in the released code,
    anchors that agree with each other count more.

    Args:
        candidates: gradients g of the harmless rows' loss, ``[rows, entries]``; a zero gradient scores 0.
        harmful: gradients of the harmful anchors' loss, ``[anchors, entries]``.
        safe: gradients of each set of safe anchors. Safe anchors are the same prompts with safe answers.
        renormalize: scale each mean to unit length too; the released code does not.
    """
    mean = [F.normalize(group, dim=1).mean(0) for group in (harmful, *safe)]
    if renormalize:
        mean = [F.normalize(m, dim=0) for m in mean]
    rows = F.normalize(candidates, dim=1)
    return rows @ mean[0] - sum((rows @ m for m in mean[1:]), torch.zeros_like(rows[:, 0]))


def sketch(flat: Tensor, dimension: int, seed: int) -> Tensor:
    r"""Return :math:`y_j = \sum_{i: b(i) = j} s(i) x_i`, a sparse random projection.

    b are random buckets and s random signs.

    Inner products are preserved in expectation, with a standard deviation of about :math:`\|x\| \|y\| / \sqrt{k}`.

    Args:
        flat: vectors x, ``[..., entries]``.
        dimension: k, number of entries of the result; 0 returns x unchanged.
        seed: seed of b and s; vectors that are compared need the same seed.
    """
    if dimension == 0:
        return flat
    generator = torch.Generator().manual_seed(seed)
    buckets = torch.randint(dimension, flat.shape[-1:], generator=generator).to(flat.device)
    signs = (2 * torch.randint(2, flat.shape[-1:], generator=generator) - 1).to(flat)
    return flat.new_zeros(*flat.shape[:-1], dimension).index_add_(-1, buckets, flat * signs)
