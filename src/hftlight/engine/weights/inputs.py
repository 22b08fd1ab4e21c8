"""Activity of layer inputs on some data: one forward pass, one number per input."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hftlight.engine.step.activations import hooked
from hftlight.engine.weights.shards import reshard


def input_squares(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Tensor]],
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    split: bool = False,
) -> tuple[dict[str, Tensor], int]:
    """Return the mean over samples of each module's squared input, summed over tokens, from one forward pass.

    Prompt and response tokens both count; padding does not. The result is at least float32.

    Args:
        model: a causal LM in eval mode.
        modules: layers of the model whose input is ``[batch, tokens, in]`` or ``[batch * tokens, in]``, by any name.
        batches: ``input_ids`` and, if there is padding, ``attention_mask``, each ``[batch, tokens]``.
        context: returns the context manager that a forward pass runs in.
        split: whether the ranks hold different batches, so that the sums are added over ranks.

    Returns:
        ``[in]`` for each module, and the number of samples.

    Raises:
        ValueError: if there is no batch.
        RuntimeError: if a layer never ran, or an activation is not finite.
    """
    sums: dict[str, Tensor] = {}
    latest: list[Any] = [None, None]  # layers with a common input, such as q, k and v, get one tensor in succession
    keep: Tensor = torch.ones(())

    def add(name: str, x: Tensor) -> None:
        if latest[0] is not x:
            inputs = x.to(torch.promote_types(x.dtype, torch.float32))
            if x.dim() == 2:  # OPT's MLP flattens rows and tokens into one dimension
                inputs = inputs.unflatten(0, keep.shape[:2])
            latest[:] = x, inputs.masked_fill(~keep, 0).square().sum(dim=(0, 1))
        sums[name] = sums[name] + latest[1] if name in sums else latest[1]

    samples, device = 0, None
    with ExitStack() as stack:
        stack.enter_context(hooked(modules, add, inputs=True))
        _leave_out_logits(model, modules, stack)
        for batch in batches:
            ids = batch["input_ids"]
            mask = batch.get("attention_mask", torch.ones_like(ids))
            keep, samples, device = mask.bool()[..., None], samples + len(ids), ids.device
            with context():
                model(input_ids=ids, attention_mask=mask, use_cache=False)
            latest[:] = None, None
    reshard(model)
    if samples == 0:
        raise ValueError("input_squares: there is no batch, so no input to measure; give at least one row.")
    silent = [name for name in modules if name not in sums]
    if silent:
        raise RuntimeError(
            f"input_squares: no input reached {silent[0]} and {len(silent) - 1} more; does the model use these layers?"
        )
    if split and dist.is_initialized():
        samples = _add_over_ranks(sums, samples, device)
    if not bool(torch.stack([s.sum() for s in sums.values()]).isfinite().all()):
        raise RuntimeError("input_squares: an activation is not finite; run the model in a wider type.")
    return {name: total / samples for name, total in sums.items()}, samples


def _leave_out_logits(model: Any, modules: Mapping[str, nn.Module], stack: ExitStack) -> None:
    """Pass one position only to the output layer, because nobody reads the logits.

    An output layer whose own input is measured is left unchanged.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and not any(head is m or head in m.children() for m in modules.values()):
        stack.enter_context(hooked({"head": head}, lambda _, hidden: hidden[:, :1], inputs=True))


def _add_over_ranks(sums: dict[str, Tensor], samples: int, device: torch.device | None) -> int:
    # One collective carries all sums and, as its last entry, the number of samples.
    flat = torch.cat([*(s.double() for s in sums.values()), torch.tensor([float(samples)], device=device).double()])
    dist.all_reduce(flat)
    parts = flat.split([len(s) for s in sums.values()] + [1])
    sums.update({name: part.to(s) for (name, s), part in zip(sums.items(), parts, strict=False)})
    return int(parts[-1])
