"""A stream-slot defense whose choice depends on measured values, and is therefore state."""

from typing import Any

from typing_extensions import override

from hftlight.engine.step.defense import Defense


class ChoosesStreams(Defense):
    """A defense that chooses the stream of each optimizer step from what it has measured so far.

    A subclass fills the stream slot and implements ``choose``. All ranks must choose alike, so measured values are
    averaged over ranks first. The choices so far are counted per stream and saved in a checkpoint, since they cannot be
    computed anew. A resumed training therefore repeats them.
    """

    _step: int = -1  # the step that was chosen for last
    _choice: str = ""
    _counts: dict[str, int]  # steps before that step, by stream

    def choose(self, step: int) -> str:
        """Return the stream for optimizer step ``step``. It is called once per step, in order."""
        raise NotImplementedError(f"{type(self).__name__} chooses streams and must implement choose().")

    @override
    def stream_at(self, step: int) -> str:
        """Return the stream of the current step, or choose that of the next one.

        Raises:
            RuntimeError: if ``step`` is neither of the two.
        """
        if step == self._step + 1:
            if self._choice:
                self._counts[self._choice] = self._counts.get(self._choice, 0) + 1
            self._step, self._choice = step, self.choose(step)
        if step != self._step:
            raise RuntimeError(
                f"{type(self).__name__}: the stream of step {step} is not known; the current step is {self._step}."
            )
        return self._choice

    @override
    def steps_on(self, name: str, step: int) -> int:
        """Return how many of the steps before the current step trained on a stream.

        Raises:
            RuntimeError: if ``step`` is not the current step.
        """
        if step != self._step:
            raise RuntimeError(
                f"{type(self).__name__}: steps are counted for the current step {self._step}, not for {step}."
            )
        return self._counts.get(name, 0)

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._step, self._choice, self._counts = -1, "", {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "chosen": [self._step, self._choice, dict(self._counts)]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._step, self._choice, counts = state_dict["chosen"]
        self._counts = dict(counts)
