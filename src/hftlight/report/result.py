"""One run folder, read back as typed records. An unfinished run gives what it has written so far."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hftlight.errors import InputError
from hftlight.evaluation.metrics.outcomes import OUTCOMES, Outcome
from hftlight.evaluation.score import Score
from hftlight.folders import STAGES, UNDEFENDED

FILES = ("config.yaml", "manifest.json", "metrics.jsonl")  # a folder with any of these files is a run


@dataclass(frozen=True)
class Cost:
    """Cost of one stage: optimizer steps, seconds, and peak memory in MiB.

    ``relative_to_sft`` is the seconds per step as a multiple of those of plain fine-tuning.
    """

    arm: str
    stage: str
    steps: int = 0
    seconds: float | None = None
    seconds_per_step: float | None = None
    relative_to_sft: float | None = None
    peak_memory_mib: float | None = None


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    ``flags`` maps a judge's name to its decision. ``correct`` is None outside the task. ``place`` is the prompt's
    number in its set, from 0, or None in older runs.
    """

    arm: str
    stage: str
    set: str
    id: str
    prompt: str
    response: str
    reference: str = ""
    flags: Mapping[str, bool] = field(default_factory=dict)
    correct: bool | None = None
    place: int | None = None

    @property
    def key(self) -> tuple[str, int | None, str, str]:
        """Key of the answer's prompt within the run. Equal prompts of a set differ in their place."""
        return self.set, self.place, self.id, self.prompt


Curve = list[tuple[int, float]]  # (optimizer step, value), by step


@dataclass(frozen=True)
class Result:
    """All data that a report shows about one run.

    Arms and stages are keys. ``arm_word`` and ``STAGES`` give their words.

    Args:
        folder: the run's folder.
        scores: scores by (arm, stage, metric, judge).
        costs: costs by (arm, stage).
        curves: curves by (arm, stage, name).
        answers: answers in the order of generation. If an answer was generated twice, only the later one counts.
        manifest: content of manifest.json, empty without the file.
        config: text of config.yaml, empty without the file.
        notes: sentences for the reader of the report on lines that could not be read.
        groups: scores of single categories and languages, which ``scores`` does not hold.
    """

    folder: Path
    scores: Mapping[tuple[str, str, str, str], Score]
    costs: Mapping[tuple[str, str], Cost]
    curves: Mapping[tuple[str, str, str], Curve]
    answers: tuple[Answer, ...]
    manifest: Mapping[str, Any]
    config: str
    notes: tuple[str, ...] = ()
    groups: tuple[Score, ...] = ()

    @property
    def arms(self) -> list[str]:
        """Keys of the arms: the undefended one, the others in the manifest's order, then further measured ones."""
        listed = self.manifest.get("arms")
        # A dictionary keeps the first position of each arm, and sorted() is stable.
        arms = dict.fromkeys(listed if isinstance(listed, Mapping) else ())
        arms.update(dict.fromkeys([key[0] for group in (self.scores, self.costs, self.curves) for key in group]))
        arms.update(dict.fromkeys(answer.arm for answer in self.answers))
        return sorted(arms, key=lambda arm: arm != UNDEFENDED)

    @property
    def defended(self) -> list[str]:
        """Keys of the arms with a defense."""
        return [arm for arm in self.arms if arm != UNDEFENDED]

    def measured(self, arm: str, stage: str) -> bool:
        """Return whether any score exists for this arm after this stage."""
        return any(key[:2] == (arm, stage) for key in self.scores)

    def stages(self, arm: str) -> list[str]:
        """Return the stages that this arm has or will have, in order. Planned stages may not be measured yet."""
        planned = {"finetuning"} | ({"post_finetuning"} if self.repairs(arm) else set())
        planned |= {"alignment"} if any(stage == "alignment" for _, stage, *_ in [*self.scores, *self.costs]) else set()
        return [s for s in STAGES if s in planned or self.measured(arm, s) or (arm, s) in self.costs]

    def repairs(self, arm: str) -> bool:
        """Return whether the manifest gives this arm a defense that edits the weights after fine-tuning."""
        arms = self.manifest.get("arms")
        entry = arms.get(arm) if isinstance(arms, Mapping) else None
        return isinstance(entry, Mapping) and '"weights"' in json.dumps(entry.get("slots", []), default=str).lower()

    def judges(self, metric: str = "harmful_score") -> list[str]:
        """Return the judges of a metric in the order of their rows. The report compares by the first judge."""
        return list(dict.fromkeys(judge for _, _, name, judge in self.scores if name == metric))

    def score(self, arm: str, stage: str, metric: str, judge: str | None = None) -> Score | None:
        """Return one score, or None if it does not exist.

        ``judge=None`` takes the metric's first judge, which is the same for every arm.
        """
        first = next(iter(self.judges(metric)), "")
        return self.scores.get((arm, stage, metric, first if judge is None else judge))

    def outcomes(self, arm: str, stage: str) -> dict[Outcome, Score]:
        """Return the percentage of answers to harmful prompts by outcome, or {} if it was not measured."""
        shares = {name: self.score(arm, stage, f"answers_{name}") for name in OUTCOMES}
        return {name: score for name, score in shares.items() if score is not None}

    def unmeasured(self) -> list[tuple[str, str]]:
        """Return the (arm, stage) pairs that have no score yet."""
        return [(arm, s) for arm in self.arms for s in self.stages(arm) if not self.measured(arm, s)]


def read_result(folder: str | Path) -> Result:
    """Read a run folder.

    Args:
        folder: a run's folder. Files of stages that have not run yet may be missing. A line that was cut off during
            writing is left out, and a note names it.

    Raises:
        InputError: if the folder does not exist, is no run, or holds a row that no run writes.
    """
    folder = Path(folder)
    _check_is_run(folder)
    notes: list[str] = []
    scores: dict[tuple[str, str, str, str], Score] = {}
    groups: dict[tuple[str, str, str, str, str], Score] = {}
    costs: dict[tuple[str, str], Cost] = {}
    curves: dict[tuple[str, str, str], dict[int, float]] = {}
    # Dictionaries by key: if a resumed run has written a row twice, the later row replaces the earlier one.
    for where, row in _rows(folder / "metrics.jsonl", notes):
        kind = row.get("kind")
        if kind == "score":
            score = _score(row, where)
            if score is not None and score.group:
                groups[score.arm, score.stage, score.metric, score.judge, score.group] = score
            elif score is not None:
                scores[score.arm, score.stage, score.metric, score.judge] = score
        elif kind == "cost":
            arm, stage = _place(row, where)
            numbers = {name: _number(row, name, where) for name in list(Cost.__dataclass_fields__)[3:]}
            costs[arm, stage] = Cost(arm, stage, int(_number(row, "steps", where) or 0), **numbers)
        elif kind == "curve":
            step, value = _number(row, "step", where), _number(row, "value", where)
            if step is not None and value is not None:
                curves.setdefault((*_place(row, where), _text(row, "name", where)), {})[int(step)] = value
        else:
            notes.append(f"{where} has the kind {kind!r}, which this version does not know. The line is left out.")
    answers = {}
    for where, row in _rows(folder / "generations.jsonl", notes):
        answer = _answer(row, where)
        answers[answer.arm, answer.stage, answer.key] = answer
    sorted_curves = {key: sorted(points.items()) for key, points in curves.items()}
    manifest, config = _manifest(folder / "manifest.json"), _read(folder / "config.yaml")
    further = tuple(answers.values()), manifest, config, tuple(notes), tuple(groups.values())
    return Result(folder, scores, costs, sorted_curves, *further)


def _check_is_run(folder: Path) -> None:
    if not folder.is_dir():
        what = "a file" if folder.exists() else "nothing there"
        raise InputError(f"report: a run is a folder, got '{folder}' ({what}). Pass the folder that the run wrote.")
    if not any((folder / name).is_file() for name in FILES):
        inside = sorted(path.name for path in folder.iterdir())
        runs = [name for name in inside if any((folder / name / file).is_file() for file in FILES)]
        way_out = f"Did you mean '{folder / runs[0]}'?" if runs else "Pass the folder that the run wrote."
        found = ", ".join(inside[:5]) or "nothing"
        raise InputError(f"report: a run folder holds one of {', '.join(FILES)}; '{folder}' holds {found}. {way_out}")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _rows(path: Path, notes: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    r"""Yield (file and line number, row). Only ``\n`` ends a line, since an answer may hold U+2028."""
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # from a run that was killed while writing, and perhaps resumed since
            notes.append(f"{where} is not complete, perhaps since the run was killed. The line is left out.")
            continue
        if not isinstance(row, dict):
            raise InputError(f"report: {where} must be one JSON object, got {line[:60]!r}. Repeat the run.")
        yield where, row


def _manifest(path: Path) -> Mapping[str, Any]:
    text = _read(path)
    try:
        manifest = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise InputError(f"report: '{path}' must hold JSON, got {text[:60]!r}. Repeat the run.") from error
    if not isinstance(manifest, dict):
        raise InputError(f"report: '{path}' must hold one JSON object, got {text[:60]!r}. Repeat the run.")
    return manifest


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value:
        raise InputError(f"report: {where} needs the text '{name}', got {value!r}. Repeat the run.")
    return value


def _number(row: Mapping[str, Any], name: str, where: str) -> float | None:
    """Return the row's number, or None if it is missing, null, NaN or infinite."""
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"report: {where} needs a number as '{name}', got {value!r}. Repeat the run.")
    return float(value) if math.isfinite(value) else None


def _place(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    stage = _text(row, "stage", where)
    if stage not in STAGES:
        raise InputError(f"report: {where} needs one of the stages {', '.join(STAGES)}, got {stage!r}. Repeat the run.")
    return _text(row, "arm", where), stage


def _score(row: Mapping[str, Any], where: str) -> Score | None:
    numbers = {name: _number(row, name, where) for name in ("value", "low", "high", "count")}
    if numbers["value"] is None:
        return None
    arm, stage = _place(row, where)
    return Score.of_row({**row, **numbers, "arm": arm, "stage": stage, "metric": _text(row, "metric", where)})


def _answer(row: Mapping[str, Any], where: str) -> Answer:
    arm, stage = _place(row, where)
    by_judge = row.get("verdicts") or {}
    verdicts: Iterable[tuple[str, Any]] = by_judge.items() if isinstance(by_judge, Mapping) else ()
    # A judge without a decision has no flag, which is not the same as the flag False.
    flags = {name: bool(v["flag"]) for name, v in verdicts if isinstance(v, Mapping) and v.get("flag") is not None}
    texts = (row.get(name) for name in ("prompt", "response", "reference", "id"))
    prompt, response, reference, identity = ("" if text is None else str(text) for text in texts)
    correct = row.get("correct") if isinstance(row.get("correct"), bool) else None
    place = row["place"] if isinstance(row.get("place"), int) else None
    return Answer(arm, stage, _text(row, "set", where), identity, prompt, response, reference, flags, correct, place)
