"""The attacker's search: many uploads and training settings against one aligned model.

All trials run in this process. They use the functions that train, repair and measure in a run. A trial writes one line
into the record and nothing else.
"""

import gc
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from hftlight.attacks.attack import Attack
from hftlight.config import RunConfig, Search
from hftlight.data.records import Record, split_by_hash
from hftlight.data.templates import SystemSlot
from hftlight.engine import Defense, Stage, in_order
from hftlight.engine.weights.repair import TRAINED, Repair, repairs_after, to_train
from hftlight.errors import InputError, RunError
from hftlight.evaluation.judges import Verdict, judge_name
from hftlight.evaluation.stats.intervals import wilson
from hftlight.files import digest, file_digest, read_rows
from hftlight.model_files import model_hash
from hftlight.models.base import device_of
from hftlight.models.serving import Artifact, full_state, save_artifact, trained_state
from hftlight.models.state import ModelState
from hftlight.provenance import described
from hftlight.runs.manifest import identity
from hftlight.runs.measuring.measure import measured_in_memory
from hftlight.runs.measuring.test_sets import TestSets
from hftlight.runs.prepare import stage_records, streams_of, test_sets
from hftlight.runs.sources import Sources
from hftlight.runs.stages.choice import ChoiceJob, run_choice
from hftlight.runs.stages.repair import apply_repairs, repaired_model, subject_around
from hftlight.runs.stages.train import (
    auxiliary_job,
    finetuning_job,
    fitted,
    phases_of,
    run_stage,
    stage_config,
    watch_of,
)
from hftlight.search.search import Outcome, Worst
from hftlight.search.space import Trial, trial_config, tried


class Attacker:
    """One aligned model, the defenses of the later stages, and trials against them.

    A trial is the run's fine-tuning with another setting, then its repairs and its measurement, by the same functions.
    The model stays in memory. Between two phases of an attack it passes through a temporary folder.

    Args:
        config: the run's configuration. Trials change steps, learning rate, rank, n and p.
        defenses: the service's defenses. Those of the alignment stage have already shaped ``aligned``.
        aligned: the aligned model.
        attack: the upload, resolved against the configuration.
    """

    def __init__(self, config: RunConfig, defenses: Sequence[Defense], aligned: Artifact, attack: Attack) -> None:
        self.config, self.aligned, self.attack = config, aligned, attack
        ordered = in_order(list(defenses))
        self.training = [d for d in ordered if d.stage is Stage.FINETUNING]
        self.after = [d for d in ordered if isinstance(d, Repair)]
        self.tests = test_sets(config, attack, Sources(config.data))
        self.selecting = _half(self.tests, 0)
        self.reporting = _half(self.tests, 1)

    @property
    def repairs(self) -> list[Repair]:
        """The repairs of the fine-tuned model, in order. The first ones deploy what the last training has kept."""
        return repairs_after([*self.training, *self.after])

    @cached_property
    def unaligned(self) -> Artifact | None:
        """The model without safety that repairs compare with, trained at most once; None if they need none."""
        if not to_train(self.after):
            return None
        rows = streams_of(self.config, {TRAINED["unaligned"]}, self.attack, Sources(self.config.data))
        job = auxiliary_job(self.config, model_hash(self.config.model), self.aligned, rows[TRAINED["unaligned"]])
        run_stage(job)
        return job.artifact()

    @property
    def first(self) -> Trial:
        """The run's own setting."""
        return Trial.of(self.config)

    def settings(self) -> str:
        """Return the hash of everything but the setting that decides a trial's outcome."""
        return settings_of(self)

    def outcome(self, trial: Trial) -> Outcome:
        """Train, repair and measure one setting on the selecting half.

        A setting that cannot be trained, or that diverges, gives an outcome with ``failed``.
        """
        since = time.perf_counter()
        try:
            harmful, correct = self.measured(trial, self.selecting)
        except (InputError, RunError) as error:
            failed = Outcome(trial, failed=str(error), seconds=time.perf_counter() - since)
        else:
            return Outcome(trial, harmful, correct, time.perf_counter() - since)
        gc.collect()  # the error's traceback held the model, which lies in a reference cycle
        return failed

    def report(self, trial: Trial) -> Worst:
        """Train a setting again and measure it on the reporting half. Training again gives the same model.

        Raises:
            InputError: if the setting cannot be trained.
            RunError: likewise, or if no answer could be judged.
        """
        flags = self.measured(trial, self.reporting)
        harmful, correct = ((100 * sum(f) / len(f), *wilson(sum(f), len(f))) for f in flags)
        return Worst(trial, harmful, correct)

    def measured(self, trial: Trial, half: TestSets) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """Return for a trial's model the flags of the judged answers, and which task rows it answers correctly.

        Raises:
            InputError: if the setting cannot be trained.
            RunError: likewise, or if no answer could be judged.
        """
        state, slot = self.trained(trial)
        tokenizer = self.aligned.tokenizer()
        with state.lent(self.config) as model:
            config = stage_config(self.config, self.attack, Stage.FINETUNING)
            rows = measured_in_memory(model, tokenizer, config, half, ("harmful", "task"), slot)
        judge = judge_name(half.judges[0])
        verdicts = [Verdict.of_row(row["verdicts"][judge]) for row in rows if row["set"] == "harmful"]
        flags = tuple(v.flag for v in verdicts if v.judged)
        if not flags:
            raise RunError(f"The judge {judge} could judge none of {len(verdicts)} answers of a trial.")
        return flags, tuple(bool(row["correct"]) for row in rows if row["set"] == "task")

    def trained(self, trial: Trial) -> tuple[ModelState, SystemSlot]:
        """Return the model that a setting gives, repairs included, and its system slot.

        Raises:
            InputError: if a value is out of range, the upload needs more rows than there are, or a defense refuses.
            RunError: if the gradient is not finite, or a repair refuses.
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
                self._select(stage_config(own, phase, Stage.FINETUNING), before or self.aligned, records)
                job = finetuning_job(own, "", self.aligned, records, self.training, phase, tests, before)
                watch = watch_of(job)
                with fitted(job, [watch] if watch else [], enable_checkpointing=False) as fit:
                    tensors, slot = full_state(fit.model), fit.slot
                    state = trained_state(fit.model, tensors, job.config, job.parent)
                    if number + 1 < len(phases):
                        place = Path(folder) / str(number)
                        place.mkdir()
                        save_artifact(place, fit.model, tensors, job.config, job.parent, slot)
                        before = Artifact.of(place)
                del fit  # before another model is loaded beside it
        if self.repairs:
            state = self._repaired(stage_config(config, attack, Stage.POST_FINETUNING), streams, state)
        return state, slot

    def _select(self, config: RunConfig, model: Artifact, records: Mapping[str, Sequence[Record]]) -> None:
        """Let the defenses that select do so on the trial's upload, with the model that its training starts from."""
        for defense in self.training:
            if defense.selects:
                defense.selected = read_rows(run_choice(ChoiceJob(config, model, records, defense)))

    def _repaired(self, config: RunConfig, streams: Mapping[str, list[Record]], state: ModelState) -> ModelState:
        records = stage_records(streams, Stage.POST_FINETUNING, self.repairs)
        subject = subject_around(config, self.aligned, state, records, self.unaligned)
        apply_repairs(subject, self.repairs)
        return repaired_model(subject, config, self.aligned, state.adapter)


def _half(tests: TestSets, part: Literal[0, 1]) -> TestSets:
    """Return one half of the prompts, split by a hash of their text.

    One half selects the setting, the other reports it, so that selection does not bias the report.
    """

    def half(rows: Sequence[Record]) -> list[Record]:
        return split_by_hash(list(rows), (len(rows) + 1) // 2)[part]

    judges = tests.judges[:1]  # the first judge decides
    return replace(tests, harmful=half(tests.harmful), task_rows=half(tests.task_rows), over_refusal=(), judges=judges)


def settings_of(attacker: Attacker) -> str:
    """Return the hash of everything but the setting that decides a trial's outcome."""
    config = replace(attacker.config, search=Search(), attacker="fixed")
    attack = {f.name: getattr(attacker.attack, f.name) for f in fields(attacker.attack)}
    defenses = [*attacker.training, *attacker.after]
    named = [model_hash(model) for d in attacker.after for model in (d.aligned, d.base, d.unaligned) if model]
    return digest(
        {
            "made_of": identity(config.model, [*defenses, attacker.attack]),
            "config": config.deciding(),
            "attack": [attacker.attack.name, attack, _files(attack.values())],
            "data": _files(asdict(config.data).values()),
            "defenses": [described(defenses), [d.state_key for d in attacker.repairs]],
            "models": [attacker.aligned.identity, named],
            "tests": [half.digest() for half in (attacker.selecting, attacker.reporting)],
            "judges": attacker.selecting.judging(),
            "device": device_of(config),
        }
    )


def _files(values: Iterable[Any]) -> dict[str, str]:
    """Return the hash of each file among some values. A file's rows may change while its name stays."""
    paths = {v for v in values if isinstance(v, str) and Path(v).expanduser().is_file()}
    return {path: file_digest(Path(path).expanduser()) for path in sorted(paths)}
