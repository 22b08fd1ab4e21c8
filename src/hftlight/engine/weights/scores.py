"""Importance scores of weights on some data: SNIP, Wanda and ActSVD.

Scores are >= 0, and higher is more important.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hftlight.engine.step.activations import hooked
from hftlight.engine.step.order import rank_and_world
from hftlight.engine.step.vectors import local
from hftlight.engine.weights.shards import Share, share

IGNORED = -100  # label of a token that is not learned
MEANING = {"higher_is_more_important": "true"}  # metadata that a file of scores must have

Batch = Mapping[str, Any]
Loss = Callable[[Batch], Tensor]


def snip_scores(weight: Tensor, sums: Tensor) -> Tensor:
    r"""Return :math:`|W_{ij}| \sum_n |\partial \ell_n / \partial W_{ij}|`, at least float32.

    The term of example n is the first-order change of its loss when the weight is set to zero. Terms of opposite sign
    do not cancel.

    Args:
        weight: W, ``[out, in]``.
        sums: the sum of absolute gradients over examples, ``[out, in]``, from ``gradient_sums``.
    """
    return weight.to(sums).abs() * sums


def wanda_scores(weight: Tensor, squares: Tensor) -> Tensor:
    r"""Return :math:`|W_{ij}| \sqrt{m_j}`, at least float32.

    Args:
        weight: W, ``[out, in]``.
        squares: m, mean square of each input over response tokens, ``[in]``, from ``input_moments``.
    """
    return weight.to(squares).abs() * squares.sqrt()


def directions(weight: Tensor, moment: Tensor, count: int) -> Tensor:
    r"""Return the ``count`` leading left singular vectors of :math:`W X^T`, ``[out, count]``.

    They are the eigenvectors of :math:`W S W^T`, so no output of the layer is ever stored. If W has more rows than
    columns, :math:`W = Q R`, and the eigenvectors of the small matrix :math:`R S R^T` are multiplied by Q.

    Args:
        weight: W, ``[out, in]``.
        moment: S, a positive multiple of :math:`X^T X` over the inputs X, ``[in, in]``, from ``input_moments``.
        count: number of directions, >= 0; at most min(out, in) are returned.
    """
    weight, moment = weight.double(), moment.double()
    turn = None
    if weight.shape[0] > weight.shape[1]:
        turn, weight = torch.linalg.qr(weight)
    vectors = torch.linalg.eigh(weight @ moment @ weight.T).eigenvectors
    leading = vectors.flip(1)[:, :count]  # eigh sorts the eigenvalues in ascending order
    return leading if turn is None else turn @ leading


def kept(weight: Tensor, u: Tensor) -> Tensor:
    """Return ``U (U^T W)``, the part of W that writes into the orthonormal directions U, ``[out, count]``."""
    return u @ (u.T @ weight)


def removed(weight: Tensor, u: Tensor) -> Tensor:
    """Return ``W - U (U^T W)``, W without the directions U."""
    return weight - kept(weight, u)


def orthogonal_edit(weight: Tensor, safety: Tensor, utility: Tensor) -> Tensor:
    r"""Return :math:`(I - \Pi_u) \Pi_s W`, the part of W that is important to safety but not to utility.

    Args:
        weight: W, ``[out, in]``.
        safety: orthonormal directions of :math:`\Pi_s`, ``[out, keep_s]``.
        utility: orthonormal directions of :math:`\Pi_u`, ``[out, keep_u]``.
    """
    return removed(safety, utility) @ (safety.T @ weight)


def checked(scores: Tensor, name: str) -> Tensor:
    """Return the scores unchanged if they are valid.

    Raises:
        ValueError: if a score is negative or not finite.
    """
    if not bool((torch.isfinite(scores) & (scores >= 0)).all()):
        raise ValueError(
            f"Scores of {name}: they must be finite and >= 0, higher for more important weights; got values from"
            f" {float(scores.min())} to {float(scores.max())}. Recompute scores that were stored negated: their"
            " largest values belong to the least important weights."
        )
    return scores


def write_scores(path: Path, scores: Mapping[str, Tensor], **about: str) -> None:
    """Write scores by weight name into a safetensors file whose metadata states their meaning.

    Args:
        path: the file; an existing file is replaced.
        scores: >= 0 and finite.
        **about: origin of the scores, such as ``score="snip"``, ``model=...``, ``data=...``.

    Raises:
        ValueError: if a score is negative or not finite.
    """
    from safetensors.torch import save_file

    save_file({name: checked(s, name).contiguous() for name, s in scores.items()}, path, {**about, **MEANING})


def read_scores(path: Path) -> dict[str, Tensor]:
    """Read a file that ``write_scores`` wrote.

    Raises:
        ValueError: if the metadata does not state that higher is more important, or a score is negative or not finite.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        if not MEANING.items() <= (file.metadata() or {}).items():
            raise ValueError(
                f"{path}: the file does not say higher_is_more_important, so the sign of its scores is unknown. Write"
                " scores with write_scores."
            )
        return {name: checked(file.get_tensor(name), f"{name} in {path}") for name in file.keys()}  # noqa: SIM118


@contextmanager
def undisturbed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Run the block in eval mode, then restore training modes, random state and shards.

    They are restored also after an exception.
    """
    training = [m for m in module.modules() if m.training]
    devices = [] if device.type in ("cpu", "meta") else [device]
    with torch.random.fork_rng(devices=devices, device_type=devices[0].type if devices else "cuda"):
        try:
            module.eval()
            yield
        finally:
            for m in training:
                m.training = True
            for m in module.modules():
                if callable(reshard := getattr(m, "reshard", None)):  # FSDP2 leaves some weights gathered
                    reshard()


def calibration(
    batches: Iterable[Batch], samples: int, split: bool = True, spread: bool = False
) -> list[tuple[Batch, int]]:
    """Return ``samples`` rows over all ranks, as pairs of a batch and the number of its first rows that count.

    All ranks return equally many batches: a rank without a chosen row gets a row that does not count, if another rank
    has a chosen row.

    Args:
        batches: mappings of tensors and lists with one entry per row; equally many on every rank.
        samples: number of rows, >= 1; fewer are returned if the batches have fewer.
        split: whether the ranks hold different batches; their rows are then counted rank by rank.
        spread: read the batches to their end and choose random rows, the same rows every time. By default the first
            rows are chosen.

    Raises:
        ValueError: if there is no row.
    """
    numbered: list[tuple[Batch, range]] = []
    total = 0
    rank = rank_and_world()[0] if split else 0
    # Rows are numbered over all ranks: batch by batch, and within a batch rank by rank.
    for batch in batches:
        sizes = _every_rank(_size(batch), split)
        first = total + sum(sizes[:rank])
        numbered.append((batch, range(first, first + sizes[rank])))
        total += sum(sizes)
        if total >= samples and not spread:
            break
    if total == 0:
        raise ValueError("Scores need at least one row of data, got none.")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0)) if spread else torch.arange(total)
    chosen = set(order[:samples].tolist())
    chosen_rows: list[tuple[Batch, int]] = []
    for batch, numbers in numbered:
        rows = [k for k, number in enumerate(numbers) if number in chosen]
        # A batch counts on every rank as soon as one rank has a chosen row in it.
        if max(_every_rank(len(rows), split)) > 0:
            chosen_rows.append((_rows(batch, rows or [0]), len(rows)))
    return chosen_rows


def without_end(batch: Batch) -> dict[str, Any]:
    """Return a batch in which the last response token of each row, the end token, does not count.

    Its label is removed. A response of one token keeps its label; a batch without labels is returned unchanged.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() < 2:
        return dict(batch)
    response = labels != IGNORED
    place = response.cumsum(dim=1)  # numbers the response tokens of a row from 1
    last = response & (place == place[:, -1:]) & (place > 1)
    return {**batch, "labels": labels.masked_fill(last, IGNORED)}


def gradient_sums(
    loss: Loss,
    layers: Mapping[str, nn.Module],
    weights: Mapping[str, Tensor],
    data: Iterable[tuple[Batch, int]],
    split: bool = True,
) -> dict[str, Tensor]:
    r"""Return :math:`\sum_n |\partial \ell_n / \partial W|` of linear layers, one example at a time, in one sweep.

    The gradient of one example is the product of the layer's output gradient and its input. Parameters therefore need
    no ``requires_grad``, and their ``.grad`` is not touched. The loss counts response tokens; its gradient runs through
    all tokens before them, prompts included. If a weight is sharded over rows, each rank gets the sum of its own rows.

    Args:
        loss: mean loss of a batch in nats over response tokens; called in eval mode, one row at a time.
        layers: linear layers, or adapted ones, that take ``[..., in]`` and return ``[..., out]``, by any name.
        weights: their weights W, ``[out, in]``, by the same names.
        data: from ``calibration``.
        split: as for ``calibration``; the sums are added over ranks.

    Returns:
        ``[out, in]`` by name, at least float32; zero if no example reached the layer.
    """
    shares = {name: _checked_share(weights[name], split) for name in layers}
    sums = {
        name: torch.zeros_like(local(w.detach()), dtype=torch.promote_types(w.dtype, torch.float32))
        for name, w in weights.items()
    }
    sharded = any(s.group is not None for s in shares.values())
    for batch, counted in data:
        # Sharded ranks must run equally many passes; a surplus pass repeats a row with a zero gradient.
        passes = max(_every_rank(_size(batch), split)) if sharded else counted
        for k in range(passes):
            calls = _activations(loss, layers, _rows(batch, [min(k, _size(batch) - 1)]))
            for name, rows in shares.items():
                x, dy = _joined(calls[name], weights[name].shape, sums[name])
                if k >= counted:
                    dy = torch.zeros_like(dy)
                for inputs, grads in _exchanged(x, dy, rows, split):
                    sums[name] += (grads[:, rows.start : rows.stop].T @ inputs).abs_()
    if split and rank_and_world()[1] > 1:
        for name, rows in shares.items():
            if rows.group is None:
                dist.all_reduce(sums[name])
    return sums


def input_moments(
    loss: Loss,
    layers: Mapping[str, nn.Module],
    data: Iterable[tuple[Batch, int]],
    outer: bool = False,
    split: bool = True,
) -> dict[str, Tensor]:
    """Return the mean square of each layer input over response tokens, or the whole second moment.

    Only forward passes run. A response token counts at its own position (its label is not -100), not at the position
    that predicts it. The last token of the prompt therefore does not count. The end of the response counts, unless
    ``without_end`` removed its label.

    Args:
        loss: function that runs the model on a batch; its value is not used.
        layers: layers that take ``[batch, tokens, in]`` or ``[batch * tokens, in]``, by any name.
        data: from ``calibration``. In a row that counts, all response tokens count. In a batch without ``labels``, all
            tokens of such a row count.
        outer: return ``[in, in]``, the mean of ``x x^T``; layers with a common input share one tensor.
        split: whether the ranks hold different batches, so that the sums are added over ranks.

    Returns:
        ``[in]`` or ``[in, in]`` by name, at least float32.

    Raises:
        ValueError: if no row has a response token.
        RuntimeError: if a layer never ran, or an activation is not finite.
        TypeError: if the shape of a layer's input does not fit the tokens of the batch.
    """

    def total(_: str, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return wide.T @ wide if outer else wide.square().sum(dim=0)

    return _input_means(loss, layers, data, total, split)


def input_variances(
    loss: Loss, layers: Mapping[str, nn.Module], data: Iterable[tuple[Batch, int]], split: bool = True
) -> dict[str, Tensor]:
    r"""Return the variance of each layer input over response tokens, :math:`\frac1N \sum_t (x_{tj} - \bar x_j)^2`.

    Tokens, arguments and errors are those of ``input_moments``. The sums are float64, because the square of a mean is
    subtracted.

    Returns:
        ``[in]`` by name, float64.
    """

    def total(_: str, x: Tensor) -> Tensor:
        wide = x.double()
        return torch.stack([wide.sum(dim=0), wide.square().sum(dim=0)])

    means = _input_means(loss, layers, data, total, split)
    return {name: (square - mean.square()).clamp(min=0) for name, (mean, square) in means.items()}


def framed_moments(
    loss: Loss,
    layers: Mapping[str, nn.Module],
    frames: Mapping[str, Tensor],
    data: Iterable[tuple[Batch, int]],
    split: bool = True,
) -> dict[str, Tensor]:
    r"""Return the second moment of each layer's input along some directions, :math:`\frac1N \sum_t (Q x_t)(Q x_t)^T`.

    Tokens, arguments and errors are those of ``input_moments``. No ``[in, in]`` matrix is formed.

    Args:
        loss: as for ``input_moments``.
        layers: likewise.
        frames: the directions Q as rows, ``[directions, in]``, by the same names.
        data: as for ``input_moments``.
        split: likewise.

    Returns:
        ``[directions, directions]`` by name, in the type of Q.
    """

    def total(name: str, x: Tensor) -> Tensor:
        along = x.to(frames[name]) @ frames[name].T
        return along.T @ along

    return _input_means(loss, layers, data, total, split, common=False)


def _input_means(
    loss: Loss,
    layers: Mapping[str, nn.Module],
    data: Iterable[tuple[Batch, int]],
    total: Callable[[str, Tensor], Tensor],
    split: bool,
    common: bool = True,
) -> dict[str, Tensor]:
    """Return the sum of a function of each layer's inputs, divided by the number of response tokens, by name.

    Args:
        loss: as for ``input_moments``, and so are the next two, ``split`` and the errors.
        layers: the layers.
        data: the rows.
        total: returns the sum over some inputs of a layer, given its name and ``[tokens, in]``.
        split: whether the ranks hold different batches.
        common: whether layers with a common input have one sum.
    """
    sums: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    latest: list[Any] = [None, ""]  # layers with a common input, such as q, k and v, get one tensor in succession
    keep = torch.ones(0)

    def add(name: str, x: Tensor) -> None:
        if latest[0] is not x:
            latest[:] = x, name
        # Layers with a common input share the sum of the layer that received the input first.
        if owner.setdefault(name, latest[1] if common else name) != name:
            return
        if x.dim() == 2 and len(x) == keep.numel():  # OPT's MLP flattens rows and tokens into one dimension
            x = x.unflatten(0, keep.shape)
        if x.shape[: keep.dim()] != keep.shape:
            raise TypeError(
                f"{name}: the shape of a layer's input must begin with {list(keep.shape)}, the tokens of the batch, got"
                f" {list(x.shape)}."
            )
        value = total(name, x[keep].flatten(0, -2))
        sums[name] = sums[name].add_(value) if name in sums else value

    tokens = 0
    with torch.no_grad(), hooked(layers, add, inputs=True):
        for batch, counted in data:
            keep = _counting(batch, counted)
            tokens += int(keep.sum())
            loss(batch)
            latest[:] = None, ""
    silent = [name for name in layers if name not in owner]
    if silent:
        raise RuntimeError(
            f"input_moments: no input reached {silent[0]} and {len(silent) - 1} more; does the model use these layers?"
        )
    if split and rank_and_world()[1] > 1:
        tokens = sum(_every_rank(tokens, split))
        for value in sums.values():
            dist.all_reduce(value)
    if tokens == 0:
        raise ValueError("input_moments: no row has a response token, so there is no input to measure.")
    if not bool(torch.stack([s.sum() for s in sums.values()]).isfinite().all()):
        raise RuntimeError("input_moments: an activation is not finite; run the model in a wider type.")
    for value in sums.values():
        value /= tokens
    return {name: sums[owner[name]] for name in layers}


def _activations(loss: Loss, layers: Mapping[str, nn.Module], row: Batch) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Return input and output gradient of every call of each layer, for one example."""
    inputs: dict[str, Tensor] = {}
    calls: list[tuple[str, Tensor, Tensor]] = []

    def enter(name: str, x: Tensor) -> None:
        inputs[name] = x.detach()

    def leave(name: str, y: Tensor) -> Tensor:
        tapped = y if y.requires_grad else y.detach().requires_grad_()  # a frozen model builds no graph
        calls.append((name, inputs.pop(name), tapped))
        return tapped  # replaces the layer's output, so that the loss depends on it

    with torch.enable_grad(), hooked(layers, enter, inputs=True), hooked(layers, leave):
        value = loss(row)
        grads = torch.autograd.grad(value, [y for _, _, y in calls], allow_unused=True)
    by_layer: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    for (name, x, _), grad in zip(calls, grads, strict=True):
        if grad is not None:
            by_layer[name].append((x.flatten(0, -2), grad.flatten(0, -2)))
    return by_layer


def _joined(calls: Sequence[tuple[Tensor, Tensor]], shape: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inputs ``[tokens, in]`` and output gradients ``[tokens, out]`` of all calls of one layer."""
    out, inner = shape
    x, dy = [like.new_empty(0, inner)], [like.new_empty(0, out)]
    for inputs, grads in calls:
        x.append(inputs.to(like))
        dy.append(grads.to(like))
    return torch.cat(x), torch.cat(dy)


def _exchanged(x: Tensor, dy: Tensor, rows: Share, split: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and output gradients of each rank that shares the matrix.

    If the matrix is not sharded, only this rank's own are yielded.
    """
    if rows.group is None or not split:
        yield x, dy
        return
    sizes = _every_rank(len(x), split)
    # Ranks have different numbers of tokens; rows of zeros fill up the shorter ones and add nothing to a sum.
    both = x.new_zeros(max(sizes), x.shape[1] + dy.shape[1])
    both[: len(x)] = torch.cat([x, dy], dim=1)
    everyone = [torch.empty_like(both) for _ in sizes]
    dist.all_gather(everyone, both, group=rows.group)
    for theirs in everyone:
        yield theirs[:, : x.shape[1]], theirs[:, x.shape[1] :]


def _checked_share(weight: Tensor, split: bool) -> Share:
    rows = share(weight)
    if split and rows.group is not None and dist.get_world_size(rows.group) != rank_and_world()[1]:
        raise TypeError(
            f"Scores need weights that are whole on every rank or sharded over all {rank_and_world()[1]} ranks, got"
            f" {dist.get_world_size(rows.group)} shards; use one-dimensional FSDP2."
        )
    return rows


def _every_rank(number: int, split: bool) -> list[int]:
    """Return the number that each rank passes, in the order of ranks."""
    world = rank_and_world()[1] if split else 1
    if world == 1:
        return [number]
    everyone: list[Any] = [0] * world
    dist.all_gather_object(everyone, number)
    return everyone


def _size(batch: Batch) -> int:
    """Return the number of rows of a batch.

    Raises:
        TypeError: if the batch is not a mapping with a tensor of rows.
    """
    if isinstance(batch, Mapping):
        for value in (batch.get("labels"), *batch.values()):
            if isinstance(value, Tensor) and value.dim() > 0:
                return len(value)
    raise TypeError(
        f"Scores are taken one example at a time: a batch must map names to tensors of rows, got {type(batch)}."
    )


def _rows(batch: Batch, rows: list[int]) -> dict[str, Any]:
    """Return some rows of a batch."""
    size = _size(batch)
    chosen: dict[str, Any] = {}
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.dim() > 0 and len(value) == size:
            chosen[name] = value[rows]
        else:
            chosen[name] = [value[k] for k in rows] if isinstance(value, list) else value
    return chosen


def _counting(batch: Batch, counted: int) -> Tensor:
    """Return a mask of the rows ``[batch]``, or response tokens ``[batch, tokens]``, that count."""
    labels = batch.get("labels")
    size = _size(batch)
    if labels is None:
        device = next(v.device for v in batch.values() if isinstance(v, Tensor))
        return torch.arange(size, device=device) < counted
    rows = torch.arange(size, device=labels.device) < counted
    return (labels != IGNORED) & rows[:, None] if labels.dim() > 1 else rows
