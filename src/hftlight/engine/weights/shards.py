"""Which rows of a matrix this rank holds, and sums over the ranks that share it."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Share:
    """The rows of a matrix that this rank holds.

    Attributes:
        start: the first of them in the whole matrix.
        stop: one past the last.
        total: rows of the whole matrix.
        group: the ranks that hold the others; None where this rank holds all.
    """

    start: int
    stop: int
    total: int
    group: Any = None

    def sum(self, *parts: Tensor) -> list[Tensor]:
        """Return sums over the ranks that share the matrix, one collective for all of them."""
        if self.group is None:
            return list(parts)
        flat = torch.cat([p.flatten() for p in parts])
        dist.all_reduce(flat, group=self.group)
        return [piece.view_as(p) for piece, p in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]

    def gather(self, value: Any) -> tuple[list[Any], int]:
        """Return the value of each rank that shares the matrix, in the order of their rows, and this rank's place."""
        if self.group is None:
            return [value], 0
        values: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values, dist.get_rank(self.group)


def share(tensor: Tensor) -> Share:
    """Return which rows of a tensor this rank holds.

    Raises:
        TypeError: if it is sharded otherwise than over rows, as tensor parallelism does.
    """
    if not isinstance(tensor, DTensor):
        return Share(0, tensor.shape[0], tensor.shape[0])
    sharded = [i for i, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if not sharded:
        return Share(0, tensor.shape[0], tensor.shape[0])
    if len(sharded) > 1 or tensor.placements[sharded[0]] != Shard(0):
        raise TypeError(
            f"A repair works on weights that are whole or sharded over rows (FSDP2), got {tensor.placements}; repair"
            " the saved model in one process."
        )
    size, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    start = offset[0] if size[0] else tensor.shape[0]
    return Share(start, start + size[0], tensor.shape[0], tensor.device_mesh.get_group(sharded[0]))


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 keeps gathered after a forward pass: a write into that would be lost."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
