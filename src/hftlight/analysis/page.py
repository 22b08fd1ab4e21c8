"""A study as one self-contained page: each analysis with its figures, what to read in them, and its numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hftlight.analysis.analysis import Row, analysis_class
from hftlight.analysis.drawing import label
from hftlight.analysis.study import Study
from hftlight.report.html.render import Drawing, anchor, embed, render_page

HEADERS = ("model", "layer", "position", "metric", "value", "95 % interval")


@dataclass(frozen=True)
class Section:
    """One analysis on the page.

    Attributes:
        name: its name.
        purpose: the first line of its docstring.
        about: the rest of its docstring, without its arguments.
        drawings: its figures.
        rows: its numbers: model, layer, position, metric, value, interval.
        notes: on which models it could not work, and why.
    """

    name: str
    purpose: str
    about: str
    drawings: Sequence[Drawing]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]

    @property
    def anchor(self) -> str:
        """HTML id of the section."""
        return anchor(self.name)


def page(done: Study, title: str) -> str:
    """Return the whole page as HTML. It loads nothing from outside."""
    return render_page("analysis/page.html.j2", "analysis.js", name=title, analyses=_sections(done), headers=HEADERS)


def _sections(done: Study) -> list[Section]:
    found = []
    for name, rows in done.rows.items():
        purpose, _, about = (analysis_class(name).__doc__ or "").partition("\n")
        pictures = done.pictures.get(name, [])
        drawings = [embed(p.figure, p.name, title=p.title, text=p.caption, label=p.caption) for p in pictures]
        text = about.partition("    Args:")[0].strip()
        found.append(Section(name, purpose, text, drawings, [_cells(row) for row in rows], done.notes[name]))
    return found


def _cells(row: Row) -> list[str]:
    ends = "" if row.low is None or row.high is None else f"{_text(row.low)} to {_text(row.high)}"
    place = _text(row.position) if isinstance(row.position, float) else row.position or ""
    return [
        label(row.model, row.stage),
        "" if row.layer is None else str(row.layer),
        place,
        row.metric,
        _text(row.value),
        ends,
    ]


def _text(value: float) -> str:
    """Return a number with four significant digits."""
    return str(int(value)) if math.isfinite(value) and value == int(value) and abs(value) < 1e6 else f"{value:.4g}"
