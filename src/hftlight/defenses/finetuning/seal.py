"""SEAL: learn a weight for each row of an upload, and drop the rows of the lowest weights."""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from hftlight.config import ALL_LINEAR, Lora
from hftlight.data.records import Record
from hftlight.data.templates import Template
from hftlight.data.tokens import Example
from hftlight.engine import Vector, hooked, trainable
from hftlight.engine.step.simulation import InnerAdamW
from hftlight.errors import InputError
from hftlight.models.adapters import adapter_seed, check_targets, scratch_adapter
from hftlight.models.row_filter import RowFilter, check_fraction
from hftlight.models.row_reader import RowReader, as_found, row_losses

Kind = Literal["softmax", "sigmoid"]
Losses = Callable[[Sequence[int]], Tensor]  # numbers of rows -> their losses in nats, ``[rows]``
BETAS = (0.9, 0.95)  # of both optimizers
LONGEST_GRADIENT = 10.0  # L2 norm to which the logits' gradient is clipped
START: Mapping[str, float] = {"softmax": 0.1, "sigmoid": -1e-4}  # all logits at the start


def row_weights(logits: Tensor, kind: Kind = "softmax") -> Tensor:
    r"""Return the weight of each of N rows: :math:`p = N \mathrm{softmax}(\omega)`, or :math:`2\,\sigma(\omega)`.

    Softmax weights have the mean 1.
    """
    return len(logits) * logits.softmax(0) if kind == "softmax" else 2 * logits.sigmoid()


def weighted_loss(logits: Tensor, rows: Sequence[int], losses: Tensor, kind: Kind = "softmax") -> Tensor:
    r"""Return :math:`\frac{1}{|B|} \sum_{i \in B} p_i(\omega) \ell_i`, 0-d.

    With softmax weights its gradient is
    :math:`\partial_j = \frac{p_j}{|B|} ( \ell_j [j \in B] - \frac1N \sum_{i \in B} p_i \ell_i )`. A row outside of the
    batch therefore rises.

    Args:
        logits: omega, ``[N]``.
        rows: numbers of the batch's rows, B.
        losses: their losses, ``[B]``.
        kind: how logits become weights.
    """
    return (row_weights(logits, kind)[list(rows)] * losses).mean()


@dataclass(frozen=True)
class Loop:
    """Settings of ``learned_logits``, as the defense's arguments of the same names describe them.

    Attributes:
        u: weight of the safe loss in the first epoch.
        decay: what the weight loses with each epoch.
        epochs: passes over the longer of the two sets.
        lr: learning rate of the model.
        selector_lr: learning rate of the logits.
        batch_size: rows of each set per step.
        weights: how logits become weights.
        seed: seed of both orders.
    """

    u: float = 1.0
    decay: float = 0.03
    epochs: int = 3
    lr: float = 1e-5
    selector_lr: float = 5e-3
    batch_size: int = 64
    weights: Kind = "softmax"
    seed: int = 0


def learned_logits(
    parameters: Mapping[str, nn.Parameter],
    safe: Losses,
    task: Losses,
    sizes: tuple[int, int],
    loop: Loop,
    chunk: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    r"""Return the logits omega of the task's rows after the single loop, in float32 ``[task rows]``.

    Each step takes a batch A of safe rows and a batch B of task rows, and updates with AdamW first the model, then the
    logits:

    .. math:: \theta: u \frac{1}{|A|} \sum_{i \in A} \ell_i + (1 - u) \frac{1}{|B|} \sum_{i \in B} p_i \ell_i, \qquad
              \omega: \frac{1}{|B|} \sum_{i \in B} p_i(\omega) \ell_i

    The losses of B are those before the model's update. The shorter set is repeated.

    Args:
        parameters: theta by name, updated in place.
        safe: losses of safe rows by their numbers.
        task: losses of the task's rows by their numbers.
        sizes: number of safe rows and of task rows.
        loop: settings.
        chunk: rows per pass, >= 1.
        progress: called with the number of steps' rows done so far.
    """
    omega = nn.Parameter(torch.full((sizes[1],), START[loop.weights]))
    model = InnerAdamW(parameters, loop.lr, BETAS, weight_decay=0.0)
    selector = InnerAdamW({"omega": omega}, loop.selector_lr, BETAS, weight_decay=0.0)
    orders = [cycled(size, f"{loop.seed}/seal/{name}") for name, size in zip(("alignment", "task"), sizes, strict=True)]
    for step in range(loop.epochs * steps_per_epoch(sizes, loop.batch_size)):
        u = max(0.0, loop.u - loop.decay * (step // steps_per_epoch(sizes, loop.batch_size)))
        ours, theirs = (list(itertools.islice(order, loop.batch_size)) for order in orders)
        p = row_weights(omega.detach(), loop.weights)
        gradient = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        for rows in _chunks(ours, chunk) if u > 0 else ():
            _add(gradient, parameters, u / len(ours) * safe(rows).sum())
        losses = []
        for rows in _chunks(theirs, chunk):
            own = task(rows)
            losses.append(own.detach())
            if u < 1:
                _add(gradient, parameters, (1 - u) / len(theirs) * (p[rows].to(own) * own).sum())
        model.step(gradient)
        value = weighted_loss(omega, theirs, torch.cat(losses).to(omega), loop.weights)
        (slope,) = torch.autograd.grad(value, [omega])
        selector.step({"omega": slope * min(1.0, LONGEST_GRADIENT / max(float(slope.norm()), 1e-12))})
        if progress is not None:
            progress((step + 1) * loop.batch_size)
    return omega.detach()


def steps_per_epoch(sizes: tuple[int, int], batch_size: int) -> int:
    """Return the steps in which the larger set is seen once."""
    return -(-max(sizes) // batch_size)


def cycled(count: int, seed: str) -> Iterator[int]:
    """Yield the numbers below ``count`` without end, shuffled anew in each pass."""
    for number in itertools.count():
        rows = list(range(count))
        random.Random(f"{seed}/{number}").shuffle(rows)
        yield from rows


def _chunks(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _add(total: Vector, parameters: Mapping[str, nn.Parameter], loss: Tensor) -> None:
    """Add the gradient of a loss to ``total`` in place."""
    if parameters:
        grads = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        torch._foreach_add_(list(total.values()), grads)


def one_step_scores(
    model: nn.Module,
    safe: Losses,
    task: Losses,
    sizes: tuple[int, int],
    chunk: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    r"""Return :math:`\langle g_\mathrm{safe}, g_i \rangle` for each row i of the task, ``[task rows]``.

    g_safe is the gradient of the mean safe loss with respect to the factors B of a new adapter, and g_i that of row i's
    loss. The weight of row i in one step of gradient descent changes the safe loss by -lr times this product. As B is
    zero, the gradient with respect to A is zero too.

    All products of a batch come from one backward pass. B is set to g_safe, and the adapter's output of row i is
    multiplied by a number c_i. At c = 0, the derivative of row i's loss with respect to c_i is the product.

    Args:
        model: a causal LM whose trainable parameters are those of a new adapter. Its B changes.
        safe: losses of safe rows by their numbers.
        task: losses of the task's rows by their numbers.
        sizes: number of safe rows and of task rows.
        chunk: rows per pass, >= 1.
        progress: called with the number of rows done so far.
    """
    factors = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora_B" in n}
    gradient = {name: torch.zeros_like(p) for name, p in factors.items()}
    for rows in _chunks(range(sizes[0]), chunk):
        _add(gradient, factors, safe(rows).sum() / sizes[0])
        if progress is not None:
            progress(rows[-1] + 1)
    with torch.no_grad():
        for name, p in factors.items():
            p.copy_(gradient[name])
    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in factors}
    scores = []
    for rows in _chunks(range(sizes[1]), chunk):
        gate = torch.zeros(len(rows), device=next(iter(factors.values())).device, requires_grad=True)

        def gated(_: str, output: Tensor, gate: Tensor = gate) -> Tensor:
            return output * gate.to(output)[:, None, None]

        with hooked(layers, gated):
            scores.append(torch.autograd.grad(task(rows).sum(), [gate])[0])
        if progress is not None:
            progress(sizes[0] + rows[-1] + 1)
    return torch.cat(scores)


class SEAL(RowFilter):
    r"""Learn a weight for each row of the upload, and drop the rows of the lowest weights.

    A scratch adapter is trained on safe rows and on weighted rows of the upload. The weights are
    :math:`p = N \mathrm{softmax}(\omega)` with one logit per row. Each step updates theta, then omega, with AdamW:

    .. math:: \theta: u L_\mathrm{safe} + (1 - u) \frac{1}{|B|} \sum_{i \in B} p_i \ell_i, \qquad
              \omega: \frac{1}{|B|} \sum_{i \in B} p_i(\omega) \ell_i

    L_safe and the losses :math:`\ell_i` are means over rows, and over response tokens within a row, in nats. The weight
    u falls by ``decay`` with each epoch. The rows with the highest logits are kept. The adapter is then thrown away,
    and the kept rows train the aligned model as usual. With u near 1, this ranks rows by their loss under a model that
    is trained on safe rows.

    ``mode="one_step"`` is a cheap baseline of ours, which SEAL must beat. A row's weight in one step of plain gradient
    descent changes the safe loss by :math:`-\mathrm{lr} \langle g_\mathrm{safe}, g_i \rangle`. The rows with the
    largest products are kept.

    Args:
        topp: fraction of the upload that is kept, rounded down to whole rows, in (0, 1]; 1 turns the filter off.
        mode: ``"single_loop"`` as published, or ``"one_step"``, which uses only ``topp``, ``lr`` and the adapter.
        u: weight of the safe loss in the first epoch, in [0, 1].
        decay: what u loses with each epoch, >= 0; u stays at 0 then.
        epochs: passes over the longer of the two sets, >= 1. The shorter one is repeated.
        lr: learning rate of the scratch adapter, >= 0.
        selector_lr: learning rate of the logits, > 0.
        weights: ``"softmax"`` with the mean weight 1, or ``"sigmoid"`` with each weight in (0, 2).
        batch_size: rows of each set per step, >= 1.
        r: rank of the scratch adapter, >= 1.
        alpha: numerator of its scale, > 0.
        targets: names of the linear layers that it adapts, or all-linear.
        max_tokens: tokens of a row that are read, >= 1; None reads the whole row. If the run cuts long rows, give its
            limit.

    Raises:
        ValueError: if an argument is out of range, or no row would be kept.

    Cost: nothing in training. Before it, 2 forward and 2 backward passes per row of the longer set and epoch, and an
        adapter with two moments. While u is 1, one of the backward passes is left out. ``"one_step"`` takes one forward
        and one backward pass per row of both sets.
    Source: Shen et al., "SEAL: Safety-enhanced Aligned LLM Fine-tuning via Bilevel Data Selection", ICLR 2025,
        arXiv:2410.07471, and its official code.
    Differs: as in the official code, no inner problem is solved and no value function enters. The paper's penalty has
        one. Logits keep the ids of their rows; the official code renumbers rows after dropping some. The shorter set is
        repeated; the official code stops at its end. The adapter covers all linear layers by default. Dropout is off,
        the model's gradient is not clipped, and the adapter's optimizer is AdamW without decay, like that of the
        logits. An interrupted selection starts anew. ``"one_step"`` is not in the paper.
    """

    streams = ("alignment",)
    selects_by_gradient = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "llama3": {"decay": 0.03, "targets": ["q_proj", "v_proj"]},
        "pythia": {"decay": 0.02},
    }

    def __init__(
        self,
        topp: float = 0.8,
        mode: Literal["single_loop", "one_step"] = "single_loop",
        u: float = 1.0,
        decay: float = 0.03,
        epochs: int = 3,
        lr: float = 1e-5,
        selector_lr: float = 5e-3,
        weights: Literal["softmax", "sigmoid"] = "softmax",
        batch_size: int = 64,
        r: int = 16,
        alpha: float = 16.0,
        targets: Sequence[str] = (ALL_LINEAR,),
        max_tokens: int | None = None,
    ) -> None:
        for name, value in (("topp", topp), ("u", u)):
            check_fraction("SEAL", name, value)
        if topp == 0:
            raise ValueError("SEAL: topp must lie in (0, 1], got 0, which keeps no row. The paper keeps 0.8.")
        if mode not in ("single_loop", "one_step"):
            raise ValueError(f"SEAL: mode must be 'single_loop' or 'one_step', got {mode!r}.")
        if weights not in ("softmax", "sigmoid"):
            raise ValueError(f"SEAL: weights must be 'softmax' or 'sigmoid', got {weights!r}.")
        for name, value, low in (("decay", decay, True), ("lr", lr, True), ("selector_lr", selector_lr, False)):
            if not (value >= 0 if low else value > 0):
                raise ValueError(f"SEAL: {name} must be {'>=' if low else '>'} 0, got {value}.")
        for name, count in (("epochs", epochs), ("batch_size", batch_size), ("r", r), ("max_tokens", max_tokens)):
            if not ((name == "max_tokens" and count is None) or (isinstance(count, int) and count >= 1)):
                raise ValueError(f"SEAL: {name} must be a whole number >= 1, got {count}.")
        if not alpha > 0:
            raise ValueError(f"SEAL: alpha must be > 0, got {alpha}.")
        if isinstance(targets, str) or not targets:
            raise ValueError(f"SEAL: targets must be a list of layer names such as ['q_proj'], got {targets!r}.")
        super().__init__()
        self.topp, self.u, self.decay, self.epochs, self.lr = topp, u, decay, epochs, lr
        self.mode: Literal["single_loop", "one_step"] = mode
        self.weights: Kind = weights
        self.selector_lr, self.batch_size, self.r, self.alpha = selector_lr, batch_size, r, alpha
        self.targets, self.max_tokens = list(targets), max_tokens
        # A backward pass counts as two forward passes. A row of the plan stands for one row of each set.
        self.selecting_passes = 6.0 if mode == "single_loop" else 3.0

    @property
    @override
    def off(self) -> bool:
        return self.topp == 1

    @override
    def selecting(self, records: Mapping[str, Sequence[Record]]) -> int:
        """Return the number of pairs of a safe and a task row in all steps, or of rows for ``"one_step"``."""
        sizes = len(records["alignment"]), len(records["task"])
        if not int(self.topp * sizes[1]):
            raise InputError(
                f"SEAL: topp={self.topp} would keep none of {sizes[1]} rows of the upload, and at least one must be"
                " left. Raise topp."
            )
        if self.off or self.mode == "one_step":
            return 0 if self.off else sum(sizes)
        return self.epochs * steps_per_epoch(sizes, self._batch(sizes)) * self._batch(sizes)

    @override
    def select(
        self,
        model: Any,
        tokenizer: Any,
        template: Template,
        records: Mapping[str, Sequence[Record]],
        system: str | None = None,
        batch_size: int = 8,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> list[dict[str, Any]]:
        self.selecting(records)  # refuses to drop all rows
        rows = list(records["task"])
        if self.off:
            return self.decided(rows, {}, set(range(len(rows))))
        reader = self.reader(model, tokenizer, template, system, batch_size)
        places, task = reader.encoded(rows)
        _, safe = reader.encoded(records["alignment"])
        with as_found(model), self._adapted(model, seed) as adapted, torch.enable_grad():
            values = self._values(adapted, reader, safe, task, seed, progress)
        scores = dict(zip(places, values.tolist(), strict=True))
        order = sorted(scores, key=lambda place: (-scores[place], rows[place].id))
        kept = order[: int(self.topp * len(order))]
        return self.decided(rows, scores, set(kept), mode=self.mode, threshold=scores[kept[-1]])

    def _values(
        self,
        model: nn.Module,
        reader: RowReader,
        safe: Sequence[Example],
        task: Sequence[Example],
        seed: int,
        progress: Callable[[int], None] | None,
    ) -> Tensor:
        """Return the value of each row of the task, ``[task rows]``. Rows with a high value are kept."""

        def losses(examples: Sequence[Example]) -> Losses:
            return lambda rows: row_losses(model, reader.batch([examples[i] for i in rows]))

        sizes, chunk = (len(safe), len(task)), reader.batch_size
        if self.mode == "one_step":
            return self.lr * one_step_scores(model, losses(safe), losses(task), sizes, chunk, progress)
        loop = Loop(self.u, self.decay, self.epochs, self.lr, self.selector_lr, self._batch(sizes), self.weights, seed)
        return learned_logits(trainable(model), losses(safe), losses(task), sizes, loop, chunk, progress)

    def _batch(self, sizes: tuple[int, int]) -> int:
        """Return the rows of each set per step, at most as many as the larger set has."""
        return min(self.batch_size, max(sizes))

    @contextmanager
    def _adapted(self, model: Any, seed: int) -> Iterator[nn.Module]:
        """Yield the model with the scratch adapter.

        Raises:
            InputError: if a target names no layer of the model.
        """
        lora = Lora(self.r, self.alpha, 0.0, self.targets)
        try:
            check_targets(model.get_base_model() if hasattr(model, "peft_config") else model, lora.targets)
        except InputError as error:
            raise InputError(str(error).replace("--lora.targets", "SEAL: targets")) from error
        with scratch_adapter(model, lora, adapter_seed(seed, aligned=True)) as adapted:
            yield adapted
