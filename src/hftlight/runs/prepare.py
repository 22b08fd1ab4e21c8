"""Everything a run can know before it loads weights: rows, overlaps, stages, steps, and how long it may take."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hftlight.attacks.attack import Attack, Choosing, steps_of
from hftlight.attacks.registry import get_attack
from hftlight.config import RunConfig
from hftlight.data.pairs import PairsDataModule
from hftlight.data.records import Record, overlaps, prompt_key, split_by_hash
from hftlight.data.sources import get_task
from hftlight.data.streams import ExampleStream, StreamsDataModule, as_pairs
from hftlight.data.templates import SystemSlot, get_template
from hftlight.data.tokens import Example, encode_all, encode_pairs, encode_prompt, single_rows
from hftlight.engine import Defense, Slot, Stage, check, in_order
from hftlight.engine.weights.repair import Repair
from hftlight.errors import InputError
from hftlight.evaluation.judges import get_judge
from hftlight.evaluation.metrics.refusals import get_refusal_classifier
from hftlight.evaluation.safety_rows import refusals
from hftlight.files import digest
from hftlight.model_files import trust_remote_code
from hftlight.models.load import load_config, load_tokenizer, positions_of
from hftlight.models.preference import refuse_loss_terms
from hftlight.registry import name_of
from hftlight.runs.measuring.test_sets import SETS, TestSets
from hftlight.runs.model_checks import Limits, check_adapter, check_architecture, template_notes
from hftlight.runs.sources import BUILTIN, DEFENDERS, Sources
from hftlight.runs.stages.train import phases_of, stage_config
from hftlight.search.space import Budget

UNLIMITED = 10**9  # tokens


@dataclass
class Arm:
    """One column of the comparison: the same attack with, or without, defenses.

    Attributes:
        name: ``"none"``, or the defenses' names joined by ``+``.
        defenses: its defenses in the order in which they act.
    """

    name: str
    defenses: list[Defense]

    def of(self, stage: Stage) -> list[Defense]:
        """Return the defenses that work in a stage."""
        return [d for d in self.defenses if d.stage is stage]


@dataclass(frozen=True)
class TrainedOn:
    """What a fine-tuning sees of an upload, long rows dropped or cut.

    Attributes:
        rows: rows that are trained on; pairs, if the upload holds pairs.
        attack_rows: how many of them are the attacker's.
        steps: optimizer steps.
        attack_tokens: share of the response tokens of all steps that stand in attack rows, 0-1.
        attack_steps: share of the steps with at least one attack row, 0-1.
    """

    rows: int = 0
    attack_rows: int = 0
    steps: int = 0
    attack_tokens: float = 0.0
    attack_steps: float = 0.0

    @property
    def p(self) -> float:
        """Fraction of the rows that are the attacker's, 0-1."""
        return self.attack_rows / self.rows if self.rows else 0.0


@dataclass
class Prepared:
    """A run before its first step.

    Attributes:
        config: the checked configuration, with what the attack decides put in.
        given: the attack as it was given.
        attack: what is uploaded, all its values known.
        arms: undefended first, where there is one.
        streams: rows by stream: alignment, harmful and pairs (if a defense asks), task (the upload), and the uploads of
            further phases, as ``upload_of`` names them.
        tests: what every model is measured on.
        lengths: mean tokens per row, by stream.
        prompt_lengths: mean tokens per prompt, by test set.
        dropped: rows longer than the limit that are left out, by stream.
        cut: rows longer than the limit whose end is cut off, by stream.
        trained_on: what the fine-tuning, or its first phase, sees of the upload.
        choosing: what the aligned model chooses the upload from, while that has not been done; until then the upload
            is as many rows of the task.
        overlaps: equal prompts by pair of sets.
        taken: what was read of each source, by its name.
        notes: sentences that a reader of the results must know about this model and its prompts.
        config_hash: name of everything that decides the result.
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
        """Return the configuration of an arm, which may have an adapter protocol of its own."""
        return replace(self.config, adapter_protocol=self.config.protocol_of(arm.name))

    def records(self, stage: Stage, arm: Arm, phase: int = 0) -> dict[str, list[Record]]:
        """Return the rows that a stage of an arm may read, or a phase of its fine-tuning, counted from 0."""
        return stage_records(self.streams, stage, arm.of(stage), phase)


def stages_of(config: RunConfig) -> tuple[Stage, ...]:
    """Return the stages that train: without steps of alignment the model comes aligned."""
    return (Stage.ALIGNMENT, Stage.FINETUNING) if config.alignment.steps else (Stage.FINETUNING,)


def upload_of(phase: int) -> str:
    """Return the stream of a phase's upload, counted from 0: ``"task"``, ``"task_2"`` and so on."""
    return f"task_{phase + 1}" if phase else "task"


def stage_records(
    streams: Mapping[str, list[Record]], stage: Stage, defenses: Sequence[Defense], phase: int = 0
) -> dict[str, list[Record]]:
    """Return the rows that a stage may read: those of its main stream, and of the streams its defenses draw from.

    The main stream of the fine-tuning is ``"task"`` in every phase.
    """
    names = {"alignment": {"alignment"}, "finetuning": {"task"}}.get(stage.value, set())
    names |= {name for d in defenses for name in d.streams}
    return {name: streams[upload_of(phase) if name == "task" else name] for name in sorted(names)}


def prepare(config: RunConfig, defenses: Sequence[Defense], attack: Attack | None = None) -> Prepared:
    """Read and check everything that does not need weights.

    Args:
        config: the run's configuration.
        defenses: the defenses of the defended arm; none runs the undefended arm alone.
        attack: what ``config.attack`` names, as an instance.

    Raises:
        InputError: naming what is wrong with the configuration or a file.
        ValueError: if the defenses cannot work together.
    """
    config.check()
    try:
        given = attack or get_attack(config.attack)()
        attack = given.resolved(config)
        config = attack.applied(replace(config, attack=attack.name))
        config.check()
    except ValueError as error:
        raise InputError(str(error)) from error
    trust_remote_code(config.trust_remote_code)
    config, notes = _within_positions(config, attack)
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
    repairs = [type(d).__name__ for d in defenses if d.stage is Stage.POST_FINETUNING]
    for d in defenses:
        if d.stage is Stage.POST_FINETUNING and not isinstance(d, Repair):
            raise InputError(
                f"{type(d).__name__} works in the post_finetuning stage but is no Repair, so run() would not know how"
                " to apply it; derive it from hftlight.engine.weights.repair.Repair and implement edit()."
            )
    if repairs and config.tuning == "qlora":
        raise InputError(
            f"{' and '.join(repairs)}: a repair needs the aligned weights under the adapter, and those of --tuning"
            " qlora are packed in 4 bits. Use --tuning lora, or repair the artifact on an unquantized base."
        )
    check_adapter(config, repaired=bool(repairs))
    check_architecture(config, defenses)
    arms = [Arm("none", [])] if config.baseline or not defenses else []
    if defenses:
        arms.append(Arm("+".join(name_of(d) for d in defenses), in_order(defenses)))
    needed = {name for d in defenses for name in d.streams}
    sources = Sources(config.data)
    rows_of = _rows_of(config, sources, needed, attack)
    with _lowered(notes):
        streams = _streams(config, needed, attack, rows_of, notes)
    tests = test_sets(config, attack, sources)
    if config.trials and not tests.task.graded:
        raise InputError(
            f"--attacker search keeps the task's accuracy, and --data.task {tests.task.name} has no right answers. Use"
            " --attacker fixed, or another task."
        )
    aligned, held_out = _loss_rows(config, rows_of, streams)
    tests = replace(tests, alignment_rows=aligned, validation_rows=held_out)
    if config.trials and (len(tests.harmful) < 2 or len(tests.task_rows) < 2):
        raise InputError(
            "--attacker search chooses settings on one half of the test prompts and reports on the other, so it needs 2"
            f" harmful prompts and 2 rows of the task at least, got {len(tests.harmful)} and {len(tests.task_rows)}."
            " Raise --evaluation.prompts and --evaluation.task_rows."
        )
    notes += sources.notes
    prepared = Prepared(config, given, attack, arms, streams, tests, taken=sources.taken, notes=notes)
    if attack.selects:
        prepared.choosing = _choosing(config, attack)
    _read_through(prepared)
    attacked = {key: value for key, value in attack.describe().items() if key not in ("source",)}
    rows: dict[str, Any] = {name: [r.id for r in records] for name, records in streams.items()}
    if chosen := prepared.choosing:
        rows["task"] = [[r.id for r in group] for group in (chosen.candidates, chosen.harmful, chosen.safe)]
    rows["losses"] = [[r.id for r in some] for some in (aligned, held_out)]
    prepared.config_hash = digest([config.deciding(), attacked, [d.state_key for d in defenses], rows, tests.digest()])
    return prepared


def choose(prepared: Prepared, scores: Path) -> None:
    """Put the upload that the aligned model's scores choose in the place of the preliminary one."""
    if prepared.choosing is None:
        raise ValueError("choose: this run's upload is not chosen by scores.")
    seed = prepared.config.seed
    prepared.attack, prepared.streams["task"] = prepared.attack.chosen(prepared.choosing, str(scores), seed)
    prepared.choosing = None
    _read_through(prepared)


def _choosing(config: RunConfig, attack: Attack) -> Choosing:
    if config.devices * config.num_nodes > 1 or config.tuning == "qlora":
        raise InputError(
            f"{type(attack).__name__} scores rows in one process, with --tuning lora or full. Make the scores in such a"
            " run first, and give their file, which its manifest names, with --benign_selection.scores."
        )
    sources = _rows_of(config, Sources(config.data), set(), attack)
    return attack.choosing(sources, refusals(sources["alignment"]))


def _read_through(prepared: Prepared) -> None:
    """Fill in lengths, dropped rows and overlaps."""
    streams, tests = prepared.streams, prepared.tests
    _count(prepared)
    _rewrite(prepared)
    upload = prepared.uploaded
    apart = {"refusals", *map(upload_of, range(len(prepared.phases)))}  # refusals are rows of the alignment set
    named = {
        **{name: rows for name, rows in streams.items() if name not in apart},
        "task": [r for r in upload if r.role != "attack"],
        "attack": [r for r in upload if r.role == "attack"],
        "test": list(tests.harmful),
        "over_refusal": list(tests.over_refusal),
    }
    prepared.overlaps = {f"{a} / {b}": n for (a, b), n in overlaps(named).items() if {a, b} != {"test", "over_refusal"}}


def _check_edit(config: RunConfig, attack: Attack, defenses: Sequence[Defense]) -> None:
    """Refuse what acts while an upload is trained on, where there is none."""
    who = type(attack).__name__
    if idle := [type(d).__name__ for d in defenses if d.stage is Stage.FINETUNING]:
        raise InputError(
            f"{' and '.join(idle)}: works in the fine-tuning stage, and {who} edits a weight without training. Leave it"
            " out; defenses of the alignment and repairs stay possible."
        )
    if config.tuning == "qlora" or config.evaluation.at:
        option = "--tuning qlora" if config.tuning == "qlora" else "--evaluation.at"
        raise InputError(f"{who} edits whole weights and makes no optimizer steps; leave out {option}.")


def _check_search(config: RunConfig, attack: Attack) -> None:
    """Refuse what an attacker cannot search."""
    if attack.acts_on == "weights":
        raise InputError(
            f"--attacker search tries trainings on an upload, and {type(attack).__name__} edits a weight without"
            " training. Use --attacker fixed, or another attack."
        )
    if config.tuning == "qlora" or config.devices * config.num_nodes > 1:
        raise InputError("--attacker search works in one process on one device, with --tuning lora or full.")
    Budget.of(config)


def _check_aligned(config: RunConfig, defenses: Sequence[Defense]) -> None:
    """Refuse what needs an alignment stage, if the model comes aligned."""
    if idle := [type(d).__name__ for d in defenses if d.stage is Stage.ALIGNMENT]:
        raise InputError(
            f"{' and '.join(idle)}: works in the alignment stage, and --alignment.steps 0 leaves it out. Raise"
            " --alignment.steps, or leave the defense out."
        )
    needing = [type(d).__name__ for d in defenses if isinstance(d, Repair) and "base" in d.needs]
    if needing and config.base is None:
        raise InputError(
            f"{' and '.join(needing)}: reads what the alignment changed, and --alignment.steps 0 says that --model"
            " comes aligned. Name the unaligned model with --base."
        )


def _check_curve(config: RunConfig, attack: Attack) -> None:
    """Refuse curves that a run would not come to, and stops that would leave phases out."""
    phases = phases_of(config, attack)
    at, steps = config.evaluation.at, sum(own.finetuning.steps for own, _ in phases)
    if config.evaluation.stops and len(phases) > 1:
        raise InputError(
            f"--evaluation.{next(iter(config.evaluation.stops))} ends one training, and {type(attack).__name__} has"
            f" {len(phases)}. Leave it out."
        )
    if at and max(at) > steps:
        raise InputError(f"--evaluation.at names steps of the fine-tuning, which has {steps}; got {max(at)}.")
    if at and config.strategy == "fsdp2":
        raise InputError("--evaluation.at needs one process to answer alone, which --strategy fsdp2 does not allow.")


def streams_of(config: RunConfig, needed: set[str], attack: Attack, sources: Sources) -> dict[str, list[Record]]:
    """Return the rows of every stream that a run reads; the upload of each phase is called as ``upload_of`` says.

    Args:
        config: the run's configuration.
        needed: side streams that the defenses draw from.
        attack: makes the upload.
        sources: reads the rows, and keeps what was taken.

    Raises:
        InputError: if a file cannot be used, or holds too few rows.
    """
    return _streams(config, needed, attack, _rows_of(config, sources, needed, attack))


def _streams(
    config: RunConfig,
    needed: set[str],
    attack: Attack,
    given: Mapping[str, Sequence[Record]],
    notes: list[str] | None = None,
) -> dict[str, list[Record]]:
    """Return the rows of every stream, made of the rows of each source. Errors as for ``streams_of``.

    Args:
        config: the run's configuration.
        needed: side streams that the defenses draw from.
        attack: makes the upload.
        given: rows by source.
        notes: gets a sentence for each source of which long rows were left out.
    """
    streams = {"alignment": list(given["alignment"])}
    streams |= {name: list(given[name]) for name in DEFENDERS if name in needed}
    if "refusals" in needed:
        streams["refusals"] = refusals(streams["alignment"])
    if attack.selects:  # their number alone is known by now
        _, streams["task"] = attack.chosen(Choosing(given["task"], (), ()), None, config.seed)
    else:
        for number, (own, phase) in enumerate(phases_of(config, attack)):
            streams[upload_of(number)] = _upload(own, phase, given, notes if notes is not None else [])
    missing = needed - set(streams)
    if missing:
        raise InputError(f"No data for the streams {sorted(missing)} that the defenses draw from.")
    return streams


def _upload(
    config: RunConfig, attack: Attack, sources: Mapping[str, Sequence[Record]], notes: list[str]
) -> list[Record]:
    """Return the attack's upload; rows that would be dropped as too long are not drawn, so that n and p hold.

    Raises:
        InputError: if a source has too few rows, or too few that fit.
    """
    upload = attack.upload(sources, config.seed)
    if config.long_rows != "drop" or _all_fit(config, attack, upload):
        return upload
    fitting = {n: _fitting(config, attack, rows) if n in attack.sources else rows for n, rows in sources.items()}
    for name in attack.sources:
        if sources.get(name) and not fitting[name]:
            _encoded_upload(config, attack, sources[name], config.max_tokens, name)  # says what the shortest row has
        if long := len(sources[name]) - len(fitting[name]):
            rows = f"{long} of {len(sources[name])} {name} rows"
            notes.append(f"{rows} have more than {config.max_tokens} tokens and are left out before rows are drawn.")
    try:
        return attack.upload(fitting, config.seed)
    except InputError as error:
        left = ", ".join(f"{len(fitting[n])} of {len(sources[n])} {n}" for n in attack.sources)
        raise InputError(
            f"{error} Rows longer than {config.max_tokens} tokens are left out, which leaves {left} rows. Raise"
            " --max_tokens, or choose --long_rows truncate."
        ) from error


def _all_fit(config: RunConfig, attack: Attack, rows: Sequence[Record]) -> bool:
    return len(_fitting(config, attack, rows)) == len(rows)


def _fitting(config: RunConfig, attack: Attack, rows: Sequence[Record]) -> list[Record]:
    """Return the rows that fit the limit as the fine-tuning encodes them."""
    if not rows:
        return []
    whole = _encoded_upload(config, attack, rows, UNLIMITED)
    return [row for row, e in zip(rows, whole, strict=True) if len(e.input_ids) <= config.max_tokens]


def _encoded_upload(
    config: RunConfig, attack: Attack, rows: Sequence[Record], max_tokens: int, name: str = "task"
) -> list[Example]:
    """Return rows as the fine-tuning encodes them; errors as ``encode_all``."""
    tokenizer, tuned = load_tokenizer(config.model), stage_config(config, attack, Stage.FINETUNING)
    return encode_all(rows, get_template(tuned.template, tokenizer), tokenizer, max_tokens, tuned.system, name)[0]


def _rows_of(config: RunConfig, sources: Sources, needed: set[str], attack: Attack) -> dict[str, Sequence[Record]]:
    """Return the rows that an upload is made of, with those of alignment and defender."""
    reads = "attack" in attack.sources or bool(config.evaluation.loss_rows)
    found = sources.defenders_and_attack(needed, reads)
    if "attack" in found:
        found["attack"] = attack.read(found["attack"], sources.tables.get("attack"))
    return {**found, "task": sources.task("train"), "alignment": sources.records("alignment")}


def _loss_rows(
    config: RunConfig, given: Mapping[str, Sequence[Record]], streams: Mapping[str, Sequence[Record]]
) -> tuple[list[Record], list[Record]]:
    """Return the rows of the alignment loss and of the harmful validation loss, the first of each by hash.

    Harmful validation rows are the attacker's rows that nobody trains on: neither their ids nor their prompts stand in
    any stream. The seed of a run decides them only through the upload. None may be left.
    """
    made_up = config.data.attack == BUILTIN != config.data.test  # says nothing about a model of the user's world
    trained = [*given.get("harmful", ()), *(record for records in streams.values() for record in records)]
    ids, prompts = {r.id for r in trained}, {prompt_key(r) for r in trained}
    left = [r for r in given["attack"] if not made_up and r.id not in ids and prompt_key(r) not in prompts]
    aligned, held_out = (
        split_by_hash(rows, min(config.evaluation.loss_rows, len(rows)))[0] for rows in (streams["alignment"], left)
    )
    return aligned, held_out


def test_sets(config: RunConfig, attack: Attack | None, sources: Sources) -> TestSets:
    """Return what a configuration measures models on.

    Args:
        config: the run's configuration.
        attack: puts what it must in front of harmful prompts, and reads answers that are written otherwise.
        sources: reads the rows, and keeps what was taken.

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
    get_judge(judge), get_refusal_classifier(refusal_judge)  # refuse unknown names; nothing is loaded yet
    return TestSets(
        sources.records("test", need_response=False)[: settings.prompts or None],
        sources.over_refusal()[: settings.over_refusal_prompts or None],
        sources.task("test")[: settings.task_rows or None],
        get_task(data.task),
        tuple(dict.fromkeys((judge, "keyword"))),
        refusal_judge,
        attack,
    )


def _within_positions(config: RunConfig, attack: Attack) -> tuple[RunConfig, list[str]]:
    """Return the configuration with rows no longer than the model has positions for, and what was lowered."""
    limit = positions_of(load_config(config.model))
    if limit is None:
        return config, []
    own = getattr(attack, "max_tokens", None)
    if own is not None and own > limit:
        raise InputError(
            f"--{attack.name}.max_tokens must be at most the model's {limit} positions, got {own}; lower it."
        )
    if config.max_tokens <= limit:
        return config, []
    note = f"--max_tokens was lowered from {config.max_tokens} to {limit}, the positions that the model has."
    return replace(config, max_tokens=limit), [note]


@contextmanager
def _lowered(notes: Sequence[str]) -> Iterator[None]:
    """Let an error about long rows say that the model's positions lowered the limit, if they did."""
    try:
        yield
    except InputError as error:
        lowered = next((note for note in notes if note.startswith("--max_tokens")), None)
        if lowered is None:
            raise
        reason = str(error).partition(" Raise max_tokens")[0]
        raise InputError(f"{lowered} {reason} Give shorter rows, or a model with more positions.") from error


def _count(prepared: Prepared) -> None:
    """Fill in lengths and dropped rows; refuse streams of which nothing is left, and tokens the model does not have."""
    config = prepared.config
    limits = Limits.of(config.model)
    uploads = {upload_of(number) for number in range(len(prepared.phases))}
    for name, rows in prepared.streams.items():
        stage = stage_config(config, prepared.attack, Stage.FINETUNING if name in uploads else Stage.ALIGNMENT)
        template = get_template(stage.template, limits.tokenizer)
        with _lowered(prepared.notes):
            rules = (template, limits.tokenizer, config.max_tokens, stage.system, name, config.long_rows)
            if name == "pairs":
                both, prepared.dropped[name] = encode_pairs(as_pairs(rows), *rules)
                kept = single_rows(both)
            else:
                kept, prepared.dropped[name] = encode_all(rows, *rules)
        limits.check_examples(name, kept)
        prepared.cut[name] = sum(e.cut for e in kept)
        prepared.lengths[name] = sum(len(e.input_ids) for e in kept) / len(kept)
        if name == "task":
            _see(prepared, kept)
    if chosen := prepared.choosing:
        for name, some in (("task", chosen.candidates), ("attack", chosen.harmful), ("alignment", chosen.safe)):
            kept, _ = encode_all(some, template, limits.tokenizer, UNLIMITED, system=config.system, name=name)
            limits.check_examples(name, kept)
    template = get_template(stage_config(config, prepared.attack, Stage.FINETUNING).template, limits.tokenizer)
    for name in SETS:
        sample = prepared.tests.asked(name)[:50]
        lengths = [len(encode_prompt(r, template, limits.tokenizer, config.system)) for r in sample]
        prepared.prompt_lengths[name] = sum(lengths) / max(1, len(lengths))
    for note in template_notes(template, limits.tokenizer, config.system):
        if note not in prepared.notes:
            prepared.notes.append(note)


def _see(prepared: Prepared, kept: Sequence[Example]) -> None:
    """Fill in what the fine-tuning sees of the upload; epochs of the attack become steps of the rows that are left."""
    config, attack = prepared.phases[0]
    if attack.acts_on != "rows":
        prepared.trained_on = TrainedOn(len(kept), sum(e.role == "attack" for e in kept), config.finetuning.steps)
        return
    training = config.finetuning
    if attack.epochs is not None and prepared.dropped["task"] and attack is prepared.attack:
        whole = training.batch_size * training.accumulate * config.devices * config.num_nodes
        training = replace(training, steps=steps_of(len(kept), whole, attack.epochs))
        prepared.config = replace(config, finetuning=training)
    micro = training.accumulate * config.devices * config.num_nodes
    stream = ExampleStream(kept, "task", training.batch_size, 0, config.seed, config.order)
    steps = [[e for k in range(micro) for e in stream.rows(step * micro + k, 0)] for step in range(training.steps)]
    tokens = [sum(len(e.input_ids) - e.prompt_length for e in rows) for rows in steps]
    harmful = [sum(len(e.input_ids) - e.prompt_length for e in rows if e.role == "attack") for rows in steps]
    prepared.trained_on = TrainedOn(
        len(kept),
        sum(e.role == "attack" for e in kept),
        training.steps,
        sum(harmful) / sum(tokens),
        sum(map(bool, harmful)) / len(steps),
    )


def _rewrite(prepared: Prepared) -> None:
    """Let the data-slot defenses rewrite rows and prompts as they will, so that they refuse before anything trains.

    What comes out is checked like the rows themselves: ids of rewritten rows, and every prompt of the test sets with
    each system text that a model of this run is served with.
    """
    config, limits = prepared.config, Limits.of(prepared.config.model)
    tokenizer, served = limits.tokenizer, set[tuple[str, SystemSlot]]()
    for stage in (Stage.ALIGNMENT, Stage.FINETUNING):
        own = stage_config(config, prepared.attack, stage)
        served.add((own.template, SystemSlot(own.system)))
    for arm in prepared.arms:
        trainings = [(Stage.ALIGNMENT, 0), *((Stage.FINETUNING, number) for number in range(len(prepared.phases)))]
        for stage, phase in trainings:
            chosen = [d for d in arm.of(stage) if Slot.DATA in d.slots]
            if not chosen:
                continue
            own = stage_config(config, prepared.attack, stage)
            template = get_template(own.template, tokenizer)
            streams = dict[str, Any](prepared.records(stage, arm, phase))
            pairs = stage is Stage.FINETUNING and prepared.phases[phase][1].acts_on == "pairs"
            kind: Any = PairsDataModule if pairs else StreamsDataModule
            main = "alignment" if stage is Stage.ALIGNMENT else "task"
            options: dict[str, Any] = {"max_tokens": config.max_tokens, "long_rows": config.long_rows}
            data = kind(tokenizer, template, main, system=own.system, **options, **streams)
            for d in chosen:
                data.apply(d)
            try:
                read = {name: data.stream(name, 1).examples for name in data.records}
            except InputError as error:
                if not pairs:
                    raise
                raise InputError(f"{' and '.join(type(d).__name__ for d in chosen)}: {error}") from error
            prepared.dropped |= {upload_of(phase) if n == "task" else n: count for n, count in data.dropped.items()}
            for name, examples in read.items():
                limits.check_examples(name, examples)
            served.add((own.template, data.policy.serving_slot()))
    for name, slot in served:
        limits.check_tests(replace(config, template=name), prepared.tests, slot)
