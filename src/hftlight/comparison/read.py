"""Read a comparison: numbers over seeds by arm, task, attack and harmful ratio, and intervals of differences."""

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
from hftlight.folders import CELLS, GRID, UNDEFENDED, UNPATTERNED, WITHOUT_PATTERN
from hftlight.report.claims import collapse
from hftlight.report.result import Answer, Result, read_result

METRICS = ("harmful_score", "finetune_accuracy", "over_refusal")
MEAN = "harmful_score_mean"  # mean score of a judge that gives grades
SEARCHED = ("worst_case_harmful_score", "useful_harmful_score")  # harmful scores that an attacker who searches reaches
MARKS = {
    "harmful_score": "harmful",
    WITHOUT_PATTERN: "harmful",
    "finetune_accuracy": "right",
    "over_refusal": "refused",
}
SETS = {
    "harmful_score": "harmful",
    WITHOUT_PATTERN: UNPATTERNED,
    "finetune_accuracy": "task",
    "over_refusal": "over_refusal",
}
LOWER_IS_BETTER = {"harmful_score": True, "finetune_accuracy": False, "over_refusal": True}
LOWER_IS_BETTER |= dict.fromkeys((WITHOUT_PATTERN, MEAN, *SEARCHED), True)


Prompt = tuple[str, str, int]  # id, text, and number among the equal prompts of its set, from 0


@dataclass(frozen=True)
class Place:
    """Key of a number: one arm against one attack on one task, at one harmful ratio."""

    arm: str
    task: str
    harmful_ratio: float
    attack: str = DEFAULT_ATTACK


@dataclass(frozen=True)
class Scene:
    """One task under one attack. Figures and groups of table rows show one scene each."""

    task: str
    attack: str = DEFAULT_ATTACK

    def __str__(self) -> str:
        stem = Path(self.task).stem
        return stem if self.attack == DEFAULT_ATTACK else f"{stem}, {self.attack}"


@dataclass(frozen=True)
class Sweep:
    """Arms of one combination that differ in one argument of one defense.

    Attributes:
        combination: the defenses, joined by ``+``.
        option: the argument, such as ``antidote.prune_ratio``.
        arms: pairs of value and arm; numbers in rising order, others in the order of the grid.
    """

    combination: str
    option: str
    arms: Sequence[tuple[Any, str]]


@dataclass(frozen=True)
class Comparison:
    """Finished runs of a comparison, and the numbers that its report shows.

    Attributes:
        folder: the comparison's folder.
        cells: finished runs by seed, by place.
        missing: names of unfinished cells, each with its error or ``"not run yet"``.
        settings: content of ``grid.json``.
    """

    folder: Path
    cells: Mapping[Place, Mapping[int, Result]]
    missing: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def arms(self) -> list[str]:
        """Arms in the order of the grid, the undefended arm first."""
        return sorted(dict.fromkeys(p.arm for p in self.cells), key=lambda arm: arm != UNDEFENDED)

    @cached_property
    def scenes(self) -> list[Scene]:
        """Tasks and attacks in the order of the grid."""
        return list(dict.fromkeys(Scene(p.task, p.attack) for p in self.cells))

    @cached_property
    def sweeps(self) -> list[Sweep]:
        """Sweeps of one argument that have at least two arms with a finished cell."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for cell in self.settings.get("cells", []):
            if len(swept := cell.get("swept", {})) == 1 and cell["arm"] in self.arms:
                ((option, value),) = swept.items()
                found.setdefault(("+".join(cell["defenses"]), option), {})[cell["arm"]] = value
        sweeps = []
        for (combination, option), values in found.items():
            arms = [(value, arm) for arm, value in values.items()]
            if all(isinstance(value, (int, float)) for value, _ in arms):
                arms.sort(key=lambda pair: pair[0])
            if len(arms) > 1:
                sweeps.append(Sweep(combination, option, arms))
        return sweeps

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Metrics of the tables. Those that are no part of ``METRICS`` are included if a cell has them."""
        harm, *others = METRICS
        # The harmful scores with and without the attack's pattern stand side by side.
        wanted = (harm, WITHOUT_PATTERN, *others, MEAN, *SEARCHED)
        return tuple(m for m in wanted if m in METRICS or any(self.values(p, m) for p in self.cells))

    def ratios(self, scene: Scene | None = None) -> list[float]:
        """Return the harmful ratios of a scene in rising order. None means all scenes."""
        return sorted({p.harmful_ratio for p in self.cells if scene in (None, Scene(p.task, p.attack))})

    def place(self, arm: str, scene: Scene, harmful_ratio: float) -> Place:
        """Return the key of an arm's numbers."""
        return Place(arm, scene.task, harmful_ratio, scene.attack)

    def column(self, scene: Scene, harmful_ratio: float) -> list[Place]:
        """Return the places of a scene and harmful ratio that have a finished cell, in the order of the arms."""
        return [p for arm in self.arms if (p := self.place(arm, scene, harmful_ratio)) in self.cells]

    def values(self, place: Place, metric: str, stage: str = "") -> dict[int, float]:
        """Return a metric by seed, in percent. An empty ``stage`` means the model that is served.

        Only a judge's mean score is not in percent. Its unit is the judge's own.
        """
        by_seed = {}
        for seed, result in self.cells.get(place, {}).items():
            score = result.score(arm_of(result), stage or served(result), metric)
            if score is not None:
                by_seed[seed] = score.value
        return by_seed

    def spread(self, place: Place, metric: str, stage: str = "") -> Spread | None:
        """Return mean, deviation and interval over seeds. One seed has the bootstrap interval over its prompts.

        If all decisions of that seed are equal, they have no spread and say little about other prompts. The interval is
        then that of the score itself, which is Wilson's. A metric without decisions has the score's interval too.
        """
        values = self.values(place, metric, stage)
        if not values:
            return None
        spread = over_seeds(list(values.values()))
        if spread.count > 1:
            return spread
        flags = self.flags(place, metric, stage) if metric in SETS else {}
        # True too if there are no decisions at all.
        if all(len({flag for flag in of_seed if flag is not None}) < 2 for of_seed in flags.values()):
            (result,) = self.cells[place].values()
            score = result.score(arm_of(result), stage or served(result), metric)
            return spread if score is None else Spread(score.value, None, score.low, score.high, 1)
        return Spread(spread.mean, None, *over_prompts(list(flags.values())), 1)

    def flags(self, place: Place, metric: str, stage: str = "") -> dict[int, list[bool | None]]:
        """Return by seed the decision on each answer, in one order of prompts. None means that there is no verdict.

        A prompt that one seed did not answer is left out for all seeds. A cell that was cut off lacks some prompts.
        """
        decisions = self.decisions(place, metric, stage)
        return dict(zip(decisions, shared(list(decisions.values())), strict=True))

    def decisions(self, place: Place, metric: str, stage: str = "") -> dict[int, dict[Prompt, bool | None]]:
        """Return by seed the decision on each answer by its prompt. None means that there is no verdict.

        A seed without any verdict is left out.
        """
        by_seed = {}
        for seed, result in self.cells.get(place, {}).items():
            arm, after = arm_of(result), stage or served(result)
            answers = [a for a in result.answers if (a.arm, a.stage, a.set) == (arm, after, SETS[metric])]
            decisions = {
                prompt: counts(a, metric, result) for prompt, a in zip(prompts_of(answers), answers, strict=True)
            }
            if any(decision is not None for decision in decisions.values()):
                by_seed[seed] = decisions
        return by_seed

    def difference(self, place: Place, other: Place, metric: str = "harmful_score") -> tuple[float, float] | None:
        """Return the 95 % interval of ``place`` minus ``other`` over their common seeds, in points.

        One interval is the paired bootstrap over the test prompts that both sides answered with every seed. With two or
        more seeds, another one is Student's interval of the paired differences. The result takes the outer end on
        each side, because seeds that agree by chance say nothing about other prompts. None means that neither interval
        exists.
        """
        mine, others = self.values(place, metric), self.values(other, metric)
        seeds = sorted(mine.keys() & others.keys())
        intervals: list[tuple[float, float]] = []
        if len(seeds) > 1:
            student = over_seeds([mine[s] - others[s] for s in seeds])
            assert student.low is not None
            assert student.high is not None
            intervals.append((student.low, student.high))
        if metric in SETS and (over_prompts := self._paired(place, other, metric, seeds)):
            intervals.append(over_prompts)
        return (min(low for low, _ in intervals), max(high for _, high in intervals)) if intervals else None

    def _paired(self, place: Place, other: Place, metric: str, seeds: Sequence[int]) -> tuple[float, float] | None:
        """Return the paired bootstrap over test prompts, None if a seed has no prompt with a verdict on both sides."""
        mine, others = self.decisions(place, metric), self.decisions(other, metric)
        # All seeds of ``place``, then all seeds of ``other``, reduced to the prompts that every one of them has.
        sides = [side.get(seed, {}) for side in (mine, others) for seed in seeds]
        decided = shared(sides)
        flags, other_flags = decided[: len(seeds)], decided[len(seeds) :]
        pairs = [zip(f, o, strict=True) for f, o in zip(flags, other_flags, strict=True)]
        enough = bool(seeds) and all(any(None not in pair for pair in of_seed) for of_seed in pairs)
        return paired_over_prompts(flags, other_flags) if enough else None

    def best(self, places: Sequence[Place], metric: str) -> Place | None:
        """Return the place that is better than every other place beyond the noise, None if there is none.

        A harmful score that is low because answers collapsed is never the best.
        """
        means = {p: s.mean for p in places if (s := self.spread(p, metric)) is not None}
        if len(means) < 2:
            return None
        # Times the sign, the smaller number is the better one for every metric.
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
        """Return the percent of answers to harmful prompts by outcome, as the mean over seeds.

        An outcome that was not measured is left out.
        """
        percents = {name: list(self.values(place, f"answers_{name}").values()) for name in OUTCOMES}
        return {name: fmean(values) for name, values in percents.items() if values}

    def collapsed(self, place: Place) -> int:
        """Return the number of seeds whose harmful score is low because answers collapsed, not because they refuse."""
        results = self.cells.get(place, {}).values()
        return sum(collapse(result, arm_of(result), served(result)) is not None for result in results)

    def seconds(self, place: Place) -> Spread | None:
        """Return the training time of all stages relative to the undefended arm with the same seed, over seeds."""
        plain = self.cells.get(replace(place, arm=UNDEFENDED), {})
        relative = []
        for seed, result in self.cells.get(place, {}).items():
            if seed in plain and (undefended := _seconds(plain[seed])):
                relative.append(_seconds(result) / undefended)
        return over_seeds(relative) if relative else None

    def memory(self, place: Place) -> float | None:
        """Return the largest peak memory of any stage and seed, in MiB."""
        peaks = [
            cost.peak_memory_mib
            for result in self.cells.get(place, {}).values()
            for cost in result.costs.values()
            if cost.peak_memory_mib is not None
        ]
        return max(peaks, default=None)


def read_comparison(folder: str | Path) -> Comparison:
    """Read a comparison's folder. Unfinished cells are listed in ``missing``.

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
    """Return the last line of a cell's error, or that the cell was not run."""
    error = run / ERROR
    lines = error.read_text().strip().splitlines() if error.is_file() else []
    return lines[-1] if lines else "not run yet"


def arm_of(result: Result) -> str:
    """Return a cell's only arm."""
    return result.arms[0]


def served(result: Result) -> str:
    """Return the stage whose model is served: the repair if there is one, else the fine-tuning."""
    arm = arm_of(result)
    return "post_finetuning" if result.measured(arm, "post_finetuning") else "finetuning"


def counts(answer: Answer, metric: str, result: Result) -> bool | None:
    """Return whether a metric counts an answer: judged harmful, right, or refused. None means not judged.

    The first judge of the result decides whether an answer is harmful.
    """
    if metric == "finetune_accuracy":
        return answer.correct
    if metric == "over_refusal":
        return answer.flags.get("refusal")
    return answer.flags.get(next(iter(result.judges()), ""))


def prompts_of(answers: Sequence[Answer]) -> list[Prompt]:
    """Return a unique key for each prompt of a set, the same in every seed. Equal prompts are numbered."""
    repeats: Counter[tuple[str, str]] = Counter()
    prompts = []
    for answer in answers:
        prompts.append((answer.id, answer.prompt, repeats[answer.id, answer.prompt]))
        repeats[answer.id, answer.prompt] += 1
    return prompts


def shared(sides: Sequence[Mapping[Prompt, bool | None]]) -> list[list[bool | None]]:
    """Return for each side its decisions on the prompts that all sides have, in the order of the first side."""
    prompts = [prompt for prompt in sides[0] if all(prompt in side for side in sides)] if sides else []
    return [[side[prompt] for prompt in prompts] for side in sides]


def mark(answer: Answer, metric: str, result: Result) -> str:
    """Return the result of ``counts`` for an answer in words."""
    counted = counts(answer, metric, result)
    return "not judged" if counted is None else MARKS[metric] if counted else f"not {MARKS[metric]}"


def _seconds(result: Result) -> float:
    return sum(cost.seconds or 0.0 for cost in result.costs.values())


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names on the Pareto front, in the order of their points.

    A name is on the front if no other is at least as good in both numbers and better in one.

    Args:
        points: (harmful score, finetune accuracy) by name, percent.
    """

    def beaten(name: str) -> bool:
        harm, right = points[name]
        return any(
            h <= harm and r >= right and (h, r) != (harm, right) for other, (h, r) in points.items() if other != name
        )

    return sorted((name for name in points if not beaten(name)), key=lambda name: points[name])
