"""The divergence of two predictions, with its gradient in closed form."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ENTRIES = 1 << 23  # entries of a softmax in memory at one time


def divergence(logits: Tensor, reference: Tensor, direction: str = "forward") -> Tensor:
    r"""Return the sum over rows of :math:`\mathrm{KL}(q \| p)`, or of :math:`\mathrm{KL}(p \| q)`, in nats.

    The gradient of the first with respect to the logits of p is :math:`p - q`. That of the second is
    :math:`p_v (g_v - \sum_u p_u g_u)` with :math:`g = \log p - \log q`. Neither direction stores a softmax. It is
    computed for some rows at a time, and recomputed in the backward pass.

    Args:
        logits: logits of p, the model that trains, ``[rows, outcomes]``.
        reference: logits of q, the aligned model, likewise; gets no gradient.
        direction: ``"forward"`` for KL(q || p), ``"reverse"`` for KL(p || q).

    Returns:
        A 0-d tensor.
    """
    total: Tensor = _Divergence.apply(logits, reference, direction == "forward")
    return total


class _Divergence(torch.autograd.Function):
    """``divergence`` with its gradient in closed form."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference: Tensor, forward: bool) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(logits, reference)
        ctx.is_forward = forward
        total = logits.new_zeros(())
        for p, q in _some_rows(logits, reference):
            log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
            first, second = (log_q, log_p) if forward else (log_p, log_q)
            total += (first.exp() * (first - second)).sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        logits, reference = ctx.saved_tensors
        grad = torch.empty_like(logits)
        # part is a view of the same rows of grad, so that out=part writes the gradient in place.
        for p, q, part in _some_rows(logits, reference, grad):
            if ctx.is_forward:
                torch.sub(p.softmax(-1), q.softmax(-1), out=part)
            else:
                log_p = p.log_softmax(-1)
                probability, gap = log_p.exp(), log_p - q.log_softmax(-1)
                torch.mul(probability, gap - (probability * gap).sum(-1, keepdim=True), out=part)
        return grad.mul_(slope), None, None


def _some_rows(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views of the same rows of matrices of one shape, of at most ``ENTRIES`` entries or one row each."""
    rows = max(1, ENTRIES // matrices[0].shape[1])
    return zip(*(m.split(rows) for m in matrices), strict=True)
