"""Analysis: the modules that noise can disturb while a probe still tells harmful from ordinary prompts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from hftlight.analysis.ridge import probe
from hftlight.engine.step.activations import hooked
from hftlight.models.module import decoder_layers

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class RobustModules:
    """Result of ``robust_modules``.

    Attributes:
        robust: patterns of the robust modules, in the form of ``MLLR(robust=...)``.
        accuracy: accuracy of the probe on held-out prompts without a disturbance, 0-1.
        joint: accuracy of the probe with all of ``robust`` disturbed together, 0-1.
        alone: accuracy of the probe with one pattern disturbed, 0-1, for every pattern that was tried.
    """

    robust: list[str]
    accuracy: float
    joint: float
    alone: dict[str, float]


def robust_modules(
    model: nn.Module,
    harmful: Sequence[Mapping[str, Tensor]],
    ordinary: Sequence[Mapping[str, Tensor]],
    spans: int = 4,
    scale: float = 0.5,
    retained: float = 0.95,
    seed: int = 0,
) -> RobustModules:
    """Return a greedily grown set of modules whose joint disturbance leaves the probe accurate.

    A linear probe tells harmful from ordinary prompts by the last token's state after the last decoder layer. It is
    fitted on every second prompt and judged on the others. First, each kind of module in each span of layers is
    disturbed alone. The disturbance is Gaussian noise of ``scale`` times the weight's root mean square. Then modules
    join the set in the order of the accuracy that they left; the probe's margin breaks ties. A module joins only if the
    joint accuracy stays high enough (``retained``).

    Args:
        model: the aligned model, a causal LM, with or without PEFT. Its weights are restored afterwards.
        harmful: prompts as batches of ``input_ids`` and ``attention_mask`` (right padding), ``[batch, tokens]``.
        ordinary: likewise.
        spans: number of spans of layers that the model is cut into, >= 1.
        scale: size of the disturbance, relative to each weight's root mean square, > 0.
        retained: smallest joint accuracy, as a fraction of the undisturbed one, in (0, 1].
        seed: seed of the noise.

    Raises:
        ValueError: if an argument is out of range, a kind has fewer than four prompts, or the probe is no better than
            chance. Such a probe has no accuracy to lose.

    Cost: forward passes only, two over all prompts for each module and span; a copy of the disturbed weights.
    Source: Du et al., arXiv:2410.04524 (version 1), section on the search of robust modules; no official code is known.
    Differs: the paper's disturbance, classifier and search rule are not verified. Scale, spans and threshold are
    arguments with starting values. The classifier is ridge regression, and the search tries the modules once in order.
    """
    for name, value, good in (("spans", spans, spans >= 1), ("scale", scale, scale > 0)):
        if not good:
            raise ValueError(f"robust_modules: {name} must be positive, got {value}.")
    if not 0 < retained <= 1:
        raise ValueError(f"robust_modules: retained is a fraction and must lie in (0, 1], got {retained}.")
    layers = decoder_layers(model)
    search = _Search(model, layers, harmful, ordinary, scale, seed)
    # One pattern per kind and span of layers; a kind that no layer of the span has is left out.
    candidates = {
        f"{kind}:{span[0]}-{span[-1]}": weights
        for span in (chunk.tolist() for chunk in torch.arange(len(layers)).chunk(spans))
        for kind in KINDS
        if (weights := [w for i in span for w in _weights(layers[i], kind)])
    }
    alone = {}
    for number, (pattern, weights) in enumerate(candidates.items(), 1):
        alone[pattern] = search.judge(weights)
        rank_zero_info(f"{number}/{len(candidates)} {pattern}: probe accuracy {alone[pattern][0]:.3f}")
    robust: list[str] = []
    joint = search.undisturbed[0]
    # Greedy: the best pattern comes first, and each is judged together with all that have joined.
    for pattern in sorted(alone, key=lambda p: alone[p], reverse=True):
        with_it = search.judge([w for p in (*robust, pattern) for w in candidates[p]])[0]
        if with_it >= retained * search.undisturbed[0]:
            robust.append(pattern)
            joint = with_it
    order = list(candidates)
    return RobustModules(
        sorted(robust, key=order.index), search.undisturbed[0], joint, {p: alone[p][0] for p in candidates}
    )


class _Search:
    """The prompts, the probe, and its accuracy and mean margin under a disturbance."""

    def __init__(
        self,
        model: nn.Module,
        layers: nn.ModuleList,
        harmful: Sequence[Mapping[str, Tensor]],
        ordinary: Sequence[Mapping[str, Tensor]],
        scale: float,
        seed: int,
    ) -> None:
        self.model, self.last, self.batches = model, layers[-1], [*harmful, *ordinary]
        self.scale, self.seed = scale, seed
        counts = [sum(len(b["input_ids"]) for b in batches) for batches in (harmful, ordinary)]
        if min(counts) < 4:
            raise ValueError(
                f"robust_modules: needs at least 4 harmful and 4 ordinary prompts, got {counts[0]} and {counts[1]}."
            )
        self.harmful = torch.arange(sum(counts)) < counts[0]
        self.held_out = torch.arange(sum(counts)) % 2 == 1
        states = self._states()
        self.w, self.b = probe(states[~self.held_out], self.harmful[~self.held_out])
        self.undisturbed = self._judge(states)
        chance = max(counts) / sum(counts)
        if self.undisturbed[0] <= chance:
            raise ValueError(
                f"robust_modules: the probe is right on {self.undisturbed[0]:.0%} of held-out prompts, no more than"
                f" chance ({chance:.0%}), so it has no accuracy to lose. Give more prompts, or an aligned model."
            )

    def judge(self, weights: Sequence[nn.Parameter]) -> tuple[float, float]:
        """Return the probe's accuracy and mean margin with these weights disturbed."""
        with _disturbed(weights, self.scale, self.seed):
            return self._judge(self._states())

    def _judge(self, states: Tensor) -> tuple[float, float]:
        # The classifier's value times the label: positive for a prompt that is classified correctly.
        values = (states[self.held_out].double() @ self.w + self.b) * (self.harmful[self.held_out].double() * 2 - 1)
        return float((values > 0).double().mean()), float(values.mean())

    def _states(self) -> Tensor:
        """Return every prompt's state at its last real token after the last layer, ``[n, hidden]`` on the CPU."""
        states: list[Tensor] = []
        training = [m for m in self.model.modules() if m.training]
        self.model.eval()
        try:
            with torch.no_grad():
                for batch in self.batches:
                    last = batch["attention_mask"].sum(1) - 1

                    def keep(_: str, hidden: Tensor, last: Tensor = last) -> None:
                        states.append(hidden[torch.arange(len(last)), last.to(hidden.device)].cpu())

                    with hooked({"last": self.last}, keep):
                        self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        finally:
            for m in training:
                m.training = True
        return torch.cat(states)


def _weights(layer: nn.Module, kind: str) -> list[nn.Parameter]:
    """Return the weights of a layer's modules of one kind, without their adapters."""
    modules = [m for name, m in layer.named_modules() if name.rpartition(".")[2] == kind]
    return [getattr(m, "base_layer", m).weight for m in modules]


@contextmanager
def _disturbed(weights: Sequence[nn.Parameter], scale: float, seed: int) -> Iterator[None]:
    """Add noise of ``scale`` times each weight's root mean square, then restore the weights bit for bit.

    The weights are restored from copies, also after an exception.
    """
    saved = [w.detach().clone() for w in weights]
    try:
        with torch.no_grad():
            generator = torch.Generator(weights[0].device).manual_seed(seed)
            for w in weights:
                noise = torch.randn(w.shape, generator=generator, device=w.device, dtype=torch.float32)
                w.add_((noise * (scale * w.float().square().mean().sqrt())).to(w.dtype))
        yield
    finally:
        with torch.no_grad():
            for w, before in zip(weights, saved, strict=True):
                w.copy_(before)
