"""The ridge classifier that tells harmful from ordinary prompts by hidden states, for all layers in one solve."""

import torch
from torch import Tensor

RIDGE = 1e-2  # strength of the ridge, as a fraction of the mean squared length of a state


def probe(states: Tensor, harmful: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the direction w ``[..., hidden]`` and the offset b ``[...]`` of the ridge classifier of each layer.

    The classifier is :math:`\mathrm{sign}(w^T x + b)`. With the centred states X and the labels y, +1 or -1,
    :math:`w = X^T (X X^T + n \lambda I)^{-1} y`. All layers are solved together in float64.

    Args:
        states: ``[..., n, hidden]``.
        harmful: whether each state belongs to a harmful prompt, bool ``[n]``.
    """
    states, labels = states.double(), harmful.to(states.device).double() * 2 - 1
    centre = states.mean(-2)
    x = states - centre[..., None, :]
    gram = x @ x.mT
    ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(gram.dtype).tiny)
    eye = torch.eye(x.shape[-2], dtype=gram.dtype, device=gram.device)
    dual = torch.linalg.solve(gram + ridge[..., None, None] * eye, labels.expand(x.shape[:-1])[..., None])
    w = (x.mT @ dual).squeeze(-1)
    return w, labels.mean() - (centre * w).sum(-1)
