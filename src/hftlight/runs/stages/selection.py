"""Benign selection in a run: the plainly aligned model scores the task's rows once, into the cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

from hftlight import cache
from hftlight.attacks.benign_selection import BenignSelection, write_scores
from hftlight.config import OF_NO_STAGE, RunConfig, Training
from hftlight.data.records import Record
from hftlight.data.templates import get_template
from hftlight.errors import InputError
from hftlight.files import cache_dir
from hftlight.models.base import device_of, on_device
from hftlight.models.load import load_tokenizer
from hftlight.models.serving import Artifact, trainable_model
from hftlight.runs.stages.train import records_digest

SCORES = "scores.jsonl"
CHOOSING = ("n", "control", "scores")  # these fields choose among scores; the others decide the scores
OWN = {f.name for f in fields(BenignSelection)} & set(BenignSelection.__annotations__) - set(CHOOSING)


@dataclass(frozen=True)
class SelectionJob:
    """Everything that decides the scores of a selection.

    Attributes:
        config: the run's configuration.
        aligned: the plainly aligned model.
        attack: how rows are scored.
        candidates: the harmless rows.
        harmful: harmful rows with answers, the anchors.
        safe: rows that refuse, the other anchors of the gradient.
    """

    config: RunConfig
    aligned: Artifact
    attack: BenignSelection
    candidates: Sequence[Record]
    harmful: Sequence[Record]
    safe: Sequence[Record]

    @cached_property
    def _key(self) -> str:
        records = {"task": self.candidates, "harmful": self.harmful, "safe": self.safe}
        training = {f"finetuning.{f.name}" for f in fields(Training)} - {"finetuning.batch_size"}
        return cache.key(
            "selection",
            ["hftlight.runs.stages.selection", type(self.attack)],
            config=self.config.without({*OF_NO_STAGE, "alignment", "evaluation", "max_tokens", *training}),
            aligned=self.aligned.identity,
            records=records_digest(records),
            attack={name: getattr(self.attack, name) for name in sorted(OWN)},
            device=device_of(self.config),
        )

    def key(self) -> str:
        """Return the hash of everything that decides the scores, code and versions included."""
        return self._key

    def folder(self) -> Path:
        """Return the folder of the scores."""
        return cache_dir() / "selections" / self.key()

    def done(self) -> bool:
        """Tell whether the scores are there and intact."""
        return cache.whole(self.folder())


def run_selection(job: SelectionJob, on_rows: Callable[[int], None] | None = None) -> Path:
    """Score the rows with the aligned model, unless the scores exist, and return their file.

    Args:
        job: the rows and the model that scores them.
        on_rows: called once with the number of scored rows.

    Raises:
        InputError: if no row fits, or there are fewer anchors than ``nearest``.
    """

    def make(place: Path) -> None:
        scores = _scores(job)
        write_scores(place / SCORES, job.candidates, scores)
        if on_rows is not None:
            on_rows(len(scores))

    return cache.kept("selections", job.key(), make) / SCORES


def _scores(job: SelectionJob) -> Sequence[float]:
    config, attack = job.config, job.attack
    tokenizer = load_tokenizer(config.model)
    trainable = attack.kind == "gradient" and attack.parameters == "trainable"
    chosen = trainable_model(config, job.aligned) if trainable else job.aligned.model(config)
    with chosen as model:
        model = on_device(model, config)
        try:
            return attack.score(
                model,
                tokenizer,
                get_template(config.template, tokenizer),
                job.candidates,
                job.harmful,
                [job.safe] if attack.kind == "gradient" and job.safe else [],
                config.system,
                config.finetuning.batch_size,
                config.seed,
            )
        except ValueError as error:
            raise InputError(f"BenignSelection: {error}") from error
