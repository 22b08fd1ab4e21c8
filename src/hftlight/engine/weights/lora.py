"""The user's update in a LoRA adapter, layer by layer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hftlight.engine.step.vectors import local, whole
from hftlight.engine.weights.lowrank import LowRank
from hftlight.engine.weights.shards import share
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


def sharded(updates: Mapping[str, LoraUpdate]) -> bool:
    """Tell whether several ranks share the factors of an adapter."""
    return any(share(update.b).group is not None for update in updates.values())


def grows(updates: Mapping[str, LoraUpdate], factors: Mapping[str, LowRank]) -> bool:
    """Tell whether new factors have a larger rank than those of the adapter in any layer."""
    return any(factors[name].b.shape[1] > update.a.shape[0] for name, update in updates.items())


def put_factors(model: nn.Module, factors: Mapping[str, LowRank]) -> None:
    """Replace the active adapter's factors by others of any rank.

    If no layer's rank grows, the factors are written in place and keep their ranks and scales. Otherwise all layers get
    the largest rank and scale 1. Missing components are zero.

    Args:
        model: a PEFT model.
        factors: the new update of every adapted layer, by the plain name of its weight.

    Raises:
        ValueError: if a sharded adapter would have to grow.
    """
    updates = lora_updates(model)
    if not grows(updates, factors):
        for name, update in updates.items():
            m, missing = factors[name], update.a.shape[0] - factors[name].b.shape[1]
            a = nn.functional.pad(m.a, (0, 0, 0, missing))
            b = nn.functional.pad(m.scale / update.scale * m.b, (0, missing))
            for p, value in ((update.a, a), (update.b, b)):
                rows = share(p)
                local(p.detach()).copy_(value[rows.start : rows.stop])
        return
    if sharded(updates):
        raise ValueError("put_factors: an adapter that FSDP2 has sharded cannot grow.")
    rank = max(m.b.shape[1] for m in factors.values())
    for name, update in updates.items():
        m, layer, adapter = factors[name], update.layer, update.adapter
        missing = rank - m.b.shape[1]
        new = {"lora_A": nn.functional.pad(m.a, (0, 0, 0, missing))}
        new["lora_B"] = nn.functional.pad(m.scale * m.b, (0, missing))
        for kind, value in new.items():
            linear = getattr(layer, kind)[adapter]
            old = linear.weight
            linear.weight = nn.Parameter(value.to(old).contiguous(), requires_grad=old.requires_grad)
            linear.out_features, linear.in_features = value.shape
        layer.r[adapter], layer.lora_alpha[adapter], layer.scaling[adapter] = rank, rank, 1.0
        settings: Any = model.peft_config[adapter]  # type: ignore[index, union-attr]
        settings.r = settings.lora_alpha = rank
        settings.rank_pattern, settings.alpha_pattern, settings.use_rslora = {}, {}, False


@contextmanager
def other_updates(updates: Mapping[str, LoraUpdate], matrices: Mapping[str, LowRank]) -> Iterator[None]:
    """Run the block with other updates in the adapter, then restore the layers' own, also after an exception.

    Args:
        updates: from ``lora_updates``.
        matrices: the updates of the block by the same names; a layer without one has no update in the block.
    """
    try:
        for name, u in updates.items():
            m = matrices.get(name, LowRank(u.b.detach()[:, :0], u.a.detach()[:0]))
            u.layer.lora_A[u.adapter].weight = nn.Parameter(m.a.to(u.a), requires_grad=u.a.requires_grad)
            u.layer.lora_B[u.adapter].weight = nn.Parameter((m.scale * m.b).to(u.b), requires_grad=u.b.requires_grad)
            u.layer.scaling[u.adapter] = 1.0
        yield
    finally:
        for u in updates.values():
            u.layer.lora_A[u.adapter].weight, u.layer.lora_B[u.adapter].weight = u.a, u.b
            u.layer.scaling[u.adapter] = u.scale


def _unfit(name: str, why: str) -> str:
    return (
        f"{plain_name(name)}: {why}; a repair takes one plain LoRA adapter on linear layers. Merge the adapter into"
        " the model and repair all parameters instead."
    )
