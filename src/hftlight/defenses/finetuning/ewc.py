"""EWC: a pull back to the aligned weights, stronger for weights that the alignment data depends on."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from hftlight.engine import (
    Defense,
    Slot,
    Stage,
    Vector,
    add_to_grad,
    difference,
    extend,
    gradient,
    norm,
    packed,
    placed,
    rank_and_world,
    snapshot,
    trainable,
)
from hftlight.engine.step.defense import Loader
from hftlight.engine.step.vectors import whole
from hftlight.engine.weights.scores import undisturbed


def ewc_term(weights: Vector, start: Vector, fisher: Vector, lam: float) -> Vector:
    r"""Return :math:`2 \lambda F (w - w_0)`, the gradient of :math:`\lambda \sum_i F_i (w_i - w_{0,i})^2`.

    Args:
        weights: w; parameter name -> tensor of that parameter's shape.
        start: the aligned weights w_0; same names and shapes.
        fisher: diagonal of the empirical Fisher matrix; same names and shapes.
        lam: penalty weight.
    """
    # term is a new vector, multiplied in place.
    term = difference(weights, start)
    torch._foreach_mul_(list(term.values()), [fisher[name] for name in term])
    torch._foreach_mul_(list(term.values()), 2 * lam)
    return term


def examples(batch: Any) -> list[Any]:
    """Return the rows of a batch, each as a batch of one row.

    Tensors with a first dimension, and sequences except strings, are split. Every row keeps all other values. A batch
    that is no mapping counts as one row.
    """
    if not isinstance(batch, Mapping):
        return [batch]

    def rowwise(value: Any) -> bool:
        return (
            value.dim() > 0 if isinstance(value, Tensor) else isinstance(value, Sequence) and not isinstance(value, str)
        )

    count = next((len(value) for value in batch.values() if rowwise(value)), 1)
    return [
        {name: value[k : k + 1] if rowwise(value) else value for name, value in batch.items()} for k in range(count)
    ]


class EWC(Defense):
    r"""Pull every weight back to its aligned value, the more the alignment data depends on it (elastic weights).

    Let f be the user's loss (mean nats per response token) and :math:`w_0` the aligned weights. Let F be the diagonal
    of the empirical Fisher matrix of the alignment data at :math:`w_0`. The optimizer receives the gradient

    .. math:: \nabla f(w) + 2 \lambda F (w - w_0), \qquad F_i = \frac{1}{n} \sum_{k=1}^n (\partial_i \ell_k(w_0))^2

    for n rows. The loss :math:`\ell_k` of a row is the mean over its own response tokens, without dropout.

    Args:
        lam: penalty weight lambda, in 1 / nats, >= 0; 0 is plain fine-tuning. Squared gradients are small, so useful
            weights are large: lambda F has the role of ``lam`` in ``L2SP``. Lambda depends on the scale of F. For
            independent row gradients, the sum over m batches of b rows is m / b times the mean over rows.
        samples: n, number of alignment rows from which F is estimated, over all processes, >= 1.
        fisher: ``"example"`` as above. ``"batch"`` is the sum over batches of their squared mean gradients, as in the
            official baseline; whole batches are drawn until they have ``samples`` rows.
        streams: loader of the stream ``"alignment"`` (harmful prompts with safe answers), needed only if the data
            module does not offer it.

    Raises:
        ValueError: if ``lam`` is negative or not finite, ``samples`` is no positive number of rows, or ``fisher`` is
            unknown.
        RuntimeError: if F is not finite.

    Cost: before the first step, one forward-backward pass per row (``"example"``) or batch. With ``"example"`` every
    process passes all rows. Training takes no extra pass. Memory holds two copies of the trainable weights, and briefly
    a third in each step.
    Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, arXiv:1612.00796; as
    a baseline in the papers and code of Vaccine, Lisa and Booster.
    Differs: the first source halves lambda. The baseline's code sums the squared gradients of batches, without
    normalization. Preset ``repo`` does the same, with that paper's 2000 alignment rows. Its lambda of 1e9 is that of
    every script of Vaccine's repository; the parser's default of 1e-3 is never used. At its batches of 5 rows m / b is
    80. That code computes F in train mode; here dropout is off. It leaves the last batch's gradient in the first
    update; here that does not happen. It keys F by module, and continues training the alignment adapter. In Booster's
    repository F comes from other rows, including the upload's harmful rows. The Lisa paper describes an unweighted
    distance, which is ``L2SP``. Under LoRA, F and the distance are those of the factors. In a new adapter B is 0, so
    that the gradient of A, and the pull on A, is 0. If a callback unfreezes weights later, their F is estimated at
    that step, since it was not known before.
    """

    stage, slots, streams = Stage.FINETUNING, (Slot.GRADIENT,), ("alignment",)
    claims: tuple[str, ...] = ("anchor that weights are pulled to",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"repo": {"lam": 1e9, "samples": 2000, "fisher": "batch"}}

    def __init__(
        self,
        lam: float = 1e5,
        samples: int = 128,
        fisher: Literal["example", "batch"] = "example",
        streams: Mapping[str, Loader] | None = None,
    ) -> None:
        if not 0 <= lam < math.inf:
            raise ValueError(f"EWC: lam must be >= 0 in 1 / nats (0 turns it off), got {lam}.")
        if not (isinstance(samples, int) and samples >= 1):
            raise ValueError(f"EWC: samples must be a whole number of rows >= 1, got {samples}.")
        if fisher not in ("example", "batch"):
            raise ValueError(f"EWC: fisher must be 'example' or 'batch', got {fisher!r}.")
        super().__init__(streams)
        self.lam, self.samples, self.fisher = lam, samples, fisher
        if lam == 0:
            self.claims = ()
        self._loaded: dict[str, Any] | None = None
        self._start: Vector = {}
        self._diagonal: Vector = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "start": packed(self._start), "diagonal": packed(self._diagonal)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._loaded = state_dict if state_dict["start"] else None  # empty in a checkpoint from before the first step

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._loaded, self._start, self._diagonal = None, {}, {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loaded, self._loaded = self._loaded, None
        if self.lam == 0:
            return
        if loaded is not None:
            self._start, self._diagonal = (placed(loaded[name], pl_module) for name in ("start", "diagonal"))
            return
        self._start, self._diagonal = snapshot(pl_module), self._estimate_fisher(pl_module)
        self._check_fisher()

    def _check_fisher(self) -> None:
        total = sum(float(whole(f.sum())) for f in self._diagonal.values())
        if not math.isfinite(total):
            raise RuntimeError(
                "EWC: a squared gradient of the alignment data is not finite. Train in float32 or bfloat16."
            )
        self.trace["fisher_sum"] = total

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.lam == 0:
            return
        if late := extend(self._start, pl_module):
            fisher = self._estimate_fisher(pl_module)
            self._diagonal |= {name: fisher[name] for name in late}
            self._check_fisher()
        weights = {name: p.detach() for name, p in trainable(pl_module).items()}
        term = ewc_term(weights, self._start, self._diagonal, self.lam)
        add_to_grad(pl_module, term)
        length = norm(term)
        self.record(pull_norm=length)
        pl_module.log("ewc/pull_norm", length)

    def _estimate_fisher(self, pl_module: LightningModule) -> Vector:
        """Return F at the current weights, and restore all state afterwards except the position in the stream."""
        total = {name: torch.zeros_like(p) for name, p in trainable(pl_module).items()}
        row_count = 0
        with undisturbed(pl_module, pl_module.device):
            while row_count < self.samples:
                own = self.draw("alignment")
                rows = [row for batch in _gather_batches(own, pl_module.device) for row in examples(batch)]
                # gradient() averages over ranks. For a single row's gradient every rank must pass the same row; for a
                # batch each rank passes its own, and the mean is the gradient of the joint batch.
                for batch in rows[: self.samples - row_count] if self.fisher == "example" else [own]:
                    grads = list(gradient(pl_module, batch).grad.values())
                    torch._foreach_addcmul_(list(total.values()), grads, grads)
                row_count += len(rows)
        if self.fisher == "example":
            torch._foreach_div_(list(total.values()), self.samples)
        return total


def _gather_batches(batch: Any, device: torch.device) -> list[Any]:
    """Return the batches of all ranks, in the order of the ranks, on every rank. This is a collective."""
    world = rank_and_world()[1]
    if world == 1:
        return [batch]
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, move_data_to_device(batch, torch.device("cpu")))
    return [move_data_to_device(each, device) for each in gathered]
