"""SPPFT: fine-tune with the safety layers frozen."""

from typing import Any

from typing_extensions import override

from hftlight.engine import Defense, Slot, Stage
from hftlight.models.module import SafetyModule, decoder_layers

PUBLISHED_FIRST, PUBLISHED_LAST, PUBLISHED_DEPTH = 5, 14, 32


def safety_span(depth: int) -> tuple[int, int]:
    """Return the first and the last of the layers 5 to 14 of Llama-2-7B's 32, scaled to another depth, from 0."""
    first, last = (round(n * depth / PUBLISHED_DEPTH) for n in (PUBLISHED_FIRST, PUBLISHED_LAST))
    return min(first, depth - 1), min(max(first, last), depth - 1)


class SPPFT(Defense):
    r"""Freeze the decoder layers that tell harmful from ordinary prompts, and fine-tune the others.

    Let :math:`w_l` be the weights or adapters of layer l. The user's loss f is minimized over
    :math:`\{w_l : l < \mathrm{first} \text{ or } l > \mathrm{last}\}`. All parameters of the span keep their aligned
    values bit for bit, so neither weight decay nor momentum moves them.

    Args:
        first: first frozen layer, counted from 0; None for layer 5 of 32, scaled to the model's depth.
        last: last frozen layer, inclusive; None for layer 14 of 32, scaled; ``first - 1`` freezes nothing.

    Raises:
        ValueError: if the span is not in the model, or no parameter would be left to train.

    Cost: less than plain fine-tuning: no weight gradients and no optimizer state in the span.
    Source: Li et al., "Safety Layers in Aligned Large Language Models", ICLR 2025, arXiv:2408.17003.
    Differs: the paper locates a model's span by the angle between hidden states of harmful and ordinary prompts, and by
    scaling layers. Here the span is an argument. Its default is Llama-2-7B's span, scaled to the depth; set it for your
    model. No official training code exists. Under LoRA the span's adapters are frozen at their start values, which for
    a new adapter give the aligned model.
    """

    stage, slots = Stage.FINETUNING, (Slot.ADAPTER,)

    def __init__(self, first: int | None = None, last: int | None = None) -> None:
        if first is not None and not first >= 0:
            raise ValueError(f"SPPFT: first is a layer number, counted from 0, and must be >= 0, got {first}.")
        if last is not None and not last >= (first or 0) - 1:
            raise ValueError(f"SPPFT: last must be >= first - 1 (first - 1 freezes nothing), got {first} to {last}.")
        super().__init__()
        self.first, self.last = first, last
        self._frozen: list[Any] = []

    @override
    def build(self, module: SafetyModule) -> None:
        layers = decoder_layers(module.model)
        span = safety_span(len(layers))
        first = span[0] if self.first is None else self.first
        last = max(span[1], first) if self.last is None else self.last
        if last >= len(layers):
            raise ValueError(f"SPPFT: the model has the layers 0 to {len(layers) - 1}, got {first} to {last}.")
        frozen = [p for layer in layers[first : last + 1] for p in layer.parameters() if p.requires_grad]
        if len(frozen) == sum(p.requires_grad for p in module.parameters()):
            raise ValueError(
                f"SPPFT: layers {first} to {last} contain every trainable parameter, so nothing is left to train."
                " Freeze fewer layers."
            )
        for p in frozen:
            p.requires_grad_(False)
        self._frozen = frozen
        self.record(frozen_tensors=len(frozen), frozen_layers=last - first + 1)

    @override
    def unbuild(self, module: SafetyModule) -> None:
        for p in self._frozen:
            p.requires_grad_(True)
        self._frozen = []
