"""The DPO loss of pairs of answers."""

from torch import Tensor
from torch.nn import functional as F


def dpo_loss(
    preferred: Tensor, rejected: Tensor, reference_preferred: Tensor, reference_rejected: Tensor, beta: float
) -> Tensor:
    r"""Return :math:`-\log \sigma(\beta [\log\pi(y_w) - \log\rho(y_w) - \log\pi(y_l) + \log\rho(y_l)])` of each pair.

    If the model :math:`\pi` still equals the reference :math:`\rho`, the loss is log 2, with the gradient
    :math:`-\frac{\beta}{2} [\nabla \log\pi(y_w) - \nabla \log\pi(y_l)]`.

    Args:
        preferred: log-probability of the preferred answers :math:`y_w` under the model, in nats, ``[pairs]``.
        rejected: log-probability of the rejected answers :math:`y_l` under the model, likewise.
        reference_preferred: log-probability of the preferred answers under the reference, likewise.
        reference_rejected: log-probability of the rejected answers under the reference, likewise.
        beta: strength, per nat, > 0.
    """
    margin = (preferred - reference_preferred) - (rejected - reference_rejected)
    return -F.logsigmoid(beta * margin)
