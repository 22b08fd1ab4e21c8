"""Figures against the rows: heights, intervals, colours and labels."""

import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from hftlight.report import read_result
from hftlight.report.figure import (
    PALETTE,
    cost_figure,
    loss_figure,
    outcome_figure,
    running_mean,
    simulated_step_figure,
    spread,
    stage_figure,
    svg,
)
from tests.helpers.run_folder import harmful, metric_rows, write_run

ARMS = ("none", "booster", "booster+antidote")


@pytest.fixture
def result(tmp_path):
    return read_result(write_run(tmp_path, answers=[], arms=ARMS))


def errorbars(axes):
    """Return arm -> (heights, interval ends) of the error bars on the axes."""
    drawn = {}
    for bars in axes.containers:
        line, _, (verticals,) = bars.lines
        # The vertical line of a bar runs from (stage, low) to (stage, high).
        ends = [(low, high) for (_, low), (_, high) in verticals.get_segments()]
        drawn[bars.get_label()] = (list(line.get_ydata()), ends)
    return drawn


@pytest.mark.parametrize("metric", ["harmful_score", "finetune_accuracy", "over_refusal"])
def test_heights_and_intervals_are_the_scores(result, metric):
    (axes,) = stage_figure(result, metric, "percent").axes
    drawn = errorbars(axes)
    assert set(drawn) == set(ARMS)
    for arm, (heights, ends) in drawn.items():
        scores = [result.score(arm, stage, metric) for stage in result.stages(arm)]
        assert heights == pytest.approx([s.value for s in scores])
        assert [end for pair in ends for end in pair] == pytest.approx([x for s in scores for x in (s.low, s.high)])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["base", "aligned", "fine-tuned", "repaired"]


def test_arms_keep_their_colour_and_are_named_with_their_last_score(result):
    (axes,) = stage_figure(result, "harmful_score", "percent").axes
    named = {text.get_text(): text.get_color() for text in axes.texts}
    assert named == dict(zip(("undefended 61.7", "booster 20.0", "booster+antidote 9.2"), PALETTE, strict=False))
    (costs, _) = cost_figure(result).axes
    bars = [bar.get_facecolor() for bar in costs.patches]
    assert len(set(bars)) == len(ARMS)


def test_a_score_without_interval_has_a_bar_of_no_length(tmp_path):
    rows = [{**harmful("none", "finetuning", 60), "low": None, "high": None}]
    (axes,) = stage_figure(read_result(write_run(tmp_path, rows, [])), "harmful_score", "percent").axes
    assert errorbars(axes)["none"] == ([60.0], [(60.0, 60.0)])


def test_loss_panels_hold_the_logged_curves(result):
    figure = loss_figure(result)
    assert [axes.get_title("left") for axes in figure.axes] == ["alignment", "fine-tuning"]
    raw = {line.get_label(): line for line in figure.axes[0].lines if not line.get_label().startswith("_")}
    for arm in ARMS:
        logged = result.curves[arm, "alignment", "train/loss"]
        assert list(zip(*raw[arm].get_data(), strict=True)) == logged
    assert not figure.axes[0].texts
    assert {text.get_text() for text in figure.axes[1].texts} == {"undefended", "booster", "booster+antidote"}


def test_reduction_is_harmful_minus_stepped_loss(result):
    left, right = simulated_step_figure(result).axes
    stepped = dict(result.curves["booster", "alignment", "booster/stepped_loss"])
    harm = result.curves["booster", "alignment", "booster/harmful_loss"]
    drawn = next(line for line in right.lines if line.get_label() == "booster")
    assert list(drawn.get_ydata()) == pytest.approx([value - stepped[step] for step, value in harm])
    assert list(next(line for line in left.lines if line.get_label() == "booster").get_ydata()) == [v for _, v in harm]


def test_cost_bars_have_the_measured_widths(result):
    speed, memory = cost_figure(result).axes
    costs = [cost for cost in result.costs.values() if cost.steps]  # a repair has no steps, so it has no bar
    assert len(costs) == len(result.costs) - 1
    assert [bar.get_width() for bar in speed.patches] == pytest.approx([c.relative_to_sft for c in costs])
    assert [bar.get_width() for bar in memory.patches] == [c.peak_memory_mib for c in costs]
    labels = [text.get_text() for text in speed.texts]
    assert labels == ["1.00x", "1.00x", "2.94x", "1.00x", "2.98x", "1.00x"]
    assert speed.get_yticklabels()[2].get_text() == "booster, alignment"


def test_without_a_plain_run_cost_bars_show_seconds(tmp_path):
    rows = [row for row in metric_rows(("booster",)) if row["kind"] == "cost"]
    folder = write_run(tmp_path, [{**row, "relative_to_sft": None} for row in rows], [], arms=("booster",))
    speed, _ = cost_figure(read_result(folder)).axes
    assert speed.get_title("left") == "time per step, seconds"
    assert [bar.get_width() for bar in speed.patches] == [4.41, 1.5]


def test_a_repair_alone_draws_no_costs(tmp_path):
    rows = [row for row in metric_rows(("booster+antidote",)) if row["stage"] == "post_finetuning"]
    result = read_result(write_run(tmp_path, rows, [], arms=("booster+antidote",)))
    assert result.costs
    assert cost_figure(result) is None


def test_nothing_measured_draws_nothing(tmp_path):
    empty = read_result(write_run(tmp_path, [], []))
    assert stage_figure(empty, "harmful_score", "percent") is None
    assert loss_figure(empty) is simulated_step_figure(empty) is cost_figure(empty) is None


def test_svg_shares_no_id_asks_for_nothing_and_takes_the_pages_colours(tmp_path):
    rows = [harmful("none", "finetuning", 60), harmful("<b>$x_1$", "finetuning", 20)]
    result = read_result(write_run(tmp_path, rows, [], arms=()))
    first, second = (svg(stage_figure(result, "harmful_score", "percent"), name) for name in ("one", "two"))
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert all(f'id="{target}"' in first for target in re.findall(r"url\(#([^)]+)\)", first))
    assert f"var(--arm-1, {PALETTE[1]})" in first
    assert "http" not in first.replace("http://www.w3.org/2000/svg", "")
    texts = [element.text for element in ET.fromstring(first).iter("{http://www.w3.org/2000/svg}text")]
    assert "<b>$x_1$ 20.0" in texts


def test_spread_keeps_order_gap_and_what_is_free():
    assert spread([1.0, 5.0, 9.0], gap=1) == [1.0, 5.0, 9.0]
    assert spread([5.0, 5.0, 5.0], gap=1) == pytest.approx([4.0, 5.0, 6.0])
    moved = spread([0.0, 0.5, 1.4, 1.5, 8.0], gap=1)
    assert all(b - a >= 1 - 1e-9 for a, b in pairwise(moved))
    assert moved[-1] == 8.0


def test_running_mean_shortens_at_the_ends():
    assert running_mean([0, 3, 6, 9], window=3) == [1.5, 3, 6, 7.5]


def test_the_parts_of_a_bar_are_the_shares_and_add_up(tmp_path):
    result = read_result(write_run(tmp_path, arms=("none",)))
    figure = outcome_figure(result)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "undefended, base",
        "undefended, aligned",
        "undefended, fine-tuned",
    ]
    parts = result.outcomes("none", "finetuning")
    for container, (name, score) in zip(axes.containers, parts.items(), strict=True):
        assert container.get_label() == name
        assert container[2].get_width() == pytest.approx(score.value)
    last = axes.containers[-1][2]
    assert last.get_x() + last.get_width() == pytest.approx(100)
    assert outcome_figure(read_result(write_run(tmp_path / "b", [harmful("none", "base", 5)], []))) is None


def test_a_loss_is_drawn_in_its_own_unit(tmp_path):
    """The axis does not reach 100: it ends at 1.02 * 1.1 times the largest upper end, 3.1 nats."""
    figure = stage_figure(read_result(write_run(tmp_path, arms=("none",))), "alignment_loss", "nats per token")
    assert figure.axes[0].get_ylim()[1] == pytest.approx(1.02 * 1.1 * 3.1)
    assert "undefended 1.6" in {text.get_text() for text in figure.axes[0].texts}
