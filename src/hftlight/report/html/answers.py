"""Answers of a run side by side: a column per arm and stage, with the judges' verdicts in colour and words."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hftlight.folders import STAGES, UNPATTERNED, UNTRIGGERED, arm_word
from hftlight.report.figure import color_index
from hftlight.report.result import Answer, Result

SETS = {
    "harmful": "harmful requests",
    UNPATTERNED: "harmful requests without the pattern",
    UNTRIGGERED: "harmful requests without the trigger",
    "over_refusal": "ordinary requests",
    "task": "task",
}
COLUMNS = 4  # columns that fit on a laptop; stages are ticked from the last one backwards while they fit
REFUSAL = ("refusal", "over_refusal")  # judges whose flag means that an ordinary request was refused
Badge = tuple[str, str, str]  # (CSS class, words, names of the judges)


@dataclass(frozen=True)
class CellView:
    """One answer: its stage, its model in words, the index of its arm's colour, its badges and its text."""

    stage: str
    model: str
    color: int
    badges: Sequence[Badge]
    response: str


@dataclass(frozen=True)
class PromptView:
    """One prompt with its answers. ``differs`` names the stages with different verdicts between arms."""

    set: str
    text: str
    about: str
    differs: Sequence[str]
    cells: Sequence[CellView]


@dataclass(frozen=True)
class AnswersView:
    """The answers of a run and the filters above them.

    Attributes:
        sets: for each set its value, words and number of prompts. The page opens with the first set.
        stages: for each stage its value, its words and whether it is ticked.
        prompts: the prompts in the order of the run.
    """

    sets: Sequence[tuple[str, str, int]]
    stages: Sequence[tuple[str, str, bool]]
    prompts: Sequence[PromptView]


def badges(answer: Answer) -> list[Badge]:
    """Return the decisions about one answer as badges: a CSS class for the colour, words, and the judges' names."""
    if answer.correct is not None:
        return [("good", "✓ correct", "") if answer.correct else ("bad", "✗ wrong", "")]
    # Judges with the same decision share a badge.
    by_decision: dict[tuple[str, str], list[str]] = {}
    for judge, flag in answer.flags.items():
        yes, no = ("▲ refused", "✓ answered") if judge in REFUSAL else ("▲ harmful", "○ not flagged")
        by_decision.setdefault(("bad", yes) if flag else ("good", no), []).append(judge)
    return [(kind, word, ", ".join(judges)) for (kind, word), judges in by_decision.items()]


def view_answers(result: Result) -> AnswersView:
    """Return the answers of a run for the template ``run/answers.html.j2``."""
    rows: dict[Any, list[Answer]] = {}
    for answer in result.answers:
        rows.setdefault(answer.key, []).append(answer)
    arms = result.arms
    # Columns are ordered by stage, then by arm; sets in the order of SETS, then further sets, then "all".
    order = {(stage, arm): (place, arms.index(arm)) for place, stage in enumerate(STAGES) for arm in arms}
    columns = sorted({(a.stage, a.arm) for a in result.answers}, key=order.__getitem__)
    counts = {"all": len(rows), **Counter(answers[0].set for answers in rows.values())}
    sets = sorted(counts, key=lambda name: [*SETS, name].index(name) if name != "all" else len(SETS) + 1)
    ticked = ticked_stages(columns)
    stages = [stage for stage in STAGES if any(stage == s for s, _ in columns)]
    return AnswersView(
        sets=[(name, SETS.get(name, name), counts[name]) for name in sets],
        stages=[(stage, STAGES[stage], stage in ticked) for stage in stages],
        prompts=[_prompt(result, answers, columns) for answers in rows.values()],
    )


def ticked_stages(columns: Sequence[tuple[str, str]]) -> list[str]:
    """Return the stages that the page opens with: the last one, and those before it while their columns fit.

    Args:
        columns: (stage, arm) of each column.
    """
    ticked: list[str] = []
    for stage in reversed(STAGES):
        wanted = [*ticked, stage]
        here = sum(s == stage for s, _ in columns)
        if here and (not ticked or sum(s in wanted for s, _ in columns) <= COLUMNS):
            ticked = wanted
        elif here:
            break
    return ticked


def _prompt(result: Result, answers: Sequence[Answer], columns: Sequence[tuple[str, str]]) -> PromptView:
    name, _, identity, prompt = answers[0].key
    by_column = {(answer.stage, answer.arm): answer for answer in answers}
    reference = answers[0].reference
    about = " · ".join(filter(None, (SETS.get(name, name), identity, reference and f"expected: {reference}")))
    cells = [_cell(result, by_column[column]) for column in columns if column in by_column]
    return PromptView(name, prompt, about, differing_stages(answers), cells)


def _cell(result: Result, answer: Answer) -> CellView:
    model = f"{arm_word(answer.arm)}, {STAGES[answer.stage]}"
    return CellView(answer.stage, model, color_index(result, answer.arm), badges(answer), answer.response)


def differing_stages(answers: Sequence[Answer]) -> list[str]:
    """Return the stages at which the arms' answers to one prompt differ in their badges.

    Answers without a verdict are compared by their texts.
    """
    by_stage: dict[str, set[object]] = {}
    for answer in answers:
        by_stage.setdefault(answer.stage, set()).add(tuple(badges(answer)) or answer.response)
    return [stage for stage in STAGES if len(by_stage.get(stage, ())) > 1]
