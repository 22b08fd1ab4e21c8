"""KL: stay close to the aligned model's predictions on the user's data."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from hftlight.engine import Defense, Passes, Slot, Stage
from hftlight.engine.divergence import divergence
from hftlight.models.module import Forward

HIDDEN = "kl/hidden"


class KL(Defense):
    r"""Add the divergence from the aligned model's predictions to the user's loss.

    Let f be the user's loss. At the T response tokens of a micro-batch, let :math:`p_t` be the model's next-token
    distribution and :math:`q_t` that of the aligned model. Training minimizes

    .. math:: f(w) + \lambda \frac{1}{T} \sum_t \mathrm{KL}(q_t \| p_t)

    Args:
        lam: penalty weight lambda, dimensionless, >= 0; 0 is plain fine-tuning.
        direction: ``"forward"`` as above; ``"reverse"`` takes KL(p || q), which lets the model drop modes.
        axis: ``"vocabulary"`` as above. ``"sequence"`` reproduces the official code, whose softmax runs over the
            positions of a row, prompt and padding included, for each vocabulary entry. It sums the divergences of all
            entries and rows, and divides by the number of rows. Use it for reproduction only: such distributions are no
            predictions.

    Raises:
        ValueError: if ``lam`` is negative, or the direction or the axis is unknown.

    Cost: one forward pass of the aligned model per micro-batch, shared with other defenses that need it. Memory holds
    its logits at response positions. The softmaxes are computed for some hundred positions at a time, and recomputed in
    the backward pass. Under LoRA there is no second model. ``axis="sequence"`` holds several copies of both models'
    logits at all positions.
    Source: the KL baseline of Huang et al., "Vaccine", NeurIPS 2024, arXiv:2402.01109: lambda 1e-3 in the paper, 0.1 in
    its script. The preset "repo" repeats the script with the axis of its code.
    Differs: the divergence is taken over the vocabulary, not over the sequence axis, and averaged over response tokens.
    Under StreamsDataModule(average="window") the mean runs over the tokens of an optimizer step. The official teacher
    runs in training mode, with dropout; here it does not. Weights are not swapped in and out. Instead the aligned model
    is the model with its adapter switched off, wherever that is exact.
    """

    stage, slots = Stage.FINETUNING, (Slot.LOSS,)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"lam": 1e-3},
        "repo": {"lam": 0.1, "axis": "sequence"},
    }

    def __init__(
        self,
        lam: float = 0.1,
        direction: Literal["forward", "reverse"] = "forward",
        axis: Literal["vocabulary", "sequence"] = "vocabulary",
    ) -> None:
        if not lam >= 0:
            raise ValueError(f"KL: lam must be >= 0 (0 turns it off), got {lam}.")
        if direction not in ("forward", "reverse"):
            raise ValueError(f"KL: direction must be 'forward' or 'reverse', got {direction!r}.")
        if axis not in ("vocabulary", "sequence"):
            raise ValueError(f"KL: axis must be 'vocabulary' or 'sequence', got {axis!r}.")
        super().__init__()
        self.lam, self.direction, self.axis = lam, direction, axis
        self.passes = (Passes(1, per="batch", shared="reference"),) if lam > 0 else ()

    @override
    def taps(self, model: nn.Module) -> dict[str, nn.Module]:
        if self.lam == 0 or self.axis == "vocabulary":
            return {}
        return {HIDDEN: model.get_decoder()}  # type: ignore[operator]

    @override
    def loss_term(self, forward: Forward) -> Tensor | None:
        if self.lam == 0:
            return None
        if self.axis == "vocabulary":
            total = divergence(forward.logits, forward.reference.logits, self.direction)
            mean = total / forward.batch.get("window_tokens", len(forward.logits))
        else:
            mean = self._over_the_sequence(forward)
        self.record(divergence=mean.detach())
        self.show({"kl/divergence": mean})
        return self.lam * mean

    def _over_the_sequence(self, forward: Forward) -> Tensor:
        """Return the divergence that the official code adds: softmax over positions, mean over rows."""
        if self._trainer is None:
            raise RuntimeError(
                "KL: axis='sequence' needs the model's output layer, which is available only while a Trainer fits."
            )
        # The taps give hidden states at all positions; forward.logits has response positions only.
        module: Any = self._trainer.lightning_module
        logits = _all_logits(module.model, forward)
        reference = forward.reference
        with module.reference().at_work() as aligned:
            teacher = _all_logits(aligned, reference)
        return divergence(logits, teacher, self.direction) / len(forward.batch["labels"])


def _all_logits(model: Any, forward: Forward) -> Tensor:
    """Return the logits at all positions, ``[batch * vocabulary, tokens]``, in float32 or a wider type."""
    logits = model.get_output_embeddings()(forward.features[HIDDEN])
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).transpose(1, 2).flatten(0, 1)
