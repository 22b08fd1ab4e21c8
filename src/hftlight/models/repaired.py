"""Repairs without a Trainer: a model in memory, or a folder, in one call."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from hftlight.engine.weights.repair import Repair, check_output
from hftlight.engine.weights.save import MARKER, repairs_of, save_repaired
from hftlight.engine.weights.subject import Subject, at_once, no_batches
from hftlight.errors import InputError
from hftlight.files import new_folder, write_json
from hftlight.model_files import model_path, stands_on
from hftlight.models.load import load_adapter, load_model, save_tokenizer
from hftlight.models.mapped import copy_model, mapped_model


def repair_model(
    repair: Repair, model: nn.Module | str | Path, batches: Iterable[Any] | None = None, seed: int = 0
) -> dict[str, Any]:
    """Repair a fine-tuned model once, without Lightning.

    Args:
        repair: the repair. Its ``output`` names the folder for the repaired model.
        model: a PEFT model whose active adapter is the user's update, or a causal LM with all parameters trained; it is
            changed in memory. Or the folder of either; the folder stays unchanged, and ``output`` is needed. Without
            ``batches``, the weights of a folder are edited in the files of ``output``, as in ``repair_files``.
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
    if folder is not None:
        _refuse_repaired(who, folder)
    if repair.output is not None:
        check_output(repair)
    if folder is not None and batches is None:
        return repair_files([repair], str(model), Path(repair.output or ""), seed=seed)[0]
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


def repair_files(
    repairs: Sequence[Repair],
    model: str,
    output: Path,
    scores: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    on_weight: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Repair the model of a folder in the files of another folder, one matrix at a time.

    The files are copied first. Then the weights are views of the copied files, and an edit changes the file. A model
    that does not fit into memory can so be repaired. Under an adapter only the adapter is written.

    Args:
        repairs: the repairs in the order in which they act. They cannot read data.
        model: a whole model or an adapter: a folder, a hub id, or a name that ``model_path`` knows.
        output: folder for the repaired model; an existing folder is replaced.
        scores: what the ``scored`` of the only repair that needs scores returned, on data. None computes scores.
        seed: seed for random choices of a repair.
        on_weight: called with the name of each weight before it is measured or edited.

    Returns:
        The report of each repair.

    Raises:
        RuntimeError: if the model is already repaired, or a repair needs data.
        InputError: if the files cannot be mapped, or the disk has no room.
    """
    folder = Path(model_path(model, weights=True))
    _refuse_repaired(" and ".join(type(r).__name__ for r in repairs), folder)
    base = stands_on(model)

    def repaired(loaded: nn.Module) -> tuple[Subject, list[dict[str, Any]]]:
        kept = at_once if scores is None else lambda _, compute: dict(scores)
        subject, reports = Subject(loaded, seed=seed, kept=kept, on_weight=on_weight), []
        for repair in repairs:
            subject.report, subject.aligned, subject.base, subject.unaligned = {}, None, None, None
            repair.apply(subject)
            reports.append(subject.report)
        if len(reports) > 1:  # as a run writes them
            subject.report = {"reports": {type(r).__name__: of for r, of in zip(repairs, reports, strict=True)}}
        return subject, reports

    if base is not None:
        with mapped_model(Path(model_path(base, weights=True)), private=True) as under:
            subject, reports = repaired(load_adapter(under, folder))
            save_repaired(output, subject)
        with suppress(InputError):  # a folder of weights alone has no tokenizer
            save_tokenizer(model, output)
        return reports
    output.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(output) as place:
        copy_model(folder, place)
        with mapped_model(place) as loaded:
            subject, reports = repaired(loaded)
        write_json(place / MARKER, {"applied": subject.applied, **subject.report})
    return reports


def _refuse_repaired(who: str, folder: Path) -> None:
    if before := repairs_of(folder):
        raise RuntimeError(f"{who}: {folder} was repaired before ({', '.join(before)}). Give the fine-tuned model.")


def _unmerged(name: str, folder: Path) -> Any:
    """Return the model of a folder. An adapter stays an adapter, since it is the user's update."""
    base = stands_on(name)
    return load_model(name) if base is None else load_adapter(load_model(base), folder)
