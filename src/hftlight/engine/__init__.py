"""What a defense needs from a training step beyond Lightning's own hooks."""

from hftlight.engine.step.activations import captured, first_tensor, hooked, shifted
from hftlight.engine.step.choices import ChoosesStreams
from hftlight.engine.step.defense import Defense, HasLoss
from hftlight.engine.step.displacement import moved, shifted_gradient
from hftlight.engine.step.order import batches_per_pass, passes_order, rank_and_world
from hftlight.engine.step.passes import Pass, Passes, add_to_grad, count_passes, gradient
from hftlight.engine.step.side_streams import LoaderStream, Stream
from hftlight.engine.step.slots import Slot, Stage, check, in_order, main_stream
from hftlight.engine.step.vectors import (
    Vector,
    difference,
    dot,
    extend,
    norm,
    packed,
    placed,
    scaled,
    snapshot,
    trainable,
    unit,
)

__all__ = [
    "ChoosesStreams",
    "Defense",
    "HasLoss",
    "LoaderStream",
    "Pass",
    "Passes",
    "Slot",
    "Stage",
    "Stream",
    "Vector",
    "add_to_grad",
    "batches_per_pass",
    "captured",
    "check",
    "count_passes",
    "difference",
    "dot",
    "extend",
    "first_tensor",
    "gradient",
    "hooked",
    "in_order",
    "main_stream",
    "moved",
    "norm",
    "packed",
    "passes_order",
    "placed",
    "rank_and_world",
    "scaled",
    "shifted",
    "shifted_gradient",
    "snapshot",
    "trainable",
    "unit",
]
