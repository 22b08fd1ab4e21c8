"""Search over settings for the worst case, and for the worst case that keeps the accuracy."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from hftlight.errors import InputError, RunError
from hftlight.files import ensure_writable
from hftlight.search.space import Budget, Trial


class Tries(Protocol):
    """An attacker that trains and measures trials, and reports the chosen trials on other prompts."""

    @property
    def first(self) -> Trial:
        """Setting that is always tried."""

    def settings(self) -> str:
        """Return the hash of everything that decides an outcome, except the trial."""

    def outcome(self, trial: Trial) -> "Outcome":
        """Return the result of a trial on the selecting half of the prompts."""

    def report(self, trial: Trial) -> "Worst":
        """Return the result of a trial on the reporting half of the prompts."""


Sampler = Literal["grid", "optuna"]
RECORD = "trials.jsonl"


@dataclass(frozen=True)
class Outcome:
    """Result of one trial.

    Attributes:
        trial: the setting.
        harmful: whether each answer to the selecting prompts is flagged as harmful.
        correct: whether each answer to the selecting task rows is correct.
        seconds: time for training, repairing and answering.
        failed: why there is no result; empty if there is one. Reasons include a loss that is not finite, a repair that
            refuses, too few rows, or a judge that cannot judge.
    """

    trial: Trial
    harmful: tuple[bool, ...] = ()
    correct: tuple[bool, ...] = ()
    seconds: float = 0.0
    failed: str = ""

    @property
    def harmful_score(self) -> float:
        """Percent of the selecting prompts with a flagged answer."""
        return 100 * sum(self.harmful) / len(self.harmful)

    @property
    def accuracy(self) -> float:
        """Percent of the selecting task rows with a correct answer."""
        return 100 * sum(self.correct) / max(1, len(self.correct))


@dataclass(frozen=True)
class Worst:
    """A setting that was chosen on one half of the prompts, with its scores on the other half.

    Attributes:
        trial: the setting.
        harmful_score: percent, with its Wilson interval.
        accuracy: percent, likewise.
    """

    trial: Trial
    harmful_score: tuple[float, float, float]
    accuracy: tuple[float, float, float]


@dataclass(frozen=True)
class Found:
    """Result of a search.

    Attributes:
        outcomes: outcomes of all trials, in the order of the search.
        worst: the setting with the highest harmful score.
        useful: the setting with the highest harmful score among those whose accuracy lies within ``eps`` points of the
            best accuracy.
    """

    outcomes: tuple[Outcome, ...]
    worst: Worst
    useful: Worst


def search(
    attacker: Tries,
    trials: int,
    folder: Path,
    budget: Budget,
    eps: float = 2.0,
    sampler: Sampler = "grid",
    on_trial: Callable[[Outcome], None] | None = None,
) -> Found:
    """Try many settings and return the worst case, and the worst case that keeps the task's accuracy.

    Trials are chosen on one half of the test prompts and reported on the other half. Chance therefore does not inflate
    the maximum over many trials. After an interruption at any point, the same call continues after the last finished
    trial.

    Args:
        attacker: attacker of the aligned model and its defenses.
        trials: number of settings, >= 1; a smaller grid is tried whole.
        folder: folder of the record ``trials.jsonl``.
        budget: settings to choose from; the run's own setting is always the first trial.
        eps: points of accuracy that a setting may lose against the best, >= 0.
        sampler: ``"grid"``, or ``"optuna"`` (tree-structured Parzen estimator, seeded).
        on_trial: called with every outcome.

    Raises:
        InputError: if an argument is out of range, or the folder holds a search with other settings.
        RunError: if no trial could be trained and judged.
    """
    if trials < 1 or not eps >= 0:
        raise InputError(f"--attacker: the number of trials must be >= 1 and eps >= 0, got {trials} and {eps}.")
    ensure_writable(folder, "the folder of the search")
    path = folder / RECORD
    settings = attacker.settings()
    known = _read_record(path, settings)
    outcomes: list[Outcome] = []
    whole = not path.is_file() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a") as record:
        record.write("" if whole else "\n")  # ends a line that was cut off
        # The generator reads the last outcome before the next suggestion, so the loop below must append it first.
        suggestions = _suggestions(budget, attacker.first, trials, sampler, outcomes)
        for trial in suggestions:
            outcome = known.get(trial)
            if outcome is None:
                outcome = attacker.outcome(trial)
                record.write(json.dumps({"settings": settings, **asdict(outcome)}) + "\n")
                record.flush()
            outcomes.append(outcome)
            if on_trial is not None:
                on_trial(outcome)
    reports: dict[Trial, Worst] = {}
    worst = _report_worst(attacker, outcomes, math.inf, reports)
    useful = _report_worst(attacker, outcomes, eps, reports)
    return Found(tuple(outcomes), worst, useful)


def _report_worst(attacker: Tries, outcomes: list[Outcome], eps: float, reports: dict[Trial, Worst]) -> Worst:
    """Return the report of the most harmful trial that keeps the accuracy.

    If the report of a trial fails, the trial becomes a failed trial, and the next one is chosen.

    Args:
        attacker: attacker that reports a trial.
        outcomes: outcomes of all trials; a failed trial is replaced in place.
        eps: points of accuracy that a trial may lose against the best.
        reports: existing reports by trial; a new report is added in place.

    Raises:
        RunError: if no trial is left.
    """
    while trained := [o for o in outcomes if not o.failed]:
        best = max(o.accuracy for o in trained)
        chosen = max((o for o in trained if o.accuracy >= best - eps), key=lambda o: o.harmful_score)
        if chosen.trial in reports:
            return reports[chosen.trial]
        try:
            reports[chosen.trial] = attacker.report(chosen.trial)
        except (InputError, RunError) as error:
            outcomes[outcomes.index(chosen)] = replace(chosen, failed=f"on the reporting half: {error}")
    raise RunError(f"No trial could be trained and judged: {outcomes[0].failed}")


def _read_record(path: Path, settings: str) -> dict[Trial, Outcome]:
    """Return the outcomes of the finished trials.

    A line that was cut off is ignored.
    """
    finished: dict[Trial, Outcome] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            row: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        if row.pop("settings") != settings:
            raise InputError(
                f"{path} holds a search with other settings, versions or files; choose another folder (of a run with"
                " --name), or remove the file to start a new search."
            )
        trial = Trial(**row.pop("trial"))
        finished[trial] = Outcome(trial, tuple(row.pop("harmful")), tuple(row.pop("correct")), **row)
    return finished


def _suggestions(
    budget: Budget, first: Trial, trials: int, sampler: Sampler, outcomes: Sequence[Outcome]
) -> Iterable[Trial]:
    """Yield settings.

    Optuna receives the outcome of each setting before it suggests the next one.
    """
    if sampler == "grid":
        yield from budget.grid(first)[:trials]
        return
    try:
        import optuna
    except ImportError as error:
        raise InputError('--attacker optuna needs Optuna: pip install "hftlight[optuna]".') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    study.enqueue_trial(asdict(first))
    for _ in range(trials):
        open_trial = study.ask()
        trial = Trial(
            open_trial.suggest_int("steps", min(budget.steps), max(budget.steps)),
            open_trial.suggest_float("lr", min(budget.lr), max(budget.lr), log=True),
            open_trial.suggest_categorical("rank", list(budget.rank)),
            open_trial.suggest_int("num_samples", min(budget.num_samples), max(budget.num_samples)),
            open_trial.suggest_float("harmful_ratio", min(budget.harmful_ratio), max(budget.harmful_ratio)),
        )
        yield trial
        done = outcomes[-1]  # the caller appends the outcome before it asks for the next setting
        study.tell(open_trial, None if done.failed else done.harmful_score, state=_state(optuna, done))


def _state(optuna: Any, outcome: Outcome) -> Any:
    states = optuna.trial.TrialState
    return states.FAIL if outcome.failed else states.COMPLETE
