"""A study as one self-contained page: each analysis with its figures, what to read in them, and its numbers."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure

from hftlight.analysis.analysis import Picture, Row
from hftlight.analysis.drawing import label
from hftlight.analysis.study import Study
from hftlight.files import ensure_writable, new_folder, write_rows, write_text
from hftlight.folders import ANALYSIS
from hftlight.report.html.render import Drawing, anchor, embed, render_page

PAGE = Path(ANALYSIS).name
TABLE, FIGURES = "analysis.jsonl", "figures"  # in a study's folder
HEADERS = ("model", "layer", "position", "metric", "value", "interval")


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


def write_study(done: Study, folder: Path, title: str) -> Path:
    """Write table, figures and page into a folder, and return the page's path.

    Figures of an earlier study in the folder are replaced as a whole.

    Args:
        done: the finished study.
        folder: created if it is missing.
        title: title of the page.
    """
    ensure_writable(folder, "--save")
    folder.mkdir(parents=True, exist_ok=True)
    table = [{"analysis": name, **asdict(row)} for name, rows in done.rows.items() for row in rows]
    write_rows(folder / TABLE, table)
    with new_folder(folder / FIGURES) as place:
        for picture in _all(done):
            save(picture.figure, place / picture.name)
    write_text(folder / PAGE, page(done, title))
    return folder / PAGE


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG and SVG. ``path`` has no end."""
    figure.savefig(path.with_name(f"{path.name}.png"), dpi=160, facecolor="white")
    figure.savefig(path.with_name(f"{path.name}.svg"), metadata={"Date": None}, facecolor="white")


def _all(done: Study) -> Iterator[Picture]:
    for pictures in done.pictures.values():
        yield from pictures


def page(done: Study, title: str) -> str:
    """Return the whole page as HTML. It loads nothing from outside."""
    return render_page("analysis/page.html.j2", "analysis.js", name=title, analyses=_sections(done), headers=HEADERS)


def _sections(done: Study) -> list[Section]:
    found = []
    for name, rows in done.rows.items():
        purpose, _, about = done.about[name].partition("\n")
        pictures = done.pictures.get(name, [])
        drawings = [embed(p.figure, p.name, title=p.title, text=p.caption, label=p.caption) for p in pictures]
        text = about.partition("\nArgs:")[0].strip()
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
