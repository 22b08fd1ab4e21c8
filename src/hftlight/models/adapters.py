"""LoRA on a base model: attached, merged, and two adapters added up into one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hftlight.config import ALL_LINEAR, Lora
from hftlight.engine.weights.stored import stored_factors
from hftlight.errors import InputError
from hftlight.model_files import model_path, stands_on

SECOND = 1_000_003  # what the seed of an adapter on an aligned model is larger by


def adapter_seed(seed: int, aligned: bool) -> int:
    """Return the seed of a fresh adapter's A: another one on an aligned model than the alignment's own adapter had.

    An upload that began at the A of the alignment would be trained on in just the directions that the alignment moved,
    which an attacker cannot arrange.

    Args:
        seed: the run's.
        aligned: whether the adapter goes on an aligned model.
    """
    return seed + SECOND if aligned else seed


def attach(model: Any, lora: Lora, seed: int) -> nn.Module:
    """Return the model with a fresh, trainable LoRA adapter; it does not change the function yet, since B is zero.

    Args:
        model: a causal LM.
        lora: the adapter.
        seed: of its A; the random state that the process has afterwards follows from it too.

    Raises:
        InputError: if a target names no linear layer, or the output layer.
    """
    from peft import LoraConfig, get_peft_model

    transposed = check_targets(model, lora.targets)
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=ALL_LINEAR if lora.targets == [ALL_LINEAR] else list(lora.targets),
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)  # after the model was loaded, which may draw numbers
    return get_peft_model(model, settings)


def check_targets(model: Any, targets: Sequence[str]) -> bool:
    """Refuse names that are not linear layers of a model; tell whether those layers are stored transposed (Conv1D).

    The output layer and the input embedding are refused too: other libraries compute another model from an adapter
    there, merged or not, since the two may be one weight.

    Args:
        model: a causal LM; on the meta device as well.
        targets: names as ``lora.targets`` takes them.

    Raises:
        InputError: naming the layers that can be adapted.
    """
    from transformers.pytorch_utils import Conv1D

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}
    kinds = sorted({type(m).__name__ for m in layers.values()})
    known = f"linear layers are {sorted({n.rsplit('.', 1)[-1] for n in layers})} ({', '.join(kinds)})"
    transposed = any(isinstance(m, Conv1D) for m in layers.values())
    if list(targets) == [ALL_LINEAR]:
        return transposed
    for target in targets:
        found = {name: m for name, m in model.named_modules() if f".{name}".endswith(f".{target}")}
        if any(m is head or m is embedding for m in found.values()):
            raise InputError(
                f"--lora.targets: {target!r} is the output layer or the input embedding, which get no adapter;"
                f" {known}. To train them as well, use --tuning full."
            )
        if not found or not found.keys() <= layers.keys():
            raise InputError(f"--lora.targets: no linear layer is called {target!r}; {known}.")
    return transposed


def check_stackable(model: str, way: str) -> None:
    """Refuse an adapter that cannot be one summand of a new adapter on the same base model.

    Args:
        model: as ``load_model`` takes it; whole models pass.
        way: what to do instead, for the error.

    Raises:
        InputError: if the adapter, or one under it, is anything but plain LoRA.
    """
    name: str | None = model
    while name is not None and (base := stands_on(name)) is not None:
        try:
            stored_factors(Path(model_path(name)))
        except ValueError as error:
            raise InputError(f"--model {model}: {str(error).partition('; merge')[0]}. {way}") from error
        name = base


def add_up(earlier: Path, later: dict[str, Tensor], later_scale: float) -> tuple[dict[str, Tensor], int]:
    """Return one adapter whose update is the sum of two: rank r1 + r2, scale 1.

    With ``A = [A1; A2]`` and ``B = [s1 B1, s2 B2]``, ``B A = s1 B1 A1 + s2 B2 A2`` exactly. A layer that only one of
    the two adapts gets zeros from the other.

    Args:
        earlier: folder of the first adapter, as PEFT saves it; one that stands on further adapters counts with them.
        later: state of the second, by the names PEFT saves: ``*.lora_A.weight`` ``[r, in]`` and ``*.lora_B.weight``
            ``[out, r]``.
        later_scale: alpha / r of the second.
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
            missing = rank - len(down)  # layers may differ in rank; the adapter has one rank for all
            downs.append(nn.functional.pad(down.float().cpu(), (0, 0, 0, missing)))
            ups.append(nn.functional.pad(scale * up.float().cpu(), (0, missing)))
        total[f"{stem}.lora_A.weight"] = torch.cat(downs).contiguous()
        total[f"{stem}.lora_B.weight"] = torch.cat(ups, dim=1).contiguous()
    return total, sum(ranks)


def plain_state(folder: Path) -> dict[str, Tensor]:
    """Return an adapter folder as an adapter of scale 1 on the whole model under it, by the names PEFT saves.

    Raises:
        ValueError: if it, or an adapter under it, is anything but plain LoRA.
    """
    state: dict[str, Tensor] = {}
    for stem, m in stored_factors(folder).items():
        state[f"{stem}.lora_A.weight"], state[f"{stem}.lora_B.weight"] = m.a.float(), m.scale * m.b.float()
    base = stands_on(str(folder))
    if base is not None and stands_on(base) is not None:
        state, _ = add_up(Path(model_path(base)), state, 1.0)
    return state


def adapted_layers(state: Mapping[str, Tensor]) -> list[str]:
    """Return the full names of the layers that an adapter's state is for, as ``target_modules`` takes them."""
    return sorted({name.split(".lora_")[0].removeprefix("base_model.model.") for name in state})
