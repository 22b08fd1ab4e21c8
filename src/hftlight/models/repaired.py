"""Repairs without a Trainer: a model in memory, or a folder, in one call."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from torch import nn

from hftlight.engine.weights.repair import Repair, check_output
from hftlight.engine.weights.save import repairs_of, save_repaired
from hftlight.engine.weights.subject import Subject, no_batches
from hftlight.model_files import model_path, stands_on
from hftlight.models.load import load_adapter, load_model, save_tokenizer


def repair_model(
    repair: Repair, model: nn.Module | str | Path, batches: Iterable[Any] | None = None, seed: int = 0
) -> dict[str, Any]:
    """Repair a fine-tuned model once, without Lightning.

    Args:
        repair: the repair. Its ``output`` names the folder for the repaired model.
        model: a PEFT model whose active adapter is the user's update, or a causal LM with all parameters trained; it is
            changed in memory. Or the folder of either; the folder stays unchanged, and ``output`` is needed.
        batches: what the repair reads: dictionaries with ``input_ids``, ``attention_mask`` and ``labels``, int64
            ``[batch, tokens]``. None for a repair that reads no data.
        seed: seed of the repair's random choices.

    Returns:
        The report of the repair.

    Raises:
        RuntimeError: if the model is already repaired, or the repair needs batches.
        ValueError: if a folder is repaired without ``output``, or ``output`` holds something else.
    """
    who = type(repair).__name__
    folder = Path(model_path(str(model), weights=True)) if isinstance(model, (str, Path)) else None
    if folder is not None and repair.output is None:
        raise ValueError(f"{who}: give output=..., the folder for the repaired model.")
    if folder is not None and (before := repairs_of(folder)):
        raise RuntimeError(f"{who}: {folder} was repaired before ({', '.join(before)}). Give the fine-tuned model.")
    if repair.output is not None:
        check_output(repair)
    loaded: Any = model if folder is None else _unmerged(str(model), folder)
    device = next(loaded.parameters()).device

    def moved(_: str) -> Iterator[Any]:
        yield from (move_data_to_device(batch, device) for batch in batches or ())

    subject = Subject(loaded, batches=no_batches if batches is None else moved, seed=seed)
    repair.apply(subject)
    if repair.output is not None:
        save_repaired(Path(repair.output), subject)
        if folder is not None:
            save_tokenizer(str(model), Path(repair.output))
    return subject.report


def _unmerged(name: str, folder: Path) -> Any:
    """Return the model of a folder. An adapter stays an adapter, since it is the user's update."""
    base = stands_on(name)
    return load_model(name) if base is None else load_adapter(load_model(base), folder)
