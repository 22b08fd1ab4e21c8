"""Table of a comparison: in the terminal, as CSV, in Markdown, and in LaTeX with the layout of the papers."""

import csv
from collections.abc import Callable
from dataclasses import asdict
from io import StringIO
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from hftlight.comparison.read import MEAN, METRICS, Comparison, Place, arm_of
from hftlight.evaluation.stats.seeds import Spread
from hftlight.files import write_text
from hftlight.folders import WITHOUT_PATTERN, arm_word
from hftlight.report.claims import COLLAPSED
from hftlight.report.escape import in_latex, in_markdown
from hftlight.report.table import HEADLINE, headline

HEADS = {
    "harmful_score": "Harmful score %",
    WITHOUT_PATTERN: "Without pattern %",
    "finetune_accuracy": "Accuracy %",
    "over_refusal": "Over-refusal %",
    MEAN: "Mean score",
    "worst_case_harmful_score": "Worst case %",
    "useful_harmful_score": "Worst case, task kept %",
}
OUTCOME_HEAD = "Refused, complied, broken %"
COLLAPSE_MARK = "†"
SCORE = ("stage", "metric", "judge", "value", "low", "high", "count", "unit")
FIELDS = ("defense", "task", "attack", "harmful_ratio", "seed", *SCORE)


def cell_text(spread: Spread | None, digits: int = 1) -> str:
    """Return ``33.7 ± 2.1`` over seeds, ``33.7 (25.2-43.5)`` for one seed, '-' if nothing was measured."""
    if spread is None:
        return "-"
    if spread.deviation is not None:
        return f"{spread.mean:.{digits}f} ± {spread.deviation:.{digits}f}"
    if spread.low is None or spread.high is None:
        return f"{spread.mean:.{digits}f}"
    return f"{spread.mean:.{digits}f} ({spread.low:.{digits}f}-{spread.high:.{digits}f})"


def number_text(comparison: Comparison, place: Place, metric: str) -> str:
    """Return a number of the table as text. A mark shows a harmful score that is low because answers collapsed."""
    marked = metric == "harmful_score" and comparison.collapsed(place)
    digits = 2 if metric == MEAN else 1
    return cell_text(comparison.spread(place, metric), digits) + (COLLAPSE_MARK if marked else "")


def caption(comparison: Comparison) -> str:
    """Return the caption that explains the numbers of the table."""
    seeds = {len(by_seed) for by_seed in comparison.cells.values()}
    many = max(seeds, default=0) > 1
    text = (
        "Mean ± standard deviation over seeds"
        if many
        else "One seed, with the 95 % bootstrap interval over its prompts in brackets (Wilson's if all are alike)"
    )
    if many and len(seeds) > 1:
        text += " (not all cells have the same number of seeds yet)"
    text += (
        ". Bold: better than every other row of the column beyond the noise (95 % interval of the paired difference)."
        " Time: training time of all stages relative to the undefended arm."
    )
    if any(map(comparison.outcomes, comparison.cells)):
        text += f" {HEADLINE}"
    if MEAN in comparison.metrics:
        results = [result for by_seed in comparison.cells.values() for result in by_seed.values()]
        units = {score.unit for result in results for score in result.scores.values() if score.metric == MEAN}
        text += f" Mean score: mean of the judge's scores, {' or '.join(sorted(units))}; lower is safer."
    if any(map(comparison.collapsed, comparison.cells)):
        text += (
            f" {COLLAPSE_MARK}: low in at least one seed because answers to harmful prompts are {COLLAPSED}. Fewer"
            " answers refuse, and fewer are harmful."
        )
    return text


def table_rows(comparison: Comparison, bold: Callable[[str], str] = str) -> list[list[str]]:
    """Return the table as a head and rows: one row per scene and arm, columns per harmful ratio, time and memory.

    ``bold`` marks the text of the best number of a column.
    """
    ratios, metrics = comparison.ratios(), comparison.metrics
    heads = [OUTCOME_HEAD, *(HEADS[m] for m in metrics)]
    head = ["Task", "Defense", *(f"{name}, p={p:g}" for p in ratios for name in heads), "Time x", "Peak MiB"]
    rows = [head]
    for scene in comparison.scenes:
        best = {(p, m): comparison.best(comparison.column(scene, p), m) for p in ratios for m in metrics}
        for arm in comparison.arms:
            places = [p for ratio in ratios if (p := comparison.place(arm, scene, ratio)) in comparison.cells]
            if not places:
                continue
            cells = []
            for ratio in ratios:
                place = comparison.place(arm, scene, ratio)
                cells.append(headline(comparison.outcomes(place)))
                for metric in metrics:
                    text = number_text(comparison, place, metric)
                    cells.append(bold(text) if best[ratio, metric] == place else text)
            # Time and memory are those of the largest harmful ratio with a finished cell.
            time, memory = comparison.seconds(places[-1]), comparison.memory(places[-1])
            costs = ["-" if time is None else f"{time.mean:.2f}", "-" if memory is None else f"{memory:.0f}"]
            rows.append([str(scene), arm_word(arm), *cells, *costs])
    return rows


def leaderboard_table(comparison: Comparison) -> Table:
    """Return the table for a terminal, with one line per scene, harmful ratio and arm to keep it narrow."""
    metrics = comparison.metrics
    table = Table(box=SIMPLE_HEAD, caption=caption(comparison), caption_justify="left", padding=0, show_edge=False)
    outcomes = OUTCOME_HEAD.replace(", ", "/\n")
    for name in ("Task", "p", "Defense", outcomes, *(_narrow(HEADS[m]) for m in metrics), "Time\nx"):
        least = {"Task": 7, "Defense": 10}.get(name)  # text wraps in a narrow terminal; numbers are never cut
        text = least is not None
        table.add_column(name, justify="left" if text else "right", no_wrap=not text, overflow="fold", min_width=least)
    for scene in comparison.scenes:
        for ratio in comparison.ratios(scene):
            column = comparison.column(scene, ratio)
            best = {m: comparison.best(column, m) for m in metrics}
            for place in column:
                texts = {m: number_text(comparison, place, m).replace(" (", "\n(") for m in metrics}
                ends = headline(comparison.outcomes(place))
                cells = [Text(text, "bold" if best[m] == place else "") for m, text in texts.items()]
                time = comparison.seconds(place)
                took = "-" if time is None else f"{time.mean:.2f}"
                table.add_row(str(scene), f"{ratio:g}", arm_word(place.arm), ends, *cells, took)
            table.add_section()
    return table


def _narrow(head: str) -> str:
    """Return the head of a column in two lines."""
    first, _, rest = head.partition("-" if "-" in head else " ")
    return f"{first}-\n{rest}" if "-" in head else f"{first}\n{rest}"


def leaderboard_markdown(comparison: Comparison) -> str:
    """Return the table in Markdown."""
    head, *rows = table_rows(comparison, lambda text: f"**{text}**")
    named = [[*map(in_markdown, row[:2]), *row[2:]] for row in rows]  # task and defense
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2), *named]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{caption(comparison)}\n{_missing(comparison)}"


def _missing(comparison: Comparison) -> str:
    """Return the list of unfinished cells in Markdown, empty if all are finished."""
    said = "\n".join(f"- {in_markdown(name)}: {in_markdown(why)}" for name, why in comparison.missing.items())
    return f"\nNot finished:\n\n{said}\n" if said else ""


def leaderboard_latex(comparison: Comparison) -> str:
    """Return the table in LaTeX (booktabs), with the harmful score and the accuracy for each harmful ratio."""
    ratios = comparison.ratios()
    pair = METRICS[:2]
    groups = " & ".join(rf"\multicolumn{{2}}{{c}}{{$p={p:g}$}}" for p in ratios)
    # Columns 1 and 2 are task and defense. Each ratio spans the next two columns.
    rules = " ".join(rf"\cmidrule(lr){{{3 + 2 * i}-{4 + 2 * i}}}" for i in range(len(ratios)))
    lines = [
        rf"\begin{{tabular}}{{ll{'rr' * len(ratios)}}}",
        r"\toprule",
        rf" & & {groups} \\",
        rules,
        rf"Task & Defense & {' & '.join(['HS', 'FA'] * len(ratios))} \\",
    ]
    for scene in comparison.scenes:
        lines.append(r"\midrule")
        best = {(p, m): comparison.best(comparison.column(scene, p), m) for p in ratios for m in pair}
        for arm in comparison.arms:
            if not any(comparison.place(arm, scene, p) in comparison.cells for p in ratios):
                continue
            cells = []
            for ratio in ratios:
                place = comparison.place(arm, scene, ratio)
                for metric in pair:
                    text = _latex(number_text(comparison, place, metric))
                    cells.append(rf"\textbf{{{text}}}" if best[ratio, metric] == place else text)
            lines.append(rf"{_latex(str(scene))} & {_latex(arm_word(arm))} & {' & '.join(cells)} \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join([*(f"% {line}" for line in caption(comparison).split(". ")), *lines, ""])


def _latex(text: str) -> str:
    return in_latex(text).replace(" ± ", r" $\pm$ ").replace(in_latex(COLLAPSE_MARK), r"$^\dagger$")


def leaderboard_csv(comparison: Comparison) -> str:
    """Return every score of every cell as CSV, one line per seed, stage, metric and judge."""
    out = StringIO()
    writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
    writer.writeheader()
    for place, by_seed in comparison.cells.items():
        for seed, result in sorted(by_seed.items()):
            where = {"defense": place.arm, **asdict(place), "seed": seed}
            del where["arm"]
            for score in result.scores.values():
                if score.arm == arm_of(result):
                    values = {name: getattr(score, name) for name in SCORE}
                    writer.writerow({**where, **values})
    return out.getvalue()


def write_leaderboard(comparison: Comparison) -> list[Path]:
    """Write ``leaderboard.csv``, ``.md`` and ``.tex`` into the comparison's folder and return their paths."""
    makers = {"csv": leaderboard_csv, "md": leaderboard_markdown, "tex": leaderboard_latex}
    paths = []
    for suffix, make in makers.items():
        paths.append(comparison.folder / f"leaderboard.{suffix}")
        write_text(paths[-1], make(comparison))
    return paths
