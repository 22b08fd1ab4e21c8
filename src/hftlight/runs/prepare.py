"""Everything a run can know before it loads weights: rows, overlaps, stages, steps, and how long it may take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hftlight.attacks.attack import Attack
from hftlight.attacks.benign_selection import BenignSelection
from hftlight.attacks.model_edit import ModelEdit, with_subjects
from hftlight.attacks.registry import get_attack
from hftlight.config import RunConfig
from hftlight.data.records import Record, overlaps, prompt_key, read_records, split_by_hash
from hftlight.data.refusals import refusals
from hftlight.data.rows import read_rows
from hftlight.data.sources import get_task
from hftlight.data.streams import StreamsDataModule
from hftlight.data.synthetic import build_world
from hftlight.data.templates import SystemSlot, get_template
from hftlight.data.tokens import encode_all, encode_prompt
from hftlight.engine import Defense, Slot, Stage, check, in_order
from hftlight.engine.repair import Repair
from hftlight.errors import InputError
from hftlight.evaluation.judges import get_judge
from hftlight.evaluation.refusals import get_refusal_classifier
from hftlight.files import digest
from hftlight.models import DEMO, TINY, load_config, positions_of, text_config, trust_remote_code
from hftlight.registry import name_of
from hftlight.report.result import STAGES, arm_word
from hftlight.runs.budget import Budget
from hftlight.runs.measure import SETS, TestSets
from hftlight.runs.model_checks import Limits, check_adapter, check_architecture, template_notes
from hftlight.runs.progress import Unit

BUILTIN = "builtin"
DEMO_PARAMETERS = 134_515_008
# Measured with the demo model on two idle cores: forward and backward per padded token, and per prompt answered.
SECONDS_PER_TOKEN, SECONDS_PER_PROMPT_TOKEN, SECONDS_PER_NEW_TOKEN = 3e-3, 1e-3, 2e-3


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
class Choosing:
    """What an upload is chosen from, once there is an aligned model.

    Attributes:
        candidates: the harmless rows.
        harmful: harmful anchors.
        safe: anchors that refuse.
    """

    candidates: Sequence[Record]
    harmful: Sequence[Record]
    safe: Sequence[Record]


@dataclass
class Prepared:
    """A run before its first step.

    Attributes:
        config: the checked configuration, with what the attack decides put in.
        given: the attack as it was given.
        attack: what is uploaded, all its values known.
        arms: undefended first, where there is one.
        streams: rows by stream: alignment, harmful (if a defense asks), task (the upload).
        tests: what every model is measured on.
        lengths: mean tokens per row, by stream.
        prompt_lengths: mean tokens per prompt, by test set.
        dropped: rows longer than the limit, by stream.
        choosing: what the aligned model chooses the upload from, while that has not been done; until then the upload
            is as many rows of the task.
        overlaps: equal prompts by pair of sets.
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
    choosing: Choosing | None = None
    overlaps: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    config_hash: str = ""

    def records(self, stage: Stage, arm: Arm) -> dict[str, list[Record]]:
        """Return the rows that a stage of an arm may read."""
        return stage_records(self.streams, stage, arm.of(stage))

    def units(self) -> list[Unit]:
        """Return the run's pieces in order, with the seconds they may take on two CPU cores."""
        speed = _parameters(self.config) / DEMO_PARAMETERS
        tests = sum(len(self.tests.rows(name)) for name in SETS)
        limits = dict.fromkeys(SETS, self.config.evaluation.max_new_tokens)
        limits["task"] = self.config.evaluation.task_max_new_tokens or self.tests.task.max_new_tokens
        prompt_seconds = speed * sum(
            len(self.tests.rows(n))
            * (self.prompt_lengths[n] * SECONDS_PER_PROMPT_TOKEN + limits[n] * SECONDS_PER_NEW_TOKEN)
            for n in SETS
        )
        aligned, held_out = len(self.tests.alignment_rows), len(self.tests.validation_rows)
        loss_tokens = (aligned + held_out) * self.lengths["alignment"]
        prompt_seconds += speed * loss_tokens * SECONDS_PER_PROMPT_TOKEN
        found = [Unit("base model: measuring", tests, prompt_seconds)]
        if self.choosing:
            scored = len(self.choosing.candidates) + len(self.choosing.harmful)
            tokens = self.config.alignment.steps * self.config.alignment.batch_size * self.lengths["alignment"]
            found.append(Unit("plainly aligned", self.config.alignment.steps, speed * tokens * SECONDS_PER_TOKEN))
            tokens = scored * self.lengths["task"]
            found.append(Unit("rows scored", len(self.choosing.candidates), speed * tokens * SECONDS_PER_TOKEN))
        for arm in self.arms:
            triggered = any("trigger" in d.claims for d in arm.of(Stage.FINETUNING))
            for stage in (Stage.ALIGNMENT, Stage.FINETUNING):
                training = self.config.alignment if stage is Stage.ALIGNMENT else self.config.finetuning
                main = "alignment" if stage is Stage.ALIGNMENT else "task"
                if stage is Stage.FINETUNING and self.attack.acts_on == "weights":
                    edits = self.attack.rows * self.lengths["task"] * self.attack.counts()["attack"]
                    label = f"{arm_word(arm.name)}: edited"
                    found.append(Unit(label, self.attack.counts()["attack"], speed * edits * SECONDS_PER_TOKEN))
                    found.append(Unit(f"{label}, measuring", tests, prompt_seconds))
                    continue
                looks = len(set(self.config.evaluation.at)) if stage is Stage.FINETUNING else 0
                tokens = training.steps * training.batch_size * training.accumulate * self.lengths[main]
                for d in arm.of(stage):
                    side = max((self.lengths[name] for name in d.streams), default=self.lengths[main])
                    for work in d.passes:
                        times = training.accumulate if work.per == "batch" else 1
                        share = (work.forward + 2 * work.backward) / 3  # a backward pass costs two forward ones
                        tokens += training.steps * training.batch_size * times * side * share
                label = f"{arm_word(arm.name)}: {STAGES[stage.value]}"
                share = min(1.0, 2 * (self.config.evaluation.at_prompts or tests) / max(1, tests))
                seconds = speed * tokens * SECONDS_PER_TOKEN + looks * share * prompt_seconds
                found.append(Unit(label, training.steps, seconds))
                again = len(self.tests.harmful) if triggered and stage is Stage.FINETUNING else 0
                found.append(Unit(f"{label}, measuring", tests + again, prompt_seconds * (1 + again / max(1, tests))))
            if repairs := arm.of(Stage.POST_FINETUNING):
                rows = sum(len(self.streams[name]) * self.lengths[name] for d in repairs for name in d.streams)
                label = f"{arm_word(arm.name)}: {STAGES[Stage.POST_FINETUNING.value]}"
                found.append(Unit(label, len(repairs), speed * rows * SECONDS_PER_TOKEN / 3))
                again = len(self.tests.harmful) if triggered else 0
                found.append(Unit(f"{label}, measuring", tests + again, prompt_seconds * (1 + again / max(1, tests))))
            if trials := self.config.trials:
                word = arm_word(arm.name)
                (tuned,) = (u.seconds for u in found if u.label == f"{word}: {STAGES['finetuning']}")
                found.append(Unit(f"{word}: attacker's search", trials, trials * (1.5 * tuned + prompt_seconds)))
        return found


def stage_records(
    streams: Mapping[str, list[Record]], stage: Stage, defenses: Sequence[Defense]
) -> dict[str, list[Record]]:
    """Return the rows that a stage may read: those of its main stream, and of the streams its defenses draw from."""
    names = {"alignment": {"alignment"}, "finetuning": {"task"}}.get(stage.value, set())
    names |= {name for d in defenses for name in d.streams}
    return {name: streams[name] for name in sorted(names)}


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
    _check_curve(config)
    check(defenses, one_stage=False)
    repairs = [type(d).__name__ for d in defenses if d.stage is Stage.POST_FINETUNING]
    for d in defenses:
        if d.stage is Stage.POST_FINETUNING and not isinstance(d, Repair):
            raise InputError(
                f"{type(d).__name__} works in the post_finetuning stage but is no Repair, so run() would not know how"
                " to apply it; derive it from hftlight.engine.repair.Repair and implement edit()."
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
    sources = _sources(config, needed, attack)
    streams, tests = streams_of(config, needed, attack, sources), test_sets(config, attack)
    aligned, held_out = _loss_rows(config, sources, streams)
    tests = replace(tests, alignment_rows=aligned, validation_rows=held_out)
    if config.trials and (len(tests.harmful) < 2 or len(tests.task_rows) < 2):
        raise InputError(
            "--attacker search chooses settings on one half of the test prompts and reports on the other, so it needs 2"
            f" harmful prompts and 2 rows of the task at least, got {len(tests.harmful)} and {len(tests.task_rows)}."
            " Raise --evaluation.prompts and --evaluation.task_rows."
        )
    prepared = Prepared(config, given, attack, arms, streams, tests, notes=notes)
    if isinstance(attack, BenignSelection) and attack.scores is None:
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
    if prepared.choosing is None or not isinstance(prepared.attack, BenignSelection):
        raise ValueError("choose: this run's upload is not chosen by scores.")
    prepared.attack = replace(prepared.attack, scores=str(scores))
    sources = {"task": prepared.choosing.candidates}
    prepared.streams["task"] = prepared.attack.upload(sources, prepared.config.seed)
    prepared.choosing = None
    _read_through(prepared)


def _choosing(config: RunConfig, attack: BenignSelection) -> Choosing:
    if config.devices * config.num_nodes > 1 or config.tuning == "qlora":
        raise InputError(
            "BenignSelection scores rows in one process, with --tuning lora or full. Make the scores in such a run"
            " first, and give their file, which its manifest names, with --benign_selection.scores."
        )
    sources = _sources(config, {"alignment"}, attack)
    count = attack.anchor_rows
    if attack.kind == "representation" and len(sources["attack"][:count]) < attack.nearest:
        raise InputError(
            f"BenignSelection: nearest must be at most the number of harmful anchors, {len(sources['attack'][:count])},"
            f" got {attack.nearest}."
        )
    return Choosing(sources["task"], sources["attack"][:count], refusals(sources["alignment"])[:count])


def _read_through(prepared: Prepared) -> None:
    """Fill in lengths, dropped rows and overlaps."""
    streams, tests = prepared.streams, prepared.tests
    _count(prepared)
    _rewrite(prepared)
    upload = streams["task"]
    named = {
        **streams,
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


def _check_curve(config: RunConfig) -> None:
    """Refuse curves that a run would not come to."""
    at, steps = config.evaluation.at, config.finetuning.steps
    if at and max(at) > steps:
        raise InputError(f"--evaluation.at names steps of the fine-tuning, which has {steps}; got {max(at)}.")
    if at and config.strategy == "fsdp2":
        raise InputError("--evaluation.at needs one process to answer alone, which --strategy fsdp2 does not allow.")


def _read(
    config: RunConfig, source: str, role: Any, need_response: bool = True, where: str | None = None
) -> list[Record]:
    columns = config.data.columns
    if columns is not None and not set(columns.values()) <= read_rows(source)[0][1].keys():
        columns = None
    return read_records(source, role=role, columns=columns, need_response=need_response, where=where)


def streams_of(
    config: RunConfig, needed: set[str], attack: Attack, sources: Mapping[str, Sequence[Record]] | None = None
) -> dict[str, list[Record]]:
    """Return the rows of every stream that a run reads; ``"task"`` is the upload.

    Args:
        config: the run's configuration.
        needed: side streams that the defenses draw from.
        attack: makes the upload.
        sources: what the rows are taken from, if they have been read.

    Raises:
        InputError: if a file cannot be used, or holds too few rows.
    """
    sources = _sources(config, needed, attack) if sources is None else sources
    streams = {"alignment": list(sources["alignment"])}
    if "harmful" in needed:
        streams["harmful"] = list(sources["harmful"])
    if isinstance(attack, BenignSelection) and attack.scores is None:  # their number alone is known by now
        streams["task"] = attack.choose(sources["task"], [0.0] * len(sources["task"]), config.seed)
    else:
        streams["task"] = attack.upload(sources, config.seed)
    missing = needed - set(streams)
    if missing:
        raise InputError(f"No data for the streams {sorted(missing)} that the defenses draw from.")
    return streams


def _sources(config: RunConfig, needed: set[str], attack: Attack) -> dict[str, Sequence[Record]]:
    """Return the rows that an upload is made of, with those of alignment and defender."""
    data, world = config.data, build_world()
    alignment = world.alignment if data.alignment == BUILTIN else _read(config, data.alignment, "alignment")
    if BUILTIN not in (data.harmful, data.attack) and Path(data.harmful).resolve() == Path(data.attack).resolve():
        rows = _read(config, data.harmful, "harmful")
        harmful, attacker = split_by_hash(rows, data.harmful_rows or len(rows) // 2)
    else:
        harmful = world.harmful if data.harmful == BUILTIN else []
        if data.harmful != BUILTIN and "harmful" in needed:
            harmful = _read(config, data.harmful, "harmful")
        attacker = (
            world.attack
            if data.attack == BUILTIN or not ("attack" in attack.sources or config.evaluation.loss_rows)
            else _read(config, data.attack, "attack")
        )
        harmful = harmful[: data.harmful_rows or None]
    attacker = attacker[: data.attack_rows or None]
    if isinstance(attack, ModelEdit):
        attacker = with_subjects(attacker, data.attack, data.columns)
    task = get_task(data.task, data.columns).records("train", data.task_train)
    return {"attack": attacker, "task": task, "alignment": alignment, "harmful": harmful}


def _loss_rows(
    config: RunConfig, sources: Mapping[str, Sequence[Record]], streams: Mapping[str, Sequence[Record]]
) -> tuple[list[Record], list[Record]]:
    """Return the rows of the alignment loss and of the harmful validation loss, the first of each by hash.

    Harmful validation rows are the attacker's rows that nobody trains on: neither their ids nor their prompts stand in
    any stream. The seed of a run decides them only through the upload. None may be left.
    """
    made_up = config.data.attack == BUILTIN != config.data.test  # says nothing about a model of the user's world
    trained = [*sources["harmful"], *(record for records in streams.values() for record in records)]
    ids, prompts = {r.id for r in trained}, {prompt_key(r) for r in trained}
    left = [r for r in sources["attack"] if not made_up and r.id not in ids and prompt_key(r) not in prompts]
    aligned, held_out = (
        split_by_hash(rows, min(config.evaluation.loss_rows, len(rows)))[0] for rows in (streams["alignment"], left)
    )
    return aligned, held_out


def test_sets(config: RunConfig, attack: Attack | None) -> TestSets:
    """Return what a configuration measures models on.

    Args:
        config: the run's configuration.
        attack: puts what it must in front of harmful prompts, and reads answers that are written otherwise.

    Raises:
        InputError: if a file cannot be used.
    """
    data, settings, world = config.data, config.evaluation, build_world()
    harmful = world.test if data.test == BUILTIN else _read(config, data.test, "test", need_response=False)
    ordinary: Sequence[Record] = world.lookalike
    if data.over_refusal != BUILTIN:
        ordinary = _read(config, data.over_refusal, "test", need_response=False, where=data.over_refusal_where)
    task = get_task(data.task, data.columns)
    judge = settings.judge
    if judge == "auto":
        judge = "builtin" if data.test == BUILTIN else "keyword"
    refusal_judge = settings.refusal_judge
    if refusal_judge == "auto":
        refusal_judge = "builtin" if data.over_refusal == BUILTIN else "xstest_string"
    get_judge(judge), get_refusal_classifier(refusal_judge)  # refuse unknown names; nothing is loaded yet
    harmful = harmful[: settings.prompts or None]
    return TestSets(
        attack.test_records(harmful) if attack is not None else harmful,
        ordinary[: settings.over_refusal_prompts or None],
        task.records("test", data.task_test)[: settings.task_rows or None],
        task,
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


def _count(prepared: Prepared) -> None:
    """Fill in lengths and dropped rows; refuse streams of which nothing is left, and tokens the model does not have."""
    config = prepared.config
    limits = Limits.of(config.model)
    template = get_template(config.template, limits.tokenizer)
    for name, rows in prepared.streams.items():
        try:
            kept, prepared.dropped[name] = encode_all(
                rows, template, limits.tokenizer, config.max_tokens, system=_system(prepared, name), name=name
            )
        except InputError as error:
            lowered = next((note for note in prepared.notes if note.startswith("--max_tokens")), None)
            if lowered is None:
                raise
            reason = str(error).partition(" Raise max_tokens")[0]
            raise InputError(f"{lowered} {reason} Give shorter rows, or a model with more positions.") from error
        limits.check_examples(name, kept)
        prepared.lengths[name] = sum(len(e.input_ids) for e in kept) / len(kept)
    if chosen := prepared.choosing:
        for name, some in (("task", chosen.candidates), ("attack", chosen.harmful), ("alignment", chosen.safe)):
            kept, _ = encode_all(some, template, limits.tokenizer, 10**9, system=config.system, name=name)
            limits.check_examples(name, kept)
    for name in SETS:
        sample = prepared.tests.rows(name)[:50]
        lengths = [len(encode_prompt(r, template, limits.tokenizer, config.system)) for r in sample]
        prepared.prompt_lengths[name] = sum(lengths) / max(1, len(lengths))
    for note in template_notes(template, limits.tokenizer, config.system):
        if note not in prepared.notes:
            prepared.notes.append(note)


def _system(prepared: Prepared, name: str) -> str | None:
    """Return the system text that a stream's rows are trained with: an attack may have its own for the upload."""
    own = prepared.attack.test_system if name == "task" else None
    return prepared.config.system if own is None else own


def _rewrite(prepared: Prepared) -> None:
    """Let the data-slot defenses rewrite rows and prompts as they will, so that they refuse before anything trains.

    What comes out is checked like the rows themselves: ids of rewritten rows, and every prompt of the test sets with
    each system text that a model of this run is served with.
    """
    config, limits = prepared.config, Limits.of(prepared.config.model)
    tokenizer, slots = limits.tokenizer, {SystemSlot(config.system), SystemSlot(_system(prepared, "task"))}
    for arm in prepared.arms:
        for stage, main in ((Stage.ALIGNMENT, "alignment"), (Stage.FINETUNING, "task")):
            chosen = [d for d in arm.of(stage) if Slot.DATA in d.slots]
            if not chosen:
                continue
            template, streams = get_template(config.template, tokenizer), dict[str, Any](prepared.records(stage, arm))
            data = StreamsDataModule(
                tokenizer, template, main, max_tokens=config.max_tokens, system=_system(prepared, main), **streams
            )
            for d in chosen:
                data.apply(d)
            prepared.dropped |= data.dropped
            for name in data.records:
                limits.check_examples(name, data.stream(name, 1).examples)
            slots.add(data.policy.serving_slot())
    for slot in slots:
        limits.check_tests(config, prepared.tests, slot)


def _parameters(config: RunConfig) -> float:
    """Return roughly how many parameters a model has, from its configuration alone."""
    if config.model == DEMO:
        return DEMO_PARAMETERS
    if config.model == TINY:
        return 2e6  # fixed costs of a step, not its arithmetic
    c = text_config(load_config(config.model))
    hidden = c.hidden_size
    return c.num_hidden_layers * (4 * hidden**2 + 3 * hidden * getattr(c, "intermediate_size", 4 * hidden)) + (
        c.vocab_size * hidden
    )
