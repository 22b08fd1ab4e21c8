"""Perplexity of a model on clean text or on answers: exp of the mean loss per token."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hftlight.data.tokens import IGNORED
from hftlight.engine.step.activations import hooked
from hftlight.errors import InputError
from hftlight.evaluation.answering.inference import evaluating
from hftlight.models.load import positions_of

SHORTEST_WINDOW, LONGEST_WINDOW, STRIDE = 512, 2048, 512


@dataclass(frozen=True)
class Perplexity:
    """The loss of a model on a text.

    Attributes:
        nats: sum of the next-token cross-entropy over the scored tokens, in nats.
        tokens: number of scored tokens.
        window: longest context including the token itself, in tokens. 0 means that each text was scored whole.
        stride: tokens by which the window moves on. 0 means that each text was scored whole.
    """

    nats: float
    tokens: int
    window: int = 0
    stride: int = 0

    @property
    def value(self) -> float:
        """The perplexity, exp(nats / tokens), >= 1. It is infinite if it overflows a float."""
        mean = self.nats / self.tokens
        return math.exp(mean) if mean < 709 else math.inf


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
) -> Perplexity:
    r"""Return the perplexity of a causal LM on one text, read through a window that moves on by ``stride`` tokens.

    With the tokens x_1 ... x_n of the text and c_i the position of the first token of the first window that holds x_i,

    .. math:: \exp\Big(-\frac{1}{n - 1} \sum_{i=2}^n \log p(x_i \mid x_{c_i}, \dots, x_{i-1})\Big)

    Each token is scored once. From the second window on, each scored token has at least ``window - stride`` tokens
    before it. The first token of the text has no context and is not scored, whether it is the beginning-of-sequence
    token or a word. Losses are computed in at least float32 and summed in float64. The sum therefore does not round
    differently with the batch size.

    Numbers of different tokenizers, windows or strides are different metrics.

    Args:
        model: a causal LM, or a LoRA model around one. Its mode is restored afterwards.
        tokenizer: the model's tokenizer. A beginning-of-sequence token that it adds counts as the first token.
        text: the text. For the rows of a set, pass ``"\n\n".join(rows)``.
        window: tokens that the model sees at once, >= 512. By default the model's positions, at most 2048.
        stride: tokens by which the window moves on, >= 1 and < ``window``. By default 512, at most half a window.
        batch_size: windows per batch, >= 1.

    Raises:
        ValueError: if a number is out of range.
        InputError: if the model has too few positions or the text fewer than two tokens.

    Source: the strided evaluation of Hugging Face's perplexity guide; reference window 2048 with stride 512.
    Differs: a window's weight is its number of scored tokens, not its length.
    """
    ids = tokenizer(text, verbose=False)["input_ids"]
    limit = positions_of(model.config)
    if window is None:
        window = min(limit or LONGEST_WINDOW, LONGEST_WINDOW)
    if stride is None:
        stride = min(STRIDE, window // 2)
    _check(window, stride, batch_size, limit, len(ids))
    nats, tokens = 0.0, 0
    with evaluating(model):
        for batch in _batches(ids, window, stride, batch_size):
            losses = _token_losses(model, *(t.to(next(model.parameters()).device) for t in batch))
            nats, tokens = nats + float(losses.double().sum()), tokens + len(losses)
    return Perplexity(nats, tokens, window, stride)


def response_perplexity(
    model: nn.Module, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, batch_size: int = 8
) -> Perplexity:
    """Return the perplexity of answers after their prompts.

    Under the untouched base model, collapsed answers have a high perplexity. The mean is over the tokens of all answers
    together. Answers without a token are not scored, so count them separately. Arguments and errors are those of
    ``response_losses``.
    """
    losses = response_losses(model, prompts, responses, batch_size=batch_size)
    return Perplexity(sum(nats for nats, _ in losses), sum(tokens for _, tokens in losses))


def response_losses(
    model: nn.Module, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, batch_size: int = 8
) -> list[tuple[float, int]]:
    """Return for each answer after its prompt the loss in nats and the number of scored tokens.

    An answer without a token has (0, 0).

    Args:
        model: a causal LM. Its mode is restored afterwards.
        prompts: token ids of each prompt, template included, at least one.
        responses: token ids of each answer.
        batch_size: answers per batch, >= 1.

    Raises:
        ValueError: if a prompt is empty, prompts and responses differ in length, or no answer has a token. Also if
            ``batch_size`` is below 1.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"response_losses: each prompt needs its response, got {len(prompts)} and {len(responses)}.")
    if batch_size < 1:
        raise ValueError(f"response_losses: batch_size must be >= 1, got {batch_size}.")
    if not all(prompts):
        raise ValueError("response_losses: a prompt needs at least one token.")
    pairs = [(list(p), list(r)) for p, r in zip(prompts, responses, strict=True)]
    longest_first = sorted((i for i, (_, r) in enumerate(pairs) if r), key=lambda i: -sum(map(len, pairs[i])))
    if not longest_first:
        raise ValueError(f"response_losses: none of the {len(responses)} answers has a token to score.")
    scored = [(0.0, 0)] * len(pairs)
    with evaluating(model):
        for start in range(0, len(longest_first), batch_size):
            places = longest_first[start : start + batch_size]
            some = [pairs[i] for i in places]
            # The first pair is the longest. Rows are padded on the right, and only answer tokens have a label.
            width = len(some[0][0] + some[0][1])
            ids = torch.tensor([p + r + [0] * (width - len(p + r)) for p, r in some])
            labels = torch.tensor([[IGNORED] * len(p) + r + [IGNORED] * (width - len(p + r)) for p, r in some])
            mask = torch.tensor([[1] * len(p + r) + [0] * (width - len(p + r)) for p, r in some])
            device = next(model.parameters()).device
            losses = _token_losses(model, ids.to(device), labels.to(device), mask.to(device))
            # losses is flat over the batch, so it is split by the length of each answer.
            for i, row in zip(places, losses.double().split([len(r) for _, r in some]), strict=True):
                scored[i] = float(row.sum()), len(row)
    return scored


def _check(window: int, stride: int, batch_size: int, limit: int | None, tokens: int) -> None:
    if limit and limit < SHORTEST_WINDOW:
        raise InputError(
            f"perplexity: a window of at least {SHORTEST_WINDOW} tokens is needed, this model has {limit} positions."
            " A shorter window scores most tokens with little context. Use another model."
        )
    if window < SHORTEST_WINDOW or (limit and window > limit):
        most = f" and at most {limit}, the model's positions" if limit else ""
        raise ValueError(
            f"perplexity: window must be >= {SHORTEST_WINDOW} tokens{most}, got {window}. A short window scores most"
            " tokens with little context. Leave window out to take the model's positions."
        )
    if not 1 <= stride < window:
        raise ValueError(
            f"perplexity: stride must lie in [1, {window - 1}] tokens, less than the window, got {stride}. Otherwise"
            " the first token of each window has no context."
        )
    if batch_size < 1:
        raise ValueError(f"perplexity: batch_size must be >= 1, got {batch_size}.")
    if tokens < 2:
        raise InputError(f"perplexity: the text needs at least 2 tokens, got {tokens}.")


def _windows(count: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield each window of a text of ``count`` tokens as (start, end, first position that is not scored yet)."""
    scored = 1
    for start in range(0, count, stride):
        end = min(start + window, count)
        yield start, end, scored
        if end == count:
            return
        scored = end


def _batches(ids: Sequence[int], window: int, stride: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield token ids and labels, int64 ``[windows, tokens]``. The windows of a batch have the same length."""
    for _, group in groupby(_windows(len(ids), window, stride), key=lambda w: w[1] - w[0]):
        rows = list(group)
        for first in range(0, len(rows), size):
            some = rows[first : first + size]
            inputs = torch.tensor([list(ids[start:end]) for start, end, _ in some])
            labels = [[IGNORED] * (scored - start) + list(ids[scored:end]) for start, end, scored in some]
            yield inputs, torch.tensor(labels)


def _token_losses(model: nn.Module, ids: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of every labelled token in nats, ``[labelled tokens]``, at least float32.

    Only scored positions get logits: a hook selects their hidden states before the output layer.
    """
    # Position t predicts token t + 1, so the labels are shifted by one to the left.
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    chosen = (targets != IGNORED).nonzero().squeeze(1)

    def select(_: str, hidden: Tensor) -> Tensor:
        return hidden.flatten(0, 1)[chosen]

    head = model.get_output_embeddings()  # type: ignore[operator]
    with hooked({"head": head}, select, inputs=True):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets[chosen], reduction="none")
