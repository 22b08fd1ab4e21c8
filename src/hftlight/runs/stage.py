"""One training stage: content-addressed, resumable after any kill, one standard Trainer."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn
from typing_extensions import override

from hftlight import __version__
from hftlight.attacks.attack import Attack
from hftlight.attacks.preference import PairsDataModule, PreferenceModule
from hftlight.attacks.reverse_preference import ReversePreference
from hftlight.config import RunConfig, Training
from hftlight.data.records import Record
from hftlight.data.streams import StreamsDataModule
from hftlight.data.templates import get_template
from hftlight.engine import Defense, Stage, count_passes
from hftlight.errors import InputError
from hftlight.files import digest, new_folder, write_json
from hftlight.models import load_tokenizer
from hftlight.module import SafetyModule
from hftlight.runs.adapters import adapter_seed
from hftlight.runs.artifact import artifact_digest, full_state, save_artifact, trainable_model
from hftlight.runs.callbacks import FiniteGuard, Interrupted, Meter, StepSeed
from hftlight.runs.checkpoint import AtomicCheckpointIO, keep_two, newest_checkpoint
from hftlight.runs.job import RESULT, Job
from hftlight.runs.loggers import RowsLogger
from hftlight.runs.measure import TestSets
from hftlight.runs.watch import EvaluateAt

CURVES = "curves.jsonl"
DEPENDENCIES = ("torch", "lightning", "transformers", "peft")


@dataclass(frozen=True)
class StageJob(Job):
    """Everything that decides the weights at the end of a stage.

    Attributes:
        stage: alignment or finetuning.
        config: the run's configuration.
        base_hash: hash of the base model's weights.
        parent: artifact of the stage before; None starts from the base model.
        records: rows by stream.
        defenses: the callbacks of this stage.
        attack: what the records of the fine-tuning stage are; rows, where it is None.
        tests: what curves are evaluated on where ``config.evaluation.at`` names steps; None for no curve. Evaluating
            leaves the weights as they are, but a stage that was trained without it has no curve: so steps, prompts and
            thresholds are part of the key where they are given, and of no other.
    """

    stage: Stage
    config: RunConfig
    base_hash: str
    parent: Path | None
    records: Mapping[str, Sequence[Record]]
    defenses: Sequence[Defense]
    attack: Attack | None = None
    tests: TestSets | None = None

    @property
    def watched(self) -> dict[str, Any]:
        """What decides the curves and the stop; empty where nothing is evaluated."""
        evaluation = self.config.evaluation
        if self.tests is None or not evaluation.at:
            return {}
        return {
            "at": sorted(set(evaluation.at)),
            "stop": evaluation.stops,
            "prompts": {"harmful": len(self.tests.harmful), "task": len(self.tests.task_rows)},
            "tests": self.tests.digest(),
            "limits": [evaluation.max_new_tokens, evaluation.task_max_new_tokens],
        }

    @property
    def pairs(self) -> ReversePreference | None:
        """The attack, where the upload holds pairs instead of rows."""
        return self.attack if isinstance(self.attack, ReversePreference) else None

    @property
    def training(self) -> Training:
        """How the stage trains."""
        return self.config.alignment if self.stage is Stage.ALIGNMENT else self.config.finetuning

    @property
    def main(self) -> str:
        """The stream whose length is the epoch."""
        return "alignment" if self.stage is Stage.ALIGNMENT else "task"

    @property
    def passes(self) -> tuple[float, float]:
        """Forward and backward passes per optimizer step, the stage's own included."""
        return count_passes(self.defenses, self.training.accumulate)

    @property
    @override
    def kind(self) -> str:
        return self.stage.value

    @override
    def key(self) -> str:
        """Return the hash of everything that decides the result, versions included."""
        c = self.config
        return digest(
            {
                "stage": self.stage.value,
                "versions": deciding_versions(),
                "base": self.base_hash,
                "parent": artifact_digest(self.parent) if self.parent else None,
                "records": records_digest(self.records),
                "defenses": [d.state_key for d in self.defenses],
                "training": asdict(self.training),
                "lora": asdict(c.lora) if c.tuning != "full" else None,
                "settings": [c.tuning, c.adapter_protocol, c.template, c.system, c.max_tokens, c.seed, c.precision],
                **({"adapter": adapter_seed(c.seed, aligned=True)} if self.parent and c.tuning != "full" else {}),
                **({"pairs": self.pairs.beta} if self.pairs else {}),
                **({"watched": self.watched} if self.watched else {}),
                "devices": [c.accelerator, c.devices, c.num_nodes, c.strategy, c.gradient_checkpointing],
            }
        )


def deciding_versions() -> dict[str, str]:
    """Return the versions that a stage's result may depend on."""
    return {"hftlight": __version__, **{name: version(name) for name in DEPENDENCIES}}


def records_digest(records: Mapping[str, Sequence[Record]]) -> dict[str, str]:
    """Return the hash of each stream's rows."""
    return {
        name: digest([(r.id, r.instruction, r.input, r.response, r.role) for r in rows])
        for name, rows in records.items()
    }


def run_stage(
    job: StageJob,
    log_to: Callable[[], Logger | None] = lambda: None,
    on_step: Callable[[int, float | None], None] | None = None,
) -> None:
    """Train a stage to its end, from its newest checkpoint if there is one; do nothing if it is done.

    Args:
        job: the stage.
        log_to: makes the logger for its curves, besides the stage's own file.
        on_step: called after each optimizer step with (step, loss in nats).

    Raises:
        InputError: if a stream is empty or the model cannot be adapted.
        RunError: if the loss leaves the finite numbers.
        KeyboardInterrupt: after Ctrl-C; the same call resumes.
    """
    folder = job.folder()
    with ExitStack() as stack:
        if main_process():
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / "lock"))
        if job.done():
            return
        _train(job, folder, log_to, on_step)


def main_process() -> bool:
    """Tell whether this process is the one that writes; the others train along."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _train(
    job: StageJob,
    folder: Path,
    log_to: Callable[[], Logger | None],
    on_step: Callable[[int, float | None], None] | None,
) -> None:
    data = data_of(job)
    torch.manual_seed(job.config.seed)
    with trainable_model(job.config, job.parent) as model:
        module = module_of(job, model)
        checkpoints = folder / "checkpoints"
        resume = newest_checkpoint(checkpoints)
        resumed_at = int(resume.stem) if resume else 0
        meter, interrupted = Meter(on_step), Interrupted()
        loggers: list[Logger] = [RowsLogger(folder / CURVES, resumed_at)] if main_process() else []
        if (extra := log_to()) is not None:
            loggers.append(extra)
        callbacks: list[Callback] = [
            FiniteGuard(job.stage.value, checkpoints),
            meter,
            interrupted,
            keep_two(checkpoints, job.config.checkpoint_every),
        ]
        watch = watch_of(job)
        if watch is not None:
            callbacks.append(watch)
        trainer = trainer_of(job, callbacks, loggers, plugins=[AtomicCheckpointIO()])
        try:
            trainer.fit(module, data, ckpt_path=str(resume) if resume else None, weights_only=True)
        except (ValueError, TypeError) as error:  # a defense refuses the model it was given
            if str(error).startswith(tuple(type(d).__name__ for d in job.defenses)):
                raise InputError(str(error)) from error
            raise
        except SystemExit as error:
            if interrupted.seen:
                raise KeyboardInterrupt from error
            raise
        state = full_state(model)
        if trainer.is_global_zero:
            with new_folder(folder / "artifact") as place:
                save_artifact(place, model, state, job.config, job.parent, data.policy.serving_slot())
            write_json(
                folder / RESULT,
                {
                    "stage": job.stage.value,
                    "cost": meter.cost(),
                    "passes_per_step": dict(zip(("forward", "backward"), job.passes, strict=True)),
                    "dropped_rows": data.dropped,
                    "defenses": {d.state_key: d.manifest() for d in job.defenses},
                    "artifact": artifact_digest(folder / "artifact"),
                    **({"evaluated": {**job.watched, "stopped_at": _stopped_at(job, trainer)}} if watch else {}),
                },
            )
            shutil.rmtree(checkpoints, ignore_errors=True)
        trainer.strategy.barrier("stage written")


def watch_of(job: StageJob) -> EvaluateAt | None:
    """Return what evaluates the model while the stage trains; None where that is not asked for."""
    evaluation = job.config.evaluation
    if job.tests is None or not job.watched:
        return None
    return EvaluateAt(job.tests, evaluation, steps=evaluation.at, **evaluation.stops)  # type: ignore[arg-type]


def _stopped_at(job: StageJob, trainer: Trainer) -> int | None:
    return trainer.global_step if trainer.global_step < job.training.steps else None


def data_of(job: StageJob) -> StreamsDataModule:
    """Return a stage's streams, encoded when they are read."""
    config, training = job.config, job.training
    tokenizer = load_tokenizer(config.model)
    streams: dict[str, Any] = dict(job.records)
    kind: Any = PairsDataModule if job.pairs else StreamsDataModule
    made: StreamsDataModule = kind(
        tokenizer,
        get_template(config.template, tokenizer),
        job.main,
        batch_size=training.batch_size,
        max_tokens=config.max_tokens,
        seed=config.seed,
        system=config.system,
        average=training.average,
        **streams,
    )
    return made


def module_of(job: StageJob, model: nn.Module) -> SafetyModule:
    """Return the module that trains a model as the stage says."""
    t = job.training
    if job.pairs:
        beta = job.pairs.beta
        return PreferenceModule(model, t.lr, t.weight_decay, t.optimizer, t.schedule, t.warmup_ratio, beta)
    return SafetyModule(model, t.lr, t.weight_decay, t.optimizer, t.schedule, t.warmup_ratio)


def trainer_of(job: StageJob, callbacks: Sequence[Callback], loggers: Sequence[Logger] = (), **options: Any) -> Trainer:
    """Return the Trainer of a stage, with its defenses and with each step's own seed.

    Args:
        job: the stage.
        callbacks: what comes after the defenses.
        loggers: where its curves go.
        **options: Lightning's own.
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
