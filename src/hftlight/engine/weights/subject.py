"""Subject: a fine-tuned model that repairs edit, and what they may read."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from hftlight.engine.weights.lora import has_adapter
from hftlight.engine.weights.lowrank import LowRank
from hftlight.engine.weights.stored import Adapted, Difference, ModelWeights, Weights, displacement


def no_batches(stream: str) -> Iterator[Any]:
    """Refuse to give batches.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(f"This repair reads the stream {stream!r}, and none was given.")


@dataclass
class Subject:
    """One fine-tuned model on the table.

    Attributes:
        model: what is edited in place: a causal LM with all parameters trained, or a PEFT model around the aligned
            model whose one active adapter is exactly the user's update.
        aligned: the aligned model, where the user's fine-tuning started; None where only the PEFT model itself holds
            it.
        base: the model before its alignment; None where it is not known, or ``aligned`` is ``Adapted`` and so holds it.
        batches: gives all batches of a stream once, on the model's device; the same number on every rank.
        report: what was done, for the manifest: plain numbers, texts, lists and dictionaries.
        applied: names of the repairs that were applied to this model before; none is applied twice.
        context: what a forward pass runs in, such as autocast.
        split: whether each rank's batches are a share of the stream, so that sums over them are added up over ranks.
        dense: set by an edit that wrote into the weights under the adapter, and left the adapter zero: the artifact is
            a whole model then.
    """

    model: nn.Module
    aligned: Weights | None = None
    base: Weights | None = None
    batches: Callable[[str], Iterator[Any]] = no_batches
    report: dict[str, Any] = field(default_factory=dict)
    applied: list[str] = field(default_factory=list)
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    split: bool = False
    dense: bool = False

    @property
    def start(self) -> Weights | None:
        """The weights that the user's fine-tuning started from: ``aligned``, or those under the adapter."""
        return self.aligned or self._under_adapter

    @cached_property
    def _under_adapter(self) -> Weights | None:
        return ModelWeights.of(self.model) if has_adapter(self.model) else None

    def alignment(self, name: str) -> LowRank | Difference | None:
        """Return what the alignment moved in one weight; None where it did not.

        Raises:
            RuntimeError: if the base model is not known.
            ValueError: if one of the two models lacks the weight, or the shapes differ.
        """
        start = self.start
        base = self.base or (start.under if isinstance(start, Adapted) else None)
        if start is None or base is None:
            raise RuntimeError("The alignment displacement needs the aligned and the base model.")
        return displacement(start, base, name)
