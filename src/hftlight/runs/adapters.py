"""LoRA on a base model: attached, merged, and two adapters added up into one."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hftlight.config import Lora
from hftlight.errors import InputError

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
        InputError: if no layer has one of the target names.
    """
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)  # after the model was loaded, which may draw numbers
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        linear = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise InputError(f"--lora.targets: no layer is called {lora.targets}; linear layers are {linear}.") from error


def add_up(earlier: Path, later: dict[str, Tensor], later_scale: float) -> tuple[dict[str, Tensor], int]:
    """Return one adapter whose update is the sum of two: rank r1 + r2, scale 1.

    With ``A = [A1; A2]`` and ``B = [s1 B1, s2 B2]``, ``B A = s1 B1 A1 + s2 B2 A2`` exactly. A layer that only one of
    the two adapts gets zeros from the other.

    Args:
        earlier: folder of the first adapter, as PEFT saves it.
        later: state of the second, by the names PEFT saves: ``*.lora_A.weight`` ``[r, in]`` and ``*.lora_B.weight``
            ``[out, r]``.
        later_scale: alpha / r of the second.
    """
    from peft import PeftConfig
    from safetensors.torch import load_file

    first = load_file(earlier / "adapter_model.safetensors")
    settings: Any = PeftConfig.from_pretrained(str(earlier))
    scales = (settings.lora_alpha / settings.r, later_scale)
    ranks = [next(t.shape[0] for name, t in state.items() if "lora_A" in name) for state in (first, later)]
    total: dict[str, Tensor] = {}
    for stem in sorted({name.split(".lora_")[0] for name in (*first, *later)}):
        downs, ups = [], []
        reference = first if f"{stem}.lora_A.weight" in first else later
        for state, scale, rank in zip((first, later), scales, ranks, strict=True):
            down, up = state.get(f"{stem}.lora_A.weight"), state.get(f"{stem}.lora_B.weight")
            if down is None or up is None:
                down = torch.zeros(rank, reference[f"{stem}.lora_A.weight"].shape[1])
                up = torch.zeros(reference[f"{stem}.lora_B.weight"].shape[0], rank)
            downs.append(down.float().cpu())
            ups.append(scale * up.float().cpu())
        total[f"{stem}.lora_A.weight"] = torch.cat(downs).contiguous()
        total[f"{stem}.lora_B.weight"] = torch.cat(ups, dim=1).contiguous()
    return total, sum(ranks)
