"""Looks of the figures: one colour per model and one line style per stage, the same in all of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hftlight.analysis.analysis import Row
from hftlight.folders import STAGES, arm_word
from hftlight.report.figure import INK, MARKERS, MUTED, PALETTE, canvas, styled

DASHES: dict[str, str | tuple[int, tuple[int, ...]]] = {
    "base": (0, (1, 2)),
    "alignment": (0, (5, 2)),
    "finetuning": "-",
    "post_finetuning": (0, (5, 1, 1, 1)),
    "": "-",
}


@dataclass(frozen=True)
class Look:
    """How a model is drawn.

    Attributes:
        label: its name in a legend.
        color: colour of its marks.
        marker: matplotlib's marker.
        dashes: matplotlib's line style, by stage.
    """

    label: str
    color: str
    marker: str
    dashes: str | tuple[int, tuple[int, ...]]


def looks(rows: Iterable[Row]) -> dict[tuple[str, str], Look]:
    """Return the look of each model and stage, in the order of the rows.

    Arms have the colours of the palette in their order. Models before an attack, which arms may share, are in ink.
    """
    found: dict[tuple[str, str], Look] = {}
    order: dict[str, int] = {}
    for row in rows:
        key = row.model, row.stage
        if key not in found:
            number = order.setdefault(row.model, len(order))
            early = row.stage == "base" or (row.stage == "alignment" and number == 0)
            color = INK if early else PALETTE[number % len(PALETTE)]
            found[key] = Look(label(*key), color, MARKERS[number % len(MARKERS)], DASHES[row.stage])
    return found


def label(model: str, stage: str) -> str:
    """Return the name of a model in legends and tables."""
    return f"{arm_word(model)}, {STAGES[stage]}" if stage else model


def of(rows: Sequence[Row], metric: str) -> dict[tuple[str, str], list[Row]]:
    """Return the rows of a metric by model and stage."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.metric == metric:
            found.setdefault((row.model, row.stage), []).append(row)
    return found


def line(axes: Axes, rows: Sequence[Row], look: Look, x: Sequence[float]) -> None:
    """Draw rows as a line with a band between the ends of their intervals.

    Args:
        axes: where to draw.
        rows: the points in their order.
        look: of the model.
        x: one value per row.
    """
    axes.plot(x, [row.value for row in rows], color=look.color, ls=look.dashes, lw=1.6, label=look.label)
    ends = [[nan if end is None else end for end in (row.low, row.high)] for row in rows]
    axes.fill_between(x, [e[0] for e in ends], [e[1] for e in ends], color=look.color, alpha=0.15, lw=0)


@styled
def layer_figure(rows: Sequence[Row], metric: str, panels: Mapping[str, str], ylabel: str, at: float | None) -> Figure:
    """Draw a metric over the decoder layers, one line per model and one panel per position.

    Args:
        rows: of all models.
        metric: name of the metric.
        panels: title of each panel, by position.
        ylabel: label of the y axis, with its unit.
        at: height of a reference line, such as chance; None for none.
    """
    figure, axes = canvas(len(panels), height=3.4, sharey=True)
    for (position, title), ax in zip(panels.items(), axes, strict=True):
        for key, some in of([r for r in rows if r.layer is not None and r.position == position], metric).items():
            line(ax, some, looks(rows)[key], [float(row.layer or 0) for row in some])
        if at is not None:
            ax.axhline(at, color=MUTED, lw=0.8)
        ax.set(title=title, xlabel="decoder layer")
    axes[0].set_ylabel(ylabel)
    legend_below(figure, axes[0])
    return figure


def legend_below(figure: Figure, axes: Axes) -> None:
    """Draw the legend of one of its axes below a figure."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)


@styled
def heat_maps(
    panels: Mapping[str, tuple[Any, Sequence[str]]],
    xlabel: str,
    ylabel: str,
    unit: str,
    *,
    center: float = 0.0,
    marks: Mapping[str, Sequence[tuple[int, int]]] | None = None,
) -> Figure:
    """Draw matrices as heat maps, two in a row, with one scale of colours, from ``center`` on or around it.

    Args:
        panels: by title: a matrix ``[rows, columns]`` with rows from below, and the names of its columns. NaN is blank.
        xlabel: label of the columns.
        ylabel: label of the rows.
        unit: label of the colours.
        center: value of the white colour.
        marks: by title: column and row of cells to mark.
    """
    columns = min(2, len(panels))
    figure, grid = grid_canvas(-(-len(panels) // columns), columns, height=3.0)
    every = np.concatenate([np.asarray(values, float).ravel() for values, _ in panels.values()]) - center
    # The scale leaves out the outermost hundredth, so that one cell does not bleach all others.
    far = float(np.nanquantile(np.abs(every), 0.99)) if np.isfinite(every).any() else 0.0
    one_sided = not (every < 0).any()
    scale: dict[str, Any] = {"vmin": center - (0 if one_sided else far or 1.0), "vmax": center + (far or 1.0)}
    scale["cmap"] = "Blues" if one_sided else "RdBu"
    for axes, (title, (values, names)) in zip(grid.flat, panels.items(), strict=False):
        image = axes.imshow(np.asarray(values, float), aspect="auto", origin="lower", interpolation="nearest", **scale)
        axes.set_title(title)
        axes.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=7.5)
        axes.grid(False)
        for column, row in (marks or {}).get(title, ()):
            axes.plot(column, row, marker="s", color=INK, markerfacecolor="none", markersize=5, lw=0)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel(ylabel)
    for axes in grid.flat[max(0, len(panels) - columns) : len(panels)]:  # the lowest panel of each column
        axes.set_xlabel(xlabel)
    figure.colorbar(image, ax=list(grid.flat), label=unit, shrink=0.8, extend="max" if one_sided else "both")
    return figure


def layer_grid(
    rows: Iterable[Row], column: Callable[[Row], str], value: Callable[[Row], float] = lambda row: row.value
) -> tuple[Any, list[str]]:
    """Return a matrix of rows, layer by column, and the names of its columns in the order of the rows.

    A place without a row is NaN.

    Args:
        rows: rows with a layer; rows without one are left out.
        column: returns the name of a row's column.
        value: returns a row's value in the matrix.
    """
    cells = {(row.layer, column(row)): value(row) for row in rows if row.layer is not None}
    names = list(dict.fromkeys(name for _, name in cells))
    values = np.full((1 + max(layer for layer, _ in cells), len(names)), nan)
    for (layer, name), number in cells.items():
        values[layer, names.index(name)] = number
    return values, names


def grid_canvas(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, Any]:
    """Return a figure and its axes, an array ``[rows, columns]``.

    Args:
        rows: rows of panels.
        columns: panels in a row.
        height: height of a row in inches.
        **options: options of matplotlib's ``subplots``, such as ``sharey``.
    """
    figure = Figure(figsize=(6.2, 0.5 + height * rows))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)
