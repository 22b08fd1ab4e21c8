"""Subjects: the models that a study analyses, from the folders of runs and comparisons, and from plain models."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hftlight.attacks.attack import Attack
from hftlight.config import RunConfig
from hftlight.errors import InputError
from hftlight.folders import CELLS, GRID, STAGES, UNDEFENDED, arm_in_comparison
from hftlight.models.serving import Artifact
from hftlight.runs.run import ARTIFACTS


@dataclass(frozen=True)
class Subject:
    """A model to analyse.

    Attributes:
        model: the arm in a run, or the model's name.
        stage: one of ``STAGES``, or empty for a model outside a run.
        artifact: its files.
        config: how it is prompted, answers and is measured.
        attack: the attack of its run, which may change the prompts; None for none.
        reference: the aligned model of its arm, which may be the model itself; None if it is not known.
    """

    model: str
    stage: str
    artifact: Artifact
    config: RunConfig
    attack: Attack | None = None
    reference: Artifact | None = None


def runs_in(place: str) -> list[Path] | None:
    """Return the folders of runs in a place: a run, or the cells of a comparison. None if it is neither."""
    folder = Path(place).expanduser()
    if (folder / GRID).is_file():
        return sorted(cell for cell in (folder / CELLS).iterdir() if (cell / "manifest.json").is_file())
    return [folder] if (folder / "manifest.json").is_file() else None


def subjects_of_run(
    run: Path, config: RunConfig, attack: Attack | None, stages: Sequence[str] = tuple(STAGES)
) -> list[Subject]:
    """Return the models of a run that exist, the undefended arm first.

    A model that several arms share, such as an aligned model, is listed once, for the first of them.

    Args:
        run: the run's folder.
        config: the run's configuration.
        attack: the run's attack.
        stages: the stages to analyse, names of ``STAGES``.

    Raises:
        InputError: if the run has no model of these stages yet.
    """
    arms = sorted(
        json.loads((run / "manifest.json").read_text(encoding="utf-8"))["arms"], key=lambda a: a != UNDEFENDED
    )
    folders = {stage.value: name for stage, name in ARTIFACTS.items()}
    # A run whose alignment has no steps starts from a model that is aligned already.
    start = "base" if config.alignment.steps else "alignment"
    found: dict[str, Subject] = {}
    for arm in arms:
        models = {stage: run / arm / name for stage, name in folders.items() if (run / arm / name).is_dir()}
        places = {start: config.model, **models}
        aligned = Artifact.of(places["alignment"]) if "alignment" in places else None
        for stage in STAGES:
            if stage in places and stage in stages:
                one = Artifact.of(places[stage])
                found.setdefault(
                    one.identity, Subject(arm_in_comparison(run, arm), stage, one, config, attack, aligned)
                )
    if not found:
        raise InputError(f"{run}: there is no model of the stages {', '.join(stages)} yet. Finish the run first.")
    return list(found.values())


def plain_subjects(models: Sequence[str], config: RunConfig, reference: str | None) -> list[Subject]:
    """Return models outside a run.

    Args:
        models: folders, hub ids or built-in names.
        config: how they are prompted and measured; an artifact's own template wins over it.
        reference: the aligned model that they come from, or None.
    """
    beside = Artifact.of(reference) if reference is not None else None
    subjects = []
    for name, model in zip(short_names(models), models, strict=True):
        one = Artifact.of(model)
        own = replace(config, model=model, template=one.serving.get("template") or config.template)
        subjects.append(Subject(name, "", one, own, None, beside))
    return subjects


def short_names(places: Sequence[str]) -> list[str]:
    """Return the shortest last parts of paths that tell them apart."""
    parts = [Path(place).parts or (place,) for place in places]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(places)):
            return names
    return list(places)
