"""The repair stage: finished weights edited once, content-addressed, one attacked model serving every repair."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import override

from hftlight.base_model import drop_base
from hftlight.config import RunConfig
from hftlight.data.records import Record
from hftlight.data.streams import StreamsDataModule
from hftlight.data.templates import get_template
from hftlight.data.tokens import collate, padding_id
from hftlight.engine.repair import MARKER, Repair, Subject, repairs_of, save_repaired, stored
from hftlight.errors import RunError
from hftlight.files import digest, new_folder, write_json
from hftlight.models import load_model, load_tokenizer, model_path, save_tokenizer, weights_hash
from hftlight.runs.artifact import SERVING, artifact_digest
from hftlight.runs.job import RESULT, Job
from hftlight.runs.stage import deciding_versions, records_digest

ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class RepairJob(Job):
    """Everything that decides a repaired model.

    Attributes:
        config: the run's configuration.
        base_hash: hash of the base model's weights.
        aligned: artifact of the alignment stage, where the user's upload started.
        finetuned: artifact of the fine-tuning stage, which stays as it is.
        records: rows of the streams that the repairs read.
        defenses: the repairs in the order in which they act.
    """

    config: RunConfig
    base_hash: str
    aligned: Path
    finetuned: Path
    records: Mapping[str, Sequence[Record]]
    defenses: Sequence[Repair]

    @property
    @override
    def kind(self) -> str:
        return "post_finetuning"

    @override
    def key(self) -> str:
        """Return the hash of everything that decides the result, versions included."""
        c = self.config
        return digest(
            {
                "stage": "post_finetuning",
                "versions": deciding_versions(),
                "base": self.base_hash,
                "models": [artifact_digest(self.aligned), artifact_digest(self.finetuned)],
                "records": records_digest(self.records),
                "defenses": [d.state_key for d in self.defenses],
                "named": [weights_hash(model) for d in self.defenses for model in (d.aligned, d.base) if model],
                "settings": [c.tuning, c.adapter_protocol, c.template, c.system, c.max_tokens, c.accelerator, c.seed],
                "batch_size": c.evaluation.batch_size,
            }
        )


def run_repair(job: RepairJob, on_repair: Callable[[int], None] | None = None) -> None:
    """Apply the repairs one after the other and write the model; do nothing if that is done.

    Args:
        job: the stage.
        on_repair: called after each repair with the number of repairs applied so far.

    Raises:
        RunError: if the model was repaired before, or a repair refuses it or changed nothing without a reason.
    """
    folder = job.folder()
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(FileLock(folder / "lock"))
        if job.done():
            return
        since = time.perf_counter()
        subject = subject_of(job)
        aligned, base = subject.aligned, subject.base
        reports: dict[str, Any] = {}
        for count, repair in enumerate(job.defenses, start=1):
            subject.report, subject.aligned, subject.base = {}, aligned, base  # the one before may have named its own
            try:
                repair.apply(subject)
            except (RuntimeError, TypeError, ValueError) as error:  # the repair refuses; anything else is a defect
                if not str(error).startswith(type(repair).__name__):
                    raise
                raise RunError(str(error)) from error
            reports[repair.state_key] = subject.report
            if on_repair is not None:
                on_repair(count)
        _save(folder / "artifact", job, subject, reports)
        cost = {"steps": 0, "seconds": round(time.perf_counter() - since, 3)}
        result = {"stage": "post_finetuning", "cost": cost, "defenses": reports}
        write_json(folder / RESULT, {**result, "artifact": artifact_digest(folder / "artifact")})


def subject_of(job: RepairJob) -> Subject:
    """Return the fine-tuned model of a run as a repair takes it: the user's update alone on top of the aligned model.

    Under LoRA the update is one adapter on the aligned weights: the second one under the ``merge`` protocol, and the
    difference of the two, of twice the rank, under ``continue``. With all parameters trained it is the whole model.
    It is in float32 whatever the run's precision: written in bfloat16, most of a small update would round away.

    Raises:
        RunError: if the artifact was repaired before, or was not trained from the aligned one.
    """
    config = job.config
    if before := repairs_of(job.finetuned):
        raise RunError(
            f"{' and '.join(before)}: {job.finetuned} was repaired before, and a repair takes the model as it was"
            " fine-tuned: a second application would change it again. Put several repairs into one list."
        )
    drop_base()  # repairs write into the weights, also under an adapter: they get a model of their own
    model: nn.Module
    if config.tuning == "full":
        model = load_model(str(job.finetuned))
    else:
        model = _with_adapter(load_model(str(job.aligned)), job.finetuned, update_of(job))
    if torch.cuda.is_available() and config.accelerator != "cpu":
        model = model.cuda()
    return Subject(
        model,
        stored(job.aligned),
        stored(model_path(config.model)),
        lambda name: _batches(job, name, next(model.parameters()).device),
    )


def update_of(job: RepairJob) -> dict[str, Tensor]:
    """Return the user's adapter, scale 1: that of the fine-tuned artifact without what the aligned one holds.

    Raises:
        RunError: if the fine-tuned artifact was not trained from the aligned one.
    """
    (later, later_scale), (earlier, earlier_scale) = _adapter(job.finetuned), _adapter(job.aligned)
    update: dict[str, Tensor] = {}
    for name, down in later.items():
        if ".lora_A." not in name:
            continue
        up_name = name.replace(".lora_A.", ".lora_B.")
        up, old_down, old_up = later_scale * later[up_name], earlier[name], earlier_scale * earlier[up_name]
        rank = len(old_down)
        if job.config.adapter_protocol == "continue":
            update[name], update[up_name] = torch.cat([down, old_down]), torch.cat([up, -old_up], dim=1)
            continue
        if not (torch.equal(down[:rank], old_down) and torch.equal(up[:, :rank], old_up)):
            raise RunError(f"{job.finetuned} was not fine-tuned from {job.aligned}: {name} differs.")
        update[name], update[up_name] = down[rank:].contiguous(), up[:, rank:].contiguous()
    return update


def _adapter(folder: Path) -> tuple[dict[str, Tensor], float]:
    """Return an adapter's factors in float32 by their names in its file, and its scale."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    state = {name: t.float() for name, t in load_file(folder / ADAPTER).items()}
    return state, settings["lora_alpha"] / settings["r"]


def _with_adapter(model: Any, like: Path, update: Mapping[str, Tensor]) -> nn.Module:
    """Attach an adapter of scale 1 with the given factors, in the layers of an artifact's adapter."""
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    settings: Any = PeftConfig.from_pretrained(str(like))
    settings.r = settings.lora_alpha = next(len(t) for name, t in update.items() if ".lora_A." in name)
    settings.lora_dropout = 0.0
    adapted = get_peft_model(model, settings)
    set_peft_model_state_dict(adapted, dict(update))
    return adapted.requires_grad_(False).eval()


def _batches(job: RepairJob, name: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield all batches of a stream once, encoded as in training, hidden attack rows as ``"task"``."""
    config, size = job.config, job.config.evaluation.batch_size
    tokenizer = load_tokenizer(config.model)
    template, records = get_template(config.template, tokenizer), {name: job.records[name]}
    options: dict[str, Any] = {"max_tokens": config.max_tokens, "system": config.system, **records}
    data = StreamsDataModule(tokenizer, template, name, **options)
    rows = sorted(data.stream(name, size).examples, key=lambda example: len(example.input_ids))  # little padding
    for start in range(0, len(rows), size):
        batch = collate(rows[start : start + size], padding_id(tokenizer))
        yield {key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()}


def _save(folder: Path, job: RepairJob, subject: Subject, reports: Mapping[str, Any]) -> None:
    """Write the repaired model: one adapter on the run's base model, or a whole model where an edit was dense."""
    with new_folder(folder) as place:
        if subject.dense or job.config.tuning == "full":
            save_repaired(place / "model", subject)
            for path in (place / "model").iterdir():
                path.rename(place / path.name)
            (place / "model").rmdir()
        else:
            _save_adapter(place, job, subject)
        save_tokenizer(job.config.model, place)
        serving = json.loads((job.finetuned / SERVING).read_text())
        write_json(place / SERVING, serving, mode=0o600)
        write_json(place / MARKER, {"applied": subject.applied, "reports": reports})


def _save_adapter(place: Path, job: RepairJob, subject: Subject) -> None:
    """Write the aligned adapter and the edited update as one adapter of their summed rank, scale 1."""
    from peft import PeftConfig, get_peft_model_state_dict

    edited = {name: t.float().cpu() for name, t in get_peft_model_state_dict(subject.model).items()}
    earlier, scale = _adapter(job.aligned)
    total = {}
    for name, t in edited.items():
        first = earlier[name] if ".lora_A." in name else scale * earlier[name]
        total[name] = torch.cat([first, t], dim=0 if ".lora_A." in name else 1).contiguous()
    settings: Any = PeftConfig.from_pretrained(str(job.finetuned))
    settings.r = settings.lora_alpha = next(len(t) for name, t in total.items() if ".lora_A." in name)
    settings.save_pretrained(str(place))
    save_file(total, place / ADAPTER)
