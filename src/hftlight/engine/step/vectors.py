"""Arithmetic on parameter-shaped dictionaries, with one fused launch for the whole list of tensors.

A ``Vector`` maps parameter names to tensors of those parameters' shapes. Sharded parameters give sharded vectors. Every
norm and inner product covers all entries of all ranks' shards together.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

Vector = dict[str, Tensor]


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that receive gradients, by name, in the module's order."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a sharded tensor, or any other tensor unchanged.

    The shard shares the storage of the tensor.
    """
    shard = getattr(tensor, "to_local", None)
    return shard() if shard is not None else tensor


def whole(value: Tensor) -> Tensor:
    """Return a tensor as a plain tensor that is whole on every rank.

    The shards of a DTensor are gathered, and its partial results are summed over ranks. Under sharding every rank must
    call this.
    """
    full = getattr(value, "full_tensor", None)
    return full() if full is not None else value


def norm(vector: Vector) -> Tensor:
    """Return the L2 norm over all entries together as a 0-d tensor, at least in float32.

    A vector without tensors has norm 0.
    """
    if not vector:
        return torch.zeros(())
    tensors = list(vector.values())
    if tensors[0].dtype in (torch.float16, torch.bfloat16):
        tensors = [t.float() for t in tensors]
    return whole(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2.0))))


def dot(left: Vector, right: Vector) -> Tensor:
    """Return the inner product of two vectors with the same names, as a 0-d tensor, at least in float32."""
    ours, theirs = list(left.values()), [right[name] for name in left]
    if ours[0].dtype in (torch.float16, torch.bfloat16):
        ours, theirs = [t.float() for t in ours], [t.float() for t in theirs]
    products = torch._foreach_mul(ours, theirs)
    return whole(torch.stack([p.sum() for p in products]).sum())


def scaled(vector: Vector, factor: float | Tensor) -> Vector:
    """Return ``factor * vector``.

    A factor that is a 0-d tensor is not read on the host.
    """
    return dict(zip(vector, torch._foreach_mul(list(vector.values()), factor), strict=True))


def difference(left: Vector, right: Vector) -> Vector:
    """Return ``left - right`` for two vectors with the same names."""
    return dict(zip(left, torch._foreach_sub(list(left.values()), [right[name] for name in left]), strict=True))


def unit(vector: Vector, length: Tensor | None = None) -> Vector:
    """Return ``vector / ||vector||_2``, and zero for the zero vector.

    Args:
        vector: vector to normalize.
        length: its norm, 0-d, if it is known already.
    """
    length = norm(vector) if length is None else length
    return scaled(vector, torch.where(length > 0, 1.0 / length, torch.zeros_like(length)))


def snapshot(module: nn.Module) -> Vector:
    """Return copies of the trainable parameters with their present values and their sharding."""
    return {name: p.detach().clone() for name, p in trainable(module).items()}


def extend(anchor: Vector, module: nn.Module) -> list[str]:
    """Add copies of the parameters that have become trainable since the snapshot, and return their names.

    A callback may unfreeze parameters during training. Before their first update they have the values of the start.

    Args:
        anchor: snapshot of earlier trainable parameters. It is changed in place.
        module: module that is trained.
    """
    late = {name: p for name, p in trainable(module).items() if name not in anchor}
    anchor |= {name: p.detach().clone() for name, p in late.items()}
    return list(late)


def packed(vector: Vector) -> dict[str, Tensor]:
    """Return the vector as whole tensors on the CPU, for a checkpoint.

    Under sharding every rank must call this.
    """
    return {name: whole(t).cpu() for name, t in vector.items()}


def placed(plain: Mapping[str, Tensor], module: nn.Module) -> Vector:
    """Return whole tensors with the device and the sharding of the parameters of the same names."""
    parameters = dict(module.named_parameters())  # a callback may freeze some of them by now
    result = {}
    for name, tensor in plain.items():
        p = parameters[name]
        tensor = tensor.to(p.device)
        result[name] = distribute_tensor(tensor, p.device_mesh, p.placements) if isinstance(p, DTensor) else tensor
    return result
