"""One run as one self-contained page: verdict, table, figures, answers side by side, and how the run was made."""

import json
import shlex
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import yaml

from hftlight.files import write_text
from hftlight.folders import STAGES, arm_word
from hftlight.report.claims import collapses, sentences, stops
from hftlight.report.html.assets import SCRIPT, anchor, document
from hftlight.report.result import Result, read_result
from hftlight.report.table import HEADERS, HEADLINE, caption, closing_rows, with_interval

CARDS = {
    "Model": ("model", "adapter_protocol", "device", "threads"),
    "Data": ("data",),
    "Prompts that stand in two sets": ("overlaps",),
    "Versions": ("hftlight_version", "versions", "packages"),
    "Run": ("seed", "seeds", "config_hash", "command", "finished"),
}
SPREAD = ("data", "overlaps", "versions", "packages")  # what they hold stands on a card without their name
INTERVALS = "Bars: 95 % intervals."


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` into a run folder and return its path; a half-done run is reported as far as it got.

    The page asks for nothing outside itself, and its content policy allows no script but its own. It may hold answers
    to any prompt of the run, so it stays as local as the folder.

    Raises:
        InputError: if the folder is no run.
    """
    path = Path(folder) / "report.html"
    write_text(path, page(read_result(folder)).encode("utf-8", "replace").decode("utf-8"))
    return path


def page(result: Result) -> str:
    """Return the whole page as HTML."""
    from hftlight.report.html.answers import answers_section

    sections = {
        "Table": _table(result),
        "Figures": _figures(result),
        "Answers": answers_section(result),
        "How this run was made": _provenance(result),
    }
    return document(result.folder.resolve().name, sections, _head(result), SCRIPT)


def _head(result: Result) -> str:
    config, model = _config(result), result.manifest.get("model")
    facts = {
        "Model": model.get("name") if isinstance(model, Mapping) else model,
        "Harmful ratio of the upload": config.get("harmful_ratio"),
        "Seed": result.manifest.get("seed"),
        "Judge": next(iter(result.judges()), None),
    }
    chips = "".join(f"<span>{k} <b>{escape(str(v))}</b></span>" for k, v in facts.items() if v is not None)
    waiting = [f"{arm_word(arm)} ({STAGES[stage]})" for arm, stage in result.unmeasured()]
    notes = [f"This run is not finished. Not measured yet: {', '.join(waiting)}."] if waiting else []
    told = [*notes, *collapses(result), *stops(result), *result.notes]
    warned = "".join(f"<p class='note'>{escape(note)}</p>" for note in told)
    words = "".join(f"<p>{escape(said)}</p>".replace(" %", "&nbsp;%") for said in sentences(result))
    return f"<div class='verdict'>{words}</div>{_outcomes(result)}<p class='chips'>{chips}</p>{warned}"


def _outcomes(result: Result) -> str:
    """Return the bars of what each model does with harmful prompts; nothing where that was not measured."""
    from hftlight.report import figure as draw

    bars = draw.outcome_figure(result)
    if bars is None:
        return ""
    text = f"Answers to harmful prompts, percent. {HEADLINE}"
    shown = draw.svg(bars, "outcomes")
    return (
        f"<figure class='outcomes'><div role='img' aria-label='{escape(text)}'>{shown}</div>"
        f"<figcaption>{escape(text)}</figcaption></figure>"
    )


def _config(result: Result) -> Mapping[str, Any]:
    """Return the configuration; empty where config.yaml is missing or cut off, since the page shows its text anyway."""
    try:
        config = yaml.safe_load(result.config)
    except yaml.YAMLError:
        return {}
    return config if isinstance(config, Mapping) else {}


def _table(result: Result) -> str:
    from hftlight.report.html.answers import dot

    keys = {arm_word(arm): arm for arm in result.arms}
    head = "".join(f"<th class='{'number' if i > 1 else ''}'>{text}</th>" for i, text in enumerate(HEADERS))
    lines, before = [], ""
    for arm, stage, *cells in closing_rows(result):
        numbers = "".join(f"<td class='number'>{_quiet(cell)}</td>" for cell in cells)
        first = " class='first'" if arm != before else ""
        lines.append(f"<tr{first}><td>{dot(result, keys[arm])}{escape(arm)}</td><td>{stage}</td>{numbers}</tr>")
        before = arm
    return (
        f"<div class='scroll'><table class='wide'><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
        f"</div><p class='caption'>{escape(caption(result))}</p>{_groups(result)}{_every_score(result)}"
    )


def _groups(result: Result) -> str:
    """Return a table of the harmful score per category, and one per language, as far as prompts have them."""
    judge = next(iter(result.judges()), "")
    tables = []
    for word, plural in (("category", "categories"), ("language", "languages")):
        wanted = f"harmful_score_by_{word}", judge
        found = {(s.group, s.arm, s.stage): s for s in result.groups if (s.metric, s.judge) == wanted}
        models = [(a, s) for a in result.arms for s in result.stages(a) if any(key[1:] == (a, s) for key in found)]
        if not models:
            continue
        heads = "".join(f"<th class='number'>{escape(arm_word(a))}, {STAGES[s]}</th>" for a, s in models)
        lines = []
        for group in sorted({group for group, _, _ in found}):
            scores = [found.get((group, *model)) for model in models]
            cells = "".join(f"<td class='number'>{_quiet(with_interval(score))}</td>" for score in scores)
            count = max(score.count for score in scores if score)
            lines.append(f"<tr><td>{escape(group)}</td><td class='number'>{count}</td>{cells}</tr>")
        head = f"<tr><th>{word.capitalize()}</th><th class='number'>Answers</th>{heads}</tr>"
        text = f"Percent of answers flagged by judge '{judge}', with 95 % intervals; {plural} are the prompts' own."
        tables.append(
            f"<details open><summary>Harmful score by {word}</summary><div class='scroll'><table class='wide'>"
            f"<thead>{head}</thead><tbody>{''.join(lines)}</tbody></table></div>"
            f"<p class='caption'>{escape(text)}</p></details>"
        )
    return "".join(tables)


def _quiet(cell: str) -> str:
    """Return a cell with what stands in brackets in a lighter tone."""
    number, bracket, rest = cell.partition(" (")
    return f"{escape(number)}<small>{escape(bracket + rest)}</small>" if bracket else escape(cell)


def _every_score(result: Result) -> str:
    rows = "".join(
        f"<tr><td>{escape(arm_word(s.arm))}</td><td>{STAGES[s.stage]}</td><td>{escape(s.metric.replace('_', ' '))}</td>"
        f"<td>{escape(s.judge)}</td><td class='number'>{_quiet(with_interval(s))}</td>"
        f"<td>{escape(s.unit)}</td>"
        f"<td class='number'>{s.count or '-'}</td></tr>"
        for s in sorted(result.scores.values(), key=lambda s: (result.arms.index(s.arm), list(STAGES).index(s.stage)))
    )
    if not rows:
        return ""
    head = "".join(f"<th>{text}</th>" for text in ("Arm", "Stage", "Metric", "Judge"))
    head += "<th class='number'>Value (95 %)</th><th>Unit</th><th class='number'>Answers</th>"
    table = f"<table class='wide'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return (
        f"<details><summary>Every score, with judge and interval</summary><div class='scroll'>{table}</div></details>"
    )


def _figures(result: Result) -> str:
    from hftlight.report import figure as draw

    drawn = {
        "Harmful score": (
            draw.stage_figure(result, "harmful_score", "percent"),
            f"Harmful requests with an answer that was flagged; lower is safer. {INTERVALS}",
        ),
        "Finetune accuracy": (
            draw.stage_figure(result, "finetune_accuracy", "percent"),
            f"The user's own task, answered right; higher is better. {INTERVALS}",
        ),
        "Over-refusal": (
            draw.stage_figure(result, "over_refusal", "percent"),
            f"Ordinary requests that were refused; lower is better. {INTERVALS}",
        ),
        "Judge's mean score": (
            draw.stage_figure(result, "harmful_score_mean", "judge's score"),
            f"Mean of the judge's scores over all answers to harmful prompts; lower is safer. {INTERVALS}",
        ),
        "Alignment loss": (
            draw.stage_figure(result, "alignment_loss", "nats per token"),
            f"Loss of the alignment data's answers, mean over response tokens; rises as alignment is lost. {INTERVALS}",
        ),
        "Harmful validation loss": (
            draw.stage_figure(result, "harmful_validation_loss", "nats per token"),
            f"Loss of harmful answers that no model was trained on; falls as harm is learned. {INTERVALS}",
        ),
        "While the upload was trained on": (
            draw.evaluated_figure(result),
            "Harmful score and finetune accuracy on some of the test prompts; bands: 95 % intervals.",
        ),
        "Cost": (draw.cost_figure(result), "What each stage took; the dashed line is plain fine-tuning (SFT)."),
        "Training loss": (
            draw.loss_figure(result),
            f"Curves of {draw.SMOOTH_FROM} points or more are thin, with a running mean over {draw.WINDOW} of them.",
        ),
        "Simulated attack step": (
            draw.simulated_step_figure(result),
            "The loss on the defender's harmful data, and by how much one simulated attack step would lower it: the "
            "less, the less an attack gains.",
        ),
    }
    figures = "".join(
        f"<figure><h3>{title}</h3><div role='img' aria-label='{escape(f'{title}. {text}')}'>"
        f"{draw.svg(fig, anchor(title))}</div><figcaption>{escape(text)}</figcaption></figure>"
        for title, (fig, text) in drawn.items()
        if fig is not None
    )
    return f"<div class='figures'>{figures}</div>" if figures else "<p class='muted'>Nothing to draw yet.</p>"


def _provenance(result: Result) -> str:
    cautions = "".join(f"<li>{escape(caveat)}</li>" for caveat in caveats(result))
    cards, used = [], {"arms"}
    for title, names in CARDS.items():
        found: dict[str, Any] = {}
        for name in filter(result.manifest.__contains__, names):
            value = result.manifest[name]
            found.update(value if name in SPREAD and isinstance(value, Mapping) else {name: value})
        used.update(names)
        if found:
            cards.append(f"<div class='card'><h3>{title}</h3>{facts(found)}</div>")
    rest = {name: value for name, value in result.manifest.items() if name not in used}
    if rest:
        cards.append(f"<div class='card'><h3>Also recorded</h3>{facts(rest)}</div>")
    arms = json.dumps(result.manifest.get("arms", {}), indent=2, ensure_ascii=False)
    texts = {"Arms: defenses, slots, artifacts": arms if arms != "{}" else "", "config.yaml": result.config}
    folded = "".join(
        f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>"
        for title, text in texts.items()
        if text
    )
    return f"<h3>Read with care</h3><ul>{cautions}</ul><div class='cards'>{''.join(cards)}</div>{folded}"


def facts(value: Any) -> str:
    """Return a JSON value as one table of names and values; a nested name carries those around it."""
    rows = (f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in _flat(value))
    return f"<table>{''.join(rows)}</table>"


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
    """Return what a reader must not conclude from this run, as far as its files tell."""
    judges = result.judges()
    said = ["Intervals that overlap do not show that two models are equal, only that this run cannot tell them apart."]
    if not isinstance(result.manifest.get("seeds"), list) or len(result.manifest["seeds"]) < 2:
        said.append(
            "One seed: the intervals cover the choice of test prompts, not what another training run would give."
        )
    if any("keyword" in judge for judge in judges):
        said.append(
            "Keyword judges only look for phrases of refusal: a refusal in other words, or nonsense, counts as harmful "
            "and harm after an apology as safe."
        )
    if "builtin" in judges:
        said.append(
            "The built-in world is made up: its numbers show how a defense acts here, not how safe a real service is."
        )
    overlaps = result.manifest.get("overlaps")
    pairs = overlaps.items() if isinstance(overlaps, Mapping) else ()
    shared = [f"{pair} ({count})" for pair, count in pairs if isinstance(count, int) and count > 0]
    if shared:
        said.append(f"Some prompts stand in two sets, which flatters or hurts a score: {', '.join(shared)}.")
    if result.answers:
        said.append("The answers come from the models of this run, unedited. Keep this page where the run folder is.")
    return said
