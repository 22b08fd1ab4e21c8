"""Figures of a report, drawn without a display.

Each arm has one colour and one marker in all figures. The label of a line is at the line's end.
"""

import re
from collections.abc import Mapping, Sequence, Set
from io import StringIO

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.style import context

from hftlight.evaluation.metrics.outcomes import Outcome
from hftlight.folders import STAGES, UNDEFENDED, arm_word
from hftlight.report.result import Curve, Result
from hftlight.report.table import value_text

INK, MUTED, GRID = "#1f2328", "#59636e", "#d8dee4"
PALETTE = ("#57606a", "#0072b2", "#d55e00", "#00875f", "#a8528a", "#946c00", "#6f52c9")  # safe for colour blindness
MARKERS = "osD^vPX"
OUTCOME_COLORS: Mapping[Outcome, tuple[str, str]] = {  # colour of the bar, colour of the number on it
    "refused": ("#2f7f95", "#ffffff"),
    "complied": ("#b3423a", "#ffffff"),
    "broken": ("#6b7280", "#ffffff"),
    "other": (GRID, INK),
}
NARROWEST = 4.0  # percent; the smallest part of a bar that has room for its number
ROLES = {INK: "ink", MUTED: "muted", GRID: "grid"} | {color: f"arm-{i}" for i, color in enumerate(PALETTE)}
TRAINING = {"base": "base", "alignment": "alignment", "finetuning": "fine-tuning", "post_finetuning": "repair"}
SMOOTH_FROM, WINDOW = 40, 9  # points from which on a curve is drawn thin, and points in its running mean
STYLE = {
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "font.size": 9.5,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "hftlight",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
}
styled = context(["default", STYLE])  # overrides the user's own matplotlib settings


def color_index(result: Result, arm: str) -> int:
    """Return an arm's index in ``PALETTE``, the same in every figure. The undefended arm has index 0."""
    return 0 if arm == UNDEFENDED else 1 + result.defended.index(arm) % (len(PALETTE) - 1)


@styled
def stage_figure(result: Result, metric: str, label: str) -> Figure | None:
    """Draw one metric over the stages, one line per arm with 95 % intervals.

    Args:
        result: the run.
        metric: name of the metric. If several judges measured it, the first one is drawn.
        label: name of the y axis, with its unit.

    Returns:
        The figure, or None if nothing was measured.
    """
    stages = [s for s in STAGES if any(result.score(arm, s, metric) for arm in result.arms)]
    if not stages:
        return None
    figure, (axes,) = canvas(1, height=3.3)
    arms = [arm for arm in result.arms if any(result.score(arm, s, metric) for s in stages)]
    ends, top, unit = [], 0.0, "percent"
    for place, arm in enumerate(arms):
        scores = [(stages.index(s), score) for s in stages if (score := result.score(arm, s, metric))]
        unit = scores[0][1].unit
        # Arms are shifted sideways around each stage, so that their intervals do not hide each other.
        shift = 0.07 * (place - (len(arms) - 1) / 2)
        x, y = [at + shift for at, _ in scores], [score.value for _, score in scores]
        below = [s.value - (s.value if s.low is None else s.low) for _, s in scores]
        above = [(s.value if s.high is None else s.high) - s.value for _, s in scores]
        top = max([top, *(value + up for value, up in zip(y, above, strict=True))])
        color, marker = PALETTE[color_index(result, arm)], MARKERS[color_index(result, arm)]
        axes.errorbar(x, y, [below, above], color=color, marker=marker, markersize=6, lw=1.3, elinewidth=3, label=arm)
        ends.append((y[-1], f"{arm_word(arm)} {value_text(y[-1], unit)}", color))
        if scores[-1][0] < len(stages) - 1:  # a dotted line from the last score to the label at the right edge
            axes.plot([x[-1], len(stages) - 0.8], [y[-1]] * 2, color=color, lw=1, ls=(0, (1, 3)))
    limit = 100.0
    if unit != "percent":
        limit = max(top * 1.1, 1e-9)
    elif metric == "over_refusal":
        limit = min(100.0, max(20.0, top * 1.1))
    axes.set(ylim=(-0.02 * limit, limit * 1.02), xlim=(-0.4, len(stages) - 0.8), ylabel=label)
    axes.set_xticks(range(len(stages)), [STAGES[s] for s in stages])
    axes.grid(False, axis="x")
    label_ends(axes, len(stages) - 0.8, ends, gap=0.065 * limit)
    return figure


def outcome_figure(result: Result) -> Figure | None:
    """Draw the outcomes of answers to harmful prompts, one bar of 100 % per arm and stage.

    Return None if the outcomes were not measured.
    """
    rows = {
        f"{arm_word(arm)}, {STAGES[stage]}": {name: score.value for name, score in parts.items()}
        for arm in result.arms
        for stage in result.stages(arm)
        if (parts := result.outcomes(arm, stage))
    }
    return outcome_bars(rows)


@styled
def outcome_bars(rows: Mapping[str, Mapping[Outcome, float]]) -> Figure | None:
    """Draw one bar of 100 % per row, divided into refused, complied, broken and other answers.

    Args:
        rows: percent by outcome, by the row's label.

    Returns:
        The figure, or None without rows.
    """
    if not rows:
        return None
    figure, (axes,) = canvas(1, height=0.75 + 0.3 * len(rows))
    left = [0.0] * len(rows)
    for name, (color, ink) in OUTCOME_COLORS.items():
        widths = [shares[name] for shares in rows.values()]
        bars = axes.barh(range(len(rows)), widths, left=left, color=color, height=0.7, label=name)
        shown = [f"{width:.0f}" if width >= NARROWEST else "" for width in widths]
        axes.bar_label(bars, shown, label_type="center", color=ink, fontsize=8.5)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    axes.set(xlim=(0, 100))
    axes.set_xticks([])
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines[:].set_visible(False)
    look = {"ncols": len(OUTCOME_COLORS), "frameon": False, "handlelength": 1, "handleheight": 1}
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), borderpad=0, **look)
    return figure


@styled
def loss_figure(result: Result, name: str = "train/loss") -> Figure | None:
    """Draw the training loss over optimizer steps, one panel per stage and one line per arm."""
    stages = [s for s in STAGES if any(key[1:] == (s, name) for key in result.curves)]
    if not stages:
        return None
    figure, panels = canvas(len(stages), height=3.0)
    curves = {s: {a: result.curves[a, s, name] for a in result.arms if (a, s, name) in result.curves} for s in stages}
    for number, (axes, stage) in enumerate(zip(panels, stages, strict=True)):
        # An arm is labelled only in its last panel, so arms of later panels get no label here.
        later = {arm for following in stages[number + 1 :] for arm in curves[following]}
        _draw_curves(axes, result, curves[stage], unlabelled=later)
        axes.set(title=TRAINING[stage], xlabel="optimizer step")
    panels[0].set_ylabel("training loss, nats per token")
    return figure


@styled
def evaluated_figure(result: Result) -> Figure | None:
    """Draw harmful score and finetune accuracy over the steps of fine-tuning, with 95 % intervals as bands."""
    by_metric = {
        metric: {arm: c for arm in result.arms if (c := result.curves.get((arm, "finetuning", f"eval/{metric}")))}
        for metric in ("harmful_score", "finetune_accuracy")
    }
    drawn = {metric: curves for metric, curves in by_metric.items() if curves}
    if not drawn:
        return None
    figure, panels = canvas(len(drawn), height=3.0)
    for number, (axes, (metric, curves)) in enumerate(zip(panels, drawn.items(), strict=True)):
        for arm in curves:
            ends = (result.curves.get((arm, "finetuning", f"eval/{metric}_{end}"), []) for end in ("low", "high"))
            low, high = (dict(curve) for curve in ends)
            steps = sorted(low.keys() & high.keys())
            bounds = [low[s] for s in steps], [high[s] for s in steps]
            axes.fill_between(steps, *bounds, color=PALETTE[color_index(result, arm)], alpha=0.15, lw=0)
        axes.set(title=metric.replace("_", " "), xlabel="optimizer step", ylim=(0, 100))
        _draw_curves(axes, result, curves, unlabelled=set(curves) if number < len(drawn) - 1 else frozenset())
    panels[0].set_ylabel("percent")
    return figure


@styled
def simulated_step_figure(result: Result) -> Figure | None:
    """Draw the harmful loss and its reduction by one simulated attack step, for defenses that log both."""
    harmful: dict[str, Curve] = {}
    reduction: dict[str, Curve] = {}
    for (arm, stage, name), curve in result.curves.items():
        defense, _, what = name.rpartition("/")
        stepped = dict(result.curves.get((arm, stage, f"{defense}/stepped_loss"), ()))
        if what == "harmful_loss" and stepped:
            harmful[arm] = curve
            reduction[arm] = [(step, value - stepped[step]) for step, value in curve if step in stepped]
    if not harmful:
        return None
    figure, (left, right) = canvas(2, height=3.0)
    _draw_curves(left, result, harmful, unlabelled=set(reduction))
    _draw_curves(right, result, reduction)
    right.axhline(0, color=MUTED, lw=0.8)
    left.set(title="harmful loss", xlabel="optimizer step", ylabel="nats per token")
    right.set(title="reduction by one simulated step", xlabel="optimizer step")
    return figure


@styled
def cost_figure(result: Result) -> Figure | None:
    """Draw time per step and peak memory as bars, one per arm and stage.

    The time is a multiple of plain fine-tuning (SFT), or in seconds if the run has no SFT reference. A repair has no
    steps and therefore no bar for its time.
    """
    recorded = [result.costs[arm, s] for arm in result.arms for s in STAGES if (arm, s) in result.costs]
    costs = [cost for cost in recorded if cost.seconds_per_step is not None or cost.peak_memory_mib is not None]
    if not costs:
        return None
    relative = any(cost.relative_to_sft is not None for cost in costs)
    figure, panels = canvas(2, height=0.9 + 0.3 * len(costs), sharey=True)
    speed = [cost.relative_to_sft if relative else cost.seconds_per_step for cost in costs]
    memory = [cost.peak_memory_mib for cost in costs]
    title = "time per step, x SFT" if relative else "time per step, seconds"
    drawn = ((speed, title, "{:.2f}x" if relative else "{:.3g} s"), (memory, "peak memory, MiB", "{:.0f}"))
    colors = [PALETTE[color_index(result, cost.arm)] for cost in costs]
    for axes, (values, name, form) in zip(panels, drawn, strict=True):
        bars = axes.barh(range(len(costs)), [value or 0.0 for value in values], color=colors, height=0.62)
        axes.bar_label(bars, ["-" if v is None else form.format(v) for v in values], padding=4, color=INK)
        axes.set(title=name, xlim=(0, 1.22 * max([value or 0.0 for value in values] + [1e-9])))
        axes.grid(False, axis="y")
    if relative:
        panels[0].axvline(1, color=INK, lw=0.8, ls=(0, (3, 3)))
    panels[0].set_yticks(range(len(costs)), [f"{arm_word(cost.arm)}, {TRAINING[cost.stage]}" for cost in costs])
    panels[0].invert_yaxis()
    return figure


@styled
def svg(figure: Figure, name: str) -> str:
    """Return a figure as SVG for a page, with ids of its own and colours that the page can change.

    Args:
        figure: one of the figures above. Each of its colours with a role becomes ``var(--<role>, <colour>)``.
        name: a word that no other figure on the page has. It prefixes the ids.
    """
    file = StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg xmlns="http://www.w3.org/2000/svg" \1>', text, count=1)
    # href must lose its namespace before the ids and the references to them get the figure's name.
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)

    def themed(match: re.Match[str]) -> str:
        role = ROLES.get(match[2])
        return f"{match[1]}: var(--{role}, {match[2]})" if role else match[0]

    return re.sub(r"\b(fill|stroke): (#[0-9a-f]{6})\b", themed, text)


def canvas(panels: int, height: float, sharey: bool = False) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure and its ``panels`` axes side by side. ``height`` is in inches."""
    figure = Figure(figsize=(6.2, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False, sharey=sharey)[0]


def _draw_curves(axes: Axes, result: Result, curves: Mapping[str, Curve], unlabelled: Set[str] = frozenset()) -> None:
    """Draw one curve per arm, and label the arms that are not in ``unlabelled``.

    Labels take width. Callers therefore label an arm only in its last panel.
    """
    ends = []
    for arm, curve in curves.items():
        if not curve:
            continue
        steps, values = zip(*curve, strict=True)
        color = PALETTE[color_index(result, arm)]
        smooth = len(curve) >= SMOOTH_FROM
        axes.plot(steps, values, color=color, lw=0.8 if smooth else 1.6, alpha=0.4 if smooth else 1, label=arm)
        last = values[-1]
        if smooth:
            mean = running_mean(values, WINDOW)
            axes.plot(steps, mean, color=color, lw=1.8)
            last = mean[-1]
        if arm not in unlabelled:
            ends.append((last, arm_word(arm), color))
    low, high = axes.get_ylim()
    label_ends(axes, max(curve[-1][0] for curve in curves.values() if curve), ends, gap=0.075 * (high - low))


def label_ends(axes: Axes, x: float, ends: Sequence[tuple[float, str, str]], gap: float) -> None:
    """Write each line's label to the right of x, near the line's last y, at least ``gap`` (in units of y) apart."""
    ends = sorted(ends)
    heights = spread([y for y, _, _ in ends], gap)
    for (_, text, color), height in zip(ends, heights, strict=True):
        look = {"color": color, "fontweight": "bold", "va": "center", "annotation_clip": False}
        axes.annotate(text, (x, height), xytext=(5, 0), textcoords="offset points", **look)  # type: ignore[arg-type]


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Return sorted heights moved at least ``gap`` apart. Each crowd of close heights stays centred on its mean."""
    # Each height starts as its own crowd. Two neighbouring crowds whose labels would overlap become one. A merge moves
    # the centre, so the search starts again until nothing overlaps.
    crowds = [[height] for height in heights]
    merged = True
    while merged:
        merged = False
        for i in range(len(crowds) - 1):
            upper, lower = sum(crowds[i + 1]) / len(crowds[i + 1]), sum(crowds[i]) / len(crowds[i])
            if upper - lower < gap * (len(crowds[i]) + len(crowds[i + 1])) / 2:
                crowds[i : i + 2] = [crowds[i] + crowds[i + 1]]
                merged = True
                break
    return [
        sum(crowd) / len(crowd) + gap * (place - (len(crowd) - 1) / 2)
        for crowd in crowds
        for place in range(len(crowd))
    ]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean over the ``window`` values around each value. At the ends there are fewer values."""
    half = window // 2
    spans = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(span) / len(span) for span in spans]
