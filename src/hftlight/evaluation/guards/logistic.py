"""A logistic head on fixed features, fitted to its only optimum."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from hftlight.errors import RunError

TOLERANCE = 1e-7  # largest entry of the gradient at the optimum, nats per unit of weight


@dataclass(frozen=True)
class LogisticHead:
    """A logistic regression.

    Attributes:
        weight: float64 ``[features]``.
        bias: log-odds of a row whose features are zero.
    """

    weight: Tensor
    bias: float

    def __call__(self, features: Tensor) -> Tensor:
        """Return the probability of class 1 for each row, float64 ``[rows]``.

        Args:
            features: ``[rows, features]``.
        """
        return torch.sigmoid(features.double() @ self.weight + self.bias)


def head_loss(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor, l2: float) -> Tensor:
    r"""Return the loss of a logistic head, a 0-d tensor in nats.

    With z = weight . x + bias, and the classes P (label 1) and N (label 0),

    .. math:: \frac12 \left[\frac{1}{|P|} \sum_{x \in P} \log(1 + e^{-z})
        + \frac{1}{|N|} \sum_{x \in N} \log(1 + e^{z})\right] + \frac{l_2}{2} \|w\|_2^2

    Both classes count the same, so the threshold 0.5 means the same for any number of rows. The bias is not pulled to
    zero.

    Args:
        weight: ``[features]``.
        bias: 0-d.
        features: ``[rows, features]``.
        labels: 0 or 1, ``[rows]``.
        l2: strength of the pull to zero, nats per squared unit of weight, > 0.
    """
    losses = softplus((1 - 2 * labels) * (features @ weight + bias))
    return (losses[labels == 1].mean() + losses[labels == 0].mean()) / 2 + l2 / 2 * weight.square().sum()


def fitted_head(features: Tensor, labels: Tensor, l2: float | None = None) -> LogisticHead:
    """Return the head of the lowest ``head_loss``. There is only one, and no random number decides it.

    Args:
        features: ``[rows, features]``.
        labels: 0 or 1, ``[rows]``; both must occur.
        l2: as for ``head_loss``; None is one over the number of rows, the usual prior of weight 1.

    Raises:
        ValueError: if a class has no row, or ``l2`` is not positive.
        RunError: if the fit does not reach the optimum.
    """
    x, y = features.double(), labels.double()
    if not (bool((y == 1).any()) and bool((y == 0).any())):
        raise ValueError("fitted_head: each class needs a row, got rows of one class only.")
    strength = 1 / len(y) if l2 is None else l2
    if not strength > 0:
        raise ValueError(f"fitted_head: l2 must be > 0, got {l2}; without it separable rows have no optimum.")
    entries = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [entries], max_iter=2000, tolerance_grad=TOLERANCE / 10, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = head_loss(entries[:-1], entries[-1], x, y, strength)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[arg-type]
        closure()
    steepest = float(entries.grad.abs().max()) if entries.grad is not None else float("nan")
    if not steepest <= TOLERANCE:
        raise RunError(
            f"fitted_head: the gradient must be at most {TOLERANCE:g} at the optimum, got {steepest:g}. Raise l2."
        )
    return LogisticHead(entries.detach()[:-1].clone(), float(entries.detach()[-1]))
