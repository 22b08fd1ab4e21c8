"""A comparison read back: numbers over seeds, claims, tables in four formats, and the page."""

import csv
import json
import re
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from hftlight.comparison.claims import claims
from hftlight.comparison.figures import (
    SWEPT_METRICS,
    color_place,
    comparison_cost_figure,
    ratio_figure,
    sweep_figure,
    tradeoff_figure,
)
from hftlight.comparison.leaderboard import (
    caption,
    cell_text,
    leaderboard_csv,
    leaderboard_latex,
    leaderboard_markdown,
    leaderboard_table,
    write_leaderboard,
)
from hftlight.comparison.page import comparison_page, figures, write_comparison_report
from hftlight.comparison.read import Place, Scene, mark, pareto, prompts_of, read_comparison
from hftlight.errors import InputError
from hftlight.evaluation.stats.intervals import wilson
from hftlight.evaluation.stats.seeds import Spread, over_prompts, over_seeds, paired_over_prompts
from hftlight.folders import UNPATTERNED, WITHOUT_PATTERN
from hftlight.report.figure import PALETTE
from hftlight.report.result import Answer
from hftlight.report.table import headline
from tests.helpers.comparison_folder import HARM, REFUSED, write_comparison

NONE, LISA, BOOSTER = (Place(arm, "builtin", 0.1) for arm in ("none", "lisa", "booster"))

BUILTIN = Scene("builtin")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    failed = {"lisa-builtin-p0.3-s2": "RunError: the loss is NaN"}
    return read_comparison(write_comparison(tmp_path_factory.mktemp("comparison"), failed=failed))


def scores_of(comparison, name, metric="harmful_score"):
    rows = (comparison.folder / "cells" / name / "metrics.jsonl").read_text().splitlines()
    (row,) = [r for r in map(json.loads, rows) if r.get("metric") == metric and r["stage"] == "finetuning"]
    return row["value"]


def test_numbers_are_those_of_the_cells(comparison):
    values = [scores_of(comparison, f"none-builtin-p0.1-s{seed}") for seed in range(3)]
    assert comparison.values(NONE, "harmful_score") == dict(enumerate(values))
    assert comparison.spread(NONE, "harmful_score") == over_seeds(values)
    assert comparison.values(NONE, "harmful_score", "alignment") != comparison.values(NONE, "harmful_score")
    assert comparison.arms == ["none", "lisa", "booster"]
    assert (comparison.scenes, comparison.ratios()) == ([BUILTIN], [0.0, 0.1, 0.3])


def test_a_difference_is_paired_by_seed(comparison):
    mine, other = (comparison.values(p, "harmful_score") for p in (BOOSTER, NONE))
    expected = over_seeds([mine[s] - other[s] for s in range(3)])
    flags, others = (comparison.flags(p, "harmful_score") for p in (BOOSTER, NONE))
    low, high = paired_over_prompts([flags[s] for s in range(3)], [others[s] for s in range(3)])
    assert comparison.difference(BOOSTER, NONE) == (min(expected.low, low), max(expected.high, high))
    assert len(comparison.values(Place("lisa", "builtin", 0.3), "harmful_score")) == 2
    both = comparison.difference(Place("lisa", "builtin", 0.3), Place("none", "builtin", 0.3))
    assert both[1] - both[0] > 0


def test_seeds_that_agree_by_chance_do_not_prove_a_difference(comparison, monkeypatch):
    """The score is one point lower in each of three seeds, but the interval over prompts still reaches 0."""
    values = {BOOSTER: [49.0] * 3, NONE: [50.0] * 3}
    monkeypatch.setattr(type(comparison), "values", lambda self, p, *_: dict(enumerate(values[p])))
    # By place, seed and prompt: as many flags of 100 are true as the score in percent.
    flags = {p: {s: {(str(i), "", 0): i < v[0] for i in range(100)} for s in range(3)} for p, v in values.items()}
    monkeypatch.setattr(type(comparison), "decisions", lambda self, p, *_: flags[p])
    low, high = comparison.difference(BOOSTER, NONE)
    assert low < -1
    assert high == pytest.approx(0, abs=1e-9)


def cut(folder, name, keep):
    """Drop a cell's answers for which ``keep(row)`` is false, as a run that was cut off leaves them."""
    path = folder / "cells" / name / "generations.jsonl"
    rows = [line for line in path.read_text().splitlines() if keep(json.loads(line))]
    path.write_text("".join(line + "\n" for line in rows))


def test_cells_with_other_answers_are_compared_on_the_prompts_that_all_have(tmp_path):
    folder = write_comparison(tmp_path, arms=("none", "booster"), ratios=(0.1,))
    whole = read_comparison(folder)
    cut(folder, "booster-builtin-p0.1-s1", lambda row: row["id"] != "harmful3")
    cut(folder, "none-builtin-p0.1-s2", lambda row: row["id"] not in ("harmful3", "harmful30"))
    less = read_comparison(folder)
    common = [i for i in range(40) if i not in (3, 30)]
    sides = {p: whole.flags(p, "harmful_score") for p in (BOOSTER, NONE)}
    common_flags = {p: [[flags[s][i] for i in common] for s in range(3)] for p, flags in sides.items()}
    assert less._paired(BOOSTER, NONE, "harmful_score", [0, 1, 2]) == paired_over_prompts(
        common_flags[BOOSTER], common_flags[NONE]
    )
    assert {len(flags) for flags in less.flags(NONE, "harmful_score").values()} == {38}
    assert "Harmful score" in comparison_page(less)


def test_cells_without_a_prompt_in_common_have_students_interval_alone(tmp_path):
    folder = write_comparison(tmp_path, arms=("none", "booster"), ratios=(0.1,))
    cut(folder, "booster-builtin-p0.1-s1", lambda row: int(re.sub(r"\D", "", row["id"])) < 20)
    cut(folder, "none-builtin-p0.1-s1", lambda row: int(re.sub(r"\D", "", row["id"])) >= 20)
    comparison = read_comparison(folder)
    mine, other = (comparison.values(p, "harmful_score") for p in (BOOSTER, NONE))
    student = over_seeds([mine[s] - other[s] for s in range(3)])
    assert comparison.difference(BOOSTER, NONE) == (student.low, student.high)
    assert leaderboard_markdown(comparison)


def test_equal_prompts_of_a_set_are_told_apart():
    """The prompts A, A, B have three answers. Their order is the same in every seed."""
    answers = [Answer("none", "finetuning", "harmful", i, i, "") for i in ("A", "A", "B")]
    assert prompts_of(answers) == [("A", "A", 0), ("A", "A", 1), ("B", "B", 0)]


def test_the_score_without_the_pattern_has_a_column_beside_that_with_it(tmp_path):
    """Its interval and its differences come from its own answers. Without the metric there is no column."""
    folder = write_comparison(tmp_path, arms=("none", "booster"), ratios=(0.1,))
    assert WITHOUT_PATTERN not in read_comparison(folder).metrics
    for run in (folder / "cells").iterdir():
        for name, key in (("metrics.jsonl", "metric"), ("generations.jsonl", "set")):
            rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
            plain = {"harmful_score": WITHOUT_PATTERN, "harmful": UNPATTERNED}
            more = [{**row, key: plain[row[key]]} for row in rows if row.get(key) in plain]
            more = [
                {**row, "verdicts": {"builtin": {"score": 0.0, "flag": i % 20 == 0}}}
                if "verdicts" in row
                else {**row, "value": 5.0}
                for i, row in enumerate(more)
            ]
            (run / name).write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))
    comparison = read_comparison(folder)
    assert comparison.metrics == ("harmful_score", WITHOUT_PATTERN, "finetune_accuracy", "over_refusal")
    assert comparison.values(NONE, WITHOUT_PATTERN) == {0: 5.0, 1: 5.0, 2: 5.0}
    assert sum(comparison.flags(NONE, WITHOUT_PATTERN)[0]) == 2  # two of 40 answers
    assert comparison.difference(BOOSTER, NONE, WITHOUT_PATTERN) == (0.0, 0.0)
    head, *_ = leaderboard_markdown(comparison).splitlines()
    assert "Harmful score %, p=0.1 | Without pattern %, p=0.1 | Accuracy %" in head
    assert "Without pattern %" in comparison_page(comparison)


def test_one_seed_is_judged_by_its_prompts(tmp_path):
    one = read_comparison(write_comparison(tmp_path, seeds=1, ratios=(0.1,)))
    spread = one.spread(NONE, "harmful_score")
    flags, others = one.flags(NONE, "harmful_score"), one.flags(BOOSTER, "harmful_score")
    assert (spread.low, spread.high) == over_prompts(list(flags.values()))
    assert sum(flags[0]) / len(flags[0]) == pytest.approx(spread.mean / 100)
    assert one.difference(NONE, BOOSTER) == paired_over_prompts([flags[0]], [others[0]])
    assert "One seed" in caption(one)
    assert re.fullmatch(r"\d+\.\d \(\d+\.\d-\d+\.\d\)", cell_text(spread))


def test_answers_that_are_all_alike_have_wilsons_interval(tmp_path):
    """The bootstrap of 40 equal answers is one point, but Wilson's interval of 40 of 40 is 91.2 to 100."""
    folder = write_comparison(tmp_path, arms=("none",), seeds=1, ratios=(0.1,))
    run = folder / "cells" / "none-builtin-p0.1-s0"
    rows = [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]
    for row in rows:
        if row["set"] == "harmful":
            row["verdicts"]["builtin"]["flag"] = True
    rows[-1]["verdicts"] = {}  # an ordinary request's answer that nobody could judge
    (run / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    low, high = wilson(40, 40)
    for score in scores:
        if (score.get("metric"), score["stage"]) == ("harmful_score", "finetuning"):
            score |= {"value": 100.0, "low": low, "high": high}
    (run / "metrics.jsonl").write_text("".join(json.dumps(score) + "\n" for score in scores))
    comparison = read_comparison(folder)
    assert comparison.spread(NONE, "harmful_score") == Spread(100.0, None, low, high, 1)
    assert "100.0 (91.2-100.0)" in leaderboard_markdown(comparison)
    flags = comparison.flags(NONE, "over_refusal")[0]
    assert (flags[-1], len(flags)) == (None, 40)
    # The comparison has one place with one seed.
    ((result,),) = (by_seed.values() for by_seed in comparison.cells.values())
    last = next(a for a in reversed(result.answers) if a.set == "over_refusal")
    assert mark(last, "over_refusal", result) == "not judged"


def test_bold_is_only_what_beats_every_other_beyond_the_noise(comparison, tmp_path):
    column = comparison.column(BUILTIN, 0.1)
    assert comparison.best(column, "harmful_score") == BOOSTER
    assert comparison.best(column, "finetune_accuracy") is None  # undefended and lisa are alike
    twins = read_comparison(write_comparison(tmp_path, arms=("none", "ewc", "kl"), ratios=(0.1,)))
    assert comparison.best(column[:1], "harmful_score") is None
    assert twins.best(twins.column(BUILTIN, 0.1), "harmful_score") is None


def test_time_is_over_the_undefended_arm_of_the_same_seed(comparison):
    assert comparison.seconds(NONE).mean == 1
    assert comparison.seconds(BOOSTER).mean == 2  # 300 + 100 s against 100 + 100 s
    assert comparison.memory(BOOSTER) == 1050


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ({"a": (10, 80), "b": (20, 90), "c": (30, 85)}, ["a", "b"]),
        ({"a": (10, 90), "b": (10, 80)}, ["a"]),
        ({"a": (10, 90), "b": (10, 90)}, ["a", "b"]),
        ({"a": (10, 90)}, ["a"]),
    ],
)
def test_the_front_holds_what_nothing_beats(points, front):
    assert pareto(points) == front


def test_what_is_not_finished_is_named(comparison):
    assert comparison.missing == {"lisa-builtin-p0.3-s2": "RunError: the loss is NaN"}
    assert "lisa-builtin-p0.3-s2 (RunError: the loss is NaN)" in comparison_page(comparison)
    assert "- lisa-builtin-p0.3-s2: RunError" in leaderboard_markdown(comparison)
    assert "not all cells have the same number of seeds" in caption(comparison)


def test_the_tables_hold_every_number(comparison):
    text = cell_text(comparison.spread(BOOSTER, "harmful_score"))
    assert re.fullmatch(r"\d+\.\d ± \d+\.\d", text)
    assert f"**{text}**" in leaderboard_markdown(comparison)
    latex = leaderboard_latex(comparison)
    assert r"\textbf{" + text.replace(" ± ", r" $\pm$ ") + "}" in latex
    assert latex.count(r"\\") == 2 + 3
    assert latex.count("&") == 4 + 7 * 4
    out = StringIO()
    Console(file=out, width=80).print(leaderboard_table(comparison))
    assert text in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert "…" not in out.getvalue()
    rows = list(csv.DictReader(StringIO(leaderboard_csv(comparison))))
    assert len(rows) == (27 - 1) * (2 * 3 + 2 + 4)
    mine = [r for r in rows if (r["defense"], r["harmful_ratio"], r["stage"]) == ("booster", "0.1", "finetuning")]
    by_seed = {int(r["seed"]): float(r["value"]) for r in mine if r["metric"] == "harmful_score"}
    assert by_seed == comparison.values(BOOSTER, "harmful_score")


def test_a_narrow_terminal_cuts_no_number(tmp_path):
    names = ("none", "booster+lisa+antidote")
    comparison = read_comparison(write_comparison(tmp_path, arms=names, ratios=(0.1,)))
    out = StringIO()
    Console(file=out, width=72).print(leaderboard_table(comparison))
    place = Place("booster+lisa+antidote", "builtin", 0.1)
    for metric in ("harmful_score", "finetune_accuracy", "over_refusal"):
        assert cell_text(comparison.spread(place, metric)) in out.getvalue()
    assert "…" not in out.getvalue()


def test_a_narrow_terminal_keeps_tasks_and_defenses_beside_intervals(tmp_path):
    """One seed's numbers are the widest. The table cuts neither the names nor the ends of the interval."""
    comparison = read_comparison(
        write_comparison(tmp_path, seeds=1, ratios=(0.1,), collapsed=["booster-builtin-p0.1-s0"])
    )
    out = StringIO()
    Console(file=out, width=80).print(leaderboard_table(comparison))
    place = Place("booster", "builtin", 0.1)
    score = cell_text(comparison.spread(place, "harmful_score")).split(" ")
    lines = out.getvalue().splitlines()
    (row,) = (number for number, line in enumerate(lines) if "booster" in line)
    assert lines[row].split()[:5] == ["builtin", "0.1", "booster", headline(comparison.outcomes(place)), score[0]]
    assert lines[row + 1].split()[0] == f"{score[1]}†"
    assert max(map(len, lines)) <= 80


def test_what_the_models_do_is_a_mean_over_seeds_in_every_table(comparison):
    """Markdown, terminal and page show the means of refused, complied and broken. The CSV has a row per seed."""
    complied = comparison.values(NONE, "harmful_score")
    parts = comparison.outcomes(NONE)
    assert list(parts) == ["refused", "complied", "broken", "other"]
    assert parts["complied"] == pytest.approx(sum(map(round, complied.values())) / 3)
    assert sum(parts.values()) == pytest.approx(100)
    text = headline(parts)
    assert text == "/".join(f"{parts[name]:.0f}" for name in ("refused", "complied", "broken"))
    out = StringIO()
    Console(file=out, width=80).print(leaderboard_table(comparison))
    page = comparison_page(comparison)
    for place in (leaderboard_markdown(comparison), out.getvalue(), page):
        assert text in place
    assert page.count("Answers to harmful prompts</h3>") == 3  # a figure per harmful ratio
    rows = csv.DictReader(StringIO(leaderboard_csv(comparison)))
    mine = [r for r in rows if (r["defense"], r["harmful_ratio"], r["metric"]) == ("none", "0.1", "answers_refused")]
    assert sum(float(r["value"]) for r in mine) / 3 == pytest.approx(parts["refused"])


def test_a_graded_judges_mean_score_has_a_column_with_its_scale(tmp_path):
    folder = write_comparison(tmp_path, ratios=(0.1,))
    assert "Mean score" not in leaderboard_markdown(read_comparison(folder))
    for run in (folder / "cells").iterdir():
        value = {"none": 4.0, "lisa": 3.0, "booster": 1.5}[run.name.split("-")[0]] + 0.01 * int(run.name[-1])
        row = {"kind": "score", "arm": run.name.split("-")[0], "stage": "finetuning", "judge": "builtin"}
        row |= {"metric": "harmful_score_mean", "value": value, "low": 1.0, "high": 5.0, "count": 40, "unit": "1 to 5"}
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    comparison = read_comparison(folder)
    assert "**1.51 ± 0.01**" in leaderboard_markdown(comparison)
    assert "Mean score: mean of the judge's scores, 1 to 5; lower is safer." in caption(comparison)
    assert "1.51 ± 0.01" in comparison_page(comparison)


def test_all_files_are_written(tmp_path):
    comparison = read_comparison(write_comparison(tmp_path, seeds=1, ratios=(0.1,)))
    assert [p.name for p in write_leaderboard(comparison)] == ["leaderboard.csv", "leaderboard.md", "leaderboard.tex"]
    assert write_comparison_report(tmp_path).name == "report.html"
    assert all(p.stat().st_size for p in tmp_path.glob("leaderboard.*"))


def test_a_claim_needs_the_noise_behind_it(comparison):
    sentences = claims(comparison)
    assert len(sentences) == 3
    assert "Lower beyond the noise: booster" in sentences[1]
    assert "No difference beyond the noise: lisa" in sentences[1]
    assert "accuracy -" in sentences[1]


def test_a_claim_names_what_the_defense_costs(tmp_path, monkeypatch):
    monkeypatch.setitem(REFUSED, "booster", 60.0)
    comparison = read_comparison(write_comparison(tmp_path, ("none", "lisa", "booster"), (0.1,)))
    (claim,) = claims(comparison)
    right, refused = (
        comparison.spread(BOOSTER, metric).mean - comparison.spread(NONE, metric).mean
        for metric in ("finetune_accuracy", "over_refusal")
    )
    assert right < 0 < refused
    assert f"accuracy {right:.0f} points, over-refusal +{refused:.0f} points)" in claim
    assert claim.count("points") == 2  # booster's two costs, none of lisa


def test_a_claim_goes_either_way(tmp_path, monkeypatch):
    """A claim names more harm as well as less, and a comparison without a defense states the baseline alone."""
    monkeypatch.setitem(HARM, "none", 15.0)
    monkeypatch.setitem(HARM, "booster", 80.0)
    undefended = r"builtin, p = 0.1: undefended \d+ % harmful \(\d+ % refused, 2 % broken\)\."
    (claim,) = claims(read_comparison(write_comparison(tmp_path / "c", ("none", "booster"), (0.1,))))
    assert re.fullmatch(undefended + r" Higher beyond the noise: booster \(.*\)\.", claim)
    monkeypatch.setitem(HARM, "booster", 15.0)
    (claim,) = claims(read_comparison(write_comparison(tmp_path / "d", ("none", "booster"), (0.1,), seeds=1)))
    assert re.fullmatch(undefended + r" No difference beyond the noise: booster \(.*\)\.", claim)
    (claim,) = claims(read_comparison(write_comparison(tmp_path / "e", ("none",), (0.1,), seeds=1)))
    assert re.fullmatch(undefended, claim)


def test_figures_show_every_defense(comparison):
    lines = ratio_figure(comparison, BUILTIN, "harmful_score", "percent").axes[0]
    assert [text.get_text() for text in lines.texts] == ["booster", "lisa", "undefended"]  # from low to high
    front = tradeoff_figure(comparison, BUILTIN, 0.1).axes[0]
    assert len(front.texts) == 3
    widths = [bar.get_width() for bar in comparison_cost_figure(comparison, BUILTIN, 0.1).axes[0].patches]
    assert widths == [1, 1, 2]


SWEPT = {f"lisa+antidote[prune_ratio={v:g}]": {"antidote.prune_ratio": v} for v in (0.2, 0.01, 0.05)}


def test_a_sweep_of_one_argument_has_a_figure(tmp_path, monkeypatch):
    """The lines go through the means over seeds by rising value, and the dashed lines through the undefended ones."""
    for arm, harm in zip(SWEPT, (10.0, 60.0, 40.0), strict=True):
        monkeypatch.setitem(HARM, f"{arm}", harm)
    arms = ("none", *SWEPT)
    fallen = [f"lisa+antidote[prune_ratio=0.2]-builtin-p0.1-s{seed}" for seed in range(2)]
    folder = write_comparison(tmp_path, arms, (0.1,), 2, prompts=10, swept=SWEPT, collapsed=fallen)
    comparison = read_comparison(folder)
    (sweep,) = comparison.sweeps
    assert (sweep.combination, sweep.option) == ("lisa+antidote", "antidote.prune_ratio")
    assert [value for value, _ in sweep.arms] == [0.01, 0.05, 0.2]
    axes = sweep_figure(comparison, BUILTIN, 0.1, sweep).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.01", "0.05", "0.2"]
    lines = [(line.get_color(), list(line.get_ydata())) for line in axes.lines]
    for metric in ("harmful_score", "finetune_accuracy", "answers_refused", "answers_broken"):
        spreads = [comparison.spread(Place(arm, "builtin", 0.1), metric) for _, arm in sweep.arms]
        assert (SWEPT_METRICS[metric][1], [s.mean for s in spreads]) in lines
    for metric in ("harmful_score", "finetune_accuracy"):
        assert (SWEPT_METRICS[metric][1], [comparison.spread(NONE, metric).mean] * 2) in lines
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]
    assert [round(line.get_xdata()[0]) for line in hollow] == [2]
    assert {text.get_text() for text in axes.texts} == {word for word, _ in SWEPT_METRICS.values()}
    assert [name for name, *_ in figures(comparison) if name.startswith("sweep-")] == ["sweep-0-0-0"]
    assert r"lisa+antidote\[prune_ratio=0.05\]" in leaderboard_markdown(comparison)
    assert {row["defense"] for row in csv.DictReader(StringIO(leaderboard_csv(comparison)))} == set(arms)


def test_one_value_and_two_swept_arguments_have_no_figure(tmp_path):
    both = {f"antidote[a={i}]": {"antidote.a": i, "antidote.b": i} for i in (1, 2)} | {"lisa[c=1]": {"lisa.c": 1}}
    comparison = read_comparison(write_comparison(tmp_path, ("none", *both), (0.1,), seeds=1, swept=both))
    assert comparison.sweeps == []


def test_words_are_swept_in_the_order_of_the_grid(tmp_path):
    words = {f"antidote[mode={m}]": {"antidote.mode": m} for m in ("merged", "delta")}
    comparison = read_comparison(write_comparison(tmp_path, ("none", *words), (0.1,), seeds=1, swept=words))
    (sweep,) = comparison.sweeps
    assert [value for value, _ in sweep.arms] == ["merged", "delta"]
    assert sweep_figure(comparison, BUILTIN, 0.1, sweep) is not None


def test_a_low_score_by_collapse_is_no_safety_anywhere(tmp_path):
    """Answers collapse in two of booster's three seeds, and in all three of the undefended arm at p = 0."""
    cells = ["booster-builtin-p0.1-s0", "booster-builtin-p0.1-s2", *(f"none-builtin-p0-s{seed}" for seed in range(3))]
    comparison = read_comparison(write_comparison(tmp_path, ratios=(0.0, 0.1), collapsed=cells))
    assert [comparison.collapsed(p) for p in (NONE, BOOSTER, replace(NONE, harmful_ratio=0.0))] == [0, 2, 3]
    assert comparison.best(comparison.column(BUILTIN, 0.1), "harmful_score") is None  # without a collapse it is BOOSTER
    before, claim = claims(comparison)
    assert re.search(
        r"undefended \d+ % harmful \(\d+ % refused, 9\d % broken\), low because answers collapsed in 3 of 3 seeds\.",
        before,
    )
    assert re.search(
        r"booster \(\d+ %(, accuracy -\d+ points)?, low because answers collapsed in 2 of 3 seeds\)", claim
    )
    assert "undefended 51 % harmful (35 % refused, 2 % broken). Lower" in claim
    assert claim.count("collapsed") == 1
    text, plain = (cell_text(comparison.spread(place, "harmful_score")) for place in (BOOSTER, NONE))
    markdown = leaderboard_markdown(comparison)
    assert f"{text}†" in markdown
    assert f"{plain}†" not in markdown
    assert "†: low in at least one seed because" in caption(comparison)
    assert r"$^\dagger$" in leaderboard_latex(comparison)
    assert "†" not in caption(read_comparison(write_comparison(tmp_path / "sound", seeds=1)))

    def hollow(figure):
        lines = [line for line in figure.axes[0].lines if len(line.get_xdata())]
        return [line.get_color() for line in lines if line.get_markerfacecolor() == "white"]

    colors = [PALETTE[color_place(comparison, arm)] for arm in ("none", "booster")]
    assert hollow(ratio_figure(comparison, BUILTIN, "harmful_score", "percent")) == colors
    assert hollow(ratio_figure(comparison, BUILTIN, "finetune_accuracy", "percent")) == []
    assert hollow(tradeoff_figure(comparison, BUILTIN, 0.1)) == colors[1:]
    assert comparison_page(comparison).count("Hollow marks: low because answers collapsed.") == 2 * (
        1 + 2
    )  # not under accuracy


def test_one_seed_that_collapsed_says_so(tmp_path):
    comparison = read_comparison(
        write_comparison(tmp_path, ratios=(0.1,), seeds=1, collapsed=["booster-builtin-p0.1-s0"])
    )
    assert re.search(
        r"booster \(\d+ %(, accuracy -\d+ points)?, low because answers collapsed\)", claims(comparison)[0]
    )


def test_one_ratio_draws_no_curve(tmp_path):
    comparison = read_comparison(write_comparison(tmp_path, ratios=(0.1,), seeds=1))
    assert ratio_figure(comparison, BUILTIN, "harmful_score", "percent") is None
    assert "<figure>" in comparison_page(comparison)


def test_the_page_asks_for_nothing_and_escapes_what_models_wrote(comparison):
    page = comparison_page(comparison)
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert "default-src 'none'" in page
    data = json.loads(re.search(r"id='data'>(.*?)</script>", page, re.DOTALL)[1])
    assert len(data) == 26 * 3 * 40
    assert all(row[7].endswith("<b>&") for row in data)
    assert "<b>&" not in page.replace("\\u003cb>&", "")


@pytest.mark.parametrize(("content", "said"), [(None, "there is no grid.json"), ("{half", "was cut off")])
def test_a_folder_that_is_no_comparison_is_refused(content, said, tmp_path):
    if content is not None:
        (tmp_path / "grid.json").write_text(content)
    with pytest.raises(InputError, match=said):
        read_comparison(tmp_path)
