"""The repair stage: fine-tuned weights are edited once, content-addressed. One fine-tuned model serves all repairs."""

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import override

from hftlight import cache
from hftlight.config import OF_NO_STAGE, RunConfig
from hftlight.data.records import Record
from hftlight.data.streams import StreamsDataModule
from hftlight.data.templates import get_template
from hftlight.data.tokens import collate, padding_id
from hftlight.engine.weights.repair import Repair
from hftlight.engine.weights.save import MARKER, repaired_state, repairs_of, save_repaired
from hftlight.engine.weights.stored import stored
from hftlight.engine.weights.subject import Subject
from hftlight.errors import RunError
from hftlight.files import new_folder, write_json
from hftlight.model_files import model_hash, model_path
from hftlight.models.base import device_of, drop_base, on_device
from hftlight.models.load import load_model, load_tokenizer, save_tokenizer
from hftlight.models.serving import SERVING, Artifact, save_adapter
from hftlight.models.state import ModelState, with_adapter
from hftlight.provenance import described
from hftlight.runs.stages.job import Job
from hftlight.runs.stages.train import records_digest

ADAPTER = "adapter_model.safetensors"
SCORES = "scores.safetensors"
# Options that decide no repair: the first process repairs alone, in float32 and without an optimizer step.
OF_NO_REPAIR = frozenset(
    {"devices", "num_nodes", "strategy", "gradient_checkpointing", "log_every", "precision", "order"}
)


@dataclass(frozen=True)
class RepairJob(Job):
    """Everything that decides a repaired model.

    Attributes:
        config: the run's configuration.
        base_hash: hash of the base model's weights, or of the unaligned model's if the model came aligned.
        aligned: the aligned model, from which the fine-tuning started.
        finetuned: the fine-tuned model. Its files stay unchanged.
        records: rows of the streams that the repairs read.
        defenses: the repairs in the order in which they act.
        unaligned: the aligned model after training on harmful rows. None if no repair compares with it.
    """

    config: RunConfig
    base_hash: str
    aligned: Artifact
    finetuned: Artifact
    records: Mapping[str, Sequence[Record]]
    defenses: Sequence[Repair]
    unaligned: Artifact | None = None

    @property
    @override
    def kind(self) -> str:
        return "post_finetuning"

    @property
    @override
    def decided_by(self) -> str:
        return "repair"

    @override
    def code(self) -> Sequence[Any]:
        return ["hftlight.runs.stages.repair", *(type(d) for d in self.defenses)]

    @override
    def inputs(self) -> dict[str, Any]:
        """Return everything that decides the repaired weights."""
        ignored = {*OF_NO_STAGE, *OF_NO_REPAIR, "alignment", "finetuning", "evaluation"}
        return {
            "config": {**self.config.without(ignored), "rows": self.config.finetuning.batch_size},
            "base": self.base_hash,
            "aligned": self.aligned.identity,
            "finetuned": self.finetuned.identity,
            "unaligned": self.unaligned and self.unaligned.identity,
            "records": records_digest(self.records),
            "defenses": described(self.defenses),
            "named": [model_hash(model) for d in self.defenses for model in (d.aligned, d.base, d.unaligned) if model],
            "device": device_of(self.config),
        }


@dataclass(frozen=True)
class ScoresJob(Job):
    """Everything that decides what a repair's ``scored`` returns: all of its stage but its ``dials`` and later repairs.

    Attributes:
        stage: the repair stage.
        position: index of the repair among those of the stage.
    """

    stage: RepairJob
    position: int

    @property
    def _until(self) -> RepairJob:
        """The stage without the repairs that act later."""
        return replace(self.stage, defenses=self.stage.defenses[: self.position + 1])

    @property
    @override
    def kind(self) -> str:
        return "scores"

    @property
    @override
    def decided_by(self) -> str:
        return "scores"

    @override
    def code(self) -> Sequence[Any]:
        return self._until.code()

    @override
    def inputs(self) -> dict[str, Any]:
        """Return everything that decides the scores."""
        repair, inputs = self.stage.defenses[self.position], self._until.inputs()
        *before, own = inputs["defenses"]
        deciding = {k: v for k, v in repair.arguments().items() if k not in (*repair.dials, "output")}
        return {**inputs, "defenses": [*before, {**own, "state": repair.key_of(deciding)}]}


def stored_scores(job: ScoresJob, compute: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], bool]:
    """Return a repair's scores from the cache, and whether they were there. They are computed first if they were not.

    Computed scores are read back too, so that both ways give the same tensors.
    """
    folder = job.folder()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (reused := job.done()):
            # A file holds each tensor by itself, so views of a common storage are copied.
            save_file({name: t.detach().cpu().contiguous().clone() for name, t in compute().items()}, folder / SCORES)
            cache.seal(folder, SCORES)
        return load_file(folder / SCORES), reused


def units_of(repairs: Sequence[Repair]) -> int:
    """Return the units in which the progress of repairs is counted: one per repair, and one per step that it trains."""
    return sum(1 + repair.trains for repair in repairs)


def run_repair(job: RepairJob, on_unit: Callable[[int], None] | None = None) -> None:
    """Apply the repairs one after the other and write the model.

    Nothing happens if the stage is done. Scores of repairs with ``dials`` are read from the cache, or stored there.

    Args:
        job: the stage.
        on_unit: called with the number of units done so far, of those of ``units_of``.

    Raises:
        RunError: if the model was repaired before, or if a repair refuses it or changes nothing without a reason.
    """
    folder = job.folder()
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(FileLock(folder / "lock"))
        if job.done():
            return
        since = time.perf_counter()
        subject, scores = subject_of(job), dict[str, dict[str, str]]()

        def kept(repair: Repair, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
            if not repair.dials or type(repair).scored is Repair.scored:
                return compute()
            own = ScoresJob(job, list(job.defenses).index(repair))
            tensors, reused = stored_scores(own, compute)
            scores[repair.state_key] = {"key": own.key(), "scores": "reused" if reused else "computed"}
            return tensors

        subject.kept = kept
        reports = apply_repairs(subject, job.defenses, on_unit)
        _save(job.place(), job, subject, reports)
        cost = {"steps": 0, "seconds": round(time.perf_counter() - since, 3)}
        job.finish({"stage": "post_finetuning", "cost": cost, "defenses": reports, "scores": scores})


def apply_repairs(
    subject: Subject, repairs: Sequence[Repair], on_unit: Callable[[int], None] | None = None
) -> dict[str, dict[str, Any]]:
    """Apply repairs to a model in memory, one after the other, and return their reports.

    Args:
        subject: the model.
        repairs: in the order in which they act.
        on_unit: as for ``run_repair``.

    Raises:
        RunError: if a repair refuses the model, or changes nothing without a reason.
    """
    others = subject.aligned, subject.base, subject.unaligned
    reports = {}
    for number, repair in enumerate(repairs):
        before = units_of(repairs[:number])
        if on_unit is not None:
            subject.on_step = partial(_count, on_unit, before)
        subject.report, subject.scores = {}, {}
        subject.aligned, subject.base, subject.unaligned = others  # the repair before may have named its own models
        try:
            repair.apply(subject)
        except (RuntimeError, TypeError, ValueError) as error:  # a refusal names the repair; any other is a defect
            if not str(error).startswith(type(repair).__name__):
                raise
            raise RunError(str(error)) from error
        reports[repair.state_key] = subject.report
        if on_unit is not None:
            on_unit(before + units_of([repair]))
    return reports


def _count(on_unit: Callable[[int], None], before: int, steps: int) -> None:
    on_unit(before + steps)


def subject_of(job: RepairJob) -> Subject:
    """Return the fine-tuned model of a run as a repair takes it: the user's update on top of the aligned model.

    Raises:
        RunError: if the artifact was repaired before, or was not trained from the aligned one.
    """
    if before := repairs_of(job.finetuned.folder):
        raise RunError(
            f"{' and '.join(before)}: {job.finetuned.name} was repaired before; a repair takes the fine-tuned"
            " model, and a second application would change it again. Put several repairs into one list."
        )
    return subject_around(job.config, job.aligned, job.finetuned, job.records, job.unaligned)


def subject_around(
    config: RunConfig,
    aligned: Artifact,
    finetuned: Artifact | ModelState,
    records: Mapping[str, Sequence[Record]],
    unaligned: Artifact | None = None,
) -> Subject:
    """Return a fine-tuned model, on the disk or in memory, as a repair takes it.

    Under LoRA the update is one adapter on the aligned weights. Under the ``merge`` protocol it is the second adapter.
    Under ``continue`` it is the difference of the two adapters, of twice the rank. Under full tuning the model is taken
    whole. Weights are in float32 whatever the run's precision: in bfloat16, most of a small update would round away.

    Args:
        config: the run's configuration.
        aligned: the aligned model.
        finetuned: the fine-tuned model, or its state in memory.
        records: rows of the streams that the repairs read.
        unaligned: as in ``RepairJob``.

    Raises:
        RunError: if the fine-tuned model was not trained from the aligned one.
    """
    drop_base()  # repairs write into the base weights, also under an adapter, so they get their own model
    model: nn.Module
    if config.tuning != "full":
        later = finetuned if isinstance(finetuned, ModelState) else _adapter(finetuned.folder)
        name = "the model in memory" if isinstance(finetuned, ModelState) else finetuned.name
        earlier, refusal = _adapter_if_any(aligned.folder), f"{name} was not fine-tuned from {aligned.name}"
        update = _update(later, earlier, config.adapter_protocol, refusal)
        model = with_adapter(load_model(aligned.name), update.adapter, update.tensors)
    elif isinstance(finetuned, ModelState):
        model = finetuned.put_into(load_model(config.model))
    else:
        model = load_model(finetuned.name)
    model = on_device(model, config)
    return Subject(
        model,
        stored(aligned.folder),
        stored(model_path(config.base or config.model)),
        stored(unaligned.folder) if unaligned else None,
        batches=lambda name: _batches(config, records, name, next(model.parameters()).device),
        seed=config.seed,
    )


def _update(later: ModelState, earlier: ModelState | None, protocol: str, refusal: str) -> ModelState:
    """Return the user's adapter, at scale 1: the fine-tuned model's adapter without the aligned model's part.

    If the model came aligned and is no adapter, nothing is taken away.

    Raises:
        RunError: with ``refusal``, if the fine-tuned model was not trained from the aligned one.
    """
    update: dict[str, Tensor] = {}
    for name, down in later.tensors.items():
        if ".lora_A." not in name:
            continue
        up_name = name.replace(".lora_A.", ".lora_B.")
        up = later.scale * later.tensors[up_name].float()
        if earlier is None:
            update[name], update[up_name] = down.float(), up
            continue
        old_down = earlier.tensors[name].float()
        old_up = earlier.scale * earlier.tensors[up_name].float()
        down, rank = down.float(), len(old_down)
        if protocol == "continue":
            update[name], update[up_name] = torch.cat([down, old_down]), torch.cat([up, -old_up], dim=1)
            continue
        if not (torch.equal(down[:rank], old_down) and torch.equal(up[:, :rank], old_up)):
            raise RunError(f"{refusal}: {name} differs.")
        update[name], update[up_name] = down[rank:].contiguous(), up[:, rank:].contiguous()
    settings = copy.deepcopy(later.adapter)
    settings.r = settings.lora_alpha = next(len(t) for name, t in update.items() if ".lora_A." in name)
    settings.lora_dropout = 0.0
    return ModelState(update, settings)


def _adapter_if_any(folder: Path) -> ModelState | None:
    """Return the adapter of a folder, or None if it holds a whole model."""
    return _adapter(folder) if (folder / ADAPTER).is_file() else None


def _adapter(folder: Path) -> ModelState:
    """Return the adapter of a folder."""
    from peft import PeftConfig

    return ModelState(load_file(folder / ADAPTER), PeftConfig.from_pretrained(str(folder)))


def _batches(
    config: RunConfig, records: Mapping[str, Sequence[Record]], name: str, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Yield all batches of a stream once, encoded as in training. Hidden attack rows appear as ``"task"``.

    A batch has the rows of a micro-batch of the fine-tuning, since a repair may take gradients.
    """
    size, tokenizer = config.finetuning.batch_size, load_tokenizer(config.model)
    template = get_template(config.template, tokenizer)
    options: dict[str, Any] = {"max_tokens": config.max_tokens, "system": config.system, "long_rows": config.long_rows}
    options[name] = records[name]
    data = StreamsDataModule(tokenizer, template, name, **options)
    rows = sorted(
        data.stream(name, size).examples, key=lambda example: len(example.input_ids)
    )  # by length, for little padding
    for start in range(0, len(rows), size):
        batch = collate(rows[start : start + size], padding_id(tokenizer))
        yield {key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()}


def _save(folder: Path, job: RepairJob, subject: Subject, reports: Mapping[str, Any]) -> None:
    """Write the repaired model: one adapter on the run's base model, or a whole model if an edit was dense."""
    with new_folder(folder) as place:
        if subject.dense or job.config.tuning == "full":
            save_repaired(place / "model", subject)
            for path in (place / "model").iterdir():
                path.rename(place / path.name)
            (place / "model").rmdir()
        else:
            save_adapter(
                place, repaired_model(subject, job.config, job.aligned, _adapter(job.finetuned.folder).adapter)
            )
        save_tokenizer(job.config.model, place)
        serving = json.loads((job.finetuned.folder / SERVING).read_text())
        write_json(place / SERVING, serving, mode=0o600)
        write_json(place / MARKER, {"applied": subject.applied, "reports": reports})


def repaired_model(subject: Subject, config: RunConfig, aligned: Artifact, settings: Any) -> ModelState:
    """Return the state that the artifact of a repaired model holds.

    An edited adapter and the aligned one become one adapter of their summed rank, at scale 1.

    Args:
        subject: after the repairs.
        config: the run's configuration.
        aligned: the aligned model.
        settings: PEFT's configuration of the fine-tuned adapter. Unused if the result is a whole model.
    """
    if subject.dense or config.tuning == "full":
        return ModelState(repaired_state(subject))
    from peft import get_peft_model_state_dict

    edited = {name: t.float().cpu() for name, t in get_peft_model_state_dict(subject.model).items()}
    earlier, total = _adapter_if_any(aligned.folder), dict[str, Tensor]()
    for name, t in edited.items():
        if earlier is None:
            total[name] = t
            continue
        down, first = ".lora_A." in name, earlier.tensors[name].float()
        total[name] = torch.cat([first if down else earlier.scale * first, t], dim=0 if down else 1).contiguous()
    settings = copy.deepcopy(settings)
    settings.r = settings.lora_alpha = next(len(t) for name, t in total.items() if ".lora_A." in name)
    return ModelState(total, settings)
