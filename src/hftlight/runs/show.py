"""The output of a run on the console: the plan before it and the results after it."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from hftlight.attacks.attack import Attack, option_of
from hftlight.attacks.protocols.facts import shown
from hftlight.attacks.protocols.protocol import Preset
from hftlight.attacks.registry import ATTACKS
from hftlight.config import RunConfig, Training
from hftlight.engine import Defense, Stage, count_passes
from hftlight.engine.weights.repair import to_train
from hftlight.evaluation.rejudge import agreement_lines, pairwise
from hftlight.evaluation.score import Score
from hftlight.folders import HARMFUL_SETS, STAGES, WITHOUT_TRIGGER, arm_word
from hftlight.report import Result, closing_table, verdict
from hftlight.report.claims import collapses, filtered, last_stage, stops
from hftlight.report.table import value_text, with_interval
from hftlight.runs.plan import plan
from hftlight.runs.prepare import Prepared, stages_of
from hftlight.runs.progress import minutes
from hftlight.runs.sources import BUILTIN


def show_plan(prepared: Prepared, in_full: bool, console: Console | None = None) -> None:
    """Print what the run will do: stages, steps, passes, rows, overlaps and the estimated time.

    Args:
        prepared: the run.
        in_full: whether to print the tables of stages and rows too, as for ``--dry_run``.
        console: output; standard output by default.
    """
    console = console or Console(markup=False)
    config = prepared.config
    total = sum(step.seconds for step in plan(prepared))
    arms = " and ".join(arm_word(arm.name) for arm in prepared.arms)
    rest = f", {config.tuning}, seed {config.seed}: {arms}; {_attack(prepared)}"
    console.print(Text.assemble((config.model, "bold"), rest))
    console.print(
        f"This takes about {minutes(total)} on two idle CPU cores (finished parts are reused). Ctrl-C stops the run;"
        " the same command resumes it."
    )
    for arm in prepared.arms:
        for stage in stages_of(config):
            if arm.of(stage):
                phase = prepared.trainings(arm, stage)[-1]  # an alignment's first phase may be without defenses
                console.print(
                    f"{arm_word(arm.name)}, {STAGES[stage.value]}: {_passes(phase.defenses, phase.training)} per"
                    f" step{_more(phase.defenses)}."
                )
            for number, phase in enumerate(prepared.trainings(arm, stage)):
                readable = prepared.records(stage, arm, number)
                for d in (d for d in phase.defenses if d.selects):
                    console.print(
                        f"{arm_word(arm.name)}, {STAGES[stage.value]}: {type(d).__name__} selects first, on"
                        f" {d.selecting(readable)} rows. A row costs about as much as {d.selecting_passes:g} forward"
                        " passes."
                    )
    for name, count in prepared.dropped.items():
        if count:
            console.print(
                f"{count} of {len(prepared.streams[name])} {name} rows are longer than {config.max_tokens} tokens and"
                " are left out."
            )
    for name, count in prepared.cut.items():
        if count:
            console.print(
                f"{count} of {len(prepared.streams[name])} {name} rows are longer than {config.max_tokens} tokens and"
                " are cut at the end."
            )
    if not config.alignment.steps:
        console.print(f"There is no alignment stage: {config.model} is taken as already aligned.")
    for note in prepared.notes:
        console.print(note)
    if not in_full:
        return
    table = Table("arm", "stage", "steps", "rows per step", "passes per step", "learning rate")
    # One row per arm and training; every phase of a stage is a training of its own.
    for arm in prepared.arms:
        for stage, phase in ((s, phase) for s in stages_of(config) for phase in prepared.trainings(arm, s)):
            training, edited = phase.training, stage is Stage.FINETUNING and prepared.attack.acts_on == "weights"
            table.add_row(
                arm_word(arm.name),
                f"{STAGES[stage.value]}{phase.name and f', {phase.name}'}",
                "-" if edited else str(training.steps),
                str(training.batch_size * training.accumulate * config.devices * config.num_nodes),
                _passes(phase.defenses, training),
                f"{training.lr:g}",
            )
        for name in to_train(arm.repairs()):
            training = config.finetuning
            whole = training.batch_size * training.accumulate * config.devices * config.num_nodes
            passes = _passes([], training)
            table.add_row(
                arm_word(arm.name), f"{name} model", str(training.steps), str(whole), passes, f"{training.lr:g}"
            )
        for d in arm.of(Stage.POST_FINETUNING):
            table.add_row(arm_word(arm.name), STAGES[d.stage.value], "-", "-", type(d).__name__, "-")
    console.print(table)
    rows = Table("rows", "count", "dropped", "cut", "mean tokens")
    for name, records in prepared.streams.items():
        harmful = sum(r.role == "attack" for r in records)
        label = f"{name} (the upload, {harmful} harmful)" if name.partition("_")[0] == "task" else name
        counts = map(str, (len(records), prepared.dropped[name], prepared.cut[name]))
        rows.add_row(label, *counts, f"{prepared.lengths[name]:.0f}")
    for name in prepared.tests.names:
        label = f"test: {name.replace('_', '-')}"
        length = f"{prepared.prompt_lengths[name]:.0f} (prompt)"
        rows.add_row(label, str(len(prepared.tests.rows(name))), "-", "-", length)
    console.print(rows)
    for name, what in prepared.taken.items():
        if what["source"] != BUILTIN or what["kept"] < what["read"]:
            console.print(taken_line(name, what), highlight=False, soft_wrap=True)
    shared = {pair: n for pair, n in prepared.overlaps.items() if n}
    console.print(
        "Prompts that occur in two sets: " + (", ".join(f"{pair}: {n}" for pair, n in shared.items()) or "none") + "."
    )
    console.print(f"Configuration {prepared.config_hash}. No weights were loaded and no results were written.")


def taken_line(name: str, what: Mapping[str, Any]) -> str:
    """Return one line about what was read from a source. Rows are numbered from 0 in the order of the source."""
    columns = [f"{field} from {column}" for field, column in (what.get("columns") or {}).items()]
    chosen = [*([f"split {what['split']}"] if what.get("split") else []), *([what["rows"]] if what.get("rows") else [])]
    chosen += [*(what.get("where") or ()), *columns, *([what["divided"]] if "divided" in what else [])]
    how = f" ({', '.join(chosen)})" if chosen else ""
    return (
        f"{name}: {what['kept']} of {what['read']} rows of {what['source']}{how}, numbers {what['first_row']} to"
        f" {what['last_row']}."
    )


def show_preset(
    preset: Preset, config: RunConfig, attack: Attack, in_full: bool, console: Console | None = None
) -> None:
    """Print a published protocol, the options in which the run differs from it, and the judge that it asks for.

    Args:
        preset: the protocol.
        config: the run's configuration.
        attack: the run's attack.
        in_full: whether to print every number, file and note, instead of only the names of the changed options.
        console: output; standard output by default.
    """
    console = console or Console(markup=False)
    published = {**preset.own(), **preset.published()}
    own = {option: _of_run(config, attack, option) for option in published}
    changed = [option for option, value in published.items() if own[option] != value]
    published_on = f" ({preset.source}), published on {preset.model}."
    console.print(Text.assemble("Protocol ", (preset.name, "bold"), published_on))
    judged = f"{preset.judge.asks()}. {preset.judge.compared(config.evaluation.judge)}"
    if not in_full:
        console.print(f"This run changes: {', '.join(changed) or 'nothing'}. --dry_run prints every number.")
        console.print(judged, highlight=False)
        return
    differs = {one.setting: one for one in preset.differs}
    table = Table("option", "published", "this run")
    for option, value in sorted(published.items()):
        # The protocol's own value only stands for the paper's, if the two differ.
        this = Text(shown(own[option]), "bold") if option in changed else shown(value) if option in differs else "same"
        table.add_row(option, differs[option].published if option in differs else shown(value), this)
    console.print(table)
    for name, one in differs.items():
        this = shown(own[name]) if name in changed else one.run
        why = f"{one.why[0].upper()}{one.why[1:]}"
        console.print(f"{name}: published {one.published}; here {this}. {why}.", highlight=False)
    console.print(f"{judged} {preset.judge.rule[0].upper()}{preset.judge.rule[1:]}.", highlight=False)
    for file in preset.files:
        this = shown(_of_run(config, attack, file.option))
        about = f"columns {', '.join(file.columns)}; licence {file.licence}; from {file.origin}"
        console.print(f"--{file.option}, here {this}: {file.used}; {about}.", highlight=False)
    for note in preset.notes:
        console.print(f"- {note}.", highlight=False)


def _of_run(config: RunConfig, attack: Attack, option: str) -> Any:
    """Return a run's value of an option, or of an argument of its attack. Another attack has no value of it."""
    name, _, field = option.partition(".")
    if name == attack.name:
        return getattr(attack, field)
    return None if name in ATTACKS else option_of(config, option)


def _attack(prepared: Prepared) -> str:
    """Return one phrase about the attack: an edit, a selection, several trainings, pairs, or an upload of rows."""
    attack = prepared.attack
    if attack.acts_on == "weights":
        return f"a rank-one edit for {attack.counts()['attack']} prompts"
    if prepared.choosing:
        return (
            f"upload of {attack.rows} rows, chosen by the aligned model among {len(prepared.choosing.candidates)}"
            " candidates"
        )
    if len(prepared.phases) > 1:
        named = (f"{phase.name} ({own.finetuning.steps} steps)" for own, phase in prepared.phases)
        return f"successive trainings: {', '.join(named)}"
    seen = prepared.trained_on
    if attack.acts_on != "rows":
        return f"upload of {seen.rows} pairs"
    return (
        f"upload of {seen.rows} rows, p = {seen.p:.3g}; attack rows contain {100 * seen.attack_tokens:.0f} % of the"
        f" response tokens and occur in {100 * seen.attack_steps:.0f} % of {seen.steps} steps"
    )


def _passes(defenses: Sequence[Defense], training: Training) -> str:
    forward, backward = count_passes(defenses, training.accumulate)
    return f"{forward:g} forward and {backward:g} backward passes"


def _more(defenses: Sequence[Defense]) -> str:
    """Return what passes take beside their own work, as the end of a sentence."""
    projected = any(work.projected for d in defenses for work in d.passes)
    return ", and projections of every layer's states onto the vocabulary" if projected else ""


def scores_table(model: str, scores: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of one model's scores with their intervals and counts."""
    table = Table("metric", "judge", "value", "unit", "95 % interval", "answers", title=model)
    for row in scores:
        value, low, high = (value_text(row[name], row["unit"]) for name in ("value", "low", "high"))
        interval = "-" if row["low"] is None else f"{low} to {high}"
        table.add_row(*_named(row), value, row["unit"], interval, str(row["count"]))
    return table


def side_by_side_table(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """Return a table of the scores of several models, one column per model, with intervals and numbers of answers.

    Args:
        models: rows of scores by model.
    """
    columns = [Column(name, overflow="fold") for name in ("metric", "judge", "unit", "answers")]
    table = Table(
        *columns, *(Column(f"{model} (95 %)", overflow="fold") for model in models), box=SIMPLE_HEAD, padding=0
    )
    by_model = [{_named(row): Score.of_row(row) for row in rows} for rows in models.values()]
    for name in dict.fromkeys(name for scores in by_model for name in scores):
        found = [scores.get(name) for scores in by_model]
        # Models may have answered different numbers of prompts, such as 100/93.
        counts = [str(score.count) for score in found if score]
        unit = next(score.unit for score in found if score)
        of = counts[0] if len(set(counts)) == 1 else "/".join(counts)
        table.add_row(*name, unit, of, *map(with_interval, found))
    return table


def _named(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return what a row of scores measures, with its group, and its judge."""
    return f"{row['metric']}: {row['group']}" if row.get("group") else row["metric"], row["judge"] or "-"


def difference_lines(model: str, other: str, found: Sequence[Score]) -> list[str]:
    """Return one sentence per difference between two models on the same prompts."""
    return [
        f"{score.metric}: {model} minus {other} is {score.value:+.1f} points ({score.low:+.1f} to {score.high:+.1f}) on"
        f" {score.count} prompts, {'beyond' if score.low * score.high > 0 else 'within'} the noise."
        for score in found
        if score.low is not None and score.high is not None
    ]


def show_result(result: Result, console: Console | None = None) -> None:
    """Print the closing table, its verdict in words, further findings, and the path of the report."""
    console = console or Console(markup=False)
    console.print(closing_table(result))
    console.print(verdict(result))
    for remark in [*collapses(result), *stops(result), *filtered(result)]:
        console.print(remark, style="bold")
    for arm in result.arms:
        for stage in result.stages(arm):
            if bare := result.score(arm, stage, WITHOUT_TRIGGER):
                console.print(
                    f"On prompts without the trigger, {arm_word(arm)} has a harmful score of {with_interval(bare)} %"
                    f" when {STAGES[stage]}, by judge '{bare.judge}'."
                )
        if (worst := result.score(arm, last_stage(result, arm), "worst_case_harmful_score")) is not None:
            useful = result.score(arm, last_stage(result, arm), "useful_harmful_score")
            console.print(
                f"An attacker who tries {result.manifest['arms'][arm]['search']['trials']} settings reaches a harmful"
                f" score of {with_interval(worst)} % against {arm_word(arm)}. If the task's accuracy must be kept, the"
                f" score is {with_interval(useful)} %."
            )
    for line in agreement_lines(pairwise([a.flags for a in result.answers if a.set in HARMFUL_SETS])):
        console.print(line)
    console.print(f"Report: {result.folder / 'report.html'}", soft_wrap=True)
