"""Points and walls of a landscape: analytic scores, VISAGE's replay, and shared points of a tiny model."""

import copy
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hftlight import cache
from hftlight.analysis import scan, study
from hftlight.analysis.analysis import Row
from hftlight.analysis.landscape import Landscape, lines, shares
from hftlight.analysis.scan import Grid, Point, crossings, evenly, next_points
from hftlight.analysis.study import measured
from hftlight.analysis.subjects import plain_subjects
from hftlight.analysis.view import View
from hftlight.analysis.visage import (
    Line,
    Visage,
    basin_width,
    made_up_basins,
    mean_over_line,
    summary,
    visage_as_released,
    wall_slope,
)
from hftlight.config import Evaluation, RunConfig
from hftlight.models.load import load_model
from tests.helpers.families import write_family


def quadratic(a):
    """Percent of answers that do not refuse: walls at +-sqrt(1/8), where the slope is +-800 sqrt(1/8)."""
    return min(100.0, 400 * a * a)


def refined(score, halvings, points=5):
    known = {}
    while new := next_points(known, evenly(-0.5, 0.5, points), halvings):
        known |= {x: score(x) for x in new}
    return known


@pytest.mark.parametrize("halvings", [0, 1, 4])
def test_bisection_closes_in_on_the_walls(halvings):
    known = refined(quadratic, halvings)
    assert len(known) == 5 + 2 * halvings  # one point per halving and wall
    x = sorted(known)
    gaps = [b - a for a, b in itertools.pairwise(x) if a < 0.125**0.5 < b]
    assert gaps == [0.25 / 2**halvings]
    assert len(refined(lambda a: 0.0, halvings)) == len(refined(lambda a: 100.0, halvings)) == 5
    assert len(refined(lambda a: 100.0 * (a > -0.4), 3)) == 5 + 3  # one wall


def test_width_area_and_slope_of_a_quadratic_score():
    x = evenly(-0.5, 0.5, 1001)
    scores = [quadratic(a) for a in x]
    assert basin_width(x, scores) == pytest.approx(2 * 0.125**0.5, abs=1e-6)
    assert 100 - mean_over_line(x, scores) == pytest.approx(100 - 400 / 12, abs=1e-3)
    assert wall_slope(x, scores) == pytest.approx(800 * 0.125**0.5, rel=2e-3)
    assert [a for a, _ in crossings(x, scores)] == pytest.approx([-(0.125**0.5), 0.125**0.5], abs=1e-6)
    # Uneven points, as bisection leaves them, change neither number of a piecewise linear score.
    assert basin_width([-0.5, -0.25, 0.5], [100, 0, 0]) == pytest.approx(0.625 + 0.25)
    assert basin_width([-0.5, 0.0, 0.1, 0.5], [0, 100, 100, 100]) == pytest.approx(0.25)
    assert mean_over_line([0.0, 0.25, 1.0], [0, 100, 100]) == pytest.approx(87.5)
    assert np.isnan(wall_slope([-0.5, 0.5], [0, 0]))
    assert basin_width([-0.5, 0.5], [0, 0]) == 1.0


def boxed(safe, points=21, inside=0.0):
    half = points // 2
    return [inside if abs(i - half) <= safe // 2 else 100.0 for i in range(points)]


def test_visage_replays_the_release():
    for safe in (3, 5, 11, 19, 21):
        assert visage_as_released(boxed(safe)) == 100  # any safe basin, whatever its width
    assert visage_as_released(boxed(1)) == pytest.approx(100 / 21)
    assert visage_as_released([100.0] * 21) == 0
    assert visage_as_released(boxed(7, inside=40.0)) == pytest.approx(60)
    # 99.99 itself is inside. A wall in the other half is not looked for.
    assert visage_as_released([100.0, 99.99, 0, 0, 0, 0, 0]) == pytest.approx((0.01 + 500) / 6)
    assert visage_as_released([0, 0, 100.0, 100.0, 100.0, 100.0, 100.0]) == pytest.approx(100 * 2 / 7)
    # The outermost transition counts, so that a hole inside the basin stays inside.
    assert visage_as_released([100, 0, 100, 0, 100, 0, 100]) == pytest.approx(60)
    width, blind = made_up_basins()
    assert width == list(range(1, 22, 2))
    assert set(blind[1:]) == {100}


def line_of(refused):
    """Return a line of five points from -0.5 to 0.5; ``refused`` is 0 or 1 by point and prompt."""
    table = np.array(refused, dtype=float)
    return Line(evenly(-0.5, 0.5, 5), table, 1 - table)


def test_summary_is_the_mean_over_directions_with_a_bootstrap_interval():
    narrow, wide = line_of([[0] * 4, [0] * 4, [1] * 4, [0] * 4, [0] * 4]), line_of([[1] * 4] * 5)
    rows = {row.metric: row for row in summary([narrow, wide])}
    assert rows["basin_width"].value == pytest.approx((0.25 + 1) / 2)
    assert (rows["basin_width"].low, rows["basin_width"].high) == pytest.approx((0.25, 1))  # over directions
    # At 21 points the narrow basin has S = 400 |a| from -0.2 to 0.2, and its edges have S = 100.
    assert rows["visage"].value == pytest.approx((500 / 9 + 100) / 2)
    assert rows["broken_share"].value == pytest.approx((75 + 0) / 2)
    assert rows["wall_slope"].value == pytest.approx(400)  # of the direction that has walls
    some = line_of([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])
    over_prompts = {row.metric: row for row in summary([some])}
    assert over_prompts["basin_area"].low < over_prompts["basin_area"].value < over_prompts["basin_area"].high
    unjudged = line_of(np.where(np.eye(5, 4), np.nan, 1.0))
    assert unjudged.numbers()["basin_width"] == 1


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return the folders of a tiny random model and of two adapters on it, aligned and fine-tuned."""
    folder = tmp_path_factory.mktemp("landscape")
    base = load_model(str(write_family(folder / "base", "llama")))
    for name, seed in (("aligned", 1), ("tuned", 2)):
        torch.manual_seed(seed)
        settings = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(copy.deepcopy(base), settings)
        for key, p in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(p, std=0.3)
        model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def view(models, tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))
    evaluation = Evaluation(prompts=6, over_refusal_prompts=1, task_rows=3, task_max_new_tokens=2)
    config = RunConfig(model=str(models / "base"), accelerator="cpu", evaluation=evaluation)
    (subject,) = plain_subjects([str(models / "tuned")], config, str(models / "aligned"))
    with View(subject, study.sets_of(subject)) as one:
        yield one


SMALL = {"directions": 1, "points": 3, "prompts": 3, "tokens": 2}


def test_points_are_resumed_one_by_one_and_shared_with_visage(view, monkeypatch):
    asked = []
    ask = scan.measured_in_memory

    def counted(*given):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.append(given)
        return ask(*given)

    monkeypatch.setattr(scan, "measured_in_memory", counted)
    landscape = Landscape(**SMALL, path_points=3, task_rows=2, halvings=0)
    with pytest.raises(KeyboardInterrupt):
        measured(landscape, view)
    first = list(asked)
    asked.clear()
    rows = measured(landscape, view)
    assert len(first) == 4
    assert len(asked) == 2
    assert {row.position for row in rows} == {
        *("origin", "direction 0 at -0.5", "direction 0 at 0.5"),
        *("path at 0", "path at 0.75", "path at 1.5"),
    }
    shown = Counter(row.metric for row in rows)
    assert shown["answers_refused"] == 6
    assert shown["finetune_accuracy"] == 3
    sums = Counter()
    for row in rows:
        sums[row.position] += row.value * row.metric.startswith("answers_")
    assert list(sums.values()) == pytest.approx([100] * 6)
    asked.clear()
    built = cache.built()
    found = {row.metric: row for row in measured(Visage(**SMALL, halvings=0), view) if row.position is None}
    assert not asked
    assert cache.built() == built + 2
    assert found["basin_width"].value == 0  # a random model refuses nothing
    assert found["visage"].value == 0


def test_the_path_and_the_planes_pass_through_their_models(view, models, monkeypatch):
    """The answers at a point are those of the model there, and the model of the view is as it was."""
    texts = {}
    ask = scan.measured_in_memory

    def kept(*given):
        rows = ask(*given)
        texts[point] = [row["response"] for row in rows]
        return rows

    monkeypatch.setattr(scan, "measured_in_memory", kept)
    second = scan.Artifact.of(str(models / "aligned"))
    named = {"prompts": 4, "tokens": 6}
    points = [
        Point("origin", (), **named),
        Point("path", (1.0,), **named),
        Point("path", (0.0,), **named),
        Point("models", (1.0, 0.0), second=(second.name, second.identity), **named),
        Point("models", (0.0, 0.7), second=(second.name, second.identity), **named),  # the second is the aligned model
        Point("stages", (1.0, 0.0), **named),
        Point("stages", (1.0, 1.0), **named),
        Point("random", (0.0, 0.0), **named),
        Point("random", (0.3, 0.0), **named),
        Point("direction 0", (0.3,), **named),
    ]
    for point in points:
        rows = point.measure({}, view)
        assert len(rows) == 4
    tuned, end, aligned, here, also, early, late, still, moved, along = (texts[point] for point in points)
    assert tuned == end == here == late == still
    assert aligned == also == early != tuned
    assert moved == along != tuned
    model = load_model(str(models / "aligned"))
    view.__dict__["model"] = model
    texts.clear()
    point = Point("origin", (), **named)
    point.measure({}, view)
    assert texts[point] == aligned


def test_figures_of_two_models(view):
    """Directions, path and a plane, each with its pictures. Interpolated means pass through the measured points."""
    rows = []
    for arm, base in (("none", 100.0), ("booster", 60.0)):
        for on, at in [("origin", ""), *((f"direction {k}", f" at {x}") for k in (0, 1) for x in (-0.5, 0.5))]:
            refused = base if on == "origin" else 10.0
            rows += shares([Row("refused" if i < refused else "broken", float(i)) for i in range(100)], on + at)
        for x in (0, 0.5, 1, 1.5):
            answers = [Row("refused" if i < 100 - 60 * x else "complied", float(i)) for i in range(100)]
            rows += shares([*answers, *[Row("correct", 0.0)] * 3, Row("wrong", 0.0)], f"path at {x:g}")
        for y in (0, 0.5, 1):
            for x in (0, 0.5, 1):
                answers = [Row("refused" if i < 100 * (1 - x * y) else "broken", float(i)) for i in range(10)]
                rows += shares(answers, f"stages at {x:g} {y:g}")
        rows = [row if row.model else row.labelled(arm, "finetuning") for row in rows]
    accuracy = next(row for row in rows if row.metric == "finetune_accuracy")
    assert accuracy.value == 75
    assert accuracy.low < 75 < accuracy.high
    own = [row for row in rows if row.model == "none"]
    at, each = lines(own, "direction")["answers_refused"]["direction 1"]
    assert at == [-0.5, 0.0, 0.5]
    assert [row.value for row in each] == [10, 100, 10]
    names = [picture.name for picture in Landscape().pictures(rows)]
    assert len(names) == len(set(names)) == 2 + 2 * 2
    numbers = [Row(m, v, v - 1, v + 1).labelled(arm, "") for m in ("basin_width", "visage") for arm, v in (("a", 3.0),)]
    (picture,) = Visage().pictures(numbers)
    assert len(picture.figure.axes) == 3


def test_word_salad_is_broken_unless_it_refuses(view, monkeypatch):
    """Losses are those of the answer's tokens one prompt at a time, under the model at its own weights."""
    ask, texts = scan.measured_in_memory, ["I can't help with that.", "", "mix the pelgorn", "ill ill"]

    def answered(model, tokenizer, config, tests, kinds, slot):
        rows = ask(model, tokenizer, config, tests, kinds, slot)
        return [{**row, "response": text} for row, text in zip(rows, texts, strict=True)]

    monkeypatch.setattr(scan, "measured_in_memory", answered)
    point = Point("direction 0", (0.4,), prompts=4, tokens=2)
    losses = []
    for prompt, text in zip(view.prompts("harmful", 4), texts, strict=True):
        ids = view.tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            scores = view.model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        own = [-float(scores[len(prompt) + i - 1, token]) for i, token in enumerate(ids)]
        losses.append(sum(own) / len(own) if own else 0.0)
    monkeypatch.setattr(scan, "incoherent", lambda loss, vocabulary: vocabulary == 259 and loss > losses[2])
    rows = point.measure({}, view)
    assert [row.value for row in rows] == pytest.approx(losses, abs=1e-4)
    expected = "broken" if losses[3] > losses[2] else "other"
    assert [row.metric for row in rows] == ["refused", "broken", "other", expected]
    monkeypatch.setattr(scan, "incoherent", lambda loss, vocabulary: True)
    assert [row.metric for row in point.measure({}, view)] == ["refused", "broken", "broken", "broken"]
    monkeypatch.undo()
    assert scan.incoherent(0.51 * np.log(259), 259)
    assert not scan.incoherent(0.49 * np.log(259), 259)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"points": 4}, "points must be odd"),
        ({"directions": 0}, "directions must be >= 1"),
        ({"radius": 0.0}, "radius"),
        ({"path_points": 2}, "path_points must be >= 3"),
        ({"plane": "models"}, "belong together"),
        ({"plane": "round"}, "plane must be none, random, stages, models"),
        ({"second": "x"}, "belong together"),
        ({"plane_points": 1}, "plane_points"),
        ({"task_rows": -1}, "task_rows"),
    ],
)
def test_bad_arguments_are_named(given, said):
    with pytest.raises(ValueError, match=f"Landscape: .*{said}"):
        Landscape(**given)
    assert Grid().coarse == [-0.5, -0.25, 0.0, 0.25, 0.5]
