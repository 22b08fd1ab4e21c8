"""Preparation of a run before any weights are loaded: rows, overlaps, stages, steps, and checks of everything."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hftlight.attacks.attack import Attack, Choosing, steps_of
from hftlight.attacks.registry import get_attack
from hftlight.config import RunConfig, Training
from hftlight.data.pairs import PairsDataModule
from hftlight.data.records import Record, overlaps, prompt_key, split_by_hash
from hftlight.data.sources import get_task
from hftlight.data.streams import ExampleStream, StreamsDataModule, as_pairs
from hftlight.data.templates import SystemSlot, get_template
from hftlight.data.tokens import Example, encode_all, encode_pairs, encode_prompt, single_rows
from hftlight.engine import Defense, Slot, Stage, check, in_order, main_stream
from hftlight.engine.weights.repair import TRAINED, Repair, repairs_after, to_train
from hftlight.errors import InputError
from hftlight.evaluation.judges import get_judge
from hftlight.evaluation.metrics.refusals import get_refusal_classifier
from hftlight.evaluation.safety_rows import ordinary, refusals
from hftlight.files import check_cache, digest
from hftlight.model_files import trust_remote_code
from hftlight.models.load import load_config, load_tokenizer, positions_of
from hftlight.models.preference import refuse_loss_terms
from hftlight.registry import name_of
from hftlight.runs.measuring.test_sets import TestSets
from hftlight.runs.model_checks import Limits, check_adapter, check_architecture, template_notes
from hftlight.runs.sources import BUILTIN, DEFENDERS, Sources
from hftlight.runs.stages.train import MAIN, alignment_phases, phases_of, stage_config
from hftlight.search.space import Budget

UNLIMITED = 10**9  # tokens


@dataclass
class Arm:
    """One arm of a run: the attack with, or without, defenses.

    Attributes:
        name: ``"none"``, or the names of the defenses joined by ``+``.
        defenses: the arm's defenses in the order in which they act.
    """

    name: str
    defenses: list[Defense]

    def of(self, stage: Stage) -> list[Defense]:
        """Return the defenses that work in a stage. The repairs begin with what other defenses deploy."""
        if stage is Stage.POST_FINETUNING:
            return list(self.repairs())
        return [d for d in self.defenses if d.stage is stage]

    def repairs(self) -> list[Repair]:
        """Return the repairs of the fine-tuned model, in order."""
        return repairs_after(self.defenses)


@dataclass(frozen=True)
class Phase:
    """One training of an arm.

    Attributes:
        config: configuration of the arm, with the settings of this phase.
        defenses: the defenses that work in this phase.
        attack: the upload of this phase. None in the alignment stage.
        name: what tells this phase from the other phases of its stage. Empty if there is one phase only.
    """

    config: RunConfig
    defenses: list[Defense]
    attack: Attack | None = None
    name: str = ""

    @property
    def training(self) -> Training:
        """Steps, learning rate, batches and the other training settings of the phase."""
        return self.config.alignment if self.attack is None else self.config.finetuning


@dataclass(frozen=True)
class TrainedOn:
    """The part of an upload that the fine-tuning trains on, after long rows were dropped or cut.

    Attributes:
        rows: number of training rows, or of pairs if the upload holds pairs.
        attack_rows: number of attack rows among them.
        steps: optimizer steps.
        attack_tokens: share of response tokens over all steps that belong to attack rows, 0-1.
        attack_steps: share of steps with at least one attack row, 0-1.
    """

    rows: int = 0
    attack_rows: int = 0
    steps: int = 0
    attack_tokens: float = 0.0
    attack_steps: float = 0.0

    @property
    def p(self) -> float:
        """Fraction of attack rows, 0-1."""
        return self.attack_rows / self.rows if self.rows else 0.0


@dataclass
class Prepared:
    """A run before its first step.

    Attributes:
        config: the checked configuration, including the attack's settings.
        given: the attack as the user passed it.
        attack: the attack with all its values resolved.
        arms: the arms; the undefended arm comes first, if there is one.
        streams: rows by stream: alignment, harmful and pairs (if a defense draws from them), task (the upload), and the
            uploads of further phases, named by ``upload_of``.
        tests: the test sets for every model.
        lengths: mean tokens per row, by stream.
        prompt_lengths: mean tokens per prompt, by test set.
        dropped: number of rows longer than the limit that are left out, by stream.
        cut: number of rows longer than the limit whose end is cut off, by stream.
        trained_on: the part of the upload that the fine-tuning, or its first phase, trains on.
        choosing: the rows from which the aligned model will choose the upload; None once it has chosen, or if it does
            not choose. Until the choice, the upload is a placeholder: the same number of task rows.
        overlaps: number of equal prompts by pair of sets.
        taken: description of what was read from each source, by the source's name.
        notes: sentences about this model and its prompts that a reader of the results must know.
        config_hash: hash of everything that decides the result.
    """

    config: RunConfig
    given: Attack
    attack: Attack
    arms: list[Arm]
    streams: dict[str, list[Record]]
    tests: TestSets
    lengths: dict[str, float] = field(default_factory=dict)
    prompt_lengths: dict[str, float] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    trained_on: "TrainedOn" = field(default_factory=lambda: TrainedOn())
    choosing: Choosing | None = None
    overlaps: dict[str, int] = field(default_factory=dict)
    taken: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    config_hash: str = ""

    @property
    def phases(self) -> list[tuple[RunConfig, Attack]]:
        """Configuration and attack of each training on an upload."""
        return phases_of(self.config, self.attack)

    @property
    def uploaded(self) -> list[Record]:
        """The rows of all uploads."""
        return [row for number in range(len(self.phases)) for row in self.streams[upload_of(number)]]

    def config_of(self, arm: Arm) -> RunConfig:
        """Return the configuration of an arm, which may have its own adapter protocol."""
        return replace(self.config, adapter_protocol=self.config.protocol_of(arm.name))

    def records(self, stage: Stage, arm: Arm, phase: int = 0) -> dict[str, list[Record]]:
        """Return the rows that a stage of an arm may read, by stream.

        Args:
            stage: the stage.
            arm: the arm.
            phase: phase of the stage, counted from 0.
        """
        defenses = arm.of(stage) if stage is Stage.POST_FINETUNING else self.trainings(arm, stage)[phase].defenses
        return stage_records(self.streams, stage, defenses, phase)

    def trainings(self, arm: Arm, stage: Stage) -> list[Phase]:
        """Return the phases of an arm's alignment or fine-tuning, in order."""
        config, defenses = self.config_of(arm), arm.of(stage)
        if stage is Stage.ALIGNMENT:
            alignments = alignment_phases(config, defenses)
            names = ("plain", "hardening") if len(alignments) > 1 else ("",)
            return [Phase(own, some, None, name) for (own, some), name in zip(alignments, names, strict=True)]
        uploads = phases_of(config, self.attack)
        return [Phase(own, defenses, attack, attack.name if len(uploads) > 1 else "") for own, attack in uploads]


def stages_of(config: RunConfig) -> tuple[Stage, ...]:
    """Return the stages of a run before repairs. With 0 alignment steps the model is already aligned."""
    return (Stage.ALIGNMENT, Stage.FINETUNING) if config.alignment.steps else (Stage.FINETUNING,)


def upload_of(phase: int) -> str:
    """Return the name of the stream that holds a phase's upload: ``"task"`` for phase 0, ``"task_2"`` for phase 1."""
    return f"task_{phase + 1}" if phase else "task"


def stage_records(
    streams: Mapping[str, list[Record]], stage: Stage, defenses: Sequence[Defense], phase: int = 0
) -> dict[str, list[Record]]:
    """Return the rows that a stage may read: its main stream and the streams of its defenses.

    The main stream of the fine-tuning is named ``"task"`` in every phase.

    Args:
        streams: rows of all streams of the run.
        stage: the stage. A repair has no main stream.
        defenses: the defenses of the stage.
        phase: phase of the stage, counted from 0. In the alignment stage every phase reads the same streams.
    """
    names = {name for d in defenses for name in d.streams}
    if stage in MAIN:
        names.add(main_stream(defenses, MAIN[stage]))
    return {name: streams[upload_of(phase) if name == "task" else name] for name in sorted(names)}


def prepare(config: RunConfig, defenses: Sequence[Defense], attack: Attack | None = None) -> Prepared:
    """Read and check everything that does not need weights.

    Args:
        config: the run's configuration.
        defenses: the defenses of the defended arm. Without defenses only the undefended arm runs.
        attack: the attack as an instance, instead of ``config.attack``.

    Raises:
        InputError: naming what is wrong with the configuration or a file.
        ValueError: if the defenses cannot work together.
    """
    # Check twice: the attack needs a valid configuration, and its own settings may make the configuration invalid.
    config.check()
    try:
        given = attack or get_attack(config.attack)()
        attack = given.resolved(config)
        config = attack.applied(replace(config, attack=attack.name))
        config.check()
    except ValueError as error:
        raise InputError(str(error)) from error
    check_cache()
    trust_remote_code(config.trust_remote_code)
    config, notes = _lower_max_tokens(config, attack)
    if attack.acts_on == "weights":
        _check_edit(config, attack, defenses)
    if config.trials:
        _check_search(config, attack)
    _check_curve(config, attack)
    if any(phase.acts_on == "pairs" for phase in attack.phases()):
        refuse_loss_terms([d for d in defenses if d.stage is Stage.FINETUNING and Slot.LOSS in d.slots])
    check(defenses, one_stage=False)
    if not config.alignment.steps:
        _check_aligned(config, defenses)
    repairs = [type(d).__name__ for d in defenses if d.stage is Stage.POST_FINETUNING or d.deployment() is not None]
    for d in defenses:
        if d.stage is Stage.POST_FINETUNING and not isinstance(d, Repair):
            raise InputError(
                f"{type(d).__name__} works in the post_finetuning stage but is no Repair, so run() cannot apply it."
                " Derive it from hftlight.engine.weights.repair.Repair and implement edit()."
            )
    if repairs and config.tuning == "qlora":
        raise InputError(
            f"{' and '.join(repairs)}: a repair needs the aligned weights under the adapter, but --tuning qlora packs"
            " them in 4 bits. Use --tuning lora, or repair the artifact on an unquantized base."
        )
    check_adapter(config, repaired=bool(repairs))
    check_architecture(config, defenses)
    arms = [Arm("none", [])] if config.baseline or not defenses else []
    if defenses:
        arms.append(Arm("+".join(name_of(d) for d in defenses), in_order(defenses)))
    needed = {name for d in defenses for name in (*d.streams, d.main) if name}
    needed |= {TRAINED[name] for name in to_train(repairs_after(defenses))}
    sources = Sources(config.data)
    source_rows = _read_sources(config, sources, needed, attack)
    with _explain_lowered_limit(notes):
        streams = _streams(config, needed, attack, source_rows, notes)
    tests = test_sets(config, attack, sources)
    for d in defenses:
        d.check_judges([get_judge(name) for name in tests.judges])
    if config.trials and not tests.task.graded:
        raise InputError(
            f"--attacker search needs the task's accuracy, but --data.task {tests.task.name} has no right answers. Use"
            " --attacker fixed, or another task."
        )
    aligned, held_out = _loss_rows(config, source_rows, streams)
    tests = replace(tests, alignment_rows=aligned, validation_rows=held_out)
    if config.trials and (len(tests.harmful) < 2 or len(tests.task_rows) < 2):
        raise InputError(
            "--attacker search chooses settings on one half of the test prompts and reports on the other half. It"
            f" needs at least 2 harmful prompts and 2 rows of the task, got {len(tests.harmful)} and"
            f" {len(tests.task_rows)}. Raise --evaluation.prompts and --evaluation.task_rows."
        )
    notes += sources.notes
    prepared = Prepared(config, given, attack, arms, streams, tests, taken=sources.taken, notes=notes)
    if attack.selects:
        prepared.choosing = _candidates_and_anchors(config, attack)
    _encode_and_check(prepared)
    # The hash names rows by id. An upload that is still to be chosen counts by its candidates and anchors.
    attacked = {key: value for key, value in attack.describe().items() if key not in ("source",)}
    rows: dict[str, Any] = {name: [r.id for r in records] for name, records in streams.items()}
    if chosen := prepared.choosing:
        rows["task"] = [[r.id for r in group] for group in (chosen.candidates, chosen.harmful, chosen.safe)]
    # What a defense deploys may differ while its training is the same.
    acting = [d.state_key for d in (*defenses, *(d for d in repairs_after(defenses) if d not in defenses))]
    rows["losses"] = [[r.id for r in some] for some in (aligned, held_out)]
    prepared.config_hash = digest([config.deciding(), attacked, acting, rows, tests.digest()])
    return prepared


def choose(prepared: Prepared, scores: Path) -> None:
    """Replace the placeholder upload by the rows that the aligned model's scores choose, in place.

    Args:
        prepared: the run.
        scores: file of the scores.

    Raises:
        ValueError: if the run's upload is not chosen by scores.
    """
    if prepared.choosing is None:
        raise ValueError("choose: this run's upload is not chosen by scores.")
    seed = prepared.config.seed
    prepared.attack, prepared.streams["task"] = prepared.attack.chosen(prepared.choosing, str(scores), seed)
    prepared.choosing = None
    _encode_and_check(prepared)


def _candidates_and_anchors(config: RunConfig, attack: Attack) -> Choosing:
    """Return the rows from which the aligned model will choose the upload.

    Raises:
        InputError: if the run has several processes or --tuning qlora.
    """
    if config.devices * config.num_nodes > 1 or config.tuning == "qlora":
        raise InputError(
            f"{type(attack).__name__} scores rows in one process, with --tuning lora or full. Compute the scores in"
            " such a run first, and pass their file, which its manifest names, to --benign_selection.scores."
        )
    sources = _read_sources(config, Sources(config.data), set(), attack)
    return attack.choosing(sources, refusals(sources["alignment"]))


def _encode_and_check(prepared: Prepared) -> None:
    """Encode and check all rows, and fill in lengths, dropped rows and overlaps."""
    streams, tests = prepared.streams, prepared.tests
    _count_tokens(prepared)
    _try_rewrites(prepared)
    # The task rows of all uploads are one set, the attack rows another. Refusals and ordinary rows are rows of the
    # alignment set, so they are no sets of their own. The overlap between the two test sets is left out.
    upload = prepared.uploaded
    apart = {"refusals", "ordinary", *map(upload_of, range(len(prepared.phases)))}
    sets = {
        **{name: rows for name, rows in streams.items() if name not in apart},
        "task": [r for r in upload if r.role != "attack"],
        "attack": [r for r in upload if r.role == "attack"],
        "test": list(tests.harmful),
        "over_refusal": list(tests.over_refusal),
    }
    prepared.overlaps = {f"{a} / {b}": n for (a, b), n in overlaps(sets).items() if {a, b} != {"test", "over_refusal"}}


def _check_edit(config: RunConfig, attack: Attack, defenses: Sequence[Defense]) -> None:
    """Refuse defenses and options of a fine-tuning if the attack edits weights instead of training."""
    who = type(attack).__name__
    if idle := [type(d).__name__ for d in defenses if d.stage is Stage.FINETUNING]:
        raise InputError(
            f"{' and '.join(idle)}: works in the fine-tuning stage, but {who} edits a weight without training. Leave"
            " it out. Defenses of the alignment stage and repairs are possible."
        )
    if config.tuning == "qlora" or config.evaluation.at:
        option = "--tuning qlora" if config.tuning == "qlora" else "--evaluation.at"
        raise InputError(f"{who} edits whole weights and makes no optimizer steps. Leave out {option}.")


def _check_search(config: RunConfig, attack: Attack) -> None:
    """Refuse a run whose settings an attacker cannot search."""
    if attack.acts_on == "weights":
        raise InputError(
            f"--attacker search tries trainings on an upload, but {type(attack).__name__} edits a weight without"
            " training. Use --attacker fixed, or another attack."
        )
    if config.tuning == "qlora" or config.devices * config.num_nodes > 1:
        raise InputError("--attacker search works in one process on one device, with --tuning lora or full.")
    Budget.of(config)


def _check_aligned(config: RunConfig, defenses: Sequence[Defense]) -> None:
    """Refuse defenses that need an alignment stage or an unaligned model, which a run without alignment lacks."""
    if idle := [type(d).__name__ for d in defenses if d.stage is Stage.ALIGNMENT]:
        raise InputError(
            f"{' and '.join(idle)}: works in the alignment stage, but --alignment.steps 0 skips that stage. Raise"
            " --alignment.steps, or leave the defense out."
        )
    needing = [type(d).__name__ for d in defenses if isinstance(d, Repair) and "base" in d.needs]
    if needing and config.base is None:
        raise InputError(
            f"{' and '.join(needing)}: needs the model before its alignment, but with --alignment.steps 0 the run has"
            " only the aligned --model. Name the unaligned model with --base."
        )


def _check_curve(config: RunConfig, attack: Attack) -> None:
    """Refuse evaluation steps after the last step, and a stop rule for an attack of several phases."""
    phases = phases_of(config, attack)
    at, steps = config.evaluation.at, sum(own.finetuning.steps for own, _ in phases)
    if config.evaluation.stops and len(phases) > 1:
        raise InputError(
            f"--evaluation.{next(iter(config.evaluation.stops))} can stop only one training, but"
            f" {type(attack).__name__} has {len(phases)}. Leave it out."
        )
    if at and max(at) > steps:
        raise InputError(
            f"--evaluation.at must name steps of the fine-tuning, from 1 to {steps}, got {max(at)}. Leave later steps"
            " out."
        )
    if at and config.strategy == "fsdp2":
        raise InputError(
            "--evaluation.at lets one process answer alone, which --strategy fsdp2 does not allow. Leave out one of"
            " the two."
        )


def streams_of(config: RunConfig, needed: set[str], attack: Attack, sources: Sources) -> dict[str, list[Record]]:
    """Return the rows of every stream that a run reads, by name. ``upload_of`` names the upload of each phase.

    Args:
        config: the run's configuration.
        needed: side streams that the defenses draw from.
        attack: draws the upload.
        sources: reads the rows and records what was read.

    Raises:
        InputError: if a file cannot be used or holds too few rows.
    """
    return _streams(config, needed, attack, _read_sources(config, sources, needed, attack))


def _streams(
    config: RunConfig,
    needed: set[str],
    attack: Attack,
    source_rows: Mapping[str, Sequence[Record]],
    notes: list[str] | None = None,
) -> dict[str, list[Record]]:
    """Build every stream from the rows of the sources. Errors are those of ``streams_of``.

    Args:
        config: the run's configuration.
        needed: side streams that the defenses draw from.
        attack: makes the upload.
        source_rows: rows by source.
        notes: receives a sentence for each source of which long rows are left out.
    """
    streams = {"alignment": list(source_rows["alignment"])}
    streams |= {name: list(source_rows[name]) for name in DEFENDERS if name in needed}
    if "refusals" in needed:
        streams["refusals"] = refusals(streams["alignment"])
    if "ordinary" in needed:
        streams["ordinary"] = ordinary(streams["alignment"])
        if not streams["ordinary"]:
            raise InputError(
                f"--data.alignment {config.data.alignment}: a defense needs ordinary rows, but the answers of all"
                f" {len(streams['alignment'])} rows refuse. Add ordinary prompts with helpful answers."
            )
    if attack.selects:  # a placeholder: before the scores, only the number of rows is known
        _, streams["task"] = attack.chosen(Choosing(source_rows["task"], (), ()), None, config.seed)
    else:
        for number, (own, phase) in enumerate(phases_of(config, attack)):
            streams[upload_of(number)] = _upload(own, phase, source_rows, notes if notes is not None else [])
    missing = needed - set(streams)
    if missing:
        raise InputError(
            f"The defenses draw from the streams {sorted(missing)}, for which this run has no data. Leave those"
            " defenses out."
        )
    return streams


def _upload(
    config: RunConfig, attack: Attack, sources: Mapping[str, Sequence[Record]], notes: list[str]
) -> list[Record]:
    """Return the attack's upload.

    With ``--long_rows drop`` only rows that fit the token limit are drawn, so that the upload's size n and harmful
    ratio p hold. ``notes`` receives a sentence for each source with rows that do not fit.

    Raises:
        InputError: if a source has too few rows, or too few that fit.
    """
    # Draw from the full sources first: if every drawn row fits, sources need not be filtered.
    upload = attack.upload(sources, config.seed)
    if config.long_rows != "drop" or _all_fit(config, attack, upload):
        return upload
    fitting = {n: _rows_that_fit(config, attack, rows) if n in attack.sources else rows for n, rows in sources.items()}
    for name in attack.sources:
        if sources.get(name) and not fitting[name]:
            # Raises an error that names the length of the shortest row.
            _encode_upload(config, attack, sources[name], config.max_tokens, name)
        if long := len(sources[name]) - len(fitting[name]):
            rows = f"{long} of {len(sources[name])} {name} rows"
            notes.append(f"{rows} have more than {config.max_tokens} tokens and are left out before rows are drawn.")
    try:
        return attack.upload(fitting, config.seed)
    except InputError as error:
        left = ", ".join(f"{len(fitting[n])} of {len(sources[n])} {n}" for n in attack.sources)
        raise InputError(
            f"{error} Without the rows longer than {config.max_tokens} tokens there are {left} rows. Raise"
            " --max_tokens, or choose --long_rows truncate."
        ) from error


def _all_fit(config: RunConfig, attack: Attack, rows: Sequence[Record]) -> bool:
    return len(_rows_that_fit(config, attack, rows)) == len(rows)


def _rows_that_fit(config: RunConfig, attack: Attack, rows: Sequence[Record]) -> list[Record]:
    """Return the rows whose encoding in the fine-tuning fits ``--max_tokens``."""
    if not rows:
        return []
    whole = _encode_upload(config, attack, rows, UNLIMITED)
    return [row for row, e in zip(rows, whole, strict=True) if len(e.input_ids) <= config.max_tokens]


def _encode_upload(
    config: RunConfig, attack: Attack, rows: Sequence[Record], max_tokens: int, name: str = "task"
) -> list[Example]:
    """Return rows as the fine-tuning encodes them. Errors are those of ``encode_all``."""
    tokenizer, tuned = load_tokenizer(config.model), stage_config(config, attack, Stage.FINETUNING)
    return encode_all(rows, get_template(tuned.template, tokenizer), tokenizer, max_tokens, tuned.system, name)[0]


def _read_sources(config: RunConfig, sources: Sources, needed: set[str], attack: Attack) -> dict[str, Sequence[Record]]:
    """Return the rows of every training source by name: attack, task, alignment, and the defender's sources."""
    reads = "attack" in attack.sources or bool(config.evaluation.loss_rows)
    rows = sources.defenders_and_attack(needed, reads)
    if "attack" in rows:
        rows["attack"] = attack.read(rows["attack"], sources.tables.get("attack"))
    return {**rows, "task": sources.task("train"), "alignment": sources.records("alignment")}


def _loss_rows(
    config: RunConfig, source_rows: Mapping[str, Sequence[Record]], streams: Mapping[str, Sequence[Record]]
) -> tuple[list[Record], list[Record]]:
    """Return the rows of the alignment loss and the rows of the harmful validation loss, the first of each by hash.

    Harmful validation rows are attack rows that no stage trains on: no stream contains their ids or their prompts. The
    seed of a run changes them only through the upload. Both lists may be empty.
    """
    # Attack rows of the made-up world say nothing about a model that is tested on the user's own prompts.
    made_up = config.data.attack == BUILTIN != config.data.test
    trained = [*source_rows.get("harmful", ()), *(record for records in streams.values() for record in records)]
    ids, prompts = {r.id for r in trained}, {prompt_key(r) for r in trained}
    left = [r for r in source_rows["attack"] if not made_up and r.id not in ids and prompt_key(r) not in prompts]
    aligned, held_out = (
        split_by_hash(rows, min(config.evaluation.loss_rows, len(rows)))[0] for rows in (streams["alignment"], left)
    )
    return aligned, held_out


def test_sets(config: RunConfig, attack: Attack | None, sources: Sources) -> TestSets:
    """Return the test sets of a configuration, with their judges.

    Args:
        config: the run's configuration.
        attack: adds its prefix to harmful prompts, and decodes answers that are encoded; None for no attack.
        sources: reads the rows and records what was read.

    Raises:
        InputError: if a file cannot be used.
    """
    data, settings = config.data, config.evaluation
    judge = settings.judge
    if judge == "auto":
        judge = "builtin" if data.test == BUILTIN else "keyword"
    refusal_judge = settings.refusal_judge
    if refusal_judge == "auto":
        refusal_judge = "builtin" if data.over_refusal == BUILTIN else "xstest_string"
    get_judge(judge), get_refusal_classifier(refusal_judge)  # refuse unknown names before any work
    return TestSets(
        sources.records("test", need_response=False)[: settings.prompts or None],
        sources.over_refusal()[: settings.over_refusal_prompts or None],
        sources.task("test")[: settings.task_rows or None],
        get_task(data.task),
        tuple(dict.fromkeys((judge, "keyword"))),
        refusal_judge,
        attack,
    )


def _lower_max_tokens(config: RunConfig, attack: Attack) -> tuple[RunConfig, list[str]]:
    """Lower ``max_tokens`` to the model's positions if it exceeds them.

    Returns:
        The configuration, and a list with one note if the limit was lowered.

    Raises:
        InputError: if the attack itself sets a limit above the model's positions.
    """
    limit = positions_of(load_config(config.model))
    if limit is None:
        return config, []
    own = getattr(attack, "max_tokens", None)
    if own is not None and own > limit:
        raise InputError(
            f"--{attack.name}.max_tokens must be at most the model's {limit} positions, got {own}. Lower it."
        )
    if config.max_tokens <= limit:
        return config, []
    note = f"--max_tokens was lowered from {config.max_tokens} to {limit}, the positions that the model has."
    return replace(config, max_tokens=limit), [note]


@contextmanager
def _explain_lowered_limit(notes: Sequence[str]) -> Iterator[None]:
    """Extend an error about long rows by the note that the model's positions lowered the limit, if they did."""
    try:
        yield
    except InputError as error:
        lowered = next((note for note in notes if note.startswith("--max_tokens")), None)
        if lowered is None:
            raise
        # Raising the limit above the positions cannot help, so this advice is cut off.
        reason = re.split(r" Raise (?:--)?max_tokens", str(error))[0]
        raise InputError(f"{lowered} {reason} Give shorter rows, or a model with more positions.") from error


def _count_tokens(prepared: Prepared) -> None:
    """Encode all rows and prompts, and fill in lengths, dropped and cut rows, and notes on the template.

    Raises:
        InputError: if no row of a stream is left, or a token is not in the model's embedding.
    """
    config = prepared.config
    limits = Limits.of(config.model)
    uploads = {upload_of(number) for number in range(len(prepared.phases))}
    for name, rows in prepared.streams.items():
        stage = stage_config(config, prepared.attack, Stage.FINETUNING if name in uploads else Stage.ALIGNMENT)
        template = get_template(stage.template, limits.tokenizer)
        with _explain_lowered_limit(prepared.notes):
            rules = (template, limits.tokenizer, config.max_tokens, stage.system, name, config.long_rows)
            if name == "pairs":
                both, prepared.dropped[name] = encode_pairs(as_pairs(rows), *rules)
                encoded = single_rows(both)
            else:
                encoded, prepared.dropped[name] = encode_all(rows, *rules)
        limits.check_examples(name, encoded)
        prepared.cut[name] = sum(e.cut for e in encoded)
        prepared.lengths[name] = sum(len(e.input_ids) for e in encoded) / len(encoded)
        if name == "task":
            _count_trained_on(prepared, encoded)
    if chosen := prepared.choosing:
        for name, some in (("task", chosen.candidates), ("attack", chosen.harmful), ("alignment", chosen.safe)):
            encoded, _ = encode_all(some, template, limits.tokenizer, UNLIMITED, system=config.system, name=name)
            limits.check_examples(name, encoded)
    template = get_template(stage_config(config, prepared.attack, Stage.FINETUNING).template, limits.tokenizer)
    for name in prepared.tests.names:
        sample = prepared.tests.asked(name)[:50]  # enough for an estimate of the mean length
        lengths = [len(encode_prompt(r, template, limits.tokenizer, config.system)) for r in sample]
        prepared.prompt_lengths[name] = sum(lengths) / max(1, len(lengths))
    for note in template_notes(template, limits.tokenizer, config.system):
        if note not in prepared.notes:
            prepared.notes.append(note)


def _count_trained_on(prepared: Prepared, examples: Sequence[Example]) -> None:
    """Fill in ``trained_on`` for the first phase, and the steps of an attack that counts in epochs.

    Args:
        prepared: the run; changed in place.
        examples: the encoded rows of the upload that are left after long rows were dropped or cut.
    """
    config, attack = prepared.phases[0]
    if attack.acts_on != "rows":
        prepared.trained_on = TrainedOn(
            len(examples), sum(e.role == "attack" for e in examples), config.finetuning.steps
        )
        return
    # Dropped rows make an epoch shorter, so an attack of several epochs needs fewer steps.
    training = config.finetuning
    if attack.epochs is not None and prepared.dropped["task"] and attack is prepared.attack:
        whole = training.batch_size * training.accumulate * config.devices * config.num_nodes
        training = replace(training, steps=steps_of(len(examples), whole, attack.epochs))
        prepared.config = replace(config, finetuning=training)
    # Replay the order of the training: the rows of each optimizer step, over all micro-batches and processes.
    micro = training.accumulate * config.devices * config.num_nodes
    stream = ExampleStream(examples, "task", training.batch_size, 0, config.seed, config.order)
    steps = [[e for k in range(micro) for e in stream.rows(step * micro + k, 0)] for step in range(training.steps)]
    tokens = [sum(len(e.input_ids) - e.prompt_length for e in rows) for rows in steps]
    harmful = [sum(len(e.input_ids) - e.prompt_length for e in rows if e.role == "attack") for rows in steps]
    prepared.trained_on = TrainedOn(
        len(examples),
        sum(e.role == "attack" for e in examples),
        training.steps,
        sum(harmful) / sum(tokens),
        sum(map(bool, harmful)) / len(steps),
    )


def _try_rewrites(prepared: Prepared) -> None:
    """Apply the data-slot defenses to rows and prompts, so that their errors come before any training.

    The rewritten rows are checked like the original ones. Every test prompt is checked with each system text that a
    model of this run is served with.

    Raises:
        InputError: if a row or prompt does not fit the model's limits, or a defense refuses the rows.
    """
    config, limits = prepared.config, Limits.of(prepared.config.model)
    # Collect (template, system slot) of every model that is measured: without defenses here, with defenses below.
    tokenizer, served = limits.tokenizer, set[tuple[str, SystemSlot]]()
    for stage in (Stage.ALIGNMENT, Stage.FINETUNING):
        own = stage_config(config, prepared.attack, stage)
        served.add((own.template, SystemSlot(own.system)))
    for arm in prepared.arms:
        trainings = [
            (stage, number, phase)
            for stage in (Stage.ALIGNMENT, Stage.FINETUNING)
            for number, phase in enumerate(prepared.trainings(arm, stage))
        ]
        for stage, number, phase in trainings:
            chosen = [d for d in phase.defenses if Slot.DATA in d.slots]
            if not chosen:
                continue
            own = stage_config(config, prepared.attack, stage)
            template = get_template(own.template, tokenizer)
            streams = dict[str, Any](prepared.records(stage, arm, number))
            pairs = phase.attack is not None and phase.attack.acts_on == "pairs"
            kind: Any = PairsDataModule if pairs else StreamsDataModule
            main = main_stream(phase.defenses, MAIN[stage])
            options: dict[str, Any] = {"max_tokens": config.max_tokens, "long_rows": config.long_rows}
            data = kind(tokenizer, template, main, system=own.system, **options, **streams)
            for d in chosen:
                if not d.selects:  # its rows are known once it has selected
                    data.apply(d)
            try:
                read = {name: data.stream(name, 1).examples for name in data.records}
            except InputError as error:
                if not pairs:
                    raise
                raise InputError(f"{' and '.join(type(d).__name__ for d in chosen)}: {error}") from error
            prepared.dropped |= {upload_of(number) if n == "task" else n: count for n, count in data.dropped.items()}
            for name, examples in read.items():
                limits.check_examples(name, examples)
            served.add((own.template, data.policy.serving_slot()))
    for name, slot in served:
        limits.check_tests(replace(config, template=name), prepared.tests, slot)
