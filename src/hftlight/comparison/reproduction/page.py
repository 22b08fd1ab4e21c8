"""Table, Markdown and self-contained page of a repeated table: paper, ours, difference, tolerance."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from hftlight.attacks.protocols.results import EVIDENCE, METRICS
from hftlight.comparison.grid import value_text
from hftlight.comparison.reproduction.result import AVERAGE, Compared, Line
from hftlight.evaluation.stats.seeds import Spread
from hftlight.files import write_text
from hftlight.folders import UNDEFENDED, arm_word
from hftlight.report.escape import in_markdown
from hftlight.report.figure import MARKERS, PALETTE, canvas, label_ends, styled
from hftlight.report.html.render import Drawing, embed, render_page

PAGE, MARKDOWN = "reproduction.html", "reproduction.md"
HEAD = ("Metric", "Defense", "Paper", "Ours (95 %)", "Difference", "Inside?")
CAPTION = (
    "Paper: the published number. Ours: mean over seeds with its 95 % interval; one seed has the interval over its"
    " prompts. Inside: whether ours meets the tolerances, which are this project's. A dash means that none is set, that"
    " the paper's number is recalled, or that the setting is not the paper's. Averages are means of the cells."
)


def table_rows(result: Compared) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the table, one row per cell."""
    head = [*HEAD[:2], result.of.table.varies, *HEAD[2:]]
    rows = []
    for line in result.lines:
        where = line.value if line.value == AVERAGE else value_text(line.value)
        why = "not compared" if line.metric in result.of.uncompared else "not finished"
        ours = why if line.ours is None else _with_interval(line.ours)
        difference = "-" if line.difference is None else f"{line.difference:+.2f}"
        cells = [str(where), _paper(result, line), ours, difference, _inside(line)]
        rows.append([METRICS[line.metric], arm_word(line.arm), *cells])
    return head, rows


def _paper(result: Compared, line: Line) -> str:
    if line.paper is None:
        return "unknown"
    return f"{line.paper:.2f}" + (" (recalled)" if result.of.table.recalled else "")


def _inside(line: Line) -> str:
    return {True: "yes", False: "no", None: "-"}[line.inside]


def _with_interval(spread: Spread) -> str:
    ends = "" if spread.low is None or spread.high is None else f" ({spread.low:.2f} to {spread.high:.2f})"
    return f"{spread.mean:.2f}{ends}"


def sentences(result: Compared) -> list[str]:
    """Return the verdict, the conditions, the departures and what cannot be compared, one sentence each."""
    of = result.of
    table = of.table
    told = [
        result.verdict,
        f"The paper's numbers ({of.preset.source}; {table.name}) were {EVIDENCE[table.evidence]}.",
    ]
    told += [f"Departs from the paper: {departure}." for departure in of.departures]
    told += [f"{METRICS[metric]} is not compared: {why}." for metric, why in of.uncompared.items()]
    words = {True: "holds", False: "does not hold", None: "not decided"}
    told += [f"Condition {words[outcome.holds]}: {outcome.text}." for outcome in result.outcomes]
    return told


def terminal_table(result: Compared) -> Table:
    """Return the table for a terminal."""
    head, rows = table_rows(result)
    table = Table(box=SIMPLE_HEAD, caption=CAPTION, caption_justify="left", padding=0, show_edge=False)
    for number, name in enumerate(head):
        table.add_column(name, justify="left" if number < 2 else "right", no_wrap=number >= 3)
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and before[:2] != row[:2]:
            table.add_section()
        table.add_row(*row)
    return table


def markdown(result: Compared) -> str:
    """Return sentences, table and notes in Markdown."""
    of = result.of
    head, rows = table_rows(result)
    lines = [head, ["---"] * 3 + ["---:"] * (len(head) - 3), *([in_markdown(cell) for cell in row] for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    title = f"# {of.preset.name}: {of.table.name}"
    told = "\n".join(f"- {in_markdown(sentence)}" for sentence in sentences(result))
    missing = "\n".join(f"- {in_markdown(name)}: {in_markdown(why)}" for name, why in result.missing.items())
    notes = "\n".join(f"- {in_markdown(note)}" for note in (*of.table.notes, *of.preset.notes))
    parts = [title, told, table, CAPTION, f"Not finished:\n\n{missing}" if missing else "", f"Notes:\n\n{notes}"]
    return "\n\n".join(part for part in parts if part) + "\n"


@styled
def paper_figure(result: Compared, metric: str) -> Figure | None:
    """Draw the paper's numbers (dashed, hollow) and ours (filled, with intervals) over what varies.

    Returns:
        The figure, or None if the metric is not compared or nothing of it is finished.
    """
    of = result.of
    lines = [line for line in result.lines if line.metric == metric and line.value != AVERAGE]
    if not any(line.ours for line in lines):
        return None
    figure, (axes,) = canvas(1, height=3.4)
    arms = list(dict.fromkeys(line.arm for line in lines))
    defended = [arm for arm in arms if arm != UNDEFENDED]
    ends = []
    for number, arm in enumerate(arms):
        place = 0 if arm == UNDEFENDED else 1 + defended.index(arm) % (len(PALETTE) - 1)
        look: dict[str, Any] = {"color": PALETTE[place], "marker": MARKERS[place]}
        own = [line for line in lines if line.arm == arm]
        shift = 0.05 * (number - (len(arms) - 1) / 2)  # keeps the arms' marks apart
        known = [(of.values.index(line.value) + shift, line) for line in own]
        paper = [(x, line.paper) for x, line in known if line.paper is not None]
        axes.plot(*zip(*paper, strict=True), **look, ls=(0, (2, 2)), lw=1, mfc="white", markersize=6)
        points = [(x, line.ours) for x, line in known if line.ours is not None]
        if points:
            means = [s.mean for _, s in points]
            low = [s.mean - (s.mean if s.low is None else s.low) for _, s in points]
            high = [(s.mean if s.high is None else s.high) - s.mean for _, s in points]
            axes.errorbar([x for x, _ in points], means, [low, high], **look, lw=1.4, elinewidth=2, markersize=6)
        ends.append((points[-1][1].mean if points else paper[-1][1], arm_word(arm), PALETTE[place]))
    last = len(of.values) - 1
    axes.set_xticks(range(len(of.values)), [value_text(value) for value in of.values])
    axes.set(xlim=(-0.4, last + 0.4), xlabel=of.table.varies, ylabel=METRICS[metric].lower())
    bottom, top = axes.get_ylim()
    label_ends(axes, last + 0.4, ends, gap=0.065 * (top - bottom))
    return figure


def page(result: Compared) -> str:
    """Return the page as HTML."""
    of = result.of
    head, rows = table_rows(result)
    text = "Dashed, hollow: the paper. Solid, filled: ours, with 95 % intervals."
    drawn = [(metric, figure) for metric in of.table.cells if (figure := paper_figure(result, metric)) is not None]
    drawings: Sequence[Drawing] = [
        embed(figure, f"reproduction-{metric}", METRICS[metric], text, label=f"{METRICS[metric]}: {text}")
        for metric, figure in drawn
    ]
    return render_page(
        "comparison/reproduction.html.j2",
        "comparison.js",
        name=f"{of.preset.name}: {of.table.name}",
        sentences=sentences(result),
        missing="; ".join(f"{name} ({why})" for name, why in result.missing.items()),
        headers=head,
        rows=rows,
        caption=CAPTION,
        drawings=drawings,
        caveats=[*of.table.notes, *of.preset.notes],
    )


def write_pages(result: Compared) -> list[Path]:
    """Write ``reproduction.md`` and ``reproduction.html`` into the reproduction's folder, and return their paths."""
    paths = [result.of.folder / MARKDOWN, result.of.folder / PAGE]
    for path, text in zip(paths, (markdown(result), page(result)), strict=True):
        write_text(path, text)
    return paths
