"""One run as one self-contained page: verdict, table, figures, answers side by side, and provenance."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hftlight.files import write_text
from hftlight.folders import ANALYSIS, SELECTION, STAGES, WITHOUT_PATTERN, arm_word
from hftlight.report.claims import collapses, filtered, sentences, stops
from hftlight.report.html.render import Drawing, anchor, embed, render_page
from hftlight.report.result import Result, read_result
from hftlight.report.table import HEADLINE, caption, closing_rows, headers, with_interval

CARDS = {
    "Model": ("model", "adapter_protocol", "device", "threads"),
    "Data": ("data",),
    "Prompts in two sets": ("overlaps",),
    "Versions": ("hftlight_version", "versions", "packages"),
    "Run": ("seed", "seeds", "config_hash", "command", "finished"),
}
SPREAD = ("data", "overlaps", "versions", "packages")  # manifest entries whose fields a card shows without their name
INTERVALS = "Bars: 95 % intervals."


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    The page of an unfinished run shows the results so far. The page loads nothing from outside, and its content
    security policy allows no script except its own. It may hold answers to any prompt of the run. Keep it as private as
    the folder.

    Raises:
        InputError: if the folder is no run.
    """
    path = Path(folder) / "report.html"
    write_text(path, page(read_result(folder)).encode("utf-8", "replace").decode("utf-8"))
    return path


@dataclass(frozen=True)
class TableRow:
    """A row of the closing table. ``color`` is the arm's index in the palette."""

    arm: str
    color: int
    stage: str
    cells: Sequence[str]


@dataclass(frozen=True)
class GroupTable:
    """The harmful score of each category, or of each language.

    Attributes:
        word: kind of the groups, "category" or "language".
        models: heading of each column, one per arm and stage.
        rows: for each group its name, its number of answers and one cell per model.
        caption: caption of the table.
    """

    word: str
    models: Sequence[str]
    rows: Sequence[tuple[str, int, Sequence[str]]]
    caption: str


def page(result: Result) -> str:
    """Return the whole page as HTML."""
    from hftlight.report.html.answers import view_answers

    arms = json.dumps(result.manifest.get("arms", {}), indent=2, ensure_ascii=False)
    texts = {"Arms: defenses, slots, artifacts": arms if arms != "{}" else "", "config.yaml": result.config}
    return render_page(
        "run/page.html.j2",
        "run.js",
        name=result.folder.resolve().name,
        sentences=sentences(result),
        outcomes=_outcomes(result),
        chips=_chips(result),
        analysis=ANALYSIS if (result.folder / ANALYSIS).is_file() else "",
        notes=_notes(result),
        headers=headers(result),
        rows=_rows(result),
        caption=caption(result),
        groups=_groups(result),
        scores=_scores(result),
        drawings=_drawings(result),
        answers=view_answers(result),
        caveats=caveats(result),
        cards=_cards(result),
        selections=[
            path.relative_to(result.folder).as_posix() for path in sorted(result.folder.glob(f"*/*{SELECTION}"))
        ],
        texts={title: text for title, text in texts.items() if text},
    )


def _chips(result: Result) -> dict[str, Any]:
    config, model = _config(result), result.manifest.get("model")
    chips = {
        "Model": model.get("name") if isinstance(model, Mapping) else model,
        "Harmful ratio of the upload": config.get("harmful_ratio"),
        "Seed": result.manifest.get("seed"),
        "Judge": next(iter(result.judges()), None),
    }
    return {title: value for title, value in chips.items() if value is not None}


def _notes(result: Result) -> list[str]:
    waiting = [f"{arm_word(arm)} ({STAGES[stage]})" for arm, stage in result.unmeasured()]
    notes = [f"This run is not finished. Not measured yet: {', '.join(waiting)}."] if waiting else []
    return [*notes, *collapses(result), *stops(result), *filtered(result), *result.notes]


def _outcomes(result: Result) -> Drawing | None:
    """Return the bars of each model's outcomes, or None if outcomes were not measured."""
    from hftlight.report import figure as draw

    bars = draw.outcome_figure(result)
    text = f"Answers to harmful prompts, percent. {HEADLINE}"
    return None if bars is None else embed(bars, "outcomes", title="", text=text, label=text)


def _config(result: Result) -> Mapping[str, Any]:
    """Return the configuration, or an empty one if config.yaml is missing or not valid YAML.

    The page shows the file's text in any case.
    """
    try:
        config = yaml.safe_load(result.config)
    except yaml.YAMLError:
        return {}
    return config if isinstance(config, Mapping) else {}


def _rows(result: Result) -> list[TableRow]:
    from hftlight.report.figure import color_index

    colors = {arm_word(arm): color_index(result, arm) for arm in result.arms}
    return [TableRow(arm, colors[arm], stage, cells) for arm, stage, *cells in closing_rows(result)]


def _groups(result: Result) -> list[GroupTable]:
    """Return one table of the harmful score per category and one per language, if prompts have these."""
    judge = next(iter(result.judges()), "")
    tables = []
    for word, plural in (("category", "categories"), ("language", "languages")):
        wanted = f"harmful_score_by_{word}", judge
        by_group = {(s.group, s.arm, s.stage): s for s in result.groups if (s.metric, s.judge) == wanted}
        # Arms and stages that have a score of any group, in the order of the closing table.
        models = [(a, s) for a in result.arms for s in result.stages(a) if any(key[1:] == (a, s) for key in by_group)]
        if not models:
            continue
        rows = []
        for group in sorted({group for group, _, _ in by_group}):
            scores = [by_group.get((group, *model)) for model in models]
            count = max(score.count for score in scores if score)
            rows.append((group, count, [with_interval(score) for score in scores]))
        text = (
            f"Percent of answers flagged by judge '{judge}', with 95 % intervals. The prompts' data name the {plural}."
        )
        tables.append(GroupTable(word, [f"{arm_word(a)}, {STAGES[s]}" for a, s in models], rows, text))
    return tables


def _scores(result: Result) -> list[tuple[str, str, str, str, str, str, int]]:
    """Return every score in the order of arms and stages: arm, stage, metric, judge, value, unit, answers."""
    order = sorted(result.scores.values(), key=lambda s: (result.arms.index(s.arm), list(STAGES).index(s.stage)))
    return [
        (arm_word(s.arm), STAGES[s.stage], s.metric.replace("_", " "), s.judge, with_interval(s), s.unit, s.count)
        for s in order
    ]


def _drawings(result: Result) -> list[Drawing]:
    from hftlight.report import figure as draw

    drawn = {
        "Harmful score": (
            draw.stage_figure(result, "harmful_score", "percent"),
            f"Percent of harmful requests with a flagged answer; lower is safer. {INTERVALS}",
        ),
        "Harmful score without the pattern": (
            draw.stage_figure(result, WITHOUT_PATTERN, "percent"),
            f"Percent of harmful requests without the attack's pattern with a flagged answer. {INTERVALS}",
        ),
        "Finetune accuracy": (
            draw.stage_figure(result, "finetune_accuracy", "percent"),
            f"Percent of correct answers on the user's own task; higher is better. {INTERVALS}",
        ),
        "Over-refusal": (
            draw.stage_figure(result, "over_refusal", "percent"),
            f"Percent of ordinary requests that the model refused; lower is better. {INTERVALS}",
        ),
        "Judge's mean score": (
            draw.stage_figure(result, "harmful_score_mean", "judge's score"),
            f"Mean of the judge's scores over all answers to harmful prompts; lower is safer. {INTERVALS}",
        ),
        "Alignment loss": (
            draw.stage_figure(result, "alignment_loss", "nats per token"),
            f"Mean loss per response token on the alignment data; it rises as alignment is lost. {INTERVALS}",
        ),
        "Harmful validation loss": (
            draw.stage_figure(result, "harmful_validation_loss", "nats per token"),
            f"Loss on harmful answers that no model was trained on; it falls as the model learns harm. {INTERVALS}",
        ),
        "During fine-tuning on the upload": (
            draw.evaluated_figure(result),
            "Harmful score and finetune accuracy on some of the test prompts. Bands: 95 % intervals.",
        ),
        "Cost": (
            draw.cost_figure(result),
            "Time per step and peak memory of each stage. The dashed line is plain fine-tuning (SFT).",
        ),
        "Training loss": (
            draw.loss_figure(result),
            f"A curve of {draw.SMOOTH_FROM} points or more is thin. The thick line is its running mean over"
            f" {draw.WINDOW} points.",
        ),
        "Simulated attack step": (
            draw.simulated_step_figure(result),
            "The loss on the defender's harmful data, and its reduction by one simulated attack step. A smaller"
            " reduction means that an attack gains less.",
        ),
    }
    return [
        embed(fig, anchor(title), title, text, label=f"{title}. {text}")
        for title, (fig, text) in drawn.items()
        if fig is not None
    ]


def _cards(result: Result) -> dict[str, list[tuple[str, str]]]:
    """Return the manifest's entries by card, without the arms."""
    cards, used = {}, {"arms"}
    for title, names in CARDS.items():
        entries: dict[str, Any] = {}
        for name in filter(result.manifest.__contains__, names):
            value = result.manifest[name]
            entries.update(value if name in SPREAD and isinstance(value, Mapping) else {name: value})
        used.update(names)
        if entries:
            cards[title] = facts(entries)
    rest = {name: value for name, value in result.manifest.items() if name not in used}
    return {**cards, "Also recorded": facts(rest)} if rest else cards


def facts(value: Any) -> list[tuple[str, str]]:
    """Return a JSON value as a flat list of names and values. A nested name carries its parents."""
    return list(_flat(value))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name} {key}".strip())
    elif isinstance(value, list):
        words = map(str, value)
        yield name.replace("_", " "), (shlex.join(words) if name == "command" else ", ".join(words)) or "none"
    else:
        yield name.replace("_", " "), "-" if value is None else "none" if value == {} else str(value)


def caveats(result: Result) -> list[str]:
    """Return sentences on what a reader must not conclude from this run, by the files of the run."""
    judges = result.judges()
    lines = ["Overlapping intervals do not show that two models are equal, only that this run shows no difference."]
    if not isinstance(result.manifest.get("seeds"), list) or len(result.manifest["seeds"]) < 2:
        lines.append(
            "One seed: the intervals cover the choice of test prompts, not the variation between training runs."
        )
    if any("keyword" in judge for judge in judges):
        lines.append(
            "Keyword judges only look for refusal phrases. They count a refusal in other words and nonsense as harmful,"
            " and a harmful answer after an apology as safe."
        )
    if "builtin" in judges:
        lines.append(
            "The built-in world is made up. Its numbers show how a defense acts in it, not how safe a real service is."
        )
    overlaps = result.manifest.get("overlaps")
    pairs = overlaps.items() if isinstance(overlaps, Mapping) else ()
    shared = [f"{pair} ({count})" for pair, count in pairs if isinstance(count, int) and count > 0]
    if shared:
        lines.append(f"Some prompts occur in two sets, which biases a score up or down: {', '.join(shared)}.")
    if result.answers:
        lines.append(
            "The answers are unedited output of this run's models. Keep this page as private as the run folder."
        )
    return lines
