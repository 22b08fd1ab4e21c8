"""Test row of Shrink. The contract tests read it, as they read the rows of hftlight's own defenses."""

from shrink import Shrink

from tests.helpers.contract import Row, Slow


class SlowShrink(Slow):
    """Independent slow version of Shrink, written parameter by parameter."""

    def edit(self, step, grads):
        """Return the gradients with 0.3 times the weights added."""
        return [g + 0.3 * p.detach() for g, (_, p) in zip(grads, self.weights, strict=True)]


ROW = Row(
    make=lambda: Shrink(0.3),
    neutral=lambda: Shrink(0.0),
    bad=[({"rate": -1.0}, "rate"), ({"rate": float("nan")}, "rate")],
    slow=SlowShrink,
)
