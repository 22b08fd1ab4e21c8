"""LoRA on a base model: attach an adapter, check its targets, and add two adapters up into one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hftlight.config import ALL_LINEAR, Lora
from hftlight.engine.step.passes import same_random_state
from hftlight.engine.weights.stored import plain_name, stored_factors
from hftlight.errors import InputError
from hftlight.model_files import model_path, stands_on

SECOND = 1_000_003  # added to the seed of an adapter on an aligned model
SCRATCH = "scratch"  # name of an adapter that is thrown away, beside an adapter that stays
HARDENING = 2_000_003  # added to the seed of an adapter that hardens an aligned model, before any upload


def adapter_seed(seed: int, aligned: bool, hardening: bool = False) -> int:
    """Return the seed for a new adapter's A matrix.

    On an aligned model the seed is offset, so that A differs from the alignment adapter's A. With the same A, an upload
    would train in exactly the directions that the alignment moved. An attacker cannot arrange that.

    Args:
        seed: the run's seed.
        aligned: whether the adapter is put on an aligned model.
        hardening: whether the adapter on an aligned model is the defender's, which has an offset of its own.
    """
    return seed + (HARDENING if hardening else SECOND) if aligned else seed


def attach(model: Any, lora: Lora, seed: int) -> nn.Module:
    """Return the model with a new, trainable LoRA adapter.

    The adapter's B is zero, so it does not change the model's outputs yet.

    Args:
        model: a causal LM.
        lora: settings of the adapter.
        seed: seed of the adapter's A. It also sets the random state of the process.

    Raises:
        InputError: if a target names no linear layer, or the output layer or the input embedding.
    """
    from peft import get_peft_model

    transposed = check_targets(model, lora.targets)
    torch.manual_seed(seed)  # only here, since loading the model may draw random numbers
    return get_peft_model(model, _settings(lora, transposed))


def _settings(lora: Lora, transposed: bool) -> Any:
    """Return PEFT's settings of an adapter on layers that may be stored transposed."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=ALL_LINEAR if lora.targets == [ALL_LINEAR] else list(lora.targets),
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
    )


@contextmanager
def scratch_adapter(model: Any, lora: Lora, seed: int) -> Iterator[nn.Module]:
    """Yield the model with a new, trainable adapter, and remove the adapter when the block ends.

    Everything else is frozen inside the block. An adapter that the model has already keeps acting. Weights, gradient
    flags and the random state are restored, also after an exception.

    Args:
        model: a causal LM, or a PEFT model around one.
        lora: settings of the adapter.
        seed: seed of the adapter's A.

    Raises:
        InputError: as for ``attach``.
    """
    from peft import PeftModel

    flags = {p: p.requires_grad for p in model.parameters()}
    tree = [(module, dict(module._modules)) for module in model.modules()]
    device = next(model.parameters()).device
    stacked = isinstance(model, PeftModel)
    active = list(model.active_adapters) if stacked else []
    adapted = None
    try:
        with same_random_state(device):
            if stacked:
                whole = model.get_base_model()
                transposed = check_targets(whole, lora.targets)
                names = [name for name in linear_layers(whole) if _named(name, lora.targets)]
                torch.manual_seed(seed)
                model.add_adapter(SCRATCH, _settings(replace(lora, targets=names), transposed))
            else:
                adapted = attach(model, lora, seed)
        if stacked:
            model.base_model.set_adapter([*active, SCRATCH])
            for name, p in model.named_parameters():
                p.requires_grad_(f".{SCRATCH}." in name)
        yield model if adapted is None else adapted
    finally:
        if adapted is not None:
            adapted.unload()  # type: ignore[operator]
        elif stacked and SCRATCH in model.peft_config:
            model.base_model.set_adapter(active)
            model.delete_adapter(SCRATCH)
            # PEFT leaves its wrapper around layers that only this adapter adapted.
            for module, children in tree:
                module._modules.clear()
                module._modules.update(children)
        for p, flag in flags.items():
            p.requires_grad_(flag)


def check_targets(model: Any, targets: Sequence[str]) -> bool:
    """Refuse names that are not linear layers, and return whether the layers are stored transposed (Conv1D).

    The output layer and the input embedding are refused too, since the two may be one weight. Other libraries would
    compute another model from an adapter there, merged or not.

    Args:
        model: a causal LM, which may be on the meta device.
        targets: names as ``lora.targets`` takes them.

    Raises:
        InputError: if a name is refused; the message names the layers that can be adapted.
    """
    from transformers.pytorch_utils import Conv1D

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    layers = linear_layers(model)
    kinds = sorted({type(m).__name__ for m in layers.values()})
    known = f"linear layers are {sorted({n.rsplit('.', 1)[-1] for n in layers})} ({', '.join(kinds)})"
    transposed = any(isinstance(m, Conv1D) for m in layers.values())
    if list(targets) == [ALL_LINEAR]:
        return transposed
    for target in targets:
        matches = {name: m for name, m in model.named_modules() if _named(name, [target])}
        if any(m is head or m is embedding for m in matches.values()):
            raise InputError(
                f"--lora.targets: {target!r} is the output layer or the input embedding, which get no adapter;"
                f" {known}. To train them as well, use --tuning full."
            )
        if not matches or not matches.keys() <= layers.keys():
            raise InputError(f"--lora.targets: no linear layer is called {target!r}; {known}.")
    return transposed


def target_layers(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Module]:
    """Return the linear layers that an adapter with these targets adapts, by their plain names.

    Layers that an adapter already wraps are returned with it.

    Args:
        model: a causal LM, or a PEFT model around one.
        targets: names as ``lora.targets`` takes them.
    """
    names = [name for name in linear_layers(model) if _named(name, targets)]
    return {plain_name(name): model.get_submodule(name) for name in names}


def dense_weight(layer: Any) -> Tensor:
    """Return the weight of a linear layer as a plain matrix ``[out, in]``, at least float32, adapters included."""
    from peft.utils.integrations import dequantize_module_weight
    from transformers.pytorch_utils import Conv1D

    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    weight = dequantize_module_weight(base).detach()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if base is not layer and not layer.disable_adapters:
        for name in layer.active_adapters:
            weight = weight + layer.get_delta_weight(name).detach().to(weight)
    return weight.T if isinstance(base, Conv1D) else weight


def check_stackable(model: str, way: str) -> None:
    """Refuse an adapter that cannot be added up with a new adapter on the same base model.

    Args:
        model: name of a model, as for ``load_model``; whole models pass.
        way: what to do instead, for the error message.

    Raises:
        InputError: if the adapter, or an adapter under it, is not plain LoRA.
    """
    name: str | None = model
    while name is not None and (base := stands_on(name)) is not None:
        try:
            stored_factors(Path(model_path(name)))
        except ValueError as error:
            raise InputError(
                f"--model {model}: {str(error).partition(' Merge')[0].removeprefix(f'{model}: ')} {way}"
            ) from error
        name = base


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """Return the linear layers of a causal LM by name, without the output layer.

    An adapter around a layer is looked through, so an adapted layer counts once and as itself.
    """
    from transformers.pytorch_utils import Conv1D

    head, layers, inside = model.get_output_embeddings(), dict[str, nn.Module](), set[nn.Module]()
    for name, module in model.named_modules():
        own = getattr(module, "base_layer", module)
        if module not in inside and isinstance(own, nn.Linear | Conv1D) and own is not head:
            layers[name] = own
        if own is not module:
            inside |= set(module.modules())
    return layers


def _named(name: str, targets: Sequence[str]) -> bool:
    """Tell whether a target matches a module: the module's dotted name ends in it."""
    return list(targets) == [ALL_LINEAR] or any(f".{name}".endswith(f".{target}") for target in targets)


def add_up(earlier: Path, later: dict[str, Tensor], later_scale: float) -> tuple[dict[str, Tensor], int]:
    """Return one adapter whose update is the sum of two adapters' updates, and its rank r1 + r2.

    The scale of the sum is 1. With ``A = [A1; A2]`` and ``B = [s1 B1, s2 B2]``, ``B A = s1 B1 A1 + s2 B2 A2`` exactly.
    If only one of the two adapts a layer, the other contributes zeros there.

    Args:
        earlier: folder of the first adapter, as PEFT saves it. Adapters that it stands on are included.
        later: state of the second adapter, by the names that PEFT saves: ``*.lora_A.weight`` ``[r, in]`` and
            ``*.lora_B.weight`` ``[out, r]``.
        later_scale: alpha / r of the second adapter.
    """
    first = plain_state(earlier)
    scales = (1.0, later_scale)
    ranks = [max(t.shape[0] for name, t in state.items() if "lora_A" in name) for state in (first, later)]
    total: dict[str, Tensor] = {}
    for stem in sorted({name.split(".lora_")[0] for name in (*first, *later)}):
        downs, ups = [], []
        reference = first if f"{stem}.lora_A.weight" in first else later
        for state, scale, rank in zip((first, later), scales, ranks, strict=True):
            down, up = state.get(f"{stem}.lora_A.weight"), state.get(f"{stem}.lora_B.weight")
            if down is None or up is None:
                down = torch.zeros(rank, reference[f"{stem}.lora_A.weight"].shape[1])
                up = torch.zeros(reference[f"{stem}.lora_B.weight"].shape[0], rank)
            missing = rank - len(down)  # layers may differ in rank, but the sum has one rank for all
            downs.append(nn.functional.pad(down.float().cpu(), (0, 0, 0, missing)))
            ups.append(nn.functional.pad(scale * up.float().cpu(), (0, missing)))
        total[f"{stem}.lora_A.weight"] = torch.cat(downs).contiguous()
        total[f"{stem}.lora_B.weight"] = torch.cat(ups, dim=1).contiguous()
    return total, sum(ranks)


def plain_state(folder: Path) -> dict[str, Tensor]:
    """Return the state of an adapter folder as one adapter of scale 1 on the whole model under it.

    The keys are the names that PEFT saves. Adapters under the folder's adapter are included.

    Raises:
        ValueError: if the adapter, or an adapter under it, is not plain LoRA.
    """
    state: dict[str, Tensor] = {}
    for stem, m in stored_factors(folder).items():
        state[f"{stem}.lora_A.weight"], state[f"{stem}.lora_B.weight"] = m.a.float(), m.scale * m.b.float()
    base = stands_on(str(folder))
    if base is not None and stands_on(base) is not None:
        state, _ = add_up(Path(model_path(base)), state, 1.0)
    return state


def adapted_layers(state: Mapping[str, Tensor]) -> list[str]:
    """Return the full names of the layers in an adapter's state, as ``target_modules`` takes them."""
    return sorted({name.split(".lora_")[0].removeprefix("base_model.model.") for name in state})
