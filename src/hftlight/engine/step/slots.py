"""Where in the work a defense acts: stages, slots, their order, and which lists of defenses are refused."""

from collections.abc import Iterable, Sequence
from enum import Enum, IntEnum
from typing import Protocol, TypeVar


class Stage(Enum):
    """When a defense works."""

    ALIGNMENT = "alignment"
    FINETUNING = "finetuning"
    POST_FINETUNING = "post_finetuning"


class Slot(IntEnum):
    """Where in a stage a defense acts; in a step, lower values act first."""

    DATA = 1  # before the stage: rewrites, filters, mixes or weighs records
    ADAPTER = 2  # when the model is built: LoRA geometry, frozen sets, parameter groups
    STREAM = 3  # per step: which stream this step trains on
    FORWARD = 4  # per batch: a probe gradient, then one perturbed pass
    LOSS = 5  # per batch: a differentiable term on the forward pass that is made anyway
    GRADIENT = 6  # once per optimizer step: edits .grad
    PROJECTION = 7  # after all additions: masks .grad
    UPDATE = 8  # after the optimizer moved: restores or projects weights
    WEIGHTS = 9  # on a finished artifact: a function from one artifact to a new one


EXCLUSIVE = (Slot.STREAM, Slot.FORWARD)
ON_GRADIENT = (Slot.GRADIENT, Slot.PROJECTION)


class Slotted(Protocol):
    """What the checks read of a defense."""

    @property
    def stage(self) -> Stage:
        """When it works."""

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Where it acts."""

    @property
    def claims(self) -> tuple[str, ...]:
        """What it needs for itself beside the exclusive slots, such as ``"token weights"``."""

    @property
    def state_key(self) -> str:
        """Name of the instance in a checkpoint: the class and its arguments."""


D = TypeVar("D", bound=Slotted)


def name_of(defense: Slotted) -> str:
    """Return the method's name as errors print it."""
    return type(defense).__name__


def check(defenses: Sequence[Slotted], one_stage: bool = True) -> None:
    """Refuse a list of defenses that cannot work together.

    Args:
        defenses: in the user's order.
        one_stage: the list belongs to one Trainer, so all must work in the same stage.

    Raises:
        ValueError: naming both defenses, the slot or stage they disagree on, and the way out.
    """
    for position, later in enumerate(defenses):
        for earlier in defenses[:position]:
            a, b = name_of(earlier), name_of(later)
            if one_stage and earlier.stage is not later.stage:
                raise ValueError(
                    f"{a} works in the {earlier.stage.value} stage and {b} in the {later.stage.value} stage; one"
                    " Trainer runs one stage. Give each its own Trainer, or pass both to hftlight.run()."
                )
            if type(earlier) is type(later) and earlier.state_key == later.state_key:
                raise ValueError(f"{a} is in the list twice with the same arguments; keep one of them.")
            if earlier.stage is not later.stage:
                continue
            both = a if a == b else f"{a} and {b}"
            for slot in EXCLUSIVE:
                if slot in earlier.slots and slot in later.slots:
                    raise ValueError(f"{both} both fill the {slot.name.lower()} slot; keep one of them.")
            for claim in set(earlier.claims) & set(later.claims):
                raise ValueError(f"{both} both set the {claim}; keep one of them.")


def in_order(defenses: Iterable[D]) -> list[D]:
    """Return the defenses in the order in which they act; within a slot the list decides.

    A defense that fills several slots is placed by the one that acts on ``.grad``, where order changes the result.
    Defenses of several stages come stage by stage. In the weights slot, projection comes before pruning,
    and pruning before rewinding (``repair_order``), whatever the list says.
    """

    def place(defense: Slotted) -> tuple[int, int, int]:
        on_grad = [slot for slot in defense.slots if slot in ON_GRADIENT]
        stage = list(Stage).index(defense.stage)
        return stage, max(on_grad or defense.slots), getattr(defense, "repair_order", 0)

    return sorted(defenses, key=place)
