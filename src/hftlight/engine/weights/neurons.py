"""Neurons of decoder layers: hidden units of an MLP, and channels of attention values."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hftlight.engine.step.activations import ATTENTION, hooked, modules_called
from hftlight.engine.step.order import rank_and_world
from hftlight.engine.step.vectors import local, whole
from hftlight.engine.weights.regions import Target, linear_targets
from hftlight.engine.weights.scores import (
    Batch,
    Loss,
    gradient_sums,
    input_moments,
    input_variances,
    snip_scores,
    wanda_scores,
)
from hftlight.engine.weights.shards import share

MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")  # what the MLP is called in decoder layers
READERS = ("down_proj", "fc2", "dense_4h_to_h", "w2")  # the layer of an MLP that reads the hidden units
OUTPUTS = ("o_proj", "out_proj")  # the layer of an attention that reads the heads
VALUES = ("v_proj",)  # the layer of an attention that writes the values
QUERIES, KEYS = "q_proj", "k_proj"  # the layers of an attention whose rows are no neurons


@dataclass(frozen=True)
class Neurons:
    """The neurons of one MLP or attention.

    A neuron is one row of each layer that writes it, and the columns of the layer that read it. In an MLP that is one
    column. In attention with grouped heads, each query head of a group reads every value channel of its group.

    Attributes:
        name: name of the MLP or attention.
        reader: plain name of the weight that reads the neurons, ``[out, inputs]``.
        writers: plain names of the weights that write the neurons, ``[neurons, in]``.
        owner: the neuron that each input of the reader belongs to, int64 ``[inputs]``.
        count: number of neurons.
    """

    name: str
    reader: str
    writers: tuple[str, ...]
    owner: Tensor
    count: int

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over the inputs of each neuron, ``[neurons]``, of values per input."""
        owner = self.owner.to(values.device)
        return torch.zeros(self.count, dtype=values.dtype, device=values.device).index_add(0, owner, values)


def find_neurons(model: nn.Module, layers: Iterable[nn.Module], linear: Mapping[nn.Module, str]) -> list[Neurons]:
    """Return the neurons of every decoder layer whose reader is among some linear layers.

    Args:
        model: a causal LM; its config counts heads.
        layers: the decoder layers.
        linear: plain name of the weight of each linear layer that counts.

    Raises:
        ValueError: if no decoder layer has an MLP or an attention of a known form.
    """
    names = {module: name for name, module in model.named_modules()}
    result = []
    for layer in layers:
        for kind, readers, groups in ((MLP, READERS, False), (ATTENTION, OUTPUTS, True)):
            try:
                (block,) = modules_called(layer, kind).values()
            except ValueError:
                continue
            parts = dict(block.named_children())
            reader = next((parts[n] for n in readers if n in parts), None)
            writers = [parts[n] for n in VALUES if n in parts] if groups else _writers(parts, reader)
            if reader is None or not writers or reader not in linear:
                continue
            width = _in_features(reader)
            owner = _heads(model, width, block) if groups else torch.arange(width)
            known = tuple(linear[w] for w in writers if w in linear)
            result.append(Neurons(names[block], linear[reader], known, owner, int(owner.max()) + 1))
    if not result:
        raise ValueError(
            f"no decoder layer has an MLP with one of {list(READERS)} or an attention with {list(VALUES)} and one of"
            f" {list(OUTPUTS)} among the trained linear layers."
        )
    return result


def trained_neurons(
    model: nn.Module, layers_of: Callable[[nn.Module], Any], who: str
) -> tuple[dict[str, Target], list[Neurons]]:
    """Return the trained linear layers of the decoder layers by the plain name of their weight, and their neurons.

    Args:
        model: a causal LM, with or without an adapter.
        layers_of: returns the module list of the model's decoder layers.
        who: name of the defense, for errors.

    Raises:
        TypeError: as ``linear_targets``, or if no decoder layer has neurons of a known form.
    """
    targets = linear_targets(model, layers_of, who)
    try:
        return targets, find_neurons(model, layers_of(model), {t.layer: name for name, t in targets.items()})
    except ValueError as error:
        raise TypeError(f"{who}: {error}") from error


def loose_layers(targets: Mapping[str, Target], neurons: Iterable[Neurons]) -> list[str]:
    """Return the plain names of the weights that hold no neuron's row or column, except queries and keys.

    Args:
        targets: from ``trained_neurons``, and so are the neurons.
        neurons: the neurons.
    """
    known = {name for n in neurons for name in (*n.writers, n.reader)}
    return [name for name in targets if name not in known and name.split(".")[-2] not in (QUERIES, KEYS)]


def _writers(parts: Mapping[str, nn.Module], reader: nn.Module | None) -> list[nn.Module]:
    """Return the linear layers of an MLP whose outputs are the hidden units."""
    if reader is None:
        return []
    width = _in_features(reader)
    return [m for m in parts.values() if m is not reader and getattr(_base(m), "out_features", None) == width]


def _base(layer: nn.Module) -> Any:
    """Return the linear layer under an adapter, or the layer itself."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer  # type: ignore[operator]


def _in_features(layer: nn.Module) -> int:
    return int(_base(layer).in_features)


def _heads(model: Any, width: int, attention: Any) -> Tensor:
    """Return the value channel that each input of an attention's output layer carries, int64 ``[width]``."""
    config = getattr(attention, "config", model.config)
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = width // heads
    head, channel = torch.arange(width) // size, torch.arange(width) % size
    return head // (heads // groups) * size + channel


def column_norms(targets: Mapping[str, Target], names: Iterable[str]) -> dict[str, Tensor]:
    """Return the L2 norm of each column of some weights, ``[in]``, at least float32, by name.

    Under sharding every rank must call this.
    """
    norms = {}
    for name in names:
        target = targets[name]
        values = target.values()
        squares = values.to(torch.promote_types(values.dtype, torch.float32)).square().sum(0)
        norms[name] = target.rows.sum(squares)[0].sqrt() if target.rows.group is not None else squares.sqrt()
    return norms


def agreement(
    loss: Loss,
    neurons: Iterable[Neurons],
    targets: Mapping[str, Target],
    data: Iterable[tuple[Batch, int]],
    ratio: float,
    split: bool = True,
) -> dict[str, Tensor]:
    r"""Return in which fraction of the rows each neuron is among the most important ones of its MLP or attention.

    The importance of neuron j on a row is the change of the reader's output if the neuron is set to zero,
    :math:`\sqrt{\sum_t a_{tj}^2}\, \|W_{:j}\|_2`, with the activation a at each real token t of the row. For a neuron
    with several columns the squares are summed over them.

    Args:
        loss: function that runs the model on a batch; its value is not used.
        neurons: from ``find_neurons``.
        targets: the linear layers by the plain name of their weight.
        data: rows, as ``calibration`` returns them.
        ratio: fraction of the neurons that count as most important on a row, in (0, 1]; at least one neuron counts.
        split: whether the ranks hold different rows, so that the counts are added over ranks.

    Returns:
        ``[neurons]`` by the name of the MLP or attention, each entry in [0, 1].
    """
    neurons = list(neurons)
    norms = column_norms(targets, [n.reader for n in neurons])
    counts = {n.name: torch.zeros(n.count, device=norms[n.reader].device) for n in neurons}
    by_reader, squares = {n.reader: n for n in neurons}, dict[str, Tensor]()
    mask = torch.ones(())

    def read(name: str, x: Tensor) -> None:
        x = x.unflatten(0, mask.shape) if x.dim() == 2 else x  # OPT's MLP flattens rows and tokens
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares[name] = (wide * mask.unsqueeze(-1)).square().sum(1)  # [rows, in]

    rows = 0
    with torch.no_grad(), hooked({name: targets[name].layer for name in by_reader}, read, inputs=True):
        for batch, counted in data:
            mask = batch["attention_mask"]
            loss(batch)
            rows += counted
            for name, own in by_reader.items():
                best = max(1, round(ratio * own.count))
                for row in squares[name][:counted]:
                    importance = own.total(row * norms[name].to(row).square()).sqrt()
                    counts[own.name][importance.topk(best).indices] += 1
    total = torch.tensor([float(rows)])
    if split and rank_and_world()[1] > 1:
        for count in counts.values():
            dist.all_reduce(count)
        total = total.to(next(iter(counts.values())).device)
        dist.all_reduce(total)
    return {name: count / float(total) for name, count in counts.items()}


def importance(
    score: str,
    loss: Loss,
    neurons: Iterable[Neurons],
    targets: Mapping[str, Target],
    data: Iterable[tuple[Batch, int]],
    split: bool = True,
) -> dict[str, Tensor]:
    r"""Return the importance of each neuron on some rows, from the columns that read it.

    It is the sum over the neuron's columns j of :math:`\mathrm{Var}_t(x_{tj}) \|W_{:j}\|_2^2` for the score
    ``"variance"``, else of the column's ``"snip"`` or ``"wanda"`` scores.

    Args:
        score: ``"variance"``, ``"snip"`` or ``"wanda"``.
        loss: mean loss of a batch in nats over response tokens.
        neurons: from ``find_neurons``.
        targets: the linear layers by the plain name of their weight.
        data: rows, as ``calibration`` returns them.
        split: whether the ranks hold different rows.

    Returns:
        ``[neurons]`` by the name of the MLP or attention, >= 0, at least float32.
    """
    neurons = list(neurons)
    readers = {n.reader: targets[n.reader] for n in neurons}
    layers = {name: t.layer for name, t in readers.items()}
    columns: dict[str, Tensor] = {}
    if score == "variance":
        variances, norms = input_variances(loss, layers, data, split), column_norms(targets, readers)
        columns = {name: variance * norms[name].square() for name, variance in variances.items()}
    else:
        snip = score == "snip"
        weights = {name: t.weight for name, t in readers.items()}
        statistics = (
            gradient_sums(loss, layers, weights, data, split)
            if snip
            else input_moments(loss, layers, data, split=split)
        )
        rule = snip_scores if snip else wanda_scores
        for name, target in readers.items():
            columns[name] = target.rows.sum(rule(target.values(), statistics.pop(name)).sum(0))[0]
    return {n.name: n.total(columns[n.reader]) for n in neurons}


def kept_parts(
    neurons: Neurons, chosen: Tensor, targets: Mapping[str, Target], queries: bool = False
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield the trained parameters through which the weights of chosen neurons keep their values, with masks.

    A neuron's weights are its row of each writer, with the bias, and its columns of the reader. Under LoRA, a row of
    B A keeps its value if B's row does, and if A does unless the row of B is zero. A column of B A keeps its value if
    A's column does, and if B does unless the column of A is zero. If B is zero, A's columns are set to zero here, which
    leaves the model unchanged and B free.

    Every rank must call this, outside of a block that gathers weights.

    Args:
        neurons: the neurons of one MLP or attention.
        chosen: which of them keep their weights, bool ``[neurons]``.
        targets: the linear layers by the plain name of their weight.
        queries: whether the rows of the query and key projections with the numbers of the reader's inputs and of the
            neurons count too.

    Yields:
        A parameter, and the mask of the entries that this rank holds.
    """
    if not bool(chosen.any()):
        return
    rows = [(name, chosen) for name in neurons.writers]
    columns = chosen[neurons.owner.to(chosen.device)]
    if queries:
        place = neurons.reader.rsplit(".", 2)[0]
        rows += [(f"{place}.{QUERIES}.weight", columns), (f"{place}.{KEYS}.weight", chosen)]
    for name, mask in rows:
        if name in targets:
            yield from _kept_rows(targets[name], mask)
    yield from _kept_columns(targets[neurons.reader], columns)


def _kept_rows(target: Target, mask: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield the parameters through which some rows of a weight, ``[out]``, keep their values, with masks."""
    parameter: Any = target.weight if target.update is None else target.update.b
    # Ranks may share the rows of B differently from those of W.
    rows, mine = share(parameter), mask.to(parameter.device)
    yield parameter, mine[rows.start : rows.stop, None]
    if target.update is not None and bool(whole(parameter.detach())[mine].any()):
        yield _all(target.update.a)
    bias = _base(target.layer).bias
    if bias is not None and bias.requires_grad:
        rows = share(bias)
        yield bias, mine[rows.start : rows.stop]


def _kept_columns(target: Target, mask: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield the parameters through which some columns of a weight, ``[in]``, keep their values, with masks."""
    parameter: Any = target.weight if target.update is None else target.update.a
    own, mine = local(parameter.detach()), mask.to(parameter.device)
    if target.update is not None and bool(whole(parameter.detach())[:, mine].any()):
        if bool(whole(target.update.b.detach()).any()):
            yield _all(target.update.b)
        else:
            own.masked_fill_(mine, 0)
    yield parameter, mine.expand(own.shape)


def _all(parameter: nn.Parameter) -> tuple[nn.Parameter, Tensor]:
    """Return a parameter with the mask of all its rows."""
    mine = local(parameter.detach())
    return parameter, torch.ones(len(mine), 1, dtype=torch.bool, device=mine.device)
