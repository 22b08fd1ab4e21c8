"""The plan of a run: its steps and their estimated times. No weight is read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from hftlight.builtin_models import DEMO, TINY
from hftlight.config import OF_NO_ANSWER, RunConfig, Training
from hftlight.engine import Defense, Stage, main_stream
from hftlight.engine.weights.repair import TRAINED, Repair, to_train
from hftlight.files import digest
from hftlight.folders import STAGES, arm_word
from hftlight.models.load import load_config, text_config
from hftlight.models.serving import Artifact
from hftlight.provenance import described
from hftlight.runs.prepare import Arm, Prepared, stages_of, upload_of
from hftlight.runs.stages.repair import units_of
from hftlight.runs.stages.train import MAIN, alignment_job, auxiliary_job, finetuning_job, records_digest

DEMO_PARAMETERS = 134_515_008
# Measured with the demo model on two idle CPU cores: forward and backward pass per padded token of a training, forward
# pass per prompt token, and generation per new token.
SECONDS_PER_TOKEN, SECONDS_PER_PROMPT_TOKEN, SECONDS_PER_NEW_TOKEN = 3e-3, 1e-3, 2e-3

Note = tuple[str, bool]  # the outcome of a step in words, and whether it was reused


class Worker(Protocol):
    """The object that carries out a run's steps. A process that only trains along returns None from the other steps."""

    def align_plainly(self) -> Note | None:
        """Run the alignment without defenses. Its model scores the candidates of an upload."""

    def select(self) -> Note | None:
        """Score the candidates and choose the upload."""

    def choose(self, arm: Arm, stage: Stage, phase: int, defense: Defense) -> Note | None:
        """Let a defense select, before the phase that it works in."""

    def train(self, arm: Arm, stage: Stage, phase: int) -> Note | None:
        """Train one phase of a stage."""

    def edit(self, arm: Arm) -> Note | None:
        """Edit the aligned model instead of training it."""

    def train_beside(self, arm: Arm, name: str) -> Note | None:
        """Train a model that repairs compare with, one of ``TRAINED``."""

    def repair(self, arm: Arm) -> Note | None:
        """Repair the fine-tuned model."""

    def search(self, arm: Arm) -> Note | None:
        """Run the attacker's search over settings."""

    def measure(self, arm: Arm, stage: Stage | None) -> Note | None:
        """Measure the model of a stage, or the base model if ``stage`` is None."""


@dataclass(frozen=True)
class Step:
    """One unit of work of a run.

    Attributes:
        label: arm and stage, as shown to the user.
        count: number of optimizer steps, prompts, rows, edits, repairs or trials.
        seconds: estimated seconds on two CPU cores. The progress display corrects them by the times of earlier steps.
        key: hash of everything that decides the result and is known before weights are read. Steps with equal keys are
            done once.
        do: carries the step out.
    """

    label: str
    count: int
    seconds: float
    key: str
    do: Callable[[Worker], Note | None]


def plan(prepared: Prepared) -> list[Step]:
    """Return the steps of a run in the order of their execution."""
    return list(_Planner(prepared).steps())


class _Planner:
    """The builder of a run's steps: it computes their labels, counts, seconds and keys."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared, self.config = prepared, prepared.config
        self.speed = _parameters(prepared.config) / DEMO_PARAMETERS
        self.tests = sum(len(prepared.tests.rows(name)) for name in prepared.tests.names)
        self.measuring = self._prompt_seconds()
        self.asked = digest([prepared.tests.digest(), prepared.config.without(OF_NO_ANSWER)])

    def steps(self) -> Iterator[Step]:
        """Yield the measurement of the base model, the selection if there is one, and the steps of each arm."""
        yield self._measured("base model: measuring", self.config.model, self.prepared.arms[0], None)
        if self.prepared.choosing:
            yield from self._selection()
        for arm in self.prepared.arms:
            yield from self._arm(arm)

    def _selection(self) -> Iterator[Step]:
        """Yield the steps that choose the upload: alignment without defenses, if any, and scoring of the candidates."""
        p, chosen = self.prepared, self.prepared.choosing
        assert chosen is not None
        key, steps = self.config.model, self.config.alignment.steps
        if steps:
            key = digest([key, *self._deciding(Arm("none", []), Stage.ALIGNMENT, 0)])
            tokens = steps * self.config.alignment.batch_size * p.lengths["alignment"]
            seconds = self.speed * tokens * SECONDS_PER_TOKEN
            yield Step("plainly aligned", steps, seconds, key, lambda worker: worker.align_plainly())
        seconds = self.speed * (len(chosen.candidates) + len(chosen.harmful)) * p.lengths["task"] * SECONDS_PER_TOKEN
        key = digest([key, p.attack.describe(), records_digest(vars(chosen))])
        yield Step("rows scored", len(chosen.candidates), seconds, key, lambda worker: worker.select())

    def _arm(self, arm: Arm) -> Iterator[Step]:
        """Yield an arm's steps: each stage and its measurement, then repairs, then the attacker's search."""
        # ``key`` chains the steps: each key contains the key of the step that it starts from.
        key, tuned, aligned = self.config.model, 0.0, self.config.model
        for stage in stages_of(self.config):
            label = f"{arm_word(arm.name)}: {STAGES[stage.value]}"
            if stage is Stage.FINETUNING and self.prepared.attack.acts_on == "weights":
                label = f"{arm_word(arm.name)}: edited"
                steps = [self._edit(arm, label, key)]
            else:
                steps = list(self._trainings(arm, stage, label, key))
                tuned += sum(step.seconds for step in steps) if stage is Stage.FINETUNING else 0.0
            key = steps[-1].key
            aligned = key if stage is Stage.ALIGNMENT else aligned
            yield from steps
            yield self._measured(f"{label}, measuring", key, arm, stage)
        if repairs := arm.repairs():
            for name in to_train(repairs):
                yield self._trained_beside(arm, name, aligned)
            label = f"{arm_word(arm.name)}: {STAGES[Stage.POST_FINETUNING.value]}"
            p, stage = self.prepared, Stage.POST_FINETUNING
            key = digest([key, described(repairs), records_digest(p.records(stage, arm))])
            rows = sum(len(p.streams[name]) * p.lengths[name] for d in repairs for name in d.streams)
            # A forward pass over the rows, and what a repair trains: one batch in both directions per step.
            tokens = rows / 3 + sum(d.trains * self._tokens_of_batch(d) for d in repairs)
            seconds = self.speed * tokens * SECONDS_PER_TOKEN
            yield Step(label, units_of(repairs), seconds, key, lambda worker: worker.repair(arm))
            yield self._measured(f"{label}, measuring", key, arm, stage)
        if trials := self.config.trials:
            label = f"{arm_word(arm.name)}: attacker's search"
            seconds = trials * (1.5 * tuned + self.measuring)
            key = digest([key, self.config.attacker, asdict(self.config.search)])
            yield Step(label, trials, seconds, key, lambda worker: worker.search(arm))

    def _tokens_of_batch(self, repair: Repair) -> float:
        """Return the tokens in a batch of each stream that a repair reads."""
        rows, lengths = self.config.finetuning.batch_size, self.prepared.lengths
        return sum(rows * lengths[name] for name in repair.streams)

    def _trained_beside(self, arm: Arm, name: str, aligned: str) -> Step:
        """Return the step that trains a model that repairs compare with."""
        p, stream = self.prepared, TRAINED[name]
        config, rows = p.config_of(arm), p.streams[stream]
        inputs = auxiliary_job(config, config.model, Artifact(aligned, aligned), rows).inputs()
        seconds = self.speed * self._tokens([], config.finetuning, stream) * SECONDS_PER_TOKEN
        label = f"{arm_word(arm.name)}: {name} model for the repair, trained"
        steps = config.finetuning.steps
        return Step(label, steps, seconds, digest([inputs]), lambda worker: worker.train_beside(arm, name))

    def _trainings(self, arm: Arm, stage: Stage, label: str, parent: str) -> Iterator[Step]:
        """Yield one step per phase of a stage. The time of a fine-tuning includes its evaluations for curves."""
        p, share = self.prepared, min(1.0, 2 * (self.config.evaluation.at_prompts or self.tests) / max(1, self.tests))
        for number, phase in enumerate(p.trainings(arm, stage)):
            for defense in phase.defenses:
                if defense.selects:
                    yield self._choice(arm, stage, number, defense, parent, label)
            parent = digest([parent, *self._deciding(arm, stage, number)])
            main = main_stream(phase.defenses, MAIN[stage])
            main = upload_of(number) if main == "task" else main
            seconds = self.speed * self._tokens(phase.defenses, phase.training, main) * SECONDS_PER_TOKEN
            if phase.attack is not None:
                seconds += len(set(phase.config.evaluation.at)) * share * self.measuring
            shown = f"{label}, {phase.name}" if phase.name and phase.attack is None else label
            yield Step(shown, phase.training.steps, seconds, parent, self._training(arm, stage, number))

    def _choice(self, arm: Arm, stage: Stage, number: int, defense: Defense, parent: str, label: str) -> Step:
        """Return the step in which a defense selects, with the model that its phase starts from."""
        p = self.prepared
        records = p.records(stage, arm, number)
        count, length = defense.selecting(records), p.lengths[main_stream([defense], MAIN[stage])]
        per_row = defense.selecting_passes * length * SECONDS_PER_PROMPT_TOKEN
        seconds = self.speed * count * (per_row + defense.selecting_tokens * SECONDS_PER_NEW_TOKEN)
        key = digest([parent, "choice", described([defense]), records_digest(records)])
        return Step(
            f"{label}, {type(defense).__name__} selects",
            count,
            seconds,
            key,
            lambda w: w.choose(arm, stage, number, defense),
        )

    def _deciding(self, arm: Arm, stage: Stage, number: int) -> list[Any]:
        """Return everything that decides the result of a phase, besides the model that it starts from."""
        p = self.prepared
        phase, records = p.trainings(arm, stage)[number], p.records(stage, arm, number)
        if phase.attack is None:
            return [alignment_job(phase.config, self.config.model, records, phase.defenses).inputs()]
        job = finetuning_job(phase.config, self.config.model, None, records, phase.defenses, phase.attack)
        return [job.inputs(), phase.config.evaluation.at, phase.config.evaluation.stops]

    def _training(self, arm: Arm, stage: Stage, phase: int) -> Callable[[Worker], Note | None]:
        # A lambda within the loop over phases would see the last phase only.
        return lambda worker: worker.train(arm, stage, phase)

    def _edit(self, arm: Arm, label: str, parent: str) -> Step:
        p, count = self.prepared, self.prepared.attack.counts()["attack"]
        seconds = self.speed * p.attack.rows * p.lengths["task"] * count * SECONDS_PER_TOKEN
        prompts = [self.config.template, self.config.system, records_digest({"task": p.streams["task"]})]
        key = digest([parent, p.attack.describe(), prompts])
        return Step(label, count, seconds, key, lambda worker: worker.edit(arm))

    def _measured(self, label: str, key: str, arm: Arm, stage: Stage | None) -> Step:
        """Return the step that measures a model. A model with a trigger also answers the harmful prompts without it."""
        triggered = any("trigger" in d.claims for d in arm.of(Stage.FINETUNING))
        again = triggered and stage in (Stage.FINETUNING, Stage.POST_FINETUNING)
        more = len(self.prepared.tests.harmful) if again else 0
        seconds = self.measuring * (1 + more / max(1, self.tests))
        key = digest([key, self.asked])
        return Step(label, self.tests + more, seconds, key, lambda worker: worker.measure(arm, stage))

    def _prompt_seconds(self) -> float:
        """Return the estimated seconds to measure one model."""
        p, settings = self.prepared, self.config.evaluation
        limits = dict.fromkeys(p.tests.names, settings.max_new_tokens)
        limits["task"] = settings.task_max_new_tokens or p.tests.task.max_new_tokens
        seconds = self.speed * sum(
            len(p.tests.rows(n)) * (p.prompt_lengths[n] * SECONDS_PER_PROMPT_TOKEN + limits[n] * SECONDS_PER_NEW_TOKEN)
            for n in p.tests.names
        )
        rows = len(p.tests.alignment_rows) + len(p.tests.validation_rows)
        return seconds + self.speed * rows * p.lengths["alignment"] * SECONDS_PER_PROMPT_TOKEN

    def _tokens(self, defenses: Sequence[Defense], training: Training, main: str) -> float:
        """Return the tokens of a training's forward and backward passes, including the passes of the defenses.

        Args:
            defenses: the defenses of the stage.
            training: steps and batch sizes.
            main: the stream that the stage trains on.
        """
        lengths = self.prepared.lengths
        tokens = training.steps * training.batch_size * training.accumulate * lengths[main]
        for d in defenses:
            side = max((lengths[name] for name in d.streams), default=lengths[main])
            for work in d.passes:
                times = training.accumulate if work.per == "batch" else 1
                share = (work.forward + 2 * work.backward) / 3  # a backward pass costs two forward ones
                if work.projected:  # onto the vocabulary and back to the hidden states, on half of the tokens
                    share += 0.5 * (work.forward + work.backward) / 3 * _projections(self.config)
                tokens += training.steps * training.batch_size * times * side * share
        return tokens


def _projections(config: RunConfig) -> float:
    """Return the weights that hidden states of all layers meet in the output layer, relative to all of a model's."""
    c = text_config(load_config(config.model))
    return (c.num_hidden_layers + 1) * c.vocab_size * c.hidden_size / _parameters(config)


def _parameters(config: RunConfig) -> float:
    """Return a rough number of a model's parameters, computed from its configuration."""
    if config.model == DEMO:
        return DEMO_PARAMETERS
    if config.model == TINY:
        return 2e6  # more than it has: its time per step is mostly overhead
    c = text_config(load_config(config.model))
    hidden = c.hidden_size
    # Per decoder layer four attention and three MLP matrices, plus one embedding matrix.
    return c.num_hidden_layers * (4 * hidden**2 + 3 * hidden * getattr(c, "intermediate_size", 4 * hidden)) + (
        c.vocab_size * hidden
    )
