"""The edit stage: one weight of the aligned model is edited instead of fine-tuned, content-addressed."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from filelock import FileLock
from typing_extensions import override

from hftlight.attacks.model_edit import ModelEdit
from hftlight.config import OF_NO_STAGE, RunConfig
from hftlight.data.records import Record
from hftlight.data.templates import get_template
from hftlight.engine.weights.stored import stored
from hftlight.errors import InputError
from hftlight.files import new_folder, write_json
from hftlight.models.base import device_of, on_device
from hftlight.models.load import load_model, load_tokenizer
from hftlight.models.serving import SERVING, Artifact
from hftlight.runs.stages.job import Job
from hftlight.runs.stages.train import records_digest

OWN = ("layer", "value_steps", "value_lr", "reach", "ridge")  # arguments of the attack that decide an edit


@dataclass(frozen=True)
class EditJob(Job):
    """Everything that decides an edited model.

    Attributes:
        config: the run's configuration.
        base_hash: hash of the base model's weights.
        aligned: the aligned model.
        records: the prompts to edit have the role ``"attack"`` and their subject as ``kind``. The others are ordinary
            rows, whose keys keep their values.
        attack: how edits are computed.
    """

    config: RunConfig
    base_hash: str
    aligned: Artifact
    records: Sequence[Record]
    attack: ModelEdit

    @property
    @override
    def kind(self) -> str:
        return "finetuning"

    @property
    @override
    def decided_by(self) -> str:
        return "edit"

    @override
    def code(self) -> Sequence[Any]:
        return ["hftlight.runs.stages.model_edit", type(self.attack)]

    @override
    def inputs(self) -> dict[str, Any]:
        """Return everything that decides the edited weights."""
        trained = ("alignment", "finetuning", "lora", "evaluation", "adapter_protocol", "seed", "max_tokens")
        return {
            "config": self.config.without({*OF_NO_STAGE, *trained}),
            "base": self.base_hash,
            "aligned": self.aligned.identity,
            "records": records_digest({"task": self.records}),
            "attack": {name: getattr(self.attack, name) for name in OWN},
            "device": device_of(self.config),
        }


def run_edit(job: EditJob, on_edit: Callable[[int], None] | None = None) -> None:
    """Edit the aligned model, one prompt after the other, and write all its weights.

    Nothing happens if the stage is done.

    Args:
        job: the stage.
        on_edit: called after each edit with the number of edits so far.

    Raises:
        InputError: if the model has no such layer, or a prompt cannot be edited.
    """
    folder, config = job.folder(), job.config
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(FileLock(folder / "lock"))
        if job.done():
            return
        since = time.perf_counter()
        model, tokenizer = _aligned(job), load_tokenizer(config.model)
        template, edits = get_template(config.template, tokenizer), []
        background = [r for r in job.records if r.role != "attack"]
        for record in (r for r in job.records if r.role == "attack"):
            try:
                done = job.attack.edit(model, tokenizer, template, record, record.kind, background, config.system)
            except (TypeError, ValueError) as error:  # a refusal names the edit; any other error is a defect
                if not str(error).startswith(("ModelEdit", "rank_one_edit")):
                    raise
                raise InputError(str(error)) from error
            edits.append({"id": record.id, "subject": record.kind, **asdict(done)})
            if on_edit is not None:
                on_edit(len(edits))
        with new_folder(job.place()) as place:
            model.save_pretrained(place)
            tokenizer.save_pretrained(place)
            write_json(
                place / SERVING, {"template": config.template, "system": config.system, "trigger": None}, mode=0o600
            )
        cost = {"steps": 0, "seconds": round(time.perf_counter() - since, 3)}
        job.finish({"stage": "finetuning", "cost": cost, "defenses": {}, "edits": edits})


def _aligned(job: EditJob) -> Any:
    """Return the aligned model, with exactly the weights that a repair reads as aligned."""
    model: Any = load_model(job.aligned.name)
    weights = stored(job.aligned.folder)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if weights.shape(name) is not None:
                p.copy_(weights.rows(name))
    return on_device(model, job.config)
