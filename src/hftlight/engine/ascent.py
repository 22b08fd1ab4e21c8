"""Terms that raise the loss of harmful answers, with a bound or without one."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from hftlight.engine.step.vectors import Vector, norm, scaled

Form = Literal["linear", "log", "clamped", "npo", "entropy"]


@dataclass(frozen=True)
class Ascent:
    r"""A term that an optimizer lowers while the loss of harmful answers rises.

    Let :math:`\ell_t` be the next-token cross-entropy of response token t in nats, :math:`H_t` the entropy of the
    predicted distribution, m a mean over tokens, and r the mean cross-entropy of the reference. The term is

    ============ ============================================== ==========================================
    form         term                                           its derivative by m
    ============ ============================================== ==========================================
    ``linear``   :math:`-m(\ell)`                               -1, so it is not bounded below
    ``log``      :math:`-\log(1 + m(\ell))`                     :math:`-1 / (1 + m)`
    ``clamped``  :math:`-m(\min(\ell, c))`                      -1 for a token below c, else 0
    ``npo``      :math:`\frac2\beta \log(1 + e^{\beta(r - m(\ell))})` :math:`-2 \sigma(\beta (r - m))`
    ``entropy``  :math:`-m(H)`                                  -1; H is at most log V
    ============ ============================================== ==========================================

    Args:
        form: one of the names above.
        ceiling: c of ``clamped``, in nats per token, > 0. None means log V, the loss of a uniform guess.
        beta: strength of ``npo``, per nat, > 0.

    Raises:
        ValueError: if an argument is out of range.

    Source: ``log`` is RepNoise's (arXiv:2405.14577), ``npo`` that of Zhang et al. (arXiv:2404.05868), and ``entropy``
        the tamper loss of TAR (arXiv:2408.00761).
    Differs: ``npo`` compares mean nats per token of the whole micro-batch. The paper compares the summed nats of each
        answer by itself.
    """

    form: Form = "log"
    ceiling: float | None = None
    beta: float = 0.1

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise ValueError(f"Ascent: form must be one of {list(get_args(Form))}, got {self.form!r}.")
        if self.ceiling is not None and not 0 < self.ceiling < math.inf:
            raise ValueError(f"Ascent: ceiling is a loss in nats per token and must be > 0, got {self.ceiling}.")
        if not 0 < self.beta < math.inf:
            raise ValueError(f"Ascent: beta must be > 0 (per nat), got {self.beta}.")

    def per_token(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the value that rises, in nats: cross-entropy, clamped cross-entropy or entropy.

        Args:
            logits: ``[..., vocabulary]``, at least float32.
            targets: token ids, int64 ``[...]``.

        Returns:
            ``[...]``.
        """
        logs = F.log_softmax(logits, dim=-1)
        if self.form == "entropy":
            return -(logs.exp() * logs).sum(-1)
        losses = -logs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        if self.form != "clamped":
            return losses
        return losses.clamp(max=math.log(logits.shape[-1]) if self.ceiling is None else self.ceiling)

    @property
    def compares(self) -> bool:
        """Whether the term needs the reference's loss."""
        return self.form == "npo"

    def of_mean(self, mean: Tensor, reference: Tensor | None = None) -> Tensor:
        """Return the term, 0-d.

        Args:
            mean: mean of ``per_token``, 0-d, in nats.
            reference: mean cross-entropy of the same tokens under the reference, 0-d; only ``npo`` needs it.

        Raises:
            ValueError: if the form needs a reference and has none.
        """
        if self.form == "log":
            return -torch.log1p(mean)
        if self.form != "npo":
            return -mean
        if reference is None:
            raise ValueError("Ascent: form 'npo' compares with a reference; pass its mean cross-entropy.")
        return 2 / self.beta * F.softplus(self.beta * (reference - mean))

    def __call__(self, logits: Tensor, targets: Tensor, reference_nll: Tensor | None = None) -> Tensor:
        """Return the term of one micro-batch, 0-d. Arguments as for ``per_token`` and ``of_mean``."""
        return self.of_mean(self.per_token(logits, targets).mean(), reference_nll)


def bounded(ascent: Vector, alignment: Vector, fraction: float) -> Vector:
    r"""Return an ascent gradient, shortened to :math:`a \min(1, c \|g\| / \|a\|)`.

    Args:
        ascent: gradient a of the ascent term; parameter name -> tensor.
        alignment: gradient g of the alignment loss; same names.
        fraction: c, dimensionless, >= 0.
    """
    length, limit = norm(ascent), fraction * norm(alignment)
    return scaled(ascent, torch.where(length > limit, limit / length, torch.ones_like(length)))


def head_mean(
    hidden: Tensor,
    head: torch.nn.Module,
    targets: Tensor,
    per_token: Callable[[Tensor, Tensor], Tensor],
    chunk: int = 256,
) -> Tensor:
    r"""Return the mean of a per-token value of ``head(hidden)``, without holding the logits.

    Logits exist for one chunk of tokens at a time. The gradient by ``hidden`` is computed with them and held instead,
    which takes J N d numbers rather than J N V. The vocabulary projection therefore runs once forward and once back.

    Args:
        hidden: inputs of the output layer, ``[J, N, d]``; J layers, N tokens.
        head: the output layer, a linear layer, ``[..., d] -> [..., V]``. Its weights may be frozen or trained.
        targets: token ids, int64 ``[N]``, the same for each layer.
        per_token: ``(logits [n, V], targets [n]) -> [n]``, in nats.
        chunk: tokens per projection, >= 1.

    Returns:
        The mean over all J N tokens, 0-d, at least float32.
    """
    trained = [p for p in head.parameters() if p.requires_grad]
    mean: Tensor = _HeadMean.apply(hidden, head, targets, per_token, chunk, *trained)  # type: ignore[no-untyped-call]
    return mean


class _HeadMean(torch.autograd.Function):
    """``head_mean``: forward computes value and gradients, backward multiplies them by the incoming gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: torch.nn.Module,
        targets: Tensor,
        per_token: Callable[[Tensor, Tensor], Tensor],
        chunk: int,
        *trained: Tensor,
    ) -> Tensor:
        total = hidden.shape[0] * hidden.shape[1]
        wanted = ctx.needs_input_grad[0]
        slopes = torch.zeros_like(hidden) if wanted else None
        sums = [torch.zeros_like(p) for p in trained]
        value = torch.zeros((), device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32))
        # Autocast of the surrounding forward pass applies here too, so that the head computes as it does in the model.
        for layer in range(hidden.shape[0]):
            for start in range(0, hidden.shape[1], chunk):
                part = slice(start, start + chunk)
                with torch.enable_grad():
                    leaf = hidden[layer, part].detach().requires_grad_(wanted)
                    logits = head(leaf)
                    logits = logits if logits.dtype == torch.float64 else logits.float()
                    share = per_token(logits, targets[part]).sum() / total
                value += share.detach()
                sources = [*([leaf] if wanted else []), *trained]
                if not sources:
                    continue
                # A per-token value that does not depend on the logits, such as a clamped loss, has no gradient.
                grads = iter(torch.autograd.grad(share, sources, allow_unused=True) if share.requires_grad else ())
                if slopes is not None and (slope := next(grads, None)) is not None:
                    slopes[layer, part] = slope
                for total_grad, grad in zip(sums, grads, strict=False):
                    if grad is not None:
                        total_grad += grad
        ctx.save_for_backward(*([slopes] if slopes is not None else []), *sums)
        ctx.wanted = wanted
        return value

    @staticmethod
    def backward(ctx: Any, *incoming: Any) -> Any:
        saved = [t * incoming[0].to(t.dtype) for t in ctx.saved_tensors]
        return (saved.pop(0) if ctx.wanted else None), None, None, None, None, *saved
