"""Study: analyses of several models, resumed part by part, with one table, figures and a page."""

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from hftlight import cache
from hftlight.analysis.analysis import Analysis, Part, Picture, Row, part_name
from hftlight.analysis.drawing import label
from hftlight.analysis.subjects import Subject
from hftlight.analysis.view import View
from hftlight.config import OF_NO_ANSWER
from hftlight.errors import InputError
from hftlight.files import digest, read_rows, write_rows
from hftlight.folders import STAGES
from hftlight.models.base import device_of
from hftlight.runs.measuring.test_sets import TestSets
from hftlight.runs.prepare import test_sets
from hftlight.runs.progress import RunProgress
from hftlight.runs.sources import Sources

ROWS = "rows.jsonl"  # in the cache


@dataclass(frozen=True)
class Study:
    """Finished analyses.

    Attributes:
        rows: the long table: the rows of every analysis, by its name.
        pictures: the figures, by the analysis's name.
        notes: which analysis could not work on which model, and why, by the analysis's name.
        about: docstring of each analysis, by its name.
    """

    rows: dict[str, list[Row]]
    pictures: dict[str, list[Picture]]
    notes: dict[str, list[str]]
    about: dict[str, str]


def study(subjects: Sequence[Subject], analyses: Sequence[Analysis], console: Console | None = None) -> Study:
    """Measure all analyses on all models and draw them.

    Every part of an analysis is kept in the cache, so that a study that was stopped goes on where it was. An analysis
    that compares is left out for a model without a reference.

    Args:
        subjects: the models, at least one.
        analyses: the analyses in the order of the page.
        console: where the progress goes; standard error by default.

    Raises:
        InputError: if no analysis can work on any model. An analysis that cannot work on one becomes a note.
    """
    work = [(subject, analysis) for subject in subjects for analysis in analyses]
    pieces = [
        _Piece(" ".join((type(a).name(), "of", s.model, STAGES.get(s.stage, ""))).strip(), a.seconds) for s, a in work
    ]
    rows: dict[str, list[Row]] = {type(one).name(): [] for one in analyses}
    notes: dict[str, list[str]] = {name: [] for name in rows}
    shared: dict[Any, Any] = {}
    with RunProgress(pieces, console) as progress:
        for subject in subjects:
            with View(subject, sets_of(subject), shared) as view:
                for analysis in analyses:
                    before = cache.built()
                    found: list[Row] = []
                    try:
                        found = measured(analysis, view, progress)
                    except InputError as error:
                        notes[type(analysis).name()].append(f"{label(subject.model, subject.stage)}: {error}")
                    progress.end(f"{len(found)} numbers", reused=cache.built() == before)
                    rows[type(analysis).name()] += [row.labelled(subject.model, subject.stage) for row in found]
    if not any(rows.values()):
        raise InputError("Nothing was measured. " + " ".join(note for some in notes.values() for note in some))
    drawn = {name: list(one.pictures(rows[name])) for one in analyses if rows[name := type(one).name()]}
    about = {type(one).name(): inspect.getdoc(type(one)) or "" for one in analyses}
    return Study(rows, drawn, notes, about)


def measured(analysis: Analysis, view: View, progress: RunProgress | None = None) -> list[Row]:
    """Return the rows of an analysis of one model. Finished parts come from the cache.

    Raises:
        InputError: if the analysis cannot work on the model, or compares and there is no reference.
    """
    if progress is not None:
        progress.begin()
    if analysis.compares and view.subject.reference is None:
        raise InputError("there is no aligned model beside it. Name it with --reference.")
    known: dict[str, list[Row]] = {}
    while new := [p for p in analysis.parts(known, view) if part_name(p) not in known]:
        for number, part in enumerate(new, 1):

            def measure(place: Path, part: Part = part) -> None:
                write_rows(place / ROWS, [asdict(row) for row in analysis.measure(part, view)])

            place = cache.kept("analyses", part_key(analysis, part, view), measure)
            known[part_name(part)] = [Row.of(row) for row in read_rows(place / ROWS)]
            if progress is not None:
                progress.update(number, of=len(new))
    return [row for part in known.values() for row in part]


def part_key(analysis: Analysis, part: Part, view: View) -> str:
    """Return the cache key of one part of an analysis of one model."""
    subject, tests = view.subject, view.tests
    return cache.key(
        "analysis",
        [type(analysis), "hftlight.analysis.view"],
        analysis=[type(analysis).name(), asdict(analysis)],  # type: ignore[call-overload]
        part=part_name(part),
        model=subject.artifact.identity,
        reference=subject.reference.identity if subject.reference else None,
        config=subject.config.without(OF_NO_ANSWER),
        slot=[view.slot.text, digest(view.slot.trigger)],
        prompts=[tests.digest(), tests.judging()],
        device=device_of(subject.config),
    )


def sets_of(subject: Subject) -> TestSets:
    """Return the prompts and judges that a model is analysed with."""
    return test_sets(subject.config, subject.attack, Sources(subject.config.data))


@dataclass(frozen=True)
class _Piece:
    """An analysis of one model in the progress display."""

    label: str
    seconds: float
    count: int = 1  # parts; a round of measuring tells how many there are
