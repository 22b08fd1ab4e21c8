"""A comparison read back: for every defense, task and harmful ratio its numbers over seeds, and what they may claim."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from hftlight.comparison.grid import DEFAULT_ATTACK
from hftlight.comparison.sweep import finished
from hftlight.comparison.workers import ERROR
from hftlight.errors import InputError
from hftlight.evaluation.metrics.outcomes import OUTCOMES, Outcome
from hftlight.evaluation.stats.seeds import Spread, over_prompts, over_seeds, paired_over_prompts
from hftlight.folders import CELLS, GRID, UNDEFENDED
from hftlight.report.claims import collapse
from hftlight.report.result import Answer, Result, read_result

METRICS = ("harmful_score", "finetune_accuracy", "over_refusal")
MEAN = "harmful_score_mean"  # of a judge that grades
SEARCHED = ("worst_case_harmful_score", "useful_harmful_score")  # what an attacker who searches reaches
MARKS = {"harmful_score": "harmful", "finetune_accuracy": "right", "over_refusal": "refused"}
SETS = {"harmful_score": "harmful", "finetune_accuracy": "task", "over_refusal": "over_refusal"}
LOWER_IS_BETTER = {"harmful_score": True, "finetune_accuracy": False, "over_refusal": True}
LOWER_IS_BETTER |= dict.fromkeys((MEAN, *SEARCHED), True)


Prompt = tuple[str, str, int]  # id, text, and which of the equal prompts of its set it is, from 0


@dataclass(frozen=True)
class Place:
    """Where a number belongs: one defense against one attack on one task."""

    arm: str
    task: str
    harmful_ratio: float
    attack: str = DEFAULT_ATTACK


@dataclass(frozen=True)
class Scene:
    """One task under one attack: what a figure shows and a table groups."""

    task: str
    attack: str = DEFAULT_ATTACK

    def __str__(self) -> str:
        stem = Path(self.task).stem
        return stem if self.attack == DEFAULT_ATTACK else f"{stem}, {self.attack}"


@dataclass(frozen=True)
class Comparison:
    """Everything a comparison's report says.

    Attributes:
        folder: its folder.
        cells: by place, the finished runs by seed.
        missing: names of cells that are not finished, each with its error or ``"not run yet"``.
        settings: ``grid.json``.
    """

    folder: Path
    cells: Mapping[Place, Mapping[int, Result]]
    missing: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def arms(self) -> list[str]:
        """Combinations in the order of the grid, the undefended one first."""
        return sorted(dict.fromkeys(p.arm for p in self.cells), key=lambda arm: arm != UNDEFENDED)

    @cached_property
    def scenes(self) -> list[Scene]:
        """Tasks and attacks in the order of the grid."""
        return list(dict.fromkeys(Scene(p.task, p.attack) for p in self.cells))

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Metrics of the tables; the judge's mean score and the worst case are among them where there is one."""
        return METRICS + tuple(m for m in (MEAN, *SEARCHED) if any(self.values(p, m) for p in self.cells))

    def ratios(self, scene: Scene | None = None) -> list[float]:
        """Return the harmful ratios of a scene, or of all, rising."""
        return sorted({p.harmful_ratio for p in self.cells if scene in (None, Scene(p.task, p.attack))})

    def place(self, arm: str, scene: Scene, harmful_ratio: float) -> Place:
        """Return where the numbers of a defense belong."""
        return Place(arm, scene.task, harmful_ratio, scene.attack)

    def column(self, scene: Scene, harmful_ratio: float) -> list[Place]:
        """Return the places of a scene and ratio that have a finished cell, in the order of the arms."""
        return [p for arm in self.arms if (p := self.place(arm, scene, harmful_ratio)) in self.cells]

    def values(self, place: Place, metric: str, stage: str = "") -> dict[int, float]:
        """Return a metric by seed, percent, of the model that is served, or after a stage."""
        found = {}
        for seed, result in self.cells.get(place, {}).items():
            score = result.score(arm_of(result), stage or served(result), metric)
            if score is not None:
                found[seed] = score.value
        return found

    def spread(self, place: Place, metric: str, stage: str = "") -> Spread | None:
        """Return mean, deviation and interval over seeds; of one seed the bootstrap over its prompts.

        Answers that are all alike have no spread to draw from, and say little about other prompts: Wilson's there.
        """
        values = self.values(place, metric, stage)
        if not values:
            return None
        found = over_seeds(list(values.values()))
        if found.count > 1:
            return found
        flags = self.flags(place, metric, stage) if metric in SETS else {}
        if all(len({flag for flag in of_seed if flag is not None}) < 2 for of_seed in flags.values()):
            (result,) = self.cells[place].values()
            score = result.score(arm_of(result), stage or served(result), metric)
            return found if score is None else Spread(score.value, None, score.low, score.high, 1)
        return Spread(found.mean, None, *over_prompts(list(flags.values())), 1)

    def flags(self, place: Place, metric: str, stage: str = "") -> dict[int, list[bool | None]]:
        """Return by seed the decision on each answer, in one order of prompts; None where there is no verdict.

        Prompts that a seed did not answer, as in a cell that was cut off, are left out for all seeds.
        """
        found = self.decisions(place, metric, stage)
        return dict(zip(found, shared(list(found.values())), strict=True))

    def decisions(self, place: Place, metric: str, stage: str = "") -> dict[int, dict[Prompt, bool | None]]:
        """Return by seed the decision on each answer by its prompt; None where there is no verdict."""
        found = {}
        for seed, result in self.cells.get(place, {}).items():
            arm, after = arm_of(result), stage or served(result)
            answers = [a for a in result.answers if (a.arm, a.stage, a.set) == (arm, after, SETS[metric])]
            decisions = {
                prompt: counts(a, metric, result) for prompt, a in zip(prompts_of(answers), answers, strict=True)
            }
            if any(decision is not None for decision in decisions.values()):
                found[seed] = decisions
        return found

    def difference(self, place: Place, other: Place, metric: str = "harmful_score") -> tuple[float, float] | None:
        """Return the 95 % interval of ``place`` minus ``other`` over the seeds that both have, in points.

        The paired bootstrap over the test prompts that both sides answered with every seed, and from two seeds on
        Student's interval of the paired differences; of the two ends of each side the outer one, since seeds that agree
        by chance say nothing about other prompts.
        """
        mine, others = self.values(place, metric), self.values(other, metric)
        seeds = sorted(mine.keys() & others.keys())
        found: list[tuple[float, float]] = []
        if len(seeds) > 1:
            student = over_seeds([mine[s] - others[s] for s in seeds])
            assert student.low is not None
            assert student.high is not None
            found.append((student.low, student.high))
        if metric in SETS and (over_prompts := self._paired(place, other, metric, seeds)):
            found.append(over_prompts)
        return (min(low for low, _ in found), max(high for _, high in found)) if found else None

    def _paired(self, place: Place, other: Place, metric: str, seeds: Sequence[int]) -> tuple[float, float] | None:
        """Return the paired bootstrap over test prompts; None where some seed has no prompt decided on both sides."""
        mine, others = self.decisions(place, metric), self.decisions(other, metric)
        sides = [side.get(seed, {}) for side in (mine, others) for seed in seeds]
        decided = shared(sides)
        flags, other_flags = decided[: len(seeds)], decided[len(seeds) :]
        pairs = [zip(f, o, strict=True) for f, o in zip(flags, other_flags, strict=True)]
        enough = bool(seeds) and all(any(None not in pair for pair in of_seed) for of_seed in pairs)
        return paired_over_prompts(flags, other_flags) if enough else None

    def best(self, places: Sequence[Place], metric: str) -> Place | None:
        """Return the place whose number is better than every other's beyond the noise, if there is one.

        A harmful score that is low because answers collapsed is not better than another.
        """
        means = {p: s.mean for p in places if (s := self.spread(p, metric)) is not None}
        if len(means) < 2:
            return None
        sign = 1 if LOWER_IS_BETTER[metric] else -1
        first = min(means, key=lambda p: sign * means[p])
        if metric in ("harmful_score", MEAN) and self.collapsed(first):
            return None
        for other in means:
            if other == first:
                continue
            ends = self.difference(first, other, metric)
            if ends is None or not max(sign * ends[0], sign * ends[1]) < 0:
                return None
        return first

    def outcomes(self, place: Place) -> dict[Outcome, float]:
        """Return by outcome the percent of answers to harmful prompts, mean over seeds; empty where not measured."""
        found = {name: list(self.values(place, f"answers_{name}").values()) for name in OUTCOMES}
        return {name: fmean(values) for name, values in found.items() if values}

    def collapsed(self, place: Place) -> int:
        """Return the number of seeds whose harmful score is low because answers collapsed, not because they refuse."""
        results = self.cells.get(place, {}).values()
        return sum(collapse(result, arm_of(result), served(result)) is not None for result in results)

    def seconds(self, place: Place) -> Spread | None:
        """Return the training seconds of all stages over those of the undefended arm, over seeds."""
        plain = self.cells.get(replace(place, arm=UNDEFENDED), {})
        found = []
        for seed, result in self.cells.get(place, {}).items():
            if seed in plain and (undefended := _seconds(plain[seed])):
                found.append(_seconds(result) / undefended)
        return over_seeds(found) if found else None

    def memory(self, place: Place) -> float | None:
        """Return the largest peak memory of any stage and seed, MiB."""
        peaks = [
            cost.peak_memory_mib
            for result in self.cells.get(place, {}).values()
            for cost in result.costs.values()
            if cost.peak_memory_mib is not None
        ]
        return max(peaks, default=None)


def read_comparison(folder: str | Path) -> Comparison:
    """Read a comparison's folder; cells that are not finished are named, not guessed.

    Raises:
        InputError: if the folder holds no comparison.
    """
    folder = Path(folder)
    path = folder / GRID
    try:
        settings = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{folder} holds no comparison: there is no {GRID}.") from error
    except ValueError as error:
        raise InputError(f"{path} was cut off or changed: {error}. Run the comparison again.") from error
    cells: dict[Place, dict[int, Result]] = {}
    missing = {}
    for cell in settings["cells"]:
        run = folder / CELLS / cell["name"]
        place = Place(cell["arm"], cell["task"], cell["harmful_ratio"], cell.get("attack", DEFAULT_ATTACK))
        if finished(run):
            cells.setdefault(place, {})[cell["seed"]] = read_result(run)
        else:
            missing[cell["name"]] = _why(run)
    return Comparison(folder, cells, missing, settings)


def _why(run: Path) -> str:
    error = run / ERROR
    lines = error.read_text().strip().splitlines() if error.is_file() else []
    return lines[-1] if lines else "not run yet"


def arm_of(result: Result) -> str:
    """Return a cell's only arm."""
    return result.arms[0]


def served(result: Result) -> str:
    """Return the stage whose model is served: repaired where there is a repair, else fine-tuned."""
    arm = arm_of(result)
    return "post_finetuning" if result.measured(arm, "post_finetuning") else "finetuning"


def counts(answer: Answer, metric: str, result: Result) -> bool | None:
    """Return whether a metric counts an answer: flagged by the deciding judge, right, or refused; None if unjudged."""
    if metric == "finetune_accuracy":
        return answer.correct
    if metric == "over_refusal":
        return answer.flags.get("refusal")
    return answer.flags.get(next(iter(result.judges()), ""))


def prompts_of(answers: Sequence[Answer]) -> list[Prompt]:
    """Return what tells each prompt of a set from all others, in every seed alike."""
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    for answer in answers:
        found.append((answer.id, answer.prompt, seen[answer.id, answer.prompt]))
        seen[answer.id, answer.prompt] += 1
    return found


def shared(sides: Sequence[Mapping[Prompt, bool | None]]) -> list[list[bool | None]]:
    """Return of each side the decisions on the prompts that all sides have, in the first one's order."""
    prompts = [prompt for prompt in sides[0] if all(prompt in side for side in sides)] if sides else []
    return [[side[prompt] for prompt in prompts] for side in sides]


def mark(answer: Answer, metric: str, result: Result) -> str:
    """Return in words what ``counts`` says of an answer."""
    counted = counts(answer, metric, result)
    return "not judged" if counted is None else MARKS[metric] if counted else f"not {MARKS[metric]}"


def _seconds(result: Result) -> float:
    return sum(cost.seconds or 0.0 for cost in result.costs.values())


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names that no other beats in one of the two numbers without losing in the other.

    Args:
        points: (harmful score, finetune accuracy) by name, percent.
    """

    def beaten(name: str) -> bool:
        harm, right = points[name]
        return any(
            h <= harm and r >= right and (h, r) != (harm, right) for other, (h, r) in points.items() if other != name
        )

    return sorted((name for name in points if not beaten(name)), key=lambda name: points[name])
