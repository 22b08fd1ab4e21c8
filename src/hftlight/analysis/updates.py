"""What fine-tuning changed in the weights: the update of a model against its aligned model, from their files."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hftlight.analysis.view import View
from hftlight.engine.weights.lowrank import LowRank
from hftlight.engine.weights.stored import Adapted, Difference, Weights, displacement, stored
from hftlight.errors import InputError
from hftlight.models.load import skeleton
from hftlight.models.module import decoder_layers


def is_aligned(view: View) -> bool:
    """Tell whether a model is the aligned model that it would be compared with."""
    reference = view.subject.reference
    return reference is not None and reference.identity == view.subject.artifact.identity


def update(view: View, name: str) -> LowRank | Difference | None:
    """Return what fine-tuning added to one weight of the aligned model, exactly, or None if nothing.

    For the model before its alignment, this is the negative of what the alignment added.

    Args:
        view: a model with a reference.
        name: plain name of the weight.

    Raises:
        InputError: if the weights cannot be read from files, or the shapes differ.
    """
    reference = view.subject.reference
    assert reference is not None
    return _moved(_weights(view, view.subject.artifact.name), _weights(view, reference.name), name)


def alignment(view: View, name: str) -> LowRank | Difference | None:
    """Return what the alignment added to one weight, or None if nothing or if the model before it is not known.

    It is known in a run that aligns, and under an adapter.

    Raises:
        InputError: as for ``update``.
    """
    reference = view.subject.reference
    assert reference is not None
    aligned = _weights(view, reference.name)
    before = _before(view, aligned)
    return None if before is None else _moved(aligned, before, name)


def _before(view: View, aligned: Weights) -> Weights | None:
    """Return the weights before the alignment, or None if they are not known."""
    subject = view.subject
    assert subject.reference is not None
    if subject.stage and subject.config.model != subject.reference.name:
        return _weights(view, subject.config.model)
    return aligned.under if isinstance(aligned, Adapted) else None


def _weights(view: View, name: str) -> Weights:
    def read() -> Weights:
        try:
            return stored(name)
        except ValueError as error:
            raise InputError(str(error)) from error

    found: Weights = view.shared(("weights", name), read)
    return found


def _moved(model: Weights, other: Weights, name: str) -> LowRank | Difference | None:
    if isinstance(other, Adapted) and other.under == model:
        added = other.updates.get(name)
        return None if added is None else LowRank(-added.b, added.a, added.scale)
    try:
        moved = displacement(model, other, name)
    except ValueError as error:
        raise InputError(str(error)) from error
    if isinstance(moved, LowRank):
        return moved if bool(moved.b.any()) and bool(moved.a.any()) else None
    return moved


def matrix_of(moved: LowRank | Difference) -> Tensor:
    """Return a displacement as a whole matrix, at least float32."""
    rows = moved.rows()
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def matrices(model: str) -> Iterator[tuple[int, str, str, bool]]:
    """Yield layer, kind, plain name and whether it is stored transposed, of each matrix of a model's decoder layers.

    The kind is the module's name, such as ``q_proj``. No weights are read.

    Args:
        model: as for ``model_path``.

    Raises:
        InputError: if the model's code cannot build it without weights.
    """
    from transformers.pytorch_utils import Conv1D

    whole = skeleton(model)
    if whole is None:
        raise InputError(f"the code of {model} cannot build the model without its weights.")
    names = {module: name for name, module in whole.named_modules()}
    for number, layer in enumerate(decoder_layers(whole)):
        for module in layer.modules():
            if isinstance(module, nn.Linear | Conv1D):
                name = names[module]
                yield number, name.rpartition(".")[2], f"{name}.weight", isinstance(module, Conv1D)
