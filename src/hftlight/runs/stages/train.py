"""One training stage: content-addressed, resumable after any kill, one standard Trainer."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from safetensors.torch import load_file, save_file
from torch import nn
from typing_extensions import override

from hftlight.attacks.attack import Attack
from hftlight.config import OF_NO_STAGE, RunConfig, StageLora, Training
from hftlight.data.pairs import PairsDataModule
from hftlight.data.records import Record
from hftlight.data.streams import StreamsDataModule
from hftlight.data.templates import SystemSlot, get_template
from hftlight.engine import Defense, Stage, count_passes, main_stream
from hftlight.errors import InputError
from hftlight.files import digest, new_folder, remove, temporaries
from hftlight.models.base import device_of
from hftlight.models.load import load_tokenizer
from hftlight.models.module import SafetyModule
from hftlight.models.preference import PreferenceModule
from hftlight.models.serving import Artifact, full_state, save_artifact, trainable_model
from hftlight.provenance import described
from hftlight.runs.logging.rows import RowsLogger
from hftlight.runs.measuring.curve import EvaluateAt
from hftlight.runs.measuring.test_sets import TestSets
from hftlight.runs.ranks import agree, decide, ending_together, launch, main_process, meet
from hftlight.runs.stages.checkpoint import AtomicCheckpointIO, keep_two, newest_checkpoint
from hftlight.runs.stages.guards import Curves, FiniteGuard, Interrupted, StepSeed
from hftlight.runs.stages.job import Job
from hftlight.runs.stages.meter import Meter

CURVES = "curves.jsonl"
KEPT = "kept"  # folder in a model's folder, with a file for each defense that keeps tensors
MAIN = {Stage.ALIGNMENT: "alignment", Stage.FINETUNING: "task"}  # each stage's own main stream


@dataclass(frozen=True)
class StageJob(Job):
    """Everything that decides the weights at the end of a stage.

    Attributes:
        stage: alignment or finetuning.
        config: the run's configuration.
        base_hash: hash of the base model's weights.
        parent: model of the stage before; None starts from the base model.
        records: rows by stream.
        defenses: the callbacks of this stage.
        attack: the attack that the task's records belong to. None if they are plain rows.
        tests: prompts for curves at the steps of ``config.evaluation.at``. None evaluates no curve. Evaluation leaves
            the weights unchanged, but a cached stage that was trained without it has no curve. So steps, prompts and
            thresholds enter the key, and only if steps are named.
    """

    stage: Stage
    config: RunConfig
    base_hash: str
    parent: Artifact | None
    records: Mapping[str, Sequence[Record]]
    defenses: Sequence[Defense]
    attack: Attack | None = None
    tests: TestSets | None = None

    @property
    def watched(self) -> dict[str, Any]:
        """Everything that decides the curves and the stop. Empty if nothing is evaluated."""
        evaluation = self.config.evaluation
        if self.tests is None or not evaluation.at:
            return {}
        return {
            "at": sorted(set(evaluation.at)),
            "stop": evaluation.stops,
            "prompts": {"harmful": len(self.tests.harmful), "task": len(self.tests.task_rows)},
            "tests": [self.tests.digest(), self.tests.judging()],
            "limits": [evaluation.max_new_tokens, evaluation.task_max_new_tokens],
        }

    @property
    def preference(self) -> float | None:
        """DPO's beta, per nat. None if the upload holds no pairs."""
        return None if self.attack is None else self.attack.preference

    @property
    def training(self) -> Training:
        """Steps, learning rate, batches and the other training settings of the stage."""
        return self.config.alignment if self.stage is Stage.ALIGNMENT else self.config.finetuning

    @property
    def main(self) -> str:
        """The stream that the stage trains on. Its length defines the epoch."""
        return main_stream(self.defenses, MAIN[self.stage])

    @property
    def passes(self) -> tuple[float, float]:
        """Forward and backward passes per optimizer step, those of plain training included."""
        return count_passes(self.defenses, self.training.accumulate)

    @property
    @override
    def kind(self) -> str:
        return self.stage.value

    @property
    @override
    def decided_by(self) -> str:
        return "training"

    @override
    def code(self) -> Sequence[Any]:
        return ["hftlight.runs.stages.train", *(type(d) for d in self.defenses)]

    @override
    def inputs(self) -> dict[str, Any]:
        """Return everything that decides the weights and the curves."""
        other = "finetuning" if self.stage is Stage.ALIGNMENT else "alignment"
        ignored = {*OF_NO_STAGE, "evaluation", other, *(["lora"] if self.config.tuning == "full" else [])}
        return {
            "stage": self.stage.value,
            "config": self.config.without(ignored),
            "base": self.base_hash,
            "parent": self.parent.identity if self.parent else None,
            "records": records_digest(self.records),
            "defenses": described(self.defenses),
            "attack": None if self.preference is None else {"pairs": self.preference},
            "watched": self.watched,
            "device": device_of(self.config),
        }


def stage_config(config: RunConfig, attack: Attack | None, stage: Stage) -> RunConfig:
    """Return the configuration of one stage of a run.

    A stage has its own template and adapter geometry. Repairs have those of the fine-tuning. Fine-tuning uses the
    attack's own system text. A weight edit leaves whole weights behind, so its repairs use full tuning.

    Args:
        config: the run's configuration.
        attack: the upload. None for the alignment.
        stage: the stage.
    """
    name = "alignment" if stage is Stage.ALIGNMENT else "finetuning"
    training: Training = getattr(config, name)
    template, plain = training.template or config.template, replace(training, lora=StageLora(), template=None)
    changed: dict[str, Any] = {"lora": config.lora_of(name), "template": template, name: plain}
    config = replace(config, **changed)
    if attack is None:
        return config
    if stage is Stage.FINETUNING and attack.test_system is not None:
        return replace(config, system=attack.test_system)
    if stage is Stage.POST_FINETUNING and attack.acts_on == "weights":
        return replace(config, tuning="full")
    return config


def alignment_phases(config: RunConfig, defenses: Sequence[Defense]) -> list[tuple[RunConfig, list[Defense]]]:
    """Return configuration and defenses of each phase of an alignment.

    If a defense asks for an aligned model, the first phase is the alignment of the undefended arm, so that both share
    one result. The second phase trains ``hardening_steps`` with all defenses.

    Args:
        config: the run's configuration.
        defenses: the defenses of the alignment stage.
    """
    if not any(d.aligned_first for d in defenses):
        return [(config, list(defenses))]
    hardening = replace(config.alignment, steps=config.hardening_steps or config.alignment.steps)
    return [(config, []), (replace(config, alignment=hardening), list(defenses))]


def alignment_job(
    config: RunConfig,
    base_hash: str,
    records: Mapping[str, Sequence[Record]],
    defenses: Sequence[Defense],
    before: Artifact | None = None,
) -> StageJob:
    """Return one phase of the alignment stage. Arguments as for ``finetuning_job``."""
    config = stage_config(config, None, Stage.ALIGNMENT)
    return StageJob(Stage.ALIGNMENT, config, base_hash, before, records, defenses)


def phases_of(config: RunConfig, attack: Attack) -> list[tuple[RunConfig, Attack]]:
    """Return configuration and attack of each phase of an attack.

    The steps in ``evaluation.at`` count over all phases.

    Args:
        config: the run's configuration, after ``attack.applied``.
        attack: the upload, resolved against the configuration.
    """
    phases = attack.phases()
    if len(phases) == 1:
        return [(config, phases[0])]
    result, before = list[tuple[RunConfig, Attack]](), 0
    for phase in phases:
        training = phase.applied(config).finetuning
        at = [step - before for step in config.evaluation.at if before < step <= before + training.steps]
        own = replace(config, finetuning=training, evaluation=replace(config.evaluation, at=at))
        result.append((own, phase))
        before += training.steps
    return result


def finetuning_job(
    config: RunConfig,
    base_hash: str,
    aligned: Artifact | None,
    records: Mapping[str, Sequence[Record]],
    defenses: Sequence[Defense],
    attack: Attack,
    tests: TestSets | None = None,
    before: Artifact | None = None,
) -> StageJob:
    """Return the stage that fine-tunes on an upload.

    Args:
        config: the run's configuration.
        base_hash: hash of the base model's weights. Only the key uses it.
        aligned: the aligned model. If the model came aligned, it is the base itself. None leaves the parent out of the
            key, for a plan that is made before the model exists.
        records: rows by stream.
        defenses: the defenses of this stage.
        attack: the upload.
        tests: the prompts that a model is measured on. Curves use the first of them. None evaluates no curve.
        before: model of the previous phase. None for the first phase.
    """
    watched = tests.first(config.evaluation.at_prompts) if tests is not None else None
    parent = before or (aligned if config.alignment.steps else None)
    config = stage_config(config, attack, Stage.FINETUNING)
    return StageJob(Stage.FINETUNING, config, base_hash, parent, records, defenses, attack, watched)


def auxiliary_job(config: RunConfig, base_hash: str, aligned: Artifact, records: Sequence[Record]) -> StageJob:
    """Return the training of a model that repairs compare with: the aligned model, trained on other rows.

    It takes as many steps as the run's own fine-tuning, without defenses.

    Args:
        config: the configuration of the arm.
        base_hash: as for ``finetuning_job``.
        aligned: the aligned model.
        records: the rows to train on; harmful rows of the defender for the model ``"unaligned"``.
    """
    parent = aligned if config.alignment.steps else None  # a model that came aligned is the base itself
    config = stage_config(config, None, Stage.FINETUNING)
    return StageJob(Stage.FINETUNING, config, base_hash, parent, {"task": list(records)}, [])


def records_digest(records: Mapping[str, Sequence[Record]]) -> dict[str, str]:
    """Return the hash of each stream's rows. The file that a row came from does not count."""
    return {name: digest([asdict(replace(r, source="")) for r in rows]) for name, rows in records.items()}


def run_stage(
    job: StageJob,
    log_to: Callable[[], Logger | None] = lambda: None,
    on_step: Callable[[int, float | None], None] | None = None,
) -> bool:
    """Train a stage to its end, from its newest checkpoint if there is one.

    Nothing happens if the stage is done. Of several processes, the first takes the lock and looks at the disk. Then all
    train, or none. With the same number of threads, weights are equal bit for bit, however often the call was killed
    and repeated.

    Args:
        job: the stage.
        log_to: returns a logger for the curves, besides the stage's own file.
        on_step: called after each optimizer step with (step, loss in nats).

    Returns:
        Whether the stage was done before the call.

    Raises:
        InputError: if a stream is empty, the model cannot be adapted, or the processes do not see the same files.
        RunError: if the gradient is not finite.
        KeyboardInterrupt: after Ctrl-C. The same call resumes.
    """
    launch(job.config)
    with ending_together(), ExitStack() as stack:
        folder = job.folder()
        agree("The cache folder of the stage", str(folder))

        def look() -> dict[str, Any]:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / "lock"))
            remove(temporaries(folder))  # of a killed run; nobody else writes here under the lock
            done = job.done()
            newest = None if done else newest_checkpoint(folder / "checkpoints")
            return {"done": done, "resume": newest and str(newest)}

        status = decide(f"whether the {job.stage.value} stage is done", look)
        if not status["done"]:
            _train(job, folder, status["resume"] and Path(status["resume"]), log_to, on_step)
    return bool(status["done"])


def _train(
    job: StageJob,
    folder: Path,
    resume: Path | None,
    log_to: Callable[[], Logger | None],
    on_step: Callable[[int, float | None], None] | None,
) -> None:
    checkpoints = folder / "checkpoints"
    resumed_at = int(resume.stem) if resume else 0
    meter, watch = Meter(on_step), watch_of(job)
    loggers: list[Logger] = [RowsLogger(folder / CURVES, resumed_at)] if main_process() else []
    if (extra := log_to()) is not None:
        loggers.append(extra)
    # Curves come before the checkpoint of their step, so that a resumed stage has every point once.
    saver = keep_two(checkpoints, job.config.checkpoint_every)
    callbacks = [meter, Curves(job.config.log_every), saver, *([watch] if watch else [])]
    options: dict[str, Any] = {"loggers": loggers, "checkpoints": checkpoints, "plugins": [AtomicCheckpointIO()]}
    with fitted(job, callbacks, resume, **options) as fit:
        state = full_state(fit.model)

        def write() -> None:
            with new_folder(job.place()) as place:
                save_artifact(place, fit.model, state, job.config, job.parent, fit.slot)
                for d in job.defenses:
                    save_kept(place, d)
            job.finish(
                {
                    "stage": job.stage.value,
                    "cost": meter.cost(),
                    "threads": torch.get_num_threads(),
                    "passes_per_step": dict(zip(("forward", "backward"), job.passes, strict=True)),
                    "dropped_rows": fit.data.dropped,
                    "cut_rows": fit.data.cut,
                    "defenses": {d.state_key: d.manifest() for d in job.defenses},
                    **({"evaluated": {**job.watched, "stopped_at": _stopped_at(job, fit.trainer)}} if watch else {}),
                },
                CURVES,
            )
            shutil.rmtree(checkpoints, ignore_errors=True)

        meet("the stage's artifact", write)


def save_kept(place: Path, defense: Defense) -> None:
    """Write the tensors that a defense keeps beside a trained model, if there are any."""
    if defense.kept:
        (place / KEPT).mkdir(exist_ok=True)
        save_file(dict(defense.kept), place / KEPT / _kept_name(defense))


def _kept_name(defense: Defense) -> str:
    # The registry would make the code of every defense a part of this stage's code.
    return f"{type(defense).__name__.lower()}.safetensors"


def read_kept(place: Path, defense: Defense) -> None:
    """Give a defense the tensors that it kept beside a trained model."""
    path = place / KEPT / _kept_name(defense)
    defense.kept = load_file(path) if path.is_file() else None


@dataclass(frozen=True)
class Fit:
    """A stage whose training has ended.

    Attributes:
        model: the trained model.
        trainer: its Trainer.
        data: its streams, after the defenses of the data slot.
    """

    model: nn.Module
    trainer: Trainer
    data: StreamsDataModule

    @property
    def slot(self) -> SystemSlot:
        """The system slot that the model is served with."""
        return self.data.policy.serving_slot()


@contextmanager
def fitted(
    job: StageJob,
    callbacks: Sequence[Callback] = (),
    resume: Path | None = None,
    *,
    checkpoints: Path | None = None,
    **options: Any,
) -> Iterator[Fit]:
    """Train a stage's model in memory and yield it.

    Only loggers and checkpoint callbacks write files, if there are any.

    Args:
        job: the stage.
        callbacks: callbacks after the defenses and after ``FiniteGuard``.
        resume: checkpoint to resume from. None starts anew.
        checkpoints: folder in which ``FiniteGuard`` looks for the last good checkpoint. None if there is none.
        **options: of ``trainer_of``.

    Raises:
        InputError: if a stream is empty, or the model cannot be adapted or is refused by a defense.
        RunError: if the gradient is not finite.
        KeyboardInterrupt: after Ctrl-C.
    """
    data = data_of(job)
    torch.manual_seed(job.config.seed)
    with trainable_model(job.config, job.parent, hardening=job.stage is Stage.ALIGNMENT) as model:
        module, interrupted = module_of(job, model), Interrupted()
        guard = FiniteGuard(job.stage.value, checkpoints)
        trainer = trainer_of(job, [guard, interrupted, *callbacks], **options)
        try:
            trainer.fit(module, data, ckpt_path=str(resume) if resume else None, weights_only=True)
        except (ValueError, TypeError) as error:  # a defense refuses the model
            if str(error).startswith(tuple(type(d).__name__ for d in job.defenses)):
                raise InputError(str(error)) from error
            raise
        except SystemExit as error:
            if interrupted.seen:
                raise KeyboardInterrupt from error
            raise
        yield Fit(model, trainer, data)


def watch_of(job: StageJob) -> EvaluateAt | None:
    """Return the callback that evaluates the model during the stage, or None if no curve is requested."""
    evaluation = job.config.evaluation
    if job.tests is None or not job.watched:
        return None
    return EvaluateAt(job.tests, evaluation, steps=evaluation.at, **evaluation.stops)  # type: ignore[arg-type]


def _stopped_at(job: StageJob, trainer: Trainer) -> int | None:
    return trainer.global_step if trainer.global_step < job.training.steps else None


def data_of(job: StageJob) -> StreamsDataModule:
    """Return a stage's streams. Rows are encoded when they are read."""
    config, training = job.config, job.training
    tokenizer = load_tokenizer(config.model)
    streams: dict[str, Any] = dict(job.records)
    kind: Any = StreamsDataModule if job.preference is None else PairsDataModule
    data: StreamsDataModule = kind(
        tokenizer,
        get_template(config.template, tokenizer),
        job.main,
        batch_size=training.batch_size,
        max_tokens=config.max_tokens,
        seed=config.seed,
        system=config.system,
        average=training.average,
        order=config.order,
        long_rows=config.long_rows,
        **streams,
    )
    return data


def module_of(job: StageJob, model: nn.Module) -> SafetyModule:
    """Return the module that trains a model with the stage's settings."""
    names = ("lr", "weight_decay", "optimizer", "schedule", "warmup_ratio", "betas", "decay")
    options = {name: getattr(job.training, name) for name in names}
    if job.preference is None:
        return SafetyModule(model, **options)
    return PreferenceModule(model, beta=job.preference, **options)


def trainer_of(job: StageJob, callbacks: Sequence[Callback], loggers: Sequence[Logger] = (), **options: Any) -> Trainer:
    """Return the Trainer of a stage, with its defenses and a seed for each micro-batch.

    Args:
        job: the stage.
        callbacks: callbacks after the defenses.
        loggers: receivers of the curves.
        **options: further arguments of Lightning's ``Trainer``.
    """
    config, training = job.config, job.training
    return Trainer(
        max_steps=training.steps,
        max_epochs=-1,
        accumulate_grad_batches=training.accumulate,
        gradient_clip_val=training.clip or None,
        precision=config.precision,  # type: ignore[arg-type]
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=_strategy(config),
        callbacks=[StepSeed(config.seed), *job.defenses, *callbacks],
        logger=list(loggers) or False,
        log_every_n_steps=config.log_every,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **options,
    )


def _strategy(config: RunConfig) -> str | Strategy:
    if config.strategy == "fsdp2":
        return ModelParallelStrategy(
            data_parallel_size=config.devices * config.num_nodes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,  # one file, so that our own writing and checking of it holds
        )
    return config.strategy
