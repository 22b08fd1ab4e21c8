"""A defense's selection in a run: computed once, with the model that its stage starts from, into the cache."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hftlight import cache
from hftlight.config import OF_NO_STAGE, RunConfig
from hftlight.data.records import Record
from hftlight.data.templates import get_template
from hftlight.engine import Defense, Slot
from hftlight.errors import InputError
from hftlight.files import cache_dir, write_rows
from hftlight.models.base import device_of
from hftlight.models.serving import Artifact
from hftlight.provenance import described
from hftlight.runs.stages.train import records_digest

ROWS = "rows.jsonl"
# Options that decide how a stage trains, and not what a model says before it is trained.
OF_NO_CHOICE = {*OF_NO_STAGE, "alignment", "finetuning", "evaluation", "adapter_protocol", "log_every"}


@dataclass(frozen=True)
class ChoiceJob:
    """Everything that decides a defense's selection.

    Attributes:
        config: configuration of the stage.
        model: the model that the stage starts from.
        records: the rows that the stage may read, by stream.
        defense: the defense that selects.
    """

    config: RunConfig
    model: Artifact
    records: Mapping[str, Sequence[Record]]
    defense: Defense

    @property
    def _adapts(self) -> bool:
        """Whether the selection depends on the adapter that the stage trains."""
        return Slot.ADAPTER in self.defense.slots

    @cached_property
    def _key(self) -> str:
        return cache.key(
            "choice",
            ["hftlight.runs.stages.choice", type(self.defense)],
            model=self.model.identity,
            config=self.config.without(OF_NO_CHOICE | (set() if self._adapts else {"lora"})),
            records=records_digest(self.records),
            defense=described([self.defense]),
            device=device_of(self.config),
        )

    def key(self) -> str:
        """Return the hash of everything that decides the selection, code and versions included."""
        return self._key

    def done(self) -> bool:
        """Tell whether the selection is there and intact."""
        return cache.whole(cache_dir() / "selections" / self.key())


def run_choice(job: ChoiceJob, on_rows: Callable[[int], None] | None = None) -> Path:
    """Let the defense select, unless its selection exists, and return the file with the result.

    Args:
        job: the defense, its rows and the model.
        on_rows: called with the number of rows done so far.

    Raises:
        InputError: if the defense refuses the rows or the model.
    """

    def make(place: Path) -> None:
        config = job.config
        sized = config.finetuning if job.defense.selects_by_gradient else config.evaluation
        tokenizer = job.model.tokenizer()
        template = get_template(config.template, tokenizer)
        job.defense.adapter = config.lora if job._adapts else None
        with job.model.model(config) as model:
            try:
                rows = job.defense.select(
                    model, tokenizer, template, job.records, config.system,
                    sized.batch_size, config.seed, on_rows,
                )  # fmt: skip
            except ValueError as error:
                raise InputError(str(error)) from error
        write_rows(place / ROWS, rows)

    return cache.kept("selections", job.key(), make) / ROWS
