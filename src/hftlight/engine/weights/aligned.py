"""The aligned model under a fine-tuned one: a block at its weights, and the adapter merged into them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hftlight.engine.step.vectors import local, whole
from hftlight.engine.weights.lora import LoraUpdate, has_adapter, lora_updates
from hftlight.engine.weights.shards import share
from hftlight.engine.weights.stored import plain_name
from hftlight.engine.weights.subject import Subject

BLOCK = 1024  # rows merged at one time


@contextmanager
def at_aligned(subject: Subject, who: str) -> Iterator[None]:
    """Run the block at the aligned weights, and restore the fine-tuned ones afterwards, even after an exception.

    Args:
        subject: the fine-tuned model.
        who: name of the repair, for the error.

    Raises:
        ValueError: if a weight has another shape in the aligned model.
    """
    model, start = subject.model, subject.start
    assert start is not None
    # Under an adapter B = 0 gives the aligned model. Without one, or after an earlier repair merged it, the base
    # weights are exchanged too. Both cases save what they overwrite.
    parameters: dict[str, nn.Parameter] = {}
    if has_adapter(model):
        parameters = {f"{name} (B)": u.b for name, u in lora_updates(model).items()}
    if subject.dense or not has_adapter(model):
        parameters |= {plain_name(name): p for name, p in model.named_parameters() if ".lora_" not in name}
    saved = {name: local(p.detach()).to("cpu", copy=True) for name, p in parameters.items()}
    try:
        for name, p in parameters.items():
            if name.endswith(" (B)"):
                local(p.detach()).zero_()
                continue
            if start.shape(name) != tuple(p.shape):
                raise ValueError(
                    f"{who}: {name} has shape {list(p.shape)}, and {start.shape(name)} in the aligned model. Give the"
                    " model that the fine-tuning started from."
                )
            rows = share(p)
            local(p.detach()).copy_(start.rows(name, rows.start, rows.stop))
        yield
    finally:
        for name, p in parameters.items():
            local(p.detach()).copy_(saved[name])


def merge(update: LoraUpdate, mask: Tensor | None = None) -> int:
    """Add the update to the weight except at masked entries, and zero B.

    Args:
        update: one adapted layer's update.
        mask: entries that keep the value under the adapter, ``[rows, in]`` or ``[rows, 1]`` of this rank's rows, bool.

    Returns:
        The number of masked entries that the update would have changed, over all ranks.
    """
    dtype = torch.promote_types(update.b.dtype, torch.float32)
    weight, b = local(update.weight.detach()), local(update.b.detach())
    a = whole(update.a.detach()).to(dtype)
    count = torch.zeros((), dtype=torch.int64, device=weight.device)
    for at in range(0, len(weight), BLOCK):
        part = weight[at : at + BLOCK]
        delta = update.scale * (b[at : at + BLOCK].to(dtype) @ a)
        masked = torch.zeros_like(part, dtype=torch.bool) if mask is None else mask[at : at + BLOCK]
        count += ((delta != 0) & masked).sum()
        part.copy_(torch.where(masked, part, (part.to(dtype) + delta).to(part.dtype)))
    b.zero_()
    return int(share(update.weight).sum(count)[0])
