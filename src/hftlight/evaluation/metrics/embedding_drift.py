"""Embedding drift: distance of a model's hidden states from a reference model's on the same prompts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hftlight.engine.step.activations import captured, hooked
from hftlight.errors import InputError
from hftlight.evaluation.answering.inference import evaluating
from hftlight.models.module import decoder_layers

Positions = Literal["last", "mean"]
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")  # PEFT initializations that do not change the base weights


@dataclass(frozen=True)
class Drift:
    """Drift of the output of one decoder layer.

    Attributes:
        layer: number of the decoder layer, from 0.
        cosine: mean cosine distance, dimensionless, 0-2. The length of the states does not affect it.
        l2: mean L2 distance per token.
        count: number of prompts behind the means.
    """

    layer: int
    cosine: float
    l2: float
    count: int


def distances(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the cosine distance and the L2 distance of paired vectors, float64 ``[...]`` each.

    .. math:: 1 - \cos(a, b) = \tfrac12 \big\| a / \|a\|_2 - b / \|b\|_2 \big\|_2^2, \qquad \|a - b\|_2

    The right side of the first formula is computed. It is exactly 0 for equal vectors and has no cancellation for close
    ones. The direction of the zero vector is the zero vector.

    Args:
        left: a, ``[..., hidden]``.
        right: b, of the same shape.
    """
    a, b = left.double(), right.double()
    directions = [v / v.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny) for v in (a, b)]
    return (directions[0] - directions[1]).square().sum(-1) / 2, (a - b).norm(dim=-1)


def embedding_drift(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    reference: nn.Module | None = None,
    *,
    layers: Sequence[int] | None = None,
    positions: Positions = "last",
    batch_size: int = 16,
) -> list[Drift]:
    r"""Return the drift of a model against a reference at the outputs of chosen decoder layers.

    At token t of prompt x, layer l of the two models outputs h_l(x)_t and h'_l(x)_t. With d one of ``distances``, N the
    number of prompts and T(x) the chosen tokens of x, the drift is

    .. math:: \frac{1}{N} \sum_x \frac{1}{|T(x)|} \sum_{t \in T(x)} d\big(h_l(x)_t, h'_l(x)_t\big)

    All prompts have the same weight, whatever their length. In many models the first token's state is an outlier of
    great length, which dominates the L2 distance of ``"mean"``.

    Args:
        model: a causal LM, or a LoRA model around one.
        prompts: token ids of each prompt, template and BOS included, at least one. Both models get the same ids.
        reference: the model to compare with. None takes ``model`` with its adapter switched off, if that is exact.
        layers: numbers of decoder layers, from 0. Negative ones count from the last. None takes all.
        positions: ``"last"`` takes the last prompt token, ``"mean"`` every prompt token.
        batch_size: prompts per batch, >= 1.

    Raises:
        ValueError: if an argument is out of range or a prompt is empty.
        InputError: if there is no reference and switching the adapter off does not give one. Also if the two models
            differ in their number of layers or hidden size.

    Cost: two forward passes per prompt, without logits.
    Source: Huang et al., "Vaccine", NeurIPS 2024, arXiv:2402.01109, the embedding drift of its motivation (L2).
    Differs: the cosine distance is added, the chosen tokens are an argument, and distances are computed in float64.
    """
    chosen = _check(model, prompts, layers, positions, batch_size)
    if reference is not None and (shape := _shape(reference)) != _shape(model):
        raise InputError(
            f"embedding_drift: both models need the same layers, got (layers, hidden) {_shape(model)} and {shape}. Pass"
            " a reference of the same architecture."
        )
    sums = torch.zeros(len(chosen), 2, dtype=torch.float64)
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    with evaluating(*filter(None, (model, reference))):
        for start in range(0, len(order), batch_size):
            rows = [prompts[row] for row in order[start : start + batch_size]]
            weights = _weights(rows, positions)
            here = layer_outputs(model, rows, chosen)
            with adapter_off(model) if reference is None else nullcontext():
                there = layer_outputs(model if reference is None else reference, rows, chosen)
            for place, layer in enumerate(chosen):
                for kind, d in enumerate(distances(here[layer], there[layer].to(here[layer].device))):
                    sums[place, kind] += (d.cpu() * weights).sum()
    means: list[list[float]] = (sums / len(prompts)).tolist()
    return [Drift(layer, cosine, l2, len(prompts)) for layer, (cosine, l2) in zip(chosen, means, strict=True)]


def _check(
    model: nn.Module, prompts: Sequence[Sequence[int]], layers: Sequence[int] | None, positions: str, batch_size: int
) -> list[int]:
    """Return the chosen layers, counted from 0, after checking the arguments."""
    count = len(decoder_layers(model))
    chosen = list(range(count)) if layers is None else [layer + count if layer < 0 else layer for layer in layers]
    if not chosen or not all(0 <= layer < count for layer in chosen):
        raise ValueError(f"embedding_drift: layers must lie in [{-count}, {count - 1}], at least one, got {layers}.")
    if positions not in ("last", "mean"):
        raise ValueError(f"embedding_drift: positions must be 'last' or 'mean', got {positions!r}.")
    if batch_size < 1:
        raise ValueError(f"embedding_drift: batch_size must be >= 1, got {batch_size}.")
    if not prompts or not all(prompts):
        raise ValueError("embedding_drift: at least one prompt is needed, and each needs at least one token.")
    return chosen


def _shape(model: nn.Module) -> tuple[int, int]:
    return len(decoder_layers(model)), model.config.hidden_size  # type: ignore[union-attr, return-value]


def _weights(rows: Sequence[Sequence[int]], positions: Positions) -> Tensor:
    """Return the weight of every token, float64 ``[batch, tokens]``. Each row sums to 1, and padding has weight 0."""
    weights = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.float64)
    for row, ids in enumerate(rows):
        if positions == "last":
            weights[row, len(ids) - 1] = 1.0
        else:
            weights[row, : len(ids)] = 1.0 / len(ids)
    return weights


def layer_outputs(model: nn.Module, rows: Sequence[Sequence[int]], layers: Sequence[int]) -> dict[Any, Tensor]:
    """Return the outputs of some decoder layers by number, each ``[batch, tokens, hidden]``, padded on the right."""
    every: Any = decoder_layers(model)
    return outputs_of(model, rows, {layer: every[layer] for layer in layers})


def outputs_of(model: nn.Module, rows: Sequence[Sequence[int]], taps: Mapping[Any, nn.Module]) -> dict[Any, Tensor]:
    """Return the outputs of some modules of a model, each ``[batch, tokens, hidden]``, padded on the right.

    Args:
        model: a causal LM, or a LoRA model around one.
        rows: token ids of each prompt.
        taps: the modules, by any key.
    """
    width, device = max(map(len, rows)), next(model.parameters()).device
    ids = torch.tensor([list(row) + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    head = {"head": model.get_output_embeddings()}  # type: ignore[operator]
    # The hook passes only the last position to the output layer, since nobody reads the logits.
    with captured(taps) as states, hooked(head, lambda _, hidden: hidden[:, -1:], inputs=True):
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return dict(states)


@contextmanager
def adapter_off(model: Any, who: str = "embedding_drift") -> Iterator[None]:
    """Run the block with the adapter switched off, which must give exactly the adapter's base model.

    Args:
        model: a causal LM with an adapter.
        who: the caller, for the message.

    Raises:
        InputError: if it does not. The message gives the reason.
    """
    if reason := _not_exact(model):
        raise InputError(
            f"{who}: {reason}, so switching the adapter off does not give the base model. Pass reference=."
        )
    with model.disable_adapter():
        yield


def _not_exact(model: Any) -> str:
    """Return why switching the adapter off does not give the base model, or an empty text if it does."""
    if not hasattr(model, "peft_config"):
        return "the model has no adapter"
    for name, settings in model.peft_config.items():
        if getattr(settings, "is_prompt_learning", False):
            return f"adapter {name!r} adds tokens to the prompt"
        if getattr(settings, "bias", "none") != "none":
            return f"adapter {name!r} trains biases of the base (bias={settings.bias!r})"
        if getattr(settings, "init_lora_weights", True) not in KEEPS_BASE:
            return f"adapter {name!r} changed the base weights at initialization ({settings.init_lora_weights!r})"
    if any(getattr(module, "merged", False) for module in model.modules()):
        return "an adapter is merged into the base"
    owned = ("lora_", "modules_to_save", *(f".{name}." for name in model.peft_config))
    trained = [n for n, p in model.named_parameters() if p.requires_grad and not any(part in n for part in owned)]
    return f"the base itself is trained ({trained[0]})" if trained else ""
