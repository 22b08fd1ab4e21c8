"""Subject: a fine-tuned model that repairs edit, with the models and data that they may read."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from hftlight.engine.weights.lora import has_adapter
from hftlight.engine.weights.lowrank import LowRank
from hftlight.engine.weights.stored import Adapted, Difference, ModelWeights, Weights, displacement


def no_batches(stream: str) -> Iterator[Any]:
    """Refuse to return batches.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(f"This repair reads the stream {stream!r}, and none was given. Pass batches=... to Subject.")


def at_once(repair: Any, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return what ``compute`` returns. A run instead reads what it has stored for the repair."""
    return compute()


def _unseen(_: str | int) -> None:
    """Show no progress."""


@dataclass
class Subject:
    """One fine-tuned model under repair.

    Attributes:
        model: the model, edited in place: a causal LM with all parameters trained, or a PEFT model around the aligned
            model. The one active adapter of a PEFT model is exactly the user's update.
        aligned: the aligned model, where the user's fine-tuning started. None means that only the PEFT model itself
            contains it.
        base: the model before its alignment. None if it is not known, or if ``aligned`` is ``Adapted`` and so contains
            it.
        unaligned: a model without safety, such as the aligned model after training on harmful rows. None if not known.
        batches: returns all batches of a stream once, on the model's device; the same number on every rank.
        report: record of the repair for the manifest: plain numbers, texts, lists and dictionaries.
        scores: what the repair's ``scored`` returned.
        applied: names of the repairs that were applied to this model before; no repair is applied twice.
        context: returns the context manager that a forward pass runs in, such as autocast.
        split: whether each rank's batches are a share of the stream, so that sums over them are added over ranks.
        seed: seed of the run, for random choices of a repair.
        kept: returns the scores of a repair, from a store or by calling the given function.
        on_weight: called with the name of each weight before it is measured or edited, to show progress.
        on_step: called with the number of optimizer steps that the repair has trained, to show progress.
        dense: whether an edit wrote into the weights under the adapter and left the adapter zero. The repaired model is
            then written as a whole model.
    """

    model: nn.Module
    aligned: Weights | None = None
    base: Weights | None = None
    unaligned: Weights | None = None
    batches: Callable[[str], Iterator[Any]] = no_batches
    report: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    applied: list[str] = field(default_factory=list)
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    split: bool = False
    seed: int = 0
    kept: Callable[[Any, Callable[[], dict[str, Tensor]]], dict[str, Tensor]] = at_once
    on_weight: Callable[[str], None] = _unseen
    on_step: Callable[[int], None] = _unseen
    dense: bool = False

    @property
    def start(self) -> Weights | None:
        """Weights that the user's fine-tuning started from: ``aligned``, or those under the adapter."""
        return self.aligned or self._under_adapter

    @cached_property
    def _under_adapter(self) -> Weights | None:
        return ModelWeights.of(self.model) if has_adapter(self.model) else None

    def alignment(self, name: str) -> LowRank | Difference | None:
        """Return the displacement of one weight by the alignment.

        None means that the alignment did not move the weight.

        Raises:
            RuntimeError: if the base model is not known.
            ValueError: if one of the two models lacks the weight, or the shapes differ.
        """
        start = self.start
        base = self.base or (start.under if isinstance(start, Adapted) else None)
        if start is None or base is None:
            raise RuntimeError("The alignment displacement needs the aligned and the base model.")
        return displacement(start, base, name)
