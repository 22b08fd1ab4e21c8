"""Hidden states of prompts, layer by layer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hftlight.analysis.analysis import Row
from hftlight.evaluation.answering.inference import evaluating
from hftlight.evaluation.metrics.embedding_drift import layer_outputs
from hftlight.models.module import decoder_layers, final_norm


def last_states(model: nn.Module, prompts: Sequence[Sequence[int]], batch_size: int = 16) -> Tensor:
    """Return the output of every decoder layer at the last token of each prompt, float32 ``[layers, prompts, hidden]``.

    Args:
        model: a causal LM, or a LoRA model around one.
        prompts: token ids of each prompt, at least one.
        batch_size: prompts per batch, >= 1. It does not change the states beyond rounding.

    Cost: one forward pass per prompt, without logits.
    """
    layers = range(len(decoder_layers(model)))
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    found: Tensor | None = None
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ends = torch.tensor([len(prompts[row]) - 1 for row in rows])
            states = layer_outputs(model, [prompts[row] for row in rows], layers)
            last = torch.stack([states[layer][range(len(rows)), ends].float().cpu() for layer in layers])
            found = torch.empty(len(layers), len(prompts), last.shape[-1]) if found is None else found
            found[:, rows] = last
    assert found is not None
    return found


def lens(model: nn.Module, states: Tensor) -> Tensor:
    r"""Return the logits that hidden states would give at the model's end, float32 ``[..., vocabulary]``.

    .. math:: W_U \, \mathrm{norm}_f(h)

    Args:
        model: a causal LM, or a LoRA model around one.
        states: h, ``[..., hidden]``.

    Source: nostalgebraist, "interpreting GPT: the logit lens", 2020.
    """
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    weight = next(head.parameters())
    with evaluating(model):
        logits: Tensor = head(final_norm(model)(states.to(weight.device, weight.dtype)))
    return logits.float()


def right_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids and mask of prompts as one batch padded on the right, each int64 ``[prompts, tokens]``."""
    width = max(map(len, prompts))
    ids = [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]
    mask = [[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def mean_row(metric: str, values: Tensor, layer: int | None = None, position: str | float | None = None) -> Row:
    """Return the mean of values, one per prompt, as a row with its 95 % interval over prompts.

    Args:
        metric: its name.
        values: ``[prompts]``. NaN is left out; without any other value the row's value is NaN.
        layer: as for ``Row``.
        position: likewise.
    """
    known = values[~values.isnan()].double()
    if len(known) < 2:
        return Row(metric, float(known.mean()), layer=layer, position=position)
    mean, half = float(known.mean()), 1.96 * float(known.std()) / len(known) ** 0.5
    return Row(metric, mean, mean - half, mean + half, layer, position)
