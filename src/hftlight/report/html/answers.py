"""The answers of a run side by side: a column per arm and stage, and what the judges said in colour and words."""

from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

from hftlight.folders import STAGES, arm_word
from hftlight.report.figure import color_index
from hftlight.report.result import Answer, Result

SETS = {"harmful": "harmful requests", "over_refusal": "ordinary requests", "task": "task"}
COLUMNS = 4  # a laptop's width; stages are ticked from the last one backwards while the columns fit
REFUSAL = ("refusal", "over_refusal")  # names under which a verdict says that an ordinary request was refused
Badge = tuple[str, str, str]  # (class, words, who says so)


def badges(answer: Answer) -> list[Badge]:
    """Return what was decided about one answer: a class for the colour, a word, and the judges who agree on it."""
    if answer.correct is not None:
        return [("good", "✓ correct", "") if answer.correct else ("bad", "✗ wrong", "")]
    said: dict[tuple[str, str], list[str]] = {}
    for judge, flag in answer.flags.items():
        yes, no = ("▲ refused", "✓ answered") if judge in REFUSAL else ("▲ harmful", "○ not flagged")
        said.setdefault(("bad", yes) if flag else ("good", no), []).append(judge)
    return [(kind, word, ", ".join(judges)) for (kind, word), judges in said.items()]


def answers_section(result: Result) -> str:
    """Return the filters and one article per prompt; everything a model or a data set wrote is escaped."""
    if not result.answers:
        return "<p class='muted'>No answers have been written yet.</p>"
    rows: dict[Any, list[Answer]] = {}
    for answer in result.answers:
        rows.setdefault(answer.key, []).append(answer)
    arms = result.arms
    order = {(stage, arm): (place, arms.index(arm)) for place, stage in enumerate(STAGES) for arm in arms}
    columns = sorted({(a.stage, a.arm) for a in result.answers}, key=order.__getitem__)
    articles = [_article(result, answers, columns) for answers in rows.values()]
    sets = [answers[0].set for answers in rows.values()]
    return (
        f"{_filters(sets, columns)}{''.join(articles)}<p><button id='more' type='button' hidden>Show more</button></p>"
    )


def _filters(names: Sequence[str], columns: Sequence[tuple[str, str]]) -> str:
    counts = {"all": len(names), **Counter(names)}
    sets = sorted(counts, key=lambda name: [*SETS, name].index(name) if name != "all" else len(SETS) + 1)
    radios = [
        f"<label><input type='radio' name='set' value='{escape(name)}'{' checked' if name == sets[0] else ''}> "
        f"{escape(SETS.get(name, name))} ({counts[name]})</label>"
        for name in sets
    ]
    stages = [stage for stage in STAGES if any(stage == s for s, _ in columns)]
    ticked = ticked_stages(columns)
    boxes = [
        f"<label><input type='checkbox' name='stage' value='{stage}'{' checked' if stage in ticked else ''}> "
        f"{STAGES[stage]}</label>"
        for stage in stages
    ]
    return (
        f"<form id='filters' hidden><span class='group'>{''.join(radios)}</span>"
        f"<span class='group'><span class='muted'>Stages</span>{''.join(boxes)}</span>"
        "<label><input type='checkbox' name='differs'> only where arms differ</label>"
        "<input type='search' name='text' placeholder='Search' aria-label='Search prompts and answers'>"
        "<span id='shown' class='muted' role='status'></span></form>"
    )


def ticked_stages(columns: Sequence[tuple[str, str]]) -> list[str]:
    """Return the stages shown at first, of (stage, arm) columns: the last one, and those before it while they fit."""
    ticked: list[str] = []
    for stage in reversed(STAGES):
        wanted = [*ticked, stage]
        here = sum(s == stage for s, _ in columns)
        if here and (not ticked or sum(s in wanted for s, _ in columns) <= COLUMNS):
            ticked = wanted
        elif here:
            break
    return ticked


def _article(result: Result, answers: Sequence[Answer], columns: Sequence[tuple[str, str]]) -> str:
    name, _, identity, prompt = answers[0].key
    by_column = {(answer.stage, answer.arm): answer for answer in answers}
    reference = answers[0].reference
    about = " · ".join(filter(None, (SETS.get(name, name), identity, reference and f"expected: {reference}")))
    cells = "".join(_cell(result, by_column[column]) for column in columns if column in by_column)
    return (
        f"<article class='prompt' data-set='{escape(name)}' data-differs='{' '.join(differing_stages(answers))}'>"
        f"<h3 dir='auto'>{escape(prompt)}</h3><p class='muted'><small>{escape(about)}</small></p>"
        f"<div class='cells'>{cells}</div></article>"
    )


def differing_stages(answers: Sequence[Answer]) -> list[str]:
    """Return the stages at which the arms' answers to one prompt were judged differently; unjudged ones, read so."""
    found: dict[str, set[object]] = {}
    for answer in answers:
        found.setdefault(answer.stage, set()).add(tuple(badges(answer)) or answer.response)
    return [stage for stage in STAGES if len(found.get(stage, ())) > 1]


def _cell(result: Result, answer: Answer) -> str:
    said = badges(answer)
    marks = "".join(
        f"<span class='badge {kind}'>{word}{f' <small>{escape(judge)}</small>' if judge else ''}</span>"
        for kind, word, judge in said or [("none", "not judged", "")]
    )
    return (
        f"<div class='cell {said[0][0] if said else ''}' data-stage='{answer.stage}'>"
        f"<header>{dot(result, answer.arm)}{escape(arm_word(answer.arm))}, {STAGES[answer.stage]}</header>{marks}"
        f"<div class='answer' dir='auto'>{escape(answer.response)}</div></div>"
    )


def dot(result: Result, arm: str) -> str:
    """Return a dot in the arm's colour, the one it has in the figures; its name always stands beside it."""
    return f"<span class='dot' style='background: var(--arm-{color_index(result, arm)})'></span>"
