"""MLLR: a full learning rate for the robust modules, and a small one for the modules that safety depends on."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from typing_extensions import override

from hftlight.engine import Defense, Slot, Stage
from hftlight.models.module import SafetyModule, decoder_layers


def in_modules(names: Sequence[str], patterns: Sequence[str], layer_of: Mapping[str, int]) -> dict[str, bool]:
    """Return for every parameter whether one of the patterns matches its module.

    Args:
        names: parameter names, such as ``model.layers.3.self_attn.q_proj.weight``.
        patterns: a module's own name, ``"q_proj"``, or that name in a span of layers, ``"q_proj:0-7"``, ends included.
        layer_of: decoder layer of each parameter that lies in one, counted from 0.

    Raises:
        ValueError: if a pattern cannot be parsed or matches no module.
    """
    matches = dict.fromkeys(names, False)
    for pattern in patterns:
        word, colon, span = pattern.partition(":")
        ends = [int(n) for n in span.split("-") if n.isdigit()]
        if colon and (len(ends) != 2 or ends[0] > ends[1]):
            raise ValueError(f"MLLR: robust names modules such as 'q_proj' or 'q_proj:0-7', got {pattern!r}.")
        # A parameter outside the decoder layers has the layer -1, so that no span contains it.
        hits = [
            name
            for name in names
            if word in name.split(".") and (not colon or ends[0] <= layer_of.get(name, -1) <= ends[1])
        ]
        if not hits:
            known = sorted({_module(name) for name in names})
            raise ValueError(f"MLLR: no trainable module is called {pattern!r}; choose from {known}.")
        matches.update(dict.fromkeys(hits, True))
    return matches


def _module(name: str) -> str:
    """Return the own name of a parameter's module, or of the adapted layer if the parameter is an adapter's."""
    parts = name.split(".lora_")[0].split(".")
    return parts[-1] if ".lora_" in name else parts[-2] if len(parts) > 1 else parts[-1]


class MLLR(Defense):
    r"""Train robust modules at the full learning rate and all others at a small one.

    A module is robust if perturbing it leaves the model's internal separation of harmful from ordinary prompts intact.
    The learning rate of robust modules is :math:`\eta`. That of all other parameters is :math:`\gamma\eta`, at every
    step of the schedule.

    Args:
        robust: the robust modules: names such as ``q_proj``, or a name in a span of layers, ``q_proj:0-7``.
        gamma: factor of the learning rate of all other parameters, in [0, 1]; 0 freezes them, 1 is plain fine-tuning.

    Raises:
        ValueError: if ``gamma`` is out of range, ``robust`` is empty, or a name is not in the model.

    Cost: nothing per step; two optimizer parameter groups.
    Source: Du et al., "Toward Secure Tuning: Mitigating Security Risks Arising from Benign Instruction Fine-Tuning",
    arXiv:2410.04524 (version 1, ML-LR); no official code is known.
    Differs: a separate function, ``hftlight.analysis.robust_modules``, searches for the robust modules, once per
    aligned model. Its result is the argument here. The ratio is not verified against the paper; 0.1 is a starting
    point. Clipping acts on the joint gradient of both groups.
    """

    stage, slots = Stage.FINETUNING, (Slot.ADAPTER,)
    claims = ("parameter groups",)

    def __init__(self, robust: Sequence[str] = ("v_proj", "o_proj"), gamma: float = 0.1) -> None:
        if not 0 <= gamma <= 1:
            raise ValueError(f"MLLR: gamma is a factor and must lie in [0, 1], got {gamma}.")
        if isinstance(robust, str) or not robust:
            raise ValueError(f"MLLR: robust must be a list of module names such as ['q_proj'], got {robust!r}.")
        super().__init__()
        self.robust, self.gamma = list(robust), gamma

    @override
    def build(self, module: SafetyModule) -> None:
        # Layers are matched by the parameter object, since names within a layer lack the module's prefix.
        of_tensor = {id(p): i for i, layer in enumerate(decoder_layers(module.model)) for p in layer.parameters()}
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        layer_of = {name: of_tensor[id(p)] for name, p in named.items() if id(p) in of_tensor}
        robust = in_modules(list(named), self.robust, layer_of)
        if all(robust.values()):
            raise ValueError(
                f"MLLR: robust names every trainable module, {self.robust}; remove the modules that safety depends on."
            )
        self.record(robust_tensors=sum(robust.values()), other_tensors=len(robust) - sum(robust.values()))
        module.parameter_groups = partial(self.groups, robust=robust, lr=module.lr)

    def groups(self, named: dict[str, nn.Parameter], robust: dict[str, bool], lr: float) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups: the robust modules, then all other parameters.

        Args:
            named: trainable parameters by name.
            robust: whether each parameter belongs to a robust module.
            lr: the module's learning rate.
        """
        return [
            {"params": [p for name, p in named.items() if robust[name]], "lr": lr},
            {"params": [p for name, p in named.items() if not robust[name]], "lr": lr * self.gamma},
        ]

    @override
    def unbuild(self, module: SafetyModule) -> None:
        module.parameter_groups = None
