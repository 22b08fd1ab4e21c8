"""Self-contained HTML page of a comparison: claims, table, figures, and every answer with filter and sort."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from hftlight.comparison.claims import claims
from hftlight.comparison.figures import (
    color_place,
    comparison_cost_figure,
    ratio_figure,
    sweep_figure,
    tradeoff_figure,
)
from hftlight.comparison.leaderboard import caption, table_rows
from hftlight.comparison.read import SETS, Comparison, Scene, arm_of, mark, read_comparison, served
from hftlight.files import write_text
from hftlight.folders import arm_word
from hftlight.report.figure import outcome_bars
from hftlight.report.html.render import Drawing, embed, render_page
from hftlight.report.table import HEADLINE

WORDS = {
    "harmful_score": ("Harmful score", "harmful score, percent"),
    "finetune_accuracy": ("Finetune accuracy", "finetune accuracy, percent"),
}
COLUMNS = ("Defense", "Task", "p", "Seed", "Set", "Verdict", "Prompt", "Answer")  # of the table of answers
CHOICES = 6  # number of first columns that have few values; the page offers a list of the values


@dataclass(frozen=True)
class TableRow:
    """Row of the table: task, arm, the arm's index in the palette, and (text, is the best) for each cell."""

    task: str
    arm: str
    color: int
    cells: Sequence[tuple[str, bool]]


def write_comparison_report(folder: str | Path) -> Path:
    """Write ``report.html`` into a comparison's folder and return its path. The page lists unfinished cells.

    Raises:
        InputError: if the folder holds no comparison.
    """
    path = Path(folder) / "report.html"
    # Answers may hold characters that UTF-8 cannot encode; they become question marks.
    write_text(path, comparison_page(read_comparison(folder)).encode("utf-8", "replace").decode("utf-8"))
    return path


def comparison_page(comparison: Comparison) -> str:
    """Return the whole page as HTML."""
    headers, rows = _table(comparison)
    answers = _answers(comparison)
    choices = {name: list(dict.fromkeys(row[i] for row in answers)) for i, name in enumerate(COLUMNS[:CHOICES])}
    settings = {"Settings of every cell": "config", "Arguments of defenses and attacks": "arguments"}
    return render_page(
        "comparison/page.html.j2",
        "comparison.js",
        name=comparison.folder.resolve().name,
        sentences=claims(comparison),
        missing="; ".join(f"{name} ({why})" for name, why in comparison.missing.items()),
        headers=headers,
        rows=rows,
        caption=caption(comparison),
        drawings=_drawings(comparison),
        columns=COLUMNS,
        choices=choices,
        answers=answers,
        caveats=_caveats(comparison),
        texts={
            title: json.dumps(comparison.settings.get(name, {}), indent=1, ensure_ascii=False)
            for title, name in settings.items()
        },
    )


def _table(comparison: Comparison) -> tuple[list[str], list[TableRow]]:
    """Return the table's headers and rows."""
    best = "\0"  # prefix of a cell that is the best of its column
    headers, *lines = table_rows(comparison, lambda text: f"{best}{text}")
    colors = {arm_word(arm): color_place(comparison, arm) for arm in comparison.arms}
    rows = [
        TableRow(task, arm, colors[arm], [(cell.removeprefix(best), cell.startswith(best)) for cell in cells])
        for task, arm, *cells in lines
    ]
    return headers, rows


def figures(comparison: Comparison) -> list[tuple[str, str, Figure, str]]:
    """Return name, title, figure and caption of every figure of a comparison. The name is unique."""
    drawn: list[tuple[str, str, Figure | None, str]] = []
    hollow = " Hollow marks: low because answers collapsed." if any(map(comparison.collapsed, comparison.cells)) else ""
    for number, scene in enumerate(comparison.scenes):
        for metric, (title, label) in WORDS.items():
            figure = ratio_figure(comparison, scene, metric, label)
            text = f"{title} against the harmful ratio of the upload. Bars: 95 % intervals."
            text += hollow if metric == "harmful_score" else ""
            drawn.append((f"ratio-{metric}-{number}", title, figure, text))
        for place, ratio in enumerate(comparison.ratios(scene)):
            parts = {
                arm_word(p.arm): outcomes
                for p in comparison.column(scene, ratio)
                if (outcomes := comparison.outcomes(p))
            }
            text = f"{scene}, p = {ratio:g}: answers to harmful prompts, percent, mean over seeds. {HEADLINE}"
            drawn.append((f"outcomes-{number}-{place}", "Answers to harmful prompts", outcome_bars(parts), text))
            text = f"Safety against accuracy: up and left is better. Dashed: the Pareto front of the means.{hollow}"
            drawn.append((f"front-{number}-{place}", "Trade-off", tradeoff_figure(comparison, scene, ratio), text))
            for sweep_number, sweep in enumerate(comparison.sweeps):
                text = (
                    f"{sweep.combination} against {sweep.option}. Bars: 95 % intervals. Dashed: the undefended arm. The"
                    f" values have equal distances on the axis.{hollow}"
                )
                name = f"sweep-{sweep_number}-{number}-{place}"
                drawn.append((name, sweep.option, sweep_figure(comparison, scene, ratio, sweep), text))
        ratio = comparison.ratios(scene)[-1]
        text = "The dashed line is the undefended arm. Cells that ran at the same time shared the machine."
        drawn.append((f"cost-{number}", "Cost", comparison_cost_figure(comparison, scene, ratio), text))
    return [(name, title, figure, text) for name, title, figure, text in drawn if figure is not None]


def _drawings(comparison: Comparison) -> list[Drawing]:
    return [embed(figure, name, title, text, label=text) for name, title, figure, text in figures(comparison)]


def _answers(comparison: Comparison) -> list[list[str]]:
    """Return the answers of the served models as rows of ``COLUMNS``."""
    metrics = {name: metric for metric, name in SETS.items()}
    rows = []
    for place, by_seed in comparison.cells.items():
        for seed, result in sorted(by_seed.items()):
            arm, stage = arm_of(result), served(result)
            for answer in result.answers:
                if (answer.arm, answer.stage) == (arm, stage) and answer.set in metrics:
                    metric = metrics[answer.set]
                    verdict = mark(answer, metric, result)
                    scene = str(Scene(place.task, place.attack))
                    where = [arm_word(place.arm), scene, f"{place.harmful_ratio:g}", str(seed)]
                    rows.append([*where, metric.replace("_", " "), verdict, answer.prompt, answer.response])
    return rows


def _caveats(comparison: Comparison) -> list[str]:
    """Return sentences about the limits of a comparison."""
    caveats = [
        "Every defense saw the same upload, the same prompts and the same training settings. All arms share the seeds.",
        "One attack setting proves little: an attacker who tunes steps, learning rate and data may get further.",
        "Intervals over few seeds are wide, and a difference may exist although it is not claimed.",
    ]
    if any("builtin" in result.judges() for by_seed in comparison.cells.values() for result in by_seed.values()):
        caveats.append(
            "The built-in world is made up: its numbers show how a defense acts here, not how safe a real service is."
        )
    return caveats
