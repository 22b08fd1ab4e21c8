"""Shrink: a gradient term that pulls the weights toward zero."""

from hftlight.engine import Defense, Slot, Stage, add_to_grad, scaled, trainable


class Shrink(Defense):
    """Add a multiple of the weights to the gradient.

    Args:
        rate: the multiple, >= 0; 0 is plain fine-tuning.

    Cost: nothing.
    Source: an example.
    Differs: nothing known.
    """

    stage, slots = Stage.FINETUNING, (Slot.GRADIENT,)

    def __init__(self, rate: float = 0.1) -> None:
        if not rate >= 0:
            raise ValueError(f"Shrink: rate must be >= 0, got {rate}.")
        super().__init__()
        self.rate = rate

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        """Add the term to the gradient, before clipping and before the optimizer step."""
        if self.rate:
            add_to_grad(pl_module, scaled({n: p.detach() for n, p in trainable(pl_module).items()}, self.rate))
            self.record()
