"""Entries of trained parameters that keep their values, bit for bit."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from hftlight.engine.step.defense import Defense
from hftlight.engine.step.vectors import local
from hftlight.engine.weights.masks import pack, unpack, whole_rows
from hftlight.engine.weights.scores import Batch, Loss
from hftlight.engine.weights.shards import share


@dataclass(frozen=True)
class FrozenPart:
    """The frozen entries of one trained parameter on this rank.

    Attributes:
        parameter: the parameter.
        mask: its frozen entries, ``[rows, in]``, or rows, ``[rows, 1]``.
        values: the values that these entries keep, flat, in the order of the mask.
    """

    parameter: nn.Parameter
    mask: Tensor
    values: Tensor


def refuse_averaging(callbacks: Iterable[object], who: str, way: str) -> None:
    """Refuse callbacks that average weights, since the average of entries that have moved is not their kept value.

    Args:
        callbacks: the callbacks of a Trainer.
        who: name of the defense, for errors.
        way: what to do instead.

    Raises:
        ValueError: if there is such a callback.
    """
    for callback in callbacks:
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            raise ValueError(
                f"{who}: {type(callback).__name__} averages weights after they moved, so that frozen weights would not"
                f" keep their values; {way}"
            )


class FrozenEntries:
    """Frozen entries of several parameters. Weight decay and momentum would move even a weight without a gradient.

    Attributes:
        parts: the frozen entries by the name of the parameter.
    """

    def __init__(self, parts: Mapping[str, FrozenPart] | None = None) -> None:
        self.parts = dict(parts or {})

    @classmethod
    def now(cls, masks: Iterable[tuple[nn.Parameter, Tensor]], module: nn.Module) -> Self:
        """Return entries that keep the values which they have now.

        Args:
            masks: parameters, each with this rank's mask.
            module: module whose parameters these are.
        """
        names, parts = {id(p): name for name, p in module.named_parameters()}, {}
        for parameter, mask in masks:
            values = local(parameter.detach())
            parts[names[id(parameter)]] = FrozenPart(parameter, mask, values[mask.expand_as(values)])
        return cls(parts)

    def mask_gradients(self) -> None:
        """Set the gradient of the frozen entries to zero."""
        for part in self.parts.values():
            if part.parameter.grad is not None:
                local(part.parameter.grad).masked_fill_(part.mask, 0)

    def restore(self) -> None:
        """Give the frozen entries their values again."""
        with torch.no_grad():
            for part in self.parts.values():
                local(part.parameter.detach()).masked_scatter_(part.mask, part.values)

    def state(self) -> dict[str, dict[str, Any]]:
        """Return the masks as bits, with their numbers of columns, and the values, for a checkpoint.

        Under sharding every rank must call this method.
        """
        masks, columns, values = {}, {}, {}
        for name, part in self.parts.items():
            p = part.parameter
            # The values are placed into a dense shard, gathered over ranks, and then selected by the whole mask.
            mask = whole_rows(part.mask.to(torch.uint8), p).cpu().bool()
            dense = torch.zeros_like(local(p.detach())).masked_scatter_(part.mask, part.values)
            masks[name], columns[name] = pack(mask), mask.shape[1:].numel()
            values[name] = whole_rows(dense, p).cpu()[mask.expand(p.shape)]
        return {"masks": masks, "columns": columns, "values": values}

    @classmethod
    def stored(cls, state: Mapping[str, Mapping[str, Any]], module: nn.Module, who: str) -> Self:
        """Return the entries of a checkpoint, on the device and in the shards of the module's parameters.

        Args:
            state: from ``state``.
            module: module whose parameters these are.
            who: name of the defense, for errors.

        Raises:
            RuntimeError: if the module lacks a parameter.
        """
        parameters = dict(module.named_parameters())
        parts = {}
        for name, bits in state["masks"].items():
            if name not in parameters:
                raise RuntimeError(f"{who}: the checkpoint holds values of {name}, which this model does not have.")
            p = parameters[name]
            rows, columns = share(p), state["columns"][name]
            whole = tuple(p.shape) if columns == p.shape[1:].numel() else (p.shape[0], 1)
            mask, values = unpack(bits, whole), state["values"][name]
            dense = torch.zeros(p.shape, dtype=values.dtype).masked_scatter_(mask, values)[rows.start : rows.stop]
            mine = mask[rows.start : rows.stop]
            parts[name] = FrozenPart(p, mine.to(p.device), dense[mine.expand_as(dense)].to(p.device))
        return cls(parts)


class FreezesEntries(Defense):
    """A defense that scores weights before the first step and then keeps some entries at their values.

    A subclass fills the projection and the update slot. It sets ``_frozen`` in ``on_train_start``, unless ``_resumed``
    has set it.

    Attributes:
        instead: what an error advises in place of a callback that averages weights.
    """

    instead: str = "remove that callback."
    _frozen: FrozenEntries | None = None
    _stored: dict[str, Any] | None = None
    _step: int = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._frozen, self._stored = None, None
            callbacks = trainer.callbacks  # type: ignore[attr-defined]
            refuse_averaging(callbacks, type(self).__name__, self.instead)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._frozen is not None:
            self._frozen.mask_gradients()
            self.record()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # within an accumulation window no weight has moved
            return
        self._step = trainer.global_step
        if self._frozen is not None:
            self._frozen.restore()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state with the masks as bits and the frozen values.

        Under sharding every rank must call this method.
        """
        # Even if no entry is frozen, the state says so: a resumed run does not select again.
        return super().state_dict() | (self._frozen.state() if self._frozen is not None else {})

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if "masks" in state_dict:
            self._stored = {name: state_dict[name] for name in ("masks", "columns", "values")}

    def _resumed(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Note the step that training starts from, and tell whether a checkpoint holds the frozen entries."""
        self._step = trainer.global_step
        if self._stored is None:
            return False
        self._frozen, self._stored = FrozenEntries.stored(self._stored, pl_module, type(self).__name__), None
        return True

    def _draws(self, name: str) -> Iterator[Batch]:
        """Yield the batches of a stream without end."""
        while True:
            yield self.draw(name)


def scoring_loss(trainer: Trainer, pl_module: LightningModule) -> Loss:
    """Return the module's loss of a batch in the precision of the training step, for scores."""
    plugin = trainer.precision_plugin
    # A loss scaler means float16, where small gradients would vanish. Scoring then runs without autocast instead.
    context = nullcontext if getattr(plugin, "scaler", None) is not None else plugin.forward_context

    def loss(batch: Batch) -> Tensor:
        with context():
            return pl_module.loss(batch)  # type: ignore[operator]

    return loss
