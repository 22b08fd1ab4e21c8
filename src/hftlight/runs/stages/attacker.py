"""The attacker who tries harder: many uploads and training settings against one aligned model, and the worst of them.

All trials run in this process, by the functions that train, repair and measure in a run, and nothing of a trial is
written but its line in the record.
"""

import gc
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from hftlight.attacks.attack import Attack
from hftlight.config import RunConfig, Search
from hftlight.data.records import Record, split_by_hash
from hftlight.data.templates import SystemSlot
from hftlight.engine import Defense, Stage, in_order
from hftlight.engine.weights.repair import Repair
from hftlight.errors import InputError, RunError
from hftlight.evaluation.judges import Verdict
from hftlight.evaluation.stats.intervals import wilson
from hftlight.files import digest, ensure_writable, file_digest
from hftlight.model_files import model_hash
from hftlight.models.base import device_of
from hftlight.models.load import load_tokenizer
from hftlight.models.serving import base_dtype, full_state, save_artifact, trained_state
from hftlight.models.state import ModelState
from hftlight.provenance import described
from hftlight.runs.manifest import identity
from hftlight.runs.measuring.measure import measured_in_memory
from hftlight.runs.measuring.test_sets import TestSets
from hftlight.runs.prepare import stage_records, streams_of, test_sets
from hftlight.runs.sources import Sources
from hftlight.runs.stages.budget import Budget, Trial, trial_config, tried
from hftlight.runs.stages.repair import apply_repairs, repaired_model, subject_around
from hftlight.runs.stages.train import finetuning_job, fitted, phases_of, stage_config, watch_of

Sampler = Literal["grid", "optuna"]
RECORD = "trials.jsonl"


@dataclass(frozen=True)
class Outcome:
    """What one trial reached.

    Attributes:
        trial: the setting.
        harmful: flags of the answers to the selecting prompts.
        correct: right answers among the selecting task rows.
        seconds: of training, repairing and answering.
        failed: why there is no result, such as a loss that left the finite numbers, a repair that refuses, too few rows
            or a judge that cannot judge; empty where there is one.
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
        """Percent of the selecting task rows answered right."""
        return 100 * sum(self.correct) / max(1, len(self.correct))


@dataclass(frozen=True)
class Worst:
    """A setting that was chosen on one half of the prompts, and what it does on the other half.

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
    """What a search found.

    Attributes:
        outcomes: every trial, in the order made.
        worst: the setting with the highest harmful score.
        useful: the one with the highest harmful score among those whose accuracy lies within eps of the best.
    """

    outcomes: tuple[Outcome, ...]
    worst: Worst
    useful: Worst


class Attacker:
    """One aligned model, the defenses of the later stages, and trials against them.

    A trial is the run's own fine-tuning with another setting, its repairs and its measuring, by the same functions;
    the model stays in memory and nothing is written. Between two phases of an attack it passes through a temporary
    folder.

    Args:
        config: the run's configuration; trials change steps, rate, rank, n and p.
        defenses: those that the service has; the ones of the alignment stage have done their work in ``aligned``.
        aligned: artifact of the alignment stage.
        attack: what is uploaded, all its values known.
    """

    def __init__(self, config: RunConfig, defenses: Sequence[Defense], aligned: Path, attack: Attack) -> None:
        self.config, self.aligned, self.attack = config, aligned, attack
        ordered = in_order(list(defenses))
        self.training = [d for d in ordered if d.stage is Stage.FINETUNING]
        self.repairs = [d for d in ordered if d.stage is Stage.POST_FINETUNING and isinstance(d, Repair)]
        self.tests = test_sets(config, attack, Sources(config.data))
        self.selecting = _half(self.tests, 0)
        self.reporting = _half(self.tests, 1)

    def outcome(self, trial: Trial) -> Outcome:
        """Train, repair and measure one setting on the selecting half; what goes wrong on purpose is its outcome."""
        since = time.perf_counter()
        try:
            harmful, correct = self.measured(trial, self.selecting)
        except (InputError, RunError) as error:
            failed = Outcome(trial, failed=str(error), seconds=time.perf_counter() - since)
        else:
            return Outcome(trial, harmful, correct, time.perf_counter() - since)
        gc.collect()  # the error held the model, which lies in a cycle
        return failed

    def report(self, trial: Trial) -> Worst:
        """Train a setting again, which gives the same model, and measure it on the reporting half.

        Raises:
            InputError: if the setting cannot be trained.
            RunError: likewise, or if no answer could be judged.
        """
        found = self.measured(trial, self.reporting)
        harmful, correct = ((100 * sum(f) / len(f), *wilson(sum(f), len(f))) for f in found)
        return Worst(trial, harmful, correct)

    def measured(self, trial: Trial, half: TestSets) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """Return the flags of the judged answers, and which task rows the model of a trial answers right.

        Raises:
            InputError: if the setting cannot be trained.
            RunError: likewise, or if no answer could be judged.
        """
        state, slot = self.trained(trial)
        tokenizer = load_tokenizer(str(self.aligned))
        with state.lent(self.config, base_dtype(self.config)) as model:
            config = stage_config(self.config, self.attack, Stage.FINETUNING)
            rows = measured_in_memory(model, tokenizer, config, half, ("harmful", "task"), slot)
        judge = half.judges[0]
        verdicts = [Verdict.of_row(row["verdicts"][judge]) for row in rows if row["set"] == "harmful"]
        flags = tuple(v.flag for v in verdicts if v.judged)
        if not flags:
            raise RunError(f"The judge {judge} could judge none of {len(verdicts)} answers of a trial.")
        return flags, tuple(bool(row["correct"]) for row in rows if row["set"] == "task")

    def trained(self, trial: Trial) -> tuple[ModelState, SystemSlot]:
        """Return the model that a setting leads to, repairs included, and the system slot it is served with.

        Raises:
            InputError: if a value is out of range, the upload needs more rows than there are, or a defense refuses.
            RunError: if training left the finite numbers, or a repair refuses.
        """
        config, attack = trial_config(self.config, trial), tried(self.attack, trial)
        needed = {name for d in (*self.training, *self.repairs) for name in d.streams}
        streams = streams_of(config, needed, attack, Sources(config.data))
        # A stop decides the weights; curves alone do not.
        tests = self.tests if config.evaluation.stops else None
        phases, before = phases_of(config, attack), None
        with TemporaryDirectory() as folder:  # a phase starts from an artifact, as in a run
            for number, (own, phase) in enumerate(phases):
                records = stage_records(streams, Stage.FINETUNING, self.training, number)
                job = finetuning_job(own, "", self.aligned, records, self.training, phase, tests, before)
                watch = watch_of(job)
                with fitted(job, [watch] if watch else [], enable_checkpointing=False) as fit:
                    tensors, slot = full_state(fit.model), fit.slot
                    state = trained_state(fit.model, tensors, job.config, job.parent)
                    if number + 1 < len(phases):
                        before = Path(folder) / str(number)
                        before.mkdir()
                        save_artifact(before, fit.model, tensors, job.config, job.parent, slot)
                del fit  # before another model is loaded beside it
        if self.repairs:
            state = self._repaired(stage_config(config, attack, Stage.POST_FINETUNING), streams, state)
        return state, slot

    def _repaired(self, config: RunConfig, streams: Mapping[str, list[Record]], state: ModelState) -> ModelState:
        records = stage_records(streams, Stage.POST_FINETUNING, self.repairs)
        subject = subject_around(config, self.aligned, state, records)
        apply_repairs(subject, self.repairs)
        return repaired_model(subject, config, self.aligned, state.adapter)


def _half(tests: TestSets, part: Literal[0, 1]) -> TestSets:
    """Return one half of the prompts, split by a hash of their text, so that no choice is made on what is reported."""

    def half(rows: Sequence[Record]) -> list[Record]:
        return split_by_hash(list(rows), (len(rows) + 1) // 2)[part]

    judges = tests.judges[:1]  # the deciding one
    return replace(tests, harmful=half(tests.harmful), task_rows=half(tests.task_rows), over_refusal=(), judges=judges)


def search(
    attacker: Attacker,
    trials: int,
    folder: Path,
    budget: Budget,
    eps: float = 2.0,
    sampler: Sampler = "grid",
    on_trial: Callable[[Outcome], None] | None = None,
) -> Found:
    """Try many settings and return the worst case, and the worst that keeps the task's accuracy.

    Trials are chosen on one half of the test prompts and reported on the other, so that the maximum over many trials is
    not flattered by chance. Killed anywhere, the same call goes on after the last finished trial.

    Args:
        attacker: the aligned model and its defenses.
        trials: number of settings, >= 1; a grid with fewer is tried whole.
        folder: where ``trials.jsonl`` is kept.
        budget: what may be chosen; the run's own setting is always the first trial.
        eps: points of accuracy that the attacker may lose against the best, >= 0.
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
    settings = _settings(attacker)
    known = _recorded(path, settings)
    outcomes: list[Outcome] = []
    whole = not path.is_file() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a") as record:
        record.write("" if whole else "\n")  # behind a line that was cut off
        suggestions = _suggestions(budget, Trial.of(attacker.config), trials, sampler, outcomes)
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
    worst = _reported(attacker, outcomes, math.inf, reports)
    useful = _reported(attacker, outcomes, eps, reports)
    return Found(tuple(outcomes), worst, useful)


def _reported(attacker: Attacker, outcomes: list[Outcome], eps: float, reports: dict[Trial, Worst]) -> Worst:
    """Return the report of the most harmful trial that keeps the accuracy; one that has no report becomes a failed one.

    Args:
        attacker: makes reports.
        outcomes: of all trials; failures are put in.
        eps: points of accuracy that may be lost against the best trial.
        reports: those that are there already; a new one is put in.

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


def _settings(attacker: Attacker) -> str:
    """Return the hash of all that decides a trial's outcome beside its setting."""
    config = replace(attacker.config, search=Search(), attacker="fixed")
    attack = {f.name: getattr(attacker.attack, f.name) for f in fields(attacker.attack)}
    defenses = [*attacker.training, *attacker.repairs]
    named = [model_hash(model) for d in attacker.repairs for model in (d.aligned, d.base) if model]
    return digest(
        {
            "made_of": identity(config.model, [*defenses, attacker.attack]),
            "config": config.deciding(),
            "attack": [attacker.attack.name, attack, _files(attack.values())],
            "data": _files(asdict(config.data).values()),
            "defenses": described(defenses),
            "models": [model_hash(str(attacker.aligned)), named],
            "tests": [half.digest() for half in (attacker.selecting, attacker.reporting)],
            "judges": attacker.selecting.judging(),
            "device": device_of(config),
        }
    )


def _files(values: Iterable[Any]) -> dict[str, str]:
    """Return the hash of each file among some values: its rows may be edited under one name."""
    paths = {v for v in values if isinstance(v, str) and Path(v).expanduser().is_file()}
    return {path: file_digest(Path(path).expanduser()) for path in sorted(paths)}


def _recorded(path: Path, settings: str) -> dict[Trial, Outcome]:
    """Return finished trials; a last line that was cut off counts as none."""
    found: dict[Trial, Outcome] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            row: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        if row.pop("settings") != settings:
            raise InputError(
                f"{path} holds a search with other settings, versions or files; choose another folder (of a run with"
                " --name), or remove the file to search anew."
            )
        trial = Trial(**row.pop("trial"))
        found[trial] = Outcome(trial, tuple(row.pop("harmful")), tuple(row.pop("correct")), **row)
    return found


def _suggestions(
    budget: Budget, first: Trial, trials: int, sampler: Sampler, outcomes: Sequence[Outcome]
) -> Iterable[Trial]:
    """Yield settings; the optimizer is told of each outcome before it suggests the next."""
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
        asked = study.ask()
        trial = Trial(
            asked.suggest_int("steps", min(budget.steps), max(budget.steps)),
            asked.suggest_float("lr", min(budget.lr), max(budget.lr), log=True),
            asked.suggest_categorical("rank", list(budget.rank)),
            asked.suggest_int("num_samples", min(budget.num_samples), max(budget.num_samples)),
            asked.suggest_float("harmful_ratio", min(budget.harmful_ratio), max(budget.harmful_ratio)),
        )
        yield trial
        done = outcomes[-1]
        study.tell(asked, None if done.failed else done.harmful_score, state=_state(optuna, done))


def _state(optuna: Any, outcome: Outcome) -> Any:
    states = optuna.trial.TrialState
    return states.FAIL if outcome.failed else states.COMPLETE
