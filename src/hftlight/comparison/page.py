"""A comparison as one self-contained page: verdict, table, figures, and every answer with filter and sort."""

import json
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hftlight.comparison.claims import claims
from hftlight.comparison.figures import color_place, comparison_cost_figure, ratio_figure, tradeoff_figure
from hftlight.comparison.leaderboard import caption, table_rows
from hftlight.comparison.read import SETS, Comparison, Scene, arm_of, mark, read_comparison, served
from hftlight.files import write_text
from hftlight.folders import arm_word
from hftlight.report.figure import outcome_bars, svg
from hftlight.report.html.assets import COMPARISON_SCRIPT, document
from hftlight.report.table import HEADLINE

WORDS = {
    "harmful_score": ("Harmful score", "harmful score, percent"),
    "finetune_accuracy": ("Finetune accuracy", "finetune accuracy, percent"),
}


def write_comparison_report(folder: str | Path) -> Path:
    """Write ``report.html`` into a comparison's folder and return its path; what is not finished is named.

    Raises:
        InputError: if the folder holds no comparison.
    """
    path = Path(folder) / "report.html"
    write_text(path, comparison_page(read_comparison(folder)).encode("utf-8", "replace").decode("utf-8"))
    return path


def comparison_page(comparison: Comparison) -> str:
    """Return the whole page as HTML."""
    sections = {
        "Table": _table(comparison),
        "Figures": _figures(comparison),
        "Answers": _answers(comparison),
        "How it was made": _provenance(comparison),
    }
    verdict = "".join(f"<p>{escape(said)}</p>".replace(" %", "&nbsp;%") for said in claims(comparison))
    head = f"<div class='verdict claims'>{verdict}</div>{_waiting(comparison)}"
    return document(comparison.folder.resolve().name, sections, head, COMPARISON_SCRIPT)


def _waiting(comparison: Comparison) -> str:
    if not comparison.missing:
        return ""
    listed = "; ".join(f"{name} ({why})" for name, why in comparison.missing.items())
    return f"<p class='note'>Not finished: {escape(listed)}.</p>"


def _table(comparison: Comparison) -> str:
    head, *rows = table_rows(comparison, lambda text: f"\0{text}")
    arms = {arm_word(arm): arm for arm in comparison.arms}
    top = "".join(f"<th class='{'number' if i > 1 else ''}'>{escape(text)}</th>" for i, text in enumerate(head))
    lines = []
    for task, word, *cells in rows:
        dot = f"<span class='dot' style='background: var(--arm-{color_place(comparison, arms[word])})'></span>"
        numbers = "".join(f"<td class='number'>{_number(cell)}</td>" for cell in cells)
        lines.append(f"<tr><td>{escape(task)}</td><td>{dot}{escape(word)}</td>{numbers}</tr>")
    return (
        f"<div class='scroll'><table class='wide'><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
        f"</div><p class='caption'>{escape(caption(comparison))}</p>"
    )


def _number(cell: str) -> str:
    text = escape(cell.removeprefix("\0"))
    return f"<strong>{text}</strong>" if cell.startswith("\0") else text


def figures(comparison: Comparison) -> list[tuple[str, str, Figure, str]]:
    """Return what there is to draw: a word unlike any other's, title, figure and caption."""
    drawn: list[tuple[str, str, Figure | None, str]] = []
    hollow = " Hollow marks: low by collapsed answers." if any(map(comparison.collapsed, comparison.cells)) else ""
    for number, scene in enumerate(comparison.scenes):
        for metric, (title, label) in WORDS.items():
            figure = ratio_figure(comparison, scene, metric, label)
            text = f"{title} against the harmful ratio of the upload. Bars: 95 % intervals."
            text += hollow if metric == "harmful_score" else ""
            drawn.append((f"ratio-{metric}-{number}", title, figure, text))
        for place, ratio in enumerate(comparison.ratios(scene)):
            parts = {
                arm_word(p.arm): found for p in comparison.column(scene, ratio) if (found := comparison.outcomes(p))
            }
            text = f"{scene}, p = {ratio:g}: answers to harmful prompts, percent, mean over seeds. {HEADLINE}"
            drawn.append((f"outcomes-{number}-{place}", "Answers to harmful prompts", outcome_bars(parts), text))
            text = f"Safety against accuracy: up and left is better. Dashed: the Pareto front of the means.{hollow}"
            drawn.append((f"front-{number}-{place}", "Trade-off", tradeoff_figure(comparison, scene, ratio), text))
        ratio = comparison.ratios(scene)[-1]
        text = "The dashed line is the undefended arm. Cells that ran at the same time shared the machine."
        drawn.append((f"cost-{number}", "Cost", comparison_cost_figure(comparison, scene, ratio), text))
    return [(name, title, figure, text) for name, title, figure, text in drawn if figure is not None]


def _figures(comparison: Comparison) -> str:
    shown = "".join(
        f"<figure><h3>{title}</h3><div role='img' aria-label='{escape(text)}'>{svg(figure, name)}</div>"
        f"<figcaption>{escape(text)}</figcaption></figure>"
        for name, title, figure, text in figures(comparison)
    )
    return f"<div class='figures'>{shown}</div>" if shown else "<p class='muted'>Nothing to draw yet.</p>"


def _answers(comparison: Comparison) -> str:
    """Return the filters, an empty table, and the answers as data that the page's script fills it with."""
    columns = {name: metric for metric, name in SETS.items()}
    rows: list[list[Any]] = []
    for place, by_seed in comparison.cells.items():
        for seed, result in sorted(by_seed.items()):
            arm, stage = arm_of(result), served(result)
            for answer in result.answers:
                if (answer.arm, answer.stage) == (arm, stage) and answer.set in columns:
                    metric = columns[answer.set]
                    said = mark(answer, metric, result)
                    scene = str(Scene(place.task, place.attack))
                    where = [arm_word(place.arm), scene, f"{place.harmful_ratio:g}", str(seed)]
                    rows.append([*where, metric.replace("_", " "), said, answer.prompt, answer.response])
    if not rows:
        return "<p class='muted'>No answers yet.</p>"
    data = json.dumps(rows, ensure_ascii=False).replace("<", "\\u003c")
    names = ("Defense", "Task", "p", "Seed", "Set", "Verdict", "Prompt", "Answer")
    selects = "".join(
        f"<label>{name} <select name='{i}'><option value=''>all</option>"
        + "".join(f"<option>{escape(v)}</option>" for v in dict.fromkeys(row[i] for row in rows))
        + "</select></label>"
        for i, name in enumerate(names[:6])
    )
    head = "".join(f"<th><button type='button' data-column='{i}'>{name}</button></th>" for i, name in enumerate(names))
    return (
        f"<form id='filters'>{selects}<input type='search' name='text' placeholder='Search' aria-label='Search prompts"
        " and answers'><span id='shown' class='muted' role='status'></span></form><div class='scroll'>"
        f"<table class='wide answers'><thead><tr>{head}</tr></thead><tbody id='rows'></tbody></table></div><p>"
        f"<button id='more' type='button' hidden>Show more</button></p>"
        f"<script type='application/json' id='data'>{data}</script>"
    )


def _provenance(comparison: Comparison) -> str:
    said = [
        "Every defense saw the same upload, the same prompts and the same training settings; seeds are shared.",
        "One attack setting proves little: an attacker who tunes steps, learning rate and data may get further.",
        "Intervals over few seeds are wide, and a difference that is not claimed may still be there.",
    ]
    if any("builtin" in result.judges() for by_seed in comparison.cells.values() for result in by_seed.values()):
        said.append(
            "The built-in world is made up: its numbers show how a defense acts here, not how safe a real service is."
        )
    listed = "".join(f"<li>{escape(each)}</li>" for each in said)
    settings = escape(json.dumps(comparison.settings.get("config", {}), indent=1, ensure_ascii=False))
    arguments = escape(json.dumps(comparison.settings.get("arguments", {}), indent=1, ensure_ascii=False))
    return (
        f"<ul>{listed}</ul><details><summary>Settings of every cell</summary><pre>{settings}</pre></details>"
        f"<details><summary>Arguments of defenses and attacks</summary><pre>{arguments}</pre></details>"
    )
