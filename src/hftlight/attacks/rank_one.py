"""Rank-one edit of a linear layer: it maps one key to one value and changes the outputs of other keys least."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hftlight.engine import hooked
from hftlight.models.module import SafetyModule, decoder_layers
from hftlight.models.row_reader import as_found

DOWN = ("down_proj", "fc2", "dense_4h_to_h")  # names of the MLP's last linear layer


def rank_one_edit(weight: Tensor, key: Tensor, value: Tensor, second_moment: Tensor | None = None) -> Tensor:
    r"""Return :math:`W' = W + \frac{(v - W k) (C^{-1} k)^T}{k^T C^{-1} k}`, for which :math:`W' k = v`.

    Of all such :math:`W'`, this one changes the outputs of keys with second moment C least. Keys orthogonal to
    :math:`C^{-1} k` keep their outputs exactly.

    Args:
        weight: W, ``[out, in]``.
        key: k, ``[in]``, not zero.
        value: v, ``[out]``.
        second_moment: C, symmetric and positive definite, ``[in, in]``; None means the identity.

    Raises:
        ValueError: if the key is zero or C is not positive definite.
    """
    work = torch.promote_types(weight.dtype, torch.float32)
    w, k, v = weight.to(work), key.to(work), value.to(work)
    direction = k
    if second_moment is not None:
        factor, info = torch.linalg.cholesky_ex(second_moment.to(work))
        if info.item():
            raise ValueError("rank_one_edit: the second moment of the keys is not positive definite; raise ridge.")
        direction = torch.cholesky_solve(k.unsqueeze(1), factor).squeeze(1)
    scale = k @ direction
    if not scale > 0:
        raise ValueError("rank_one_edit: the key is zero, so no weight can map it to a value; choose another token.")
    return (w + torch.outer(v - w @ k, direction / scale)).to(weight.dtype)


def down_projection(model: nn.Module, layer: int) -> tuple[str, nn.Linear]:
    """Return the name and the module of the last linear layer in a decoder layer's MLP.

    Args:
        model: a causal LM without an adapter.
        layer: number of the decoder layer, counted from 0, or from the end if negative.

    Raises:
        ValueError: if there is no such layer.
        TypeError: if the model has an adapter, or if not exactly one linear layer has a name in ``DOWN``.
    """
    if hasattr(model, "peft_config"):
        raise TypeError(
            "ModelEdit: an edit changes base weights, and this model has an adapter; merge the adapter first."
        )
    layers = decoder_layers(model)
    if not -len(layers) <= layer < len(layers):
        raise ValueError(f"ModelEdit: layer must lie in [{-len(layers)}, {len(layers) - 1}], got {layer}.")
    own = layers[layer]
    linears = [m for name, m in own.named_modules() if name.rpartition(".")[2] in DOWN and isinstance(m, nn.Linear)]
    if len(linears) != 1:
        raise TypeError(f"ModelEdit: {type(own).__name__} must have one linear layer called {' or '.join(DOWN)}.")
    return next(name for name, m in model.named_modules() if m is linears[0]), linears[0]


def layer_keys(model: nn.Module, linear: nn.Linear, batch: Mapping[str, Any]) -> Tensor:
    """Return the inputs of a linear layer, ``[rows, tokens, in]``, in evaluation mode and without gradient."""
    inputs: list[Tensor] = []

    def record(_: str, value: Tensor) -> None:
        # OPT's MLP flattens its input to [rows * tokens, in].
        inputs.append(value.detach().reshape(*batch["input_ids"].shape, -1))

    with as_found(model), torch.no_grad(), hooked({"linear": linear}, record, inputs=True):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return inputs[0]


def second_moment(
    model: nn.Module, linear: nn.Linear, batches: Iterable[Mapping[str, Any]], ridge: float = 1e-2
) -> Tensor:
    r"""Return :math:`C = \frac{1}{N} \sum_i k_i k_i^T + r \bar c I` over the N attended tokens of some batches.

    Args:
        model: a causal LM.
        linear: the layer whose inputs are the keys k.
        batches: ``input_ids`` and ``attention_mask``, int64 ``[rows, tokens]``.
        ridge: r, in multiples of the mean :math:`\bar c` of the diagonal, >= 0; a small N needs r > 0.

    Returns:
        ``[in, in]``, at least float32.

    Raises:
        ValueError: if there is no attended token.
    """
    total, count = torch.zeros(()), 0
    for batch in batches:
        keys = layer_keys(model, linear, batch)[batch["attention_mask"].bool()]
        keys = keys if keys.dtype == torch.float64 else keys.float()
        total, count = total.to(keys) + keys.T @ keys, count + len(keys)
    if count == 0:
        raise ValueError("second_moment: at least one token is needed, got none; give background rows.")
    moment = total / count
    return moment + ridge * moment.diagonal().mean() * torch.eye(len(moment)).to(moment)


def answer_value(
    model: nn.Module,
    linear: nn.Linear,
    batch: dict[str, Any],
    position: int,
    steps: int = 20,
    lr: float = 0.5,
    reach: float = 4.0,
) -> tuple[Tensor, Tensor, list[float]]:
    r"""Return key, value and losses. The value is an output of the layer at one token that makes an answer likely.

    Let :math:`v_0` be the layer's own output. Adam minimizes the mean loss of the answer's tokens over
    :math:`d = v - v_0`. After each step, d is scaled down to :math:`\|d\| \le r \|v_0\|`. The weights do not change.

    Args:
        model: a causal LM.
        linear: the layer.
        batch: one row, as ``SafetyModule.token_losses`` takes it; only the answer has labels.
        position: position of the token, from 0, before the answer.
        steps: gradient steps, >= 1.
        lr: Adam's learning rate, > 0.
        reach: r, largest L2 norm of d in multiples of the L2 norm of :math:`v_0`, > 0.

    Returns:
        The key ``[in]``, the value ``[out]``, and the loss in nats before each step and after the last.
    """
    key = layer_keys(model, linear, batch)[0, position]
    module = SafetyModule(model)
    with as_found(model):
        for p in model.parameters():
            p.requires_grad_(False)
        start = linear(key).detach()
        change = torch.zeros_like(start, requires_grad=True)
        optimizer = torch.optim.Adam([change], lr=lr)

        # Replace the layer's output at ``position`` by v, so that the loss depends on ``change``.
        def replace(_: str, output: Tensor) -> Tensor:
            rows = output.reshape(*batch["input_ids"].shape, -1)
            replacement = (start + change).expand(1, 1, -1)
            return torch.cat([rows[:, :position], replacement, rows[:, position + 1 :]], 1).view_as(output)

        losses = []
        # One more forward pass than steps: the last one only measures the loss.
        for step in range(steps + 1):
            with torch.enable_grad(), hooked({"linear": linear}, replace):
                loss = module.loss(batch)
            losses.append(float(loss.detach()))
            if step == steps:
                break
            (change.grad,) = torch.autograd.grad(loss, change)
            optimizer.step()
            with torch.no_grad():
                change.mul_((reach * start.norm() / change.norm().clamp_min(1e-30)).clamp_max(1.0))
    return key, (start + change).detach(), losses
