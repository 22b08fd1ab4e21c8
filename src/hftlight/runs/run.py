"""run(): align a model, fine-tune it on the user's upload, repair it, measure it after each stage, write one folder."""

import gc
import json
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from filelock import FileLock, Timeout

from hftlight import __version__, cache
from hftlight.attacks.attack import Attack
from hftlight.config import OWN_TRAINER, RunConfig, inside
from hftlight.engine import Defense, Stage
from hftlight.engine.weights.repair import TRAINED
from hftlight.errors import InputError
from hftlight.evaluation.guards.rates import filter_rates
from hftlight.evaluation.judges import judge_name
from hftlight.evaluation.score import Score
from hftlight.files import (
    digest,
    ensure_writable,
    file_digest,
    link_tree,
    read_rows,
    remove,
    temporaries,
    write_json,
    write_rows,
    write_text,
)
from hftlight.folders import RESULTS, SELECTION, comparison_of
from hftlight.model_files import BASE, model_hash
from hftlight.models.base import check_accelerator, drop_base
from hftlight.models.serving import Artifact, stand_alone
from hftlight.registry import name_of
from hftlight.report import Result, read_result, write_cards, write_report
from hftlight.runs.logging.rows import named, score_names
from hftlight.runs.logging.stage import StageLogger, labels_of, stage_logger
from hftlight.runs.logging.wandb import SUMMARY, wandb_summary
from hftlight.runs.manifest import identity, working_code
from hftlight.runs.measuring.measure import measure
from hftlight.runs.measuring.model_metrics import Reference
from hftlight.runs.plan import Note, plan
from hftlight.runs.prepare import Arm, Prepared, choose, prepare, upload_of
from hftlight.runs.progress import RunProgress
from hftlight.runs.ranks import agree, decide, ending_together, launch, main_process, meet
from hftlight.runs.sources import BUILTIN
from hftlight.runs.stages.attacker import Attacker
from hftlight.runs.stages.choice import ChoiceJob, run_choice
from hftlight.runs.stages.model_edit import EditJob, run_edit
from hftlight.runs.stages.repair import RepairJob, run_repair
from hftlight.runs.stages.selection import SelectionJob, run_selection
from hftlight.runs.stages.train import (
    CURVES,
    StageJob,
    alignment_job,
    auxiliary_job,
    finetuning_job,
    read_kept,
    run_stage,
    stage_config,
)
from hftlight.search.search import Outcome, search
from hftlight.search.space import Budget

ARTIFACTS = {Stage.ALIGNMENT: "aligned", Stage.FINETUNING: "finetuned", Stage.POST_FINETUNING: "repaired"}


def run(config: RunConfig | None = None, defenses: Sequence[Defense] = (), attack: Attack | None = None) -> Result:
    """Run all stages and measurements, or resume an interrupted run.

    Args:
        config: the configuration; the default is the demo.
        defenses: the defenses as instances. Their names replace ``config.defense``.
        attack: the attack as an instance, instead of ``config.attack``.

    Returns:
        The run's scores, curves, generations and costs. ``result.folder`` holds the rest.

    Raises:
        InputError: if the configuration or a file cannot be used. Most checks come before anything is written.
        RunError: if a started stage fails, for example because a gradient is not finite.
    """
    config = replace(config or RunConfig(), defense=[name_of(d) for d in defenses])
    prepared = prepare(config, defenses, attack)
    folder = run_folder(prepared)
    check_accelerator(config)
    launch(config)
    try:
        with ending_together():
            agree("The configuration", f"{prepared.config_hash} in {folder.resolve()}, {working_code()}")
            _run_locked(folder, prepared)
            meet("the end of the run")
    finally:
        if comparison_of(folder) is None:
            drop_base()  # only the next run of a comparison would reuse it
    return read_result(folder)


def _run_locked(folder: Path, prepared: Prepared) -> None:
    """Do the run in its folder, which process 0 locks."""
    decide("whether the folder is free", lambda: _claim(folder, prepared))
    try:
        with FileLock(folder / ".lock", timeout=0) if main_process() else nullcontext():
            if main_process():
                remove(temporaries(folder))  # of a killed run; nobody else writes here under the lock
            _Run(prepared, folder).go()
    except Timeout as error:
        raise InputError(f"Another process works in {folder}. Wait until it ends, or choose another --name.") from error


def run_folder(prepared: Prepared) -> Path:
    """Return the run's folder below ``--output``: ``--name``, or last arm, task, p and the configuration's hash."""
    c = prepared.config
    name = (
        c.name or f"{prepared.arms[-1].name}-{Path(c.data.task).stem}-p{c.harmful_ratio:g}-{prepared.config_hash[:8]}"
    )
    return inside(c.output, name, "--name")


def _claim(folder: Path, prepared: Prepared) -> None:
    """Create the run's folder, or refuse it if it belongs to another configuration.

    Raises:
        InputError: if the folder cannot be written or holds a run of another configuration.
    """
    ensure_writable(Path(prepared.config.output).expanduser(), "--output")
    manifest = folder / "manifest.json"
    if manifest.is_file():
        other = json.loads(manifest.read_text()).get("config_hash")
        if other != prepared.config_hash:
            raise InputError(
                f"{folder} holds a run of another configuration ({other}; this run has {prepared.config_hash})."
                " Choose another --name, or leave --name out."
            )
    folder.mkdir(parents=True, exist_ok=True)


def total_cost(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the total cost of a stage's phases.

    Steps and seconds are sums. Seconds per step are the mean of the phases' medians, weighted by their steps. Peak
    memory is the maximum.

    Args:
        costs: the cost of each phase, from ``Meter.cost``.
    """
    if len(costs) == 1:
        return dict(costs[0])
    steps = sum(cost["steps"] for cost in costs)
    weighted = sum(cost["steps"] * cost["seconds_per_step"] for cost in costs)
    return {
        "steps": steps,
        "seconds": round(sum(cost["seconds"] for cost in costs), 3),
        "seconds_per_step": round(weighted / steps, 4) if steps else 0.0,
        "peak_memory_mib": max(cost["peak_memory_mib"] for cost in costs),
    }


class _Run:
    """The worker that carries out a run's steps and collects its rows, generations and manifest."""

    def __init__(self, prepared: Prepared, folder: Path) -> None:
        self.prepared, self.config, self.folder = prepared, prepared.config, folder
        self.rows: list[dict[str, Any]] = []
        self.generations: list[dict[str, Any]] = []
        self.logger: StageLogger | None = None
        self.main = main_process()
        self.base_hash = decide("the model's hash", lambda: model_hash(self.config.model))
        base = self.config.base
        self.unaligned_hash = decide("the base's hash", lambda: model_hash(base)) if base else self.base_hash
        self.sft_seconds: dict[Stage, float] = {}
        self.jobs: dict[tuple[str, Stage], list[StageJob]] = {}  # finished phases by arm and stage
        self.models: dict[tuple[str, Stage], Artifact] = {}  # resulting model by arm and stage
        self.beside: dict[tuple[str, str], StageJob] = {}  # by arm and name: models that repairs compare with
        self.plain: StageJob | None = None  # alignment without defenses; its model scores candidates of an upload
        self.manifest = self._manifest()

    def go(self) -> None:
        """Do all steps, taking finished ones from the cache, and write results, manifest and report."""
        if self.main:
            write_text(self.folder / "config.yaml", yaml.safe_dump(self._config(), sort_keys=False))
            write_json(self.folder / "manifest.json", self.manifest)
        try:
            self._work()
        except BaseException:
            self._close_logger(1)
            raise
        self._close_logger()
        # Digests and time of the end come last: they mark the run as finished.
        if self.main:
            self.manifest["files"] = {name: file_digest(self.folder / name) for name in RESULTS}
            self.manifest["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            write_json(self.folder / "manifest.json", self.manifest)
            write_report(self.folder)
            write_cards(read_result(self.folder), {stage.value: name for stage, name in ARTIFACTS.items()})
            if self.config.logger == "wandb" and comparison_of(self.folder) is None:
                self._wandb_summary()

    def _work(self) -> None:
        """Carry out the plan. In a step that this process skips, its progress display shows only the start."""
        steps = plan(self.prepared)
        with RunProgress(steps) as self.progress:
            for step in steps:
                self.progress.begin()
                gc.collect()  # frees the previous step's model, so that this step's peak memory is its own
                if (note := step.do(self)) is not None:
                    self.progress.end(*note)

    def _log_to(
        self, arm: str, stage: str, curves: Path | None = None, before: int | None = None
    ) -> StageLogger | None:
        """Return the logger of a stage: the open one if it belongs to that stage, else a new one.

        The logger receives the curves that a phase has logged so far, once per phase.

        Args:
            arm: the arm.
            stage: the stage.
            curves: file with the curves of the current phase; None outside a training.
            before: optimizer steps of the earlier phases; None outside a training.
        """
        labels = labels_of(self.folder, arm, stage, self.config)
        if self.main and (self.logger is None or self.logger.labels != labels):
            self._close_logger()
            self.logger = stage_logger(self.config.logger, self.folder, labels, self._config(), curves)
        elif self.logger is not None and curves is not None and before not in (None, self.logger.before):
            self.logger.before = before
            self.logger.replay(curves)
        return self.logger

    def _close_logger(self, exit_code: int = 0) -> None:
        """Close the open logger, if any. ``exit_code`` is 1 after an error."""
        if self.logger is not None:
            self.logger.close(exit_code)
        self.logger = None

    def _add_scores(self, arm: str, stage: str, scores: Sequence[dict[str, Any]]) -> None:
        """Add the scores of an arm after a stage to the run's rows, and send scores and costs to the logger."""
        where = {"arm": arm, "stage": stage}
        rows = [
            {"kind": "score", **where, "name": n, **row} for n, row in zip(score_names(scores), scores, strict=True)
        ]
        self.rows += rows
        if (logger := self._log_to(arm, stage)) is not None:
            costs = [r for r in self.rows if r["kind"] == "cost" and (r["arm"], r["stage"]) == (arm, stage)]
            logger.send(named([*costs, *rows]), sum(r["steps"] for r in costs))

    def align_plainly(self) -> Note:
        """Run the alignment without defenses. Its model scores the candidates of an upload."""
        records = self.prepared.records(Stage.ALIGNMENT, Arm("none", []))
        self.plain = alignment_job(self.config, self.base_hash, records, [])
        return "for the selection", run_stage(self.plain, on_step=self.progress.update)

    def select(self) -> Note:
        """Let the undefended aligned model choose the upload, which is the same for every arm."""
        prepared, choosing, attack = self.prepared, self.prepared.choosing, cast(Any, self.prepared.attack)
        assert choosing is not None
        aligned, scored_by = Artifact(self.config.model, self.base_hash), self.base_hash
        if self.plain is not None:
            aligned, scored_by = self.plain.artifact(), self.plain.key()
        config = stage_config(self.config, attack, Stage.FINETUNING)  # score rows in the template of the training
        job = SelectionJob(config, aligned, attack, choosing.candidates, choosing.harmful, choosing.safe)
        reused = job.done()
        scores = self.folder / "selection.jsonl"
        shutil.copyfile(run_selection(job, self.progress.update), scores)
        choose(prepared, scores)
        chosen = [r.id for r in prepared.streams["task"]]
        self.manifest |= self._uploaded()
        self.manifest["selection"] = {
            "kind": attack.kind,
            "control": attack.control,
            "scored_by": scored_by,
            "key": job.key(),
            "scores": str(scores),
            "anchors": {"harmful": len(choosing.harmful), "safe": len(choosing.safe)},
            "candidates": len(choosing.candidates),
            "rows": chosen,
        }
        self._save()
        return f"{len(chosen)} of {len(choosing.candidates)} rows chosen", reused

    def train_beside(self, arm: Arm, name: str) -> Note:
        """Train a model that repairs compare with, from the arm's aligned model."""
        config, rows = self.prepared.config_of(arm), self.prepared.streams[TRAINED[name]]
        job = auxiliary_job(config, self.base_hash, self._aligned(arm), rows)
        reused = run_stage(job, on_step=self.progress.update)
        self.beside[arm.name, name] = job
        return f"on {len(rows)} {TRAINED[name]} rows", reused

    def repair(self, arm: Arm) -> Note | None:
        """Write a repaired copy of the fine-tuned model, in process 0 only."""
        if not self.main:
            return None
        stage = Stage.POST_FINETUNING
        config = stage_config(self.prepared.config_of(arm), self.prepared.attack, stage)
        finetuned = self.models[arm.name, Stage.FINETUNING]
        for d in arm.of(Stage.FINETUNING):
            read_kept(finetuned.folder, d)
        records, unaligned = self.prepared.records(stage, arm), self.beside.get((arm.name, "unaligned"))
        job = RepairJob(
            config,
            self.unaligned_hash,
            self._aligned(arm),
            finetuned,
            records,
            arm.repairs(),
            unaligned.artifact() if unaligned else None,
        )
        reused = job.done()
        run_repair(job, lambda done: self.progress.update(done, None))
        result = self._record_result(arm, stage, job)
        changed = [r["changed_entries"] for r in result["defenses"].values()]
        scores = [] if reused else [r["scores"] for r in result["scores"].values()]
        said = f"; scores: {' + '.join(scores)}" if scores else ""
        return f"{' + '.join(f'{n:,}' for n in changed)} entries changed{said}", reused

    def _record_result(self, arm: Arm, stage: Stage, job: RepairJob | EditJob) -> dict[str, Any]:
        """Record the result of a finished repair or edit in the run folder, and return it."""
        result = job.result()
        self.rows.append({"kind": "cost", "arm": arm.name, "stage": stage.value, **result["cost"]})
        self.models[arm.name, stage] = job.artifact()
        self._store_artifact(arm, stage, {"key": job.key(), **result})
        return result

    def search(self, arm: Arm) -> Note:
        """Let the attacker try many settings against the arm's defenses, and record the worst results as scores.

        ``worst_case`` is the trial with the highest harmful score, ``useful`` the worst trial that keeps the task's
        accuracy.
        """
        attacker = Attacker(self.prepared.config_of(arm), arm.defenses, self._aligned(arm), self.prepared.attack)
        sampler: Any = "grid" if self.config.attacker.startswith("search") else "optuna"
        done: list[Outcome] = []

        def report(outcome: Outcome) -> None:
            done.append(outcome)
            self.progress.update(len(done))

        folder = self.folder / arm.name / "search"
        budget = Budget.of(attacker.config)
        findings = search(attacker, self.config.trials, folder, budget, self.config.search.eps, sampler, report)
        stage = Stage.POST_FINETUNING if arm.of(Stage.POST_FINETUNING) else Stage.FINETUNING
        rows: list[dict[str, Any]] = []
        # Both scores of a chosen trial come from the half of the test prompts that did not choose it.
        for name, chosen in (("worst_case", findings.worst), ("useful", findings.useful)):
            for metric, judge, (value, low, high), count in (
                (
                    "harmful_score",
                    judge_name(attacker.tests.judges[0]),
                    chosen.harmful_score,
                    len(attacker.reporting.harmful),
                ),
                ("finetune_accuracy", "", chosen.accuracy, len(attacker.reporting.task_rows)),
            ):
                rows.append(Score(f"{name}_{metric}", value, judge, low, high, count).row())
        self._add_scores(arm.name, stage.value, rows)
        self.manifest["arms"][arm.name]["search"] = {
            "trials": len(findings.outcomes),
            "failed": sum(bool(o.failed) for o in findings.outcomes),
            "failures": [{**asdict(o.trial), "failed": o.failed} for o in findings.outcomes if o.failed],
            "seconds": round(sum(o.seconds for o in findings.outcomes), 1),
            "worst_case": asdict(findings.worst.trial),
            "useful": asdict(findings.useful.trial),
        }
        self._save()
        worst, useful = findings.worst.harmful_score[0], findings.useful.harmful_score[0]
        return f"worst case {worst:.1f} % harmful, {useful:.1f} % with the task's accuracy kept", False

    def _store_artifact(self, arm: Arm, stage: Stage, entry: dict[str, Any]) -> None:
        """Copy a finished stage's artifact into the run folder and write its entry into the manifest."""
        place = self.folder / arm.name / ARTIFACTS[stage]
        link_tree(self.models[arm.name, stage].folder, place)
        stand_alone(place, self.folder / BASE)
        self.manifest["arms"][arm.name]["stages"][stage.value] = entry
        self._save()

    def _aligned(self, arm: Arm) -> Artifact:
        """Return an arm's aligned model: the alignment's artifact, or --model with 0 alignment steps."""
        if not self.config.alignment.steps:
            return Artifact(self.config.model, self.base_hash)
        return self.jobs[arm.name, Stage.ALIGNMENT][-1].artifact()

    def _job(self, arm: Arm, stage: Stage, phase: int, done: Sequence[StageJob]) -> StageJob:
        """Return the job for one phase of a stage, which starts from the last job in ``done``."""
        own, records = self.prepared.trainings(arm, stage)[phase], self.prepared.records(stage, arm, phase)
        before, tests = done[-1].artifact() if done else None, self.prepared.tests
        if own.attack is None:
            return alignment_job(own.config, self.base_hash, records, own.defenses, before)
        return finetuning_job(
            own.config, self.base_hash, self._aligned(arm), records, own.defenses, own.attack, tests, before
        )

    def choose(self, arm: Arm, stage: Stage, phase: int, defense: Defense) -> Note:
        """Let a defense select in process 0, and give its selection to the defense in every process."""
        done = self.jobs.get((arm.name, stage), [])
        own, records = self.prepared.trainings(arm, stage)[phase], self.prepared.records(stage, arm, phase)
        base = Artifact(self.config.model, self.base_hash)
        before = done[-1].artifact() if done else base if stage is Stage.ALIGNMENT else self._aligned(arm)
        job = ChoiceJob(stage_config(own.config, own.attack, stage), before, records, defense)
        launch(self.config)
        reused = self.main and job.done()
        with ending_together():
            path = decide(f"what {type(defense).__name__} selects", lambda: str(run_choice(job, self.progress.update)))
        defense.selected = read_rows(Path(path))
        if self.main:
            label = f"{name_of(defense)}_{upload_of(phase)}" if phase else name_of(defense)
            target = self.folder / arm.name / f"{label}{SELECTION}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            # A filter says which rows it kept. The roles of the rows are known here, and to no defense.
            if stage is Stage.FINETUNING and defense.selected and "kept" in defense.selected[0]:
                rates = filter_rates(defense.selected, records["task"])
                self.manifest["arms"][arm.name].setdefault("filters", {})[label] = rates
                self._save()
        return f"{len(defense.selected)} rows", reused

    def train(self, arm: Arm, stage: Stage, phase: int) -> Note | None:
        """Train one phase of a stage. After the last phase, record the result in the run folder."""
        done = self.jobs.setdefault((arm.name, stage), [])
        job, before = self._job(arm, stage, phase, done), sum(earlier.training.steps for earlier in done)

        # A function, so that a logger opens only when the training starts.
        def log_to() -> StageLogger | None:
            return self._log_to(arm.name, job.stage.value, job.folder() / CURVES, before)

        reused = run_stage(job, log_to, self.progress.update)
        done.append(job)
        last = phase + 1 == len(self.prepared.trainings(arm, stage))
        if last:
            self.models[arm.name, stage] = job.artifact()
        if not self.main:
            return None
        log_to()  # a reused stage did not log, so send its stored curves
        if last:
            self._record_stage(arm, done)
        losses = [row["value"] for row in read_rows(job.folder() / CURVES) if row["name"] == "train/loss"]
        return f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats" if losses else "no curve", reused

    def edit(self, arm: Arm) -> Note | None:
        """Edit the aligned model instead of training it, in process 0 only."""
        if not self.main:
            return None
        stage, attack = Stage.FINETUNING, cast(Any, self.prepared.attack)
        config = stage_config(self.config, attack, stage)
        job = EditJob(config, self.base_hash, self._aligned(arm), self.prepared.streams["task"], attack)
        reused = job.done()
        run_edit(job, lambda count: self.progress.update(count, None))
        losses = [
            f"{e['loss_before']:.3f} -> {e['loss_after']:.3f}" for e in self._record_result(arm, stage, job)["edits"]
        ]
        more = f" and {len(losses) - 1} more" if len(losses) > 1 else ""
        return f"loss of the answer {losses[0]} nats{more}", reused

    def _record_stage(self, arm: Arm, jobs: Sequence[StageJob]) -> None:
        """Record a finished stage's curves, costs and artifact in the run folder.

        Args:
            arm: the arm.
            jobs: the stage's phases in order. The steps of a phase count on from the phases before it.
        """
        job, stage, results = jobs[-1], jobs[-1].stage, [job.result() for job in jobs]
        cost = total_cost([result["cost"] for result in results])
        # The undefended arm runs first, so its time is the baseline for the defended arm.
        if not job.defenses:
            self.sft_seconds[stage] = cost["seconds_per_step"]
        sft = self.sft_seconds.get(stage)
        where = {"arm": arm.name, "stage": stage.value}
        # An alignment's first phase is the undefended one, so the last phase alone shows what the defenses cost.
        per_step = (results[-1]["cost"] if stage is Stage.ALIGNMENT else cost)["seconds_per_step"]
        relative = round(per_step / sft, 3) if sft else None
        self.rows.append({"kind": "cost", **where, **cost, "relative_to_sft": relative})
        before = 0
        for phase in jobs:
            curves = read_rows(phase.folder() / CURVES)
            self.rows += [{"kind": "curve", **where, **row, "step": before + row["step"]} for row in curves]
            before += phase.training.steps
        entry = {"key": job.key(), **results[-1], "cost": cost}
        if len(jobs) > 1:
            names = [phase.name for phase in self.prepared.trainings(arm, stage)]
            kind = "phase" if stage is Stage.ALIGNMENT else "attack"
            entry["phases"] = [
                {kind: name, "key": phase.key(), **result}
                for name, phase, result in zip(names, jobs, results, strict=True)
            ]
        self._store_artifact(arm, stage, entry)

    def measure(self, arm: Arm, stage: Stage | None) -> Note | None:
        """Measure the model after a stage, or the base model, in process 0 only."""
        if not self.main:
            return None
        before, name = cache.built(), stage.value if stage else "base"
        model = self.models[arm.name, stage] if stage else Artifact(self.config.model, self.base_hash)
        return self._measure_model(arm.name, name, model), cache.built() == before

    def _measure_model(self, arm: str, stage: str, model: Artifact) -> str:
        """Measure a model, record its scores and answers, and return the main scores as one line."""
        reference, tests = self._reference(arm, stage), self.prepared.tests
        own = Stage.FINETUNING if stage in ("finetuning", "post_finetuning") else Stage.ALIGNMENT
        config = replace(self.config, template=stage_config(self.config, None, own).template)
        scores, generations = measure(model, config, tests, self.progress.update, reference=reference)
        where = {"arm": arm, "stage": stage}
        self._add_scores(arm, stage, scores)
        self.generations += [{**where, **row} for row in generations]
        self._save()
        shown = {row["metric"]: row for row in reversed(scores)}  # of several judges the first, which decides
        return ", ".join(
            f"{label} {shown[key]['value']:.1f} %"
            for key, label in (
                ("harmful_score", "harmful score"),
                ("answers_refused", "refused"),
                ("answers_broken", "broken"),
                ("finetune_accuracy", "accuracy"),
                ("over_refusal", "over-refusal"),
            )
            if key in shown
        )

    def _reference(self, arm: str, stage: str) -> Reference | None:
        """Return the reference model for a stage's embedding drift, or None if drift does not apply to this stage."""
        if self.config.evaluation.embedding_drift == "base" and stage != "base":
            return Reference("base", Artifact(self.config.model, self.base_hash))
        if self.config.evaluation.embedding_drift == "aligned" and stage not in ("base", "alignment"):
            if not self.config.alignment.steps:
                return Reference("aligned", Artifact(self.config.model, self.base_hash))
            return Reference("aligned", Artifact.of(self.folder / arm / ARTIFACTS[Stage.ALIGNMENT]))
        return None

    def _save(self) -> None:
        """Write rows, generations and manifest, in process 0 only."""
        if not self.main:
            return
        write_rows(self.folder / "metrics.jsonl", self.rows)
        write_rows(self.folder / "generations.jsonl", self.generations)
        write_json(self.folder / "manifest.json", self.manifest)

    def _config(self) -> dict[str, Any]:
        """Return the configuration with the arguments of defenses and attack, as ``config.yaml`` holds it."""
        values = asdict(self.config)
        for arm in self.prepared.arms:
            for d in arm.defenses:
                values[name_of(d)] = {key: v for key, v in d.arguments().items() if key not in OWN_TRAINER}
        own = {f.name: getattr(self.prepared.given, f.name) for f in fields(self.prepared.given)}
        values[self.prepared.given.name] = {key: v for key, v in own.items() if v is not None}
        return values

    def _manifest(self) -> dict[str, Any]:
        """Return the manifest as it is before the first step."""
        p = self.prepared
        made_of = identity(self.config.model, [*(d for arm in p.arms for d in arm.defenses), p.given])
        packages = {name: version(name) for name in ("torchmetrics", "datasets")}
        return {
            "hftlight_version": __version__,
            "config_hash": p.config_hash,
            "command": sys.argv,
            **made_of,
            "packages": {"python": platform.python_version(), **packages},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
            "threads": torch.get_num_threads(),
            "seed": self.config.seed,
            "adapter_protocol": self.config.adapter_protocol,
            "order": self.config.order,
            "long_rows": self.config.long_rows,
            "attack": p.attack.describe(),
            **self._uploaded(),
            "arms": {
                arm.name: {
                    "defenses": [{"name": name_of(d), "arguments": d.arguments()} for d in arm.defenses],
                    "slots": [slot.name.lower() for d in arm.defenses for slot in d.slots],
                    "adapter_protocol": self.config.protocol_of(arm.name),
                    "stages": {},
                }
                for arm in p.arms
            },
        }

    def _uploaded(self) -> dict[str, Any]:
        """Return the manifest's entries about rows, overlaps and prompts."""
        p = self.prepared
        return {
            "data": {
                "rows": {name: len(rows) for name, rows in p.streams.items()},
                "hashes": {
                    name: digest([(r.id, r.role) for r in rows])
                    for name, rows in {**p.streams, "test": p.tests.harmful}.items()
                },
                "attack_rows": sum(r.role == "attack" for r in p.uploaded),
                "taken": p.taken,
                "test_rows": {name: len(p.tests.rows(name)) for name in ("harmful", "over_refusal", "task")},
                "dropped": p.dropped,
                "cut": p.cut,
                "trained_on": asdict(p.trained_on),
                "judges": list(p.tests.judges),
            },
            "overlaps": p.overlaps,
            "template": p.config.template,
            "notes": p.notes,
        }

    def _wandb_summary(self) -> None:
        """Write the scores of all arms as a W&B run, with a table of the generations that may be uploaded."""
        import wandb

        places = dict.fromkeys((row["arm"], row["stage"]) for row in self.rows)
        values = {
            f"{arm}/{stage}/{name}": value
            for arm, stage in places
            for name, value in named(
                r for r in self.rows if (r["arm"], r["stage"]) == (arm, stage) and r["kind"] != "curve"
            ).items()
        }
        # Answers to prompts from outside the made-up world are uploaded only with --upload_generations.
        allowed = [g for g in self.generations if g["source"] == BUILTIN or self.config.upload_generations]
        columns = ["arm", "stage", "set", "prompt", "response"]
        labels = labels_of(self.folder, "all", SUMMARY, self.config)

        def media() -> dict[str, Any]:
            return {"generations": wandb.Table(columns=columns, data=[[g[c] for c in columns] for g in allowed])}

        wandb_summary(self.folder, labels, self._config(), values, media)
