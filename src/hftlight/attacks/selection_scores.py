"""How near a harmless row is to harmful ones, in a model's hidden states or in its gradients."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hftlight.data.records import Record
from hftlight.data.templates import Template
from hftlight.data.tokens import IGNORED, Example, collate, encode, padding_id
from hftlight.engine import hooked
from hftlight.module import SafetyModule, decoder_layers

Which = Literal["trainable", "last_layer", "all"]


def representation_scores(candidates: Tensor, anchors: Tensor, top: int = 1) -> Tensor:
    r"""Return :math:`s_i = \frac{1}{t} \sum_{j \in T_i} \cos(x_i, a_j)`, with T_i the t anchors nearest to row i.

    Args:
        candidates: hidden states x of the harmless rows, ``[rows, hidden]``.
        anchors: hidden states a of the harmful rows, ``[anchors, hidden]``.
        top: t, anchors that are averaged over, 1 to their number.

    Raises:
        ValueError: if ``top`` is out of range.
    """
    if not 1 <= top <= len(anchors):
        raise ValueError(f"representation_scores: top must lie in [1, {len(anchors)}], the anchors, got {top}.")
    cosines = F.normalize(candidates, dim=1) @ F.normalize(anchors, dim=1).T
    return cosines.topk(top, dim=1).values.mean(1)


def gradient_scores(
    candidates: Tensor, harmful: Tensor, safe: Sequence[Tensor] = (), renormalize: bool = True
) -> Tensor:
    r"""Return :math:`s_i = \langle g_i, \bar h \rangle - \sum_k \langle g_i, \bar f_k \rangle`, g of unit length.

    A bar is the mean of gradients that are brought to unit length first. Renormalized, each bar counts by its direction
    alone, and the products are cosines. As released, anchors that agree with each other count more.

    Args:
        candidates: gradients g of the harmless rows' loss, ``[rows, entries]``; a zero gradient scores 0.
        harmful: gradients of the harmful anchors' loss, ``[anchors, entries]``.
        safe: gradients of each set of safe anchors, the same prompts with safe answers.
        renormalize: bring each mean to unit length too; the released code does not.
    """
    mean = [F.normalize(group, dim=1).mean(0) for group in (harmful, *safe)]
    if renormalize:
        mean = [F.normalize(m, dim=0) for m in mean]
    rows = F.normalize(candidates, dim=1)
    return rows @ mean[0] - sum((rows @ m for m in mean[1:]), torch.zeros_like(rows[:, 0]))


def last_hidden(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the last layer's hidden state at each row's last attended token, ``[rows, hidden]``, at least float32.

    Logits are formed at those tokens only.

    Args:
        model: a causal LM.
        batch: ``input_ids`` and ``attention_mask``, int64 ``[rows, tokens]``.
    """
    mask = batch["attention_mask"]
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    found: list[Tensor] = []

    def select(_: str, hidden: Tensor) -> Tensor:
        chosen = hidden[torch.arange(len(hidden), device=hidden.device), last.to(hidden.device)]
        found.append(chosen)
        return chosen

    head = model.get_output_embeddings()  # type: ignore[operator]
    with torch.no_grad(), hooked({"head": head}, select, inputs=True):
        model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False)
    return found[0] if found[0].dtype == torch.float64 else found[0].float()


def chosen_parameters(model: nn.Module, which: Which) -> dict[str, nn.Parameter]:
    """Return parameters by name: the trainable ones, those of the last decoder layer, or all.

    Raises:
        ValueError: if there are none, as of a model without anything to train.
    """
    named = dict(model.named_parameters())
    if which == "trainable":
        named = {name: p for name, p in named.items() if p.requires_grad}
    elif which == "last_layer":
        own = {id(p) for p in decoder_layers(model)[-1].parameters()}
        named = {name: p for name, p in named.items() if id(p) in own}
    found = {name: p for name, p in named.items() if p.is_floating_point()}
    if not found:
        raise ValueError(f"chosen_parameters: the model has no {which} parameters; choose last_layer or all.")
    return found


def sketch(flat: Tensor, dimension: int, seed: int) -> Tensor:
    r"""Return :math:`y_j = \sum_{i: b(i) = j} s(i) x_i`, with random buckets b and signs s: a sparse random projection.

    Inner products are kept in expectation, with a standard deviation of about :math:`\|x\| \|y\| / \sqrt{k}`.

    Args:
        flat: vectors x, ``[..., entries]``.
        dimension: k, entries of the result; 0 returns x.
        seed: decides b and s; vectors that are compared need the same one.
    """
    if dimension == 0:
        return flat
    generator = torch.Generator().manual_seed(seed)
    buckets = torch.randint(dimension, flat.shape[-1:], generator=generator).to(flat.device)
    signs = (2 * torch.randint(2, flat.shape[-1:], generator=generator) - 1).to(flat)
    return flat.new_zeros(*flat.shape[:-1], dimension).index_add_(-1, buckets, flat * signs)


def row_gradients(
    model: nn.Module, batch: Mapping[str, Any], which: Which = "last_layer", dimension: int = 0, seed: int = 0
) -> Tensor:
    """Return the gradient of each row's loss, the mean over its response tokens in nats, one after the other.

    Args:
        model: a causal LM; it comes back as it was, gradients included.
        batch: as ``SafetyModule.token_losses`` takes it.
        which: the parameters of which the gradient is taken.
        dimension: entries of a sparse random projection of it; 0 for the gradient itself.
        seed: decides the projection.

    Returns:
        ``[rows, entries]``, at least float32.
    """
    parameters = list(chosen_parameters(model, which).values())
    with as_found(model), torch.enable_grad():
        for p in parameters:
            p.requires_grad_(True)
        forward = SafetyModule(model).run(model, dict(batch))
        found = []
        for row in range(len(batch["labels"])):
            own = forward.token_losses[forward.rows == row]
            if not len(own):
                raise ValueError(f"row_gradients: row {row} of the batch has no response token; leave it out.")
            parts = torch.autograd.grad(own.mean(), parameters, retain_graph=True, materialize_grads=True)
            flat = torch.cat([g.detach().flatten() for g in parts])
            found.append(sketch(flat if flat.dtype == torch.float64 else flat.float(), dimension, seed))
    return torch.stack(found)


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Run the block with the model in evaluation mode; modes and what is trainable are as before afterwards."""
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
    """Return a batch whose labels stand on the first ``count`` response tokens of each row; 0 leaves all."""
    labels = batch["labels"]
    place = (labels != IGNORED).cumsum(1)
    return {**batch, "labels": labels.masked_fill(place > count, IGNORED) if count else labels}


class RowReader:
    """Rows as encoded batches on a model's device, in their order; rows that are too long are left out.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        template: how a record becomes a prompt.
        system: system text of the prompts; None for none.
        max_tokens: longest row in tokens, >= 1.
        batch_size: rows per batch, >= 1.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, template: Template, system: str | None, max_tokens: int, batch_size: int
    ) -> None:
        self.model, self.tokenizer, self.template, self.system = model, tokenizer, template, system
        self.max_tokens, self.batch_size = max_tokens, batch_size

    def states(self, rows: Sequence[Record], end: bool = False) -> tuple[Tensor, list[int]]:
        """Return the hidden state of each row's last token, and which rows have one.

        Args:
            rows: rows with responses.
            end: read the end token's state, as the released code does; else that of the response's last token.
        """

        def without_end(example: Example) -> Example:
            return replace(example, input_ids=example.input_ids[:-1])

        kept, examples = self._encoded(rows)
        batches = self._batches(examples if end else [without_end(e) for e in examples])
        with as_found(self.model):
            return torch.cat([last_hidden(self.model, batch) for batch in batches]), kept

    def gradients(
        self, rows: Sequence[Record], which: Which, dimension: int, seed: int, first_tokens: int
    ) -> tuple[Tensor, list[int]]:
        """Return each row's gradient, as ``row_gradients``, and which rows have one."""
        kept, examples = self._encoded(rows)
        batches = (first_tokens_only(batch, first_tokens) for batch in self._batches(examples))
        return torch.cat([row_gradients(self.model, batch, which, dimension, seed) for batch in batches]), kept

    def _encoded(self, rows: Sequence[Record]) -> tuple[list[int], list[Example]]:
        found = [encode(row, self.template, self.tokenizer, self.max_tokens, self.system) for row in rows]
        kept = {i: example for i, example in enumerate(found) if example is not None}
        if not kept:
            raise ValueError(f"Selection: none of {len(rows)} rows fits {self.max_tokens} tokens; raise max_tokens.")
        return list(kept), list(kept.values())

    def _batches(self, examples: Sequence[Example]) -> Iterator[dict[str, Any]]:
        device = next(self.model.parameters()).device
        for start in range(0, len(examples), self.batch_size):
            batch = collate(examples[start : start + self.batch_size], padding_id(self.tokenizer))
            yield {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()}
