"""The rows of a matrix that this rank holds, and sums over the ranks that share the matrix."""

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
        start: number of the first of these rows in the whole matrix.
        stop: one past the number of the last row.
        total: number of rows of the whole matrix.
        group: process group of the ranks that share the matrix; None if this rank holds all rows.
    """

    start: int
    stop: int
    total: int
    group: Any = None

    def sum(self, *parts: Tensor) -> list[Tensor]:
        """Return the sum of each part over the ranks that share the matrix, with one collective for all parts."""
        if self.group is None:
            return list(parts)
        flat = torch.cat([p.flatten() for p in parts])
        dist.all_reduce(flat, group=self.group)
        return [piece.view_as(p) for piece, p in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]

    def gather(self, value: Any) -> tuple[list[Any], int]:
        """Return the values of the ranks that share the matrix, in the order of their rows, and this rank's place."""
        if self.group is None:
            return [value], 0
        values: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values, dist.get_rank(self.group)


def share(tensor: Tensor) -> Share:
    """Return which rows of a tensor this rank holds.

    Raises:
        TypeError: if the tensor is sharded over anything but rows, as in tensor parallelism.
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
    # A rank without rows starts behind the last row.
    start = offset[0] if size[0] else tensor.shape[0]
    return Share(start, start + size[0], tensor.shape[0], tensor.device_mesh.get_group(sharded[0]))


def reshard(model: nn.Module) -> None:
    """Free the whole weights that FSDP2 leaves gathered after a forward pass.

    A write into gathered weights would be lost.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
