"""Hidden states and gradients of rows, read from a model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hftlight.data.records import Record
from hftlight.data.templates import Template
from hftlight.data.tokens import IGNORED, Example, LongRows, collate, encode, padding_id
from hftlight.engine import captured, hooked
from hftlight.engine.row_scores import sketch
from hftlight.models.module import SafetyModule, decoder_layers

Which = Literal["trainable", "last_layer", "all"]
Pooling = Literal["last", "end", "mean"]


def last_hidden(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the last layer's hidden state at each row's last attended token, ``[rows, hidden]``, at least float32.

    Logits are computed at those tokens only.

    Args:
        model: a causal LM.
        batch: ``input_ids`` and ``attention_mask``, int64 ``[rows, tokens]``.
    """
    mask = batch["attention_mask"]
    # argmax of the flipped mask is the number of masked tokens at the end of a row.
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    states: list[Tensor] = []

    def select(_: str, hidden: Tensor) -> Tensor:
        chosen = hidden[torch.arange(len(hidden), device=hidden.device), last.to(hidden.device)]
        states.append(chosen)
        return chosen

    head = model.get_output_embeddings()  # type: ignore[operator]
    with torch.no_grad(), hooked({"head": head}, select, inputs=True):
        model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False)
    return states[0] if states[0].dtype == torch.float64 else states[0].float()


def layer_states(model: nn.Module, batch: Mapping[str, Any], layers: Sequence[int], mean: bool = False) -> Tensor:
    """Return the hidden states after some decoder layers, ``[layers, rows, hidden]``, at least float32.

    Args:
        model: a causal LM.
        batch: ``input_ids``, ``attention_mask`` and ``labels``, int64 ``[rows, tokens]``.
        layers: decoder layers, counted from 1.
        mean: average over each row's labelled tokens, instead of reading its last attended token.
    """
    blocks, mask = decoder_layers(model), batch["attention_mask"]
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    weights = torch.zeros_like(mask).scatter(1, last[:, None], 1)
    if mean:
        labelled = batch["labels"] != IGNORED
        weights = torch.where(labelled.any(1, keepdim=True), labelled.long(), weights)

    def first_token(_: str, hidden: Tensor) -> Tensor:
        return hidden[:, :1]  # the logits are not needed

    head = model.get_output_embeddings()  # type: ignore[operator]
    chosen = {str(layer): blocks[layer - 1] for layer in layers}
    with torch.no_grad(), captured(chosen) as outputs, hooked({"head": head}, first_token, inputs=True):
        model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False)
    pooled = []
    for layer in layers:
        hidden = outputs[str(layer)]
        hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
        own = weights.to(hidden)
        pooled.append((own[:, None] @ hidden).squeeze(1) / own.sum(1, keepdim=True))
    return torch.stack(pooled)


def row_losses(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return each row's mean loss over its response tokens, in nats, ``[rows]``, at least float32.

    Args:
        model: a causal LM.
        batch: as for ``SafetyModule.token_losses``. Every row needs a response token.
    """
    forward = SafetyModule(model).run(model, dict(batch))
    counts = torch.bincount(forward.rows, minlength=len(batch["labels"]))
    sums = forward.token_losses.new_zeros(len(counts)).index_add(0, forward.rows, forward.token_losses)
    return sums / counts


def chosen_parameters(model: nn.Module, which: Which) -> dict[str, nn.Parameter]:
    """Return parameters by name: the trainable ones, those of the last decoder layer, or all.

    Raises:
        ValueError: if there are none, as in a model without trainable parameters.
    """
    named = dict(model.named_parameters())
    if which == "trainable":
        named = {name: p for name, p in named.items() if p.requires_grad}
    elif which == "last_layer":
        own = {id(p) for p in decoder_layers(model)[-1].parameters()}
        named = {name: p for name, p in named.items() if id(p) in own}
    floating = {name: p for name, p in named.items() if p.is_floating_point()}
    if not floating:
        raise ValueError(f"chosen_parameters: the model has no {which} parameters; choose last_layer or all.")
    return floating


def row_gradients(
    model: nn.Module, batch: Mapping[str, Any], which: Which = "last_layer", dimension: int = 0, seed: int = 0
) -> Tensor:
    """Return the gradient of each row's loss, which is the mean over its response tokens in nats.

    Gradients are computed one row after the other.

    Args:
        model: a causal LM. Its modes, ``requires_grad`` flags and gradients are unchanged afterwards.
        batch: as for ``SafetyModule.token_losses``.
        which: the parameters whose gradient is computed.
        dimension: entries of a sparse random projection of the gradient; 0 returns the gradient itself.
        seed: seed of the projection.

    Returns:
        ``[rows, entries]``, at least float32.
    """
    parameters = list(chosen_parameters(model, which).values())
    with as_found(model), torch.enable_grad():
        for p in parameters:
            p.requires_grad_(True)
        forward = SafetyModule(model).run(model, dict(batch))
        gradients = []
        for row in range(len(batch["labels"])):
            own = forward.token_losses[forward.rows == row]
            if not len(own):
                raise ValueError(f"row_gradients: row {row} of the batch has no response token; leave it out.")
            parts = torch.autograd.grad(own.mean(), parameters, retain_graph=True, materialize_grads=True)
            flat = torch.cat([g.detach().flatten() for g in parts])
            gradients.append(sketch(flat if flat.dtype == torch.float64 else flat.float(), dimension, seed))
    return torch.stack(gradients)


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Run the block with the model in evaluation mode, then restore its modes and ``requires_grad`` flags."""
    modes = {module: module.training for module in model.modules()}
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for p, flag in flags.items():
            p.requires_grad_(flag)


def first_tokens_only(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return a batch whose labels cover only the first ``count`` response tokens of each row.

    A ``count`` of 0 leaves all labels.
    """
    labels = batch["labels"]
    # The place of a response token within its row, from 1.
    place = (labels != IGNORED).cumsum(1)
    return {**batch, "labels": labels.masked_fill(place > count, IGNORED) if count else labels}


class RowReader:
    """Reader of hidden states and gradients of rows, which are encoded in batches on a model's device.

    Rows keep their order. A row that is too long is left out, or cut if ``long_rows`` says so.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        template: how a record becomes a prompt.
        system: system text of the prompts; None for no system text.
        max_tokens: longest row in tokens, >= 1.
        batch_size: rows per batch, >= 1.
        long_rows: ``"drop"`` leaves longer rows out, ``"truncate"`` cuts their end off.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        template: Template,
        system: str | None,
        max_tokens: int,
        batch_size: int,
        long_rows: LongRows = "drop",
    ) -> None:
        self.model, self.tokenizer, self.template, self.system = model, tokenizer, template, system
        self.max_tokens, self.batch_size, self.long_rows = max_tokens, batch_size, long_rows

    def states(self, rows: Sequence[Record], end: bool = False) -> tuple[Tensor, list[int]]:
        """Return the hidden state of each row's last token, and the indices of the rows that have one.

        Args:
            rows: rows with responses.
            end: read the state of the end token, as the released code does; else of the response's last token.
        """
        fitting, examples = self.encoded(rows)
        batches = self._batches(examples if end else [_without_end(e) for e in examples])
        with as_found(self.model):
            return torch.cat([last_hidden(self.model, batch) for batch in batches]), fitting

    def layer_states(
        self,
        rows: Sequence[Record],
        layers: Sequence[int],
        pooling: Pooling = "last",
        progress: Callable[[int], None] | None = None,
    ) -> tuple[Tensor, list[int]]:
        """Return the rows' states after some layers, on the CPU, and the indices of the rows that have one.

        Args:
            rows: rows with responses.
            layers: decoder layers, counted from 1.
            pooling: ``"last"`` reads the last token of the response, ``"end"`` the end token, and ``"mean"`` averages
                over the response.
            progress: called with the number of rows of each batch.
        """
        fitting, examples = self.encoded(rows)
        states = []
        with as_found(self.model):
            for batch in self._batches(examples if pooling == "end" else [_without_end(e) for e in examples]):
                states.append(layer_states(self.model, batch, layers, pooling == "mean").cpu())
                if progress is not None:
                    progress(len(batch["input_ids"]))
        return torch.cat(states, dim=1), fitting

    def gradients(
        self, rows: Sequence[Record], which: Which, dimension: int, seed: int, first_tokens: int
    ) -> tuple[Tensor, list[int]]:
        """Return each row's gradient, as ``row_gradients`` does, and the indices of the rows that have one."""
        fitting, examples = self.encoded(rows)
        batches = (first_tokens_only(batch, first_tokens) for batch in self._batches(examples))
        return torch.cat([row_gradients(self.model, batch, which, dimension, seed) for batch in batches]), fitting

    def batches(self, rows: Sequence[Record]) -> Iterator[dict[str, Any]]:
        """Yield the rows that fit, in order, as batches with labels on response tokens."""
        yield from self._batches(self.encoded(rows)[1])

    def encoded(self, rows: Sequence[Record]) -> tuple[list[int], list[Example]]:
        """Return the indices of the rows that fit, and these rows encoded."""
        rules = (self.template, self.tokenizer, self.max_tokens, self.system, self.long_rows)
        encoded = [encode(row, *rules) for row in rows]
        fitting = {i: example for i, example in enumerate(encoded) if example is not None}
        if not fitting:
            raise ValueError(f"Selection: none of {len(rows)} rows fits {self.max_tokens} tokens; raise max_tokens.")
        return list(fitting), list(fitting.values())

    def batch(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return encoded rows as one batch on the model's device."""
        device = next(self.model.parameters()).device
        batch = collate(examples, padding_id(self.tokenizer))
        return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()}

    def _batches(self, examples: Sequence[Example]) -> Iterator[dict[str, Any]]:
        for start in range(0, len(examples), self.batch_size):
            yield self.batch(examples[start : start + self.batch_size])


def _without_end(example: Example) -> Example:
    """Return an encoded row without its end token, which a cut row has lost already."""
    return example if example.cut else replace(example, input_ids=example.input_ids[:-1])
