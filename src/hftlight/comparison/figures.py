"""Figures of a comparison: harm against harmful ratio, safety against accuracy, and the cost of each defense."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hftlight.comparison.grid import value_text
from hftlight.comparison.read import SETS, Comparison, Scene, Sweep, pareto
from hftlight.evaluation.stats.seeds import Spread
from hftlight.folders import UNDEFENDED, arm_word
from hftlight.report.figure import INK, MARKERS, MUTED, OUTCOME_COLORS, PALETTE, canvas, label_ends, styled

# Lines of the figure of a sweep: metric, then word and colour.
SWEPT_METRICS = {
    "harmful_score": ("harmful score", PALETTE[2]),
    "finetune_accuracy": ("finetune accuracy", PALETTE[1]),
    "answers_refused": ("refused", OUTCOME_COLORS["refused"][0]),
    "answers_broken": ("broken", OUTCOME_COLORS["broken"][0]),
}


def _draw_line(axes: Axes, x: Sequence[float], spreads: Sequence[Spread], hollow: Sequence[int], **look: Any) -> None:
    """Draw means in percent with their intervals. The marks whose indices are in ``hollow`` are hollow."""
    y = [s.mean for s in spreads]
    below = [s.mean - max(0.0, s.mean if s.low is None else s.low) for s in spreads]
    above = [min(100.0, s.mean if s.high is None else s.high) - s.mean for s in spreads]
    axes.errorbar(x, y, [below, above], **{"markersize": 6, "lw": 1.3, "elinewidth": 2.4, **look})
    marks = {"markersize": 6, **look, "ls": "none", "mfc": "white", "zorder": 3}
    marks.pop("elinewidth", None)
    axes.plot([x[i] for i in hollow], [y[i] for i in hollow], **marks)


def color_place(comparison: Comparison, arm: str) -> int:
    """Return an arm's index in the palette, the same in every figure. The undefended arm has index 0."""
    if arm == UNDEFENDED:
        return 0
    defended = [a for a in comparison.arms if a != UNDEFENDED]
    return 1 + defended.index(arm) % (len(PALETTE) - 1)


@styled
def ratio_figure(comparison: Comparison, scene: Scene, metric: str, label: str) -> Figure | None:
    """Draw one metric against the harmful ratio, one line per arm with 95 % intervals.

    A hollow mark shows a harmful score that is low because answers collapsed.

    Args:
        comparison: the comparison.
        scene: task and attack.
        metric: name of the metric.
        label: label of the y axis, with its unit, percent.

    Returns:
        The figure, or None if there are fewer than two harmful ratios.
    """
    ratios = [p for p in comparison.ratios(scene) if comparison.column(scene, p)]
    if len(ratios) < 2:
        return None
    figure, (axes,) = canvas(1, height=3.3)
    step = min(b - a for a, b in pairwise(ratios))
    arms = [arm for arm in comparison.arms if any(comparison.place(arm, scene, p) in comparison.cells for p in ratios)]
    ends = []
    for number, arm in enumerate(arms):
        spreads = {p: comparison.spread(comparison.place(arm, scene, p), metric) for p in ratios}
        points = [(p, s) for p, s in spreads.items() if s is not None]
        if not points:
            continue
        # A small shift per arm keeps the intervals at one ratio apart.
        shift = 0.04 * step * (number - (len(arms) - 1) / 2)
        color = PALETTE[color_place(comparison, arm)]
        marker = MARKERS[color_place(comparison, arm)]
        fallen = [i for i, (p, _) in enumerate(points) if comparison.collapsed(comparison.place(arm, scene, p))]
        fallen = fallen if metric == "harmful_score" else []
        _draw_line(axes, [p + shift for p, _ in points], [s for _, s in points], fallen, color=color, marker=marker)
        ends.append((points[-1][1].mean, arm_word(arm), color))
    axes.set(ylim=(-2, 102), xlabel="harmful ratio p of the upload", ylabel=label, title=str(scene))
    axes.set_xticks(ratios, [f"{p:g}" for p in ratios])
    axes.set_xlim(ratios[0] - 0.3 * step, ratios[-1] + 0.3 * step)
    label_ends(axes, ratios[-1] + 0.3 * step, ends, gap=6.5)
    return figure


@styled
def sweep_figure(comparison: Comparison, scene: Scene, harmful_ratio: float, sweep: Sweep) -> Figure | None:
    """Draw harmful score, accuracy, and refused and broken answers against a swept argument, with 95 % intervals.

    A dashed line is the score of the undefended arm. A hollow mark shows a harmful score that is low because answers
    collapsed. The values have equal distances on the axis.

    Returns:
        The figure, or None if fewer than two arms have a harmful score.
    """
    places = [comparison.place(arm, scene, harmful_ratio) for _, arm in sweep.arms]
    if sum(comparison.spread(place, "harmful_score") is not None for place in places) < 2:
        return None
    figure, (axes,) = canvas(1, height=3.3)
    ends, last = [], len(places) - 1
    for number, (metric, (word, color)) in enumerate(SWEPT_METRICS.items()):
        points = [(x, s) for x, place in enumerate(places) if (s := comparison.spread(place, metric)) is not None]
        if not points:
            continue
        shift = 0.05 * (number - (len(SWEPT_METRICS) - 1) / 2)
        fallen = [i for i, (at, _) in enumerate(points) if comparison.collapsed(places[at])]
        fallen = fallen if metric == "harmful_score" else []
        look: dict[str, Any] = {"color": color, "marker": MARKERS[number]}
        if metric in SETS:
            plain = comparison.spread(comparison.place(UNDEFENDED, scene, harmful_ratio), metric)
            if plain is not None:
                axes.axhline(plain.mean, color=color, lw=1, ls=(0, (5, 4)), alpha=0.8, zorder=0)
        else:
            look |= {"markersize": 4, "lw": 1, "elinewidth": 1, "ls": (0, (1, 2))}
        _draw_line(axes, [at + shift for at, _ in points], [s for _, s in points], fallen, **look)
        ends.append((points[-1][1].mean, word, color))
    axes.set(ylim=(-2, 102), xlim=(-0.3, last + 0.3), xlabel=sweep.option, ylabel="percent")
    axes.set_title(f"{sweep.combination}: {scene}, p = {harmful_ratio:g}")
    axes.set_xticks(range(len(places)), [value_text(value) for value, _ in sweep.arms])
    axes.grid(False, axis="x")
    label_ends(axes, last + 0.3, ends, gap=6.5)
    return figure


@styled
def tradeoff_figure(comparison: Comparison, scene: Scene, harmful_ratio: float) -> Figure | None:
    """Draw finetune accuracy over harmful score, one mark per arm with intervals, and the Pareto front.

    A hollow mark shows a harmful score that is low because answers collapsed.

    Returns:
        The figure, or None if fewer than two arms have both scores.
    """
    spreads = {}
    for place in comparison.column(scene, harmful_ratio):
        harm, right = (comparison.spread(place, m) for m in ("harmful_score", "finetune_accuracy"))
        if harm is not None and right is not None:
            spreads[place.arm] = (harm, right)
    if len(spreads) < 2:
        return None
    figure, (axes,) = canvas(1, height=3.6)
    ends = []
    for arm, (harm, right) in spreads.items():
        color, marker = PALETTE[color_place(comparison, arm)], MARKERS[color_place(comparison, arm)]
        fallen = comparison.collapsed(comparison.place(arm, scene, harmful_ratio))
        fill = "white" if fallen else color
        axes.plot(harm.mean, right.mean, color=color, marker=marker, markersize=8, ls="none", mfc=fill, zorder=3)
        for spread, line in ((harm, axes.hlines), (right, axes.vlines)):
            if spread.low is not None and spread.high is not None:
                at = right.mean if spread is harm else harm.mean
                line(at, max(0.0, spread.low), min(100.0, spread.high), color=color, lw=1.4, alpha=0.7)
        ends.append((right.mean, f"{arm_word(arm)}", color))
    # The front uses the means alone, not their intervals.
    front = pareto({arm: (harm.mean, right.mean) for arm, (harm, right) in spreads.items()})
    points = [(spreads[arm][0].mean, spreads[arm][1].mean) for arm in front]
    axes.step([x for x, _ in points], [y for _, y in points], where="post", color=MUTED, lw=1, ls=(0, (3, 3)), zorder=0)
    lows = [r.mean if r.low is None else r.low for _, r in spreads.values()]
    bottom = max(-2.0, min(lows) - 5)
    axes.set(xlim=(-2, 102), ylim=(bottom, 102), xlabel="harmful score, percent (lower is safer)")
    axes.set(ylabel="finetune accuracy, percent", title=f"{scene}, p = {harmful_ratio:g}")
    label_ends(axes, 102, ends, gap=0.065 * (102 - bottom))
    return figure


@styled
def comparison_cost_figure(comparison: Comparison, scene: Scene, harmful_ratio: float) -> Figure | None:
    """Draw training time relative to the undefended arm, and peak memory, as one bar per arm.

    Returns:
        The figure, or None if neither time nor memory was measured.
    """
    column = comparison.column(scene, harmful_ratio)
    times = [comparison.seconds(place) for place in column]
    memory = [comparison.memory(place) for place in column]
    if not column or not (any(times) or any(memory)):
        return None
    figure, panels = canvas(2, height=0.9 + 0.3 * len(column), sharey=True)
    colors = [PALETTE[color_place(comparison, place.arm)] for place in column]
    drawn = (
        ([None if t is None else t.mean for t in times], "training time, x undefended", "{:.2f}x"),
        (memory, "peak memory, MiB", "{:.0f}"),
    )
    for axes, (values, title, form) in zip(panels, drawn, strict=True):
        bars = axes.barh(range(len(column)), [v or 0.0 for v in values], color=colors, height=0.62)
        axes.bar_label(bars, ["-" if v is None else form.format(v) for v in values], padding=4, color=INK)
        axes.set(title=title, xlim=(0, 1.25 * max([v or 0.0 for v in values] + [1e-9])))
        axes.grid(False, axis="y")
    panels[0].axvline(1, color=INK, lw=0.8, ls=(0, (3, 3)))
    panels[0].set_yticks(range(len(column)), [arm_word(place.arm) for place in column])
    panels[0].invert_yaxis()
    return figure
