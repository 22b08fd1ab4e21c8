"""Where a defense acts: stages, slots and their order, and the check that refuses a list of defenses."""

from collections.abc import Iterable, Sequence
from enum import Enum, IntEnum
from typing import Protocol, TypeVar


class Stage(Enum):
    """Stage of the run in which a defense works."""

    ALIGNMENT = "alignment"
    FINETUNING = "finetuning"
    POST_FINETUNING = "post_finetuning"


class Slot(IntEnum):
    """Place in a stage where a defense acts.

    Within a step, lower values act first.
    """

    DATA = 1  # before the stage: rewrites, filters, mixes or weighs records
    ADAPTER = 2  # when the model is built: LoRA geometry, frozen sets, parameter groups
    STREAM = 3  # per step: which stream this step trains on
    FORWARD = 4  # per batch: a probe gradient, then one perturbed pass
    LOSS = 5  # per batch: a differentiable term on the stage's own forward pass
    GRADIENT = 6  # once per optimizer step: edits .grad
    PROJECTION = 7  # after all additions: masks .grad
    UPDATE = 8  # after the optimizer's update: restores or projects weights
    WEIGHTS = 9  # on a finished artifact: a function from one artifact to a new one


EXCLUSIVE = (Slot.STREAM, Slot.FORWARD)
ON_GRADIENT = (Slot.GRADIENT, Slot.PROJECTION)


class Slotted(Protocol):
    """A defense, as far as the checks read it."""

    @property
    def stage(self) -> Stage:
        """Stage in which the defense works."""

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Slots that the defense fills."""

    @property
    def claims(self) -> tuple[str, ...]:
        """What the defense needs for itself alone beside the exclusive slots, such as ``"token weights"``."""

    @property
    def main(self) -> str:
        """Stream that the stage trains on, or an empty text for the stage's own stream."""

    @property
    def state_key(self) -> str:
        """Name of the instance in a checkpoint: its class and arguments."""


D = TypeVar("D", bound=Slotted)


def name_of(defense: Slotted) -> str:
    """Return the name of the method as errors print it."""
    return type(defense).__name__


def check(defenses: Sequence[Slotted], one_stage: bool = True) -> None:
    """Refuse a list of defenses that cannot work together.

    Args:
        defenses: in the user's order.
        one_stage: whether the list belongs to one Trainer, so that all defenses must work in the same stage.

    Raises:
        ValueError: if two defenses conflict. The message names both, the slot or stage of the conflict, and the remedy.
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
            if earlier.main and later.main and earlier.main != later.main:
                raise ValueError(
                    f"{a} trains the stage on the stream {earlier.main!r} and {b} on {later.main!r}; keep one of them."
                )


def main_stream(defenses: Iterable[Slotted], usual: str) -> str:
    """Return the stream that a stage trains on.

    Args:
        defenses: the defenses of the stage.
        usual: the stage's own stream, for defenses that name none.
    """
    return next((d.main for d in defenses if d.main), usual)


def in_order(defenses: Iterable[D]) -> list[D]:
    """Return the defenses in the order in which they act.

    Within a slot, the order of the list decides, except that a defense with ``acts_first`` comes first. If a defense
    fills several slots, its slot on ``.grad`` places it, because order changes the result there. Without such a slot,
    its last slot places it. Defenses of several stages are sorted stage by stage. In the weights slot, ``repair_order``
    overrides the list: projection, then pruning, then rewinding.
    """

    def place(defense: Slotted) -> tuple[int, int, int]:
        on_grad = [slot for slot in defense.slots if slot in ON_GRADIENT]
        stage = list(Stage).index(defense.stage)
        order = -1 if getattr(defense, "acts_first", False) else getattr(defense, "repair_order", 0)
        return stage, max(on_grad or defense.slots), order

    return sorted(defenses, key=place)
