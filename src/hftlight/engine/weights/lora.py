"""The user's update in a LoRA adapter, layer by layer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hftlight.engine.step.vectors import whole
from hftlight.engine.weights.lowrank import LowRank
from hftlight.engine.weights.stored import plain_name


@dataclass(frozen=True)
class LoraUpdate:
    """One adapted layer's part of the user's update, ``scale * B A``.

    Writing into the parameters edits the model.

    Attributes:
        name: plain name of the adapted weight, such as ``model.layers.0.self_attn.q_proj.weight``.
        layer: the LoRA layer.
        a: A, ``[rank, in]``.
        b: B, ``[out, rank]``.
        scale: factor of ``B A`` as the layer uses it, rank-stabilized or not.
        weight: frozen weight under the adapter; packed if it is quantized.
        adapter: name of the adapter.
    """

    name: str
    layer: Any
    a: nn.Parameter
    b: nn.Parameter
    scale: float
    weight: Tensor
    adapter: str = "default"

    def factors(self) -> LowRank:
        """Return the update with whole factors.

        Under sharding these thin matrices are gathered.
        """
        return LowRank(whole(self.b.detach()), whole(self.a.detach()), self.scale)


def has_adapter(model: nn.Module) -> bool:
    """Tell whether a model is wrapped by PEFT."""
    return hasattr(model, "peft_config")


def lora_updates(model: nn.Module) -> dict[str, LoraUpdate]:
    """Return the adapted layers of a PEFT model by the plain name of their weight.

    Raises:
        TypeError: if the adapter is not plain LoRA on linear layers. Another method, several active adapters, DoRA or
            another variant, and adapted embeddings are refused. Trained biases or modules, and an adapter that is
            merged or off, are refused too.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    updates: dict[str, LoraUpdate] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, AuxiliaryTrainingWrapper):
            raise TypeError(_unfit(name, "it is trained as a whole module (modules_to_save)"))
        if not isinstance(layer, BaseTunerLayer):
            continue
        if not isinstance(layer, LoraLayer):
            raise TypeError(_unfit(name, f"its adapter is {type(layer).__name__}"))
        if layer.merged or layer.disable_adapters:
            raise TypeError(_unfit(name, "its adapter is merged or off"))
        active = [a for a in layer.active_adapters if a in layer.lora_A or a in layer.lora_embedding_A]
        if len(active) > 1:
            raise TypeError(_unfit(name, f"several adapters are active, {active}"))
        if not active:
            continue
        adapter = active[0]
        if adapter in layer.lora_embedding_A or not isinstance(layer.lora_A[adapter], nn.Linear):
            raise TypeError(_unfit(name, f"it is not a linear layer ({type(layer.get_base_layer()).__name__})"))
        if adapter in layer.lora_variant or layer.use_dora.get(adapter):
            raise TypeError(_unfit(name, f"its adapter is a variant, {layer.lora_variant.get(adapter) or 'DoRA'}"))
        if layer.lora_A[adapter].bias is not None or layer.lora_B[adapter].bias is not None:
            raise TypeError(_unfit(name, "its adapter has a bias"))
        weight = f"{plain_name(name)}.weight"
        updates[weight] = LoraUpdate(
            weight,
            layer,
            layer.lora_A[adapter].weight,
            layer.lora_B[adapter].weight,
            float(layer.scaling[adapter]),
            layer.get_base_layer().weight,
            adapter,
        )
    if not updates:
        raise TypeError("No layer of this PEFT model has an active LoRA adapter.")
    return updates


def replace_updates(model: Any, matrices: Mapping[str, LowRank]) -> int:
    """Let a model's adapter hold other updates, all at one rank and at scale 1.

    Factors of lower rank are padded with zeros. The adapter's configuration gets the new rank.

    Args:
        model: a PEFT model; changed in place.
        matrices: the update of every adapted layer, by the plain name of its weight.

    Returns:
        The rank, the largest of the matrices.
    """
    updates = lora_updates(model)
    rank = max(m.b.shape[1] for m in matrices.values())
    for name, update in updates.items():
        _put(update, matrices[name], rank)
    settings = model.peft_config[next(iter(updates.values())).adapter]
    settings.r = settings.lora_alpha = rank
    settings.use_rslora, settings.rank_pattern, settings.alpha_pattern = False, {}, {}
    return rank


@contextmanager
def other_updates(updates: Mapping[str, LoraUpdate], matrices: Mapping[str, LowRank]) -> Iterator[None]:
    """Run the block with other updates in the adapter, then restore the layers' own, also after an exception.

    Args:
        updates: from ``lora_updates``.
        matrices: the updates of the block by the same names; a layer without one has no update in the block.
    """
    try:
        for name, u in updates.items():
            _put(u, matrices.get(name, LowRank(u.b.detach()[:, :0], u.a.detach()[:0])))
        yield
    finally:
        for u in updates.values():
            u.layer.lora_A[u.adapter].weight, u.layer.lora_B[u.adapter].weight = u.a, u.b
            u.layer.scaling[u.adapter] = u.scale


def _put(update: LoraUpdate, matrix: LowRank, rank: int | None = None) -> None:
    """Let a layer hold new factors, at scale 1. With ``rank`` they are padded to it and counted by the layer."""
    layer, adapter, own = update.layer, update.adapter, matrix.b.shape[1]
    b = update.b.new_zeros(update.b.shape[0], own if rank is None else rank)
    a = update.a.new_zeros(own if rank is None else rank, update.a.shape[1])
    b[:, :own], a[:own] = matrix.scale * matrix.b, matrix.a
    layer.lora_A[adapter].weight = nn.Parameter(a, requires_grad=update.a.requires_grad)
    layer.lora_B[adapter].weight = nn.Parameter(b, requires_grad=update.b.requires_grad)
    layer.scaling[adapter] = 1.0
    if rank is not None:
        layer.r[adapter] = layer.lora_alpha[adapter] = rank
        layer.lora_A[adapter].out_features = layer.lora_B[adapter].in_features = rank


def _unfit(name: str, why: str) -> str:
    return (
        f"{plain_name(name)}: {why}; a repair takes one plain LoRA adapter on linear layers. Merge the adapter into"
        " the model and repair all parameters instead."
    )
