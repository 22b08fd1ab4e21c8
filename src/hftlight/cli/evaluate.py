"""``hftlight evaluate``: measure any model, or several side by side."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hftlight.cli.arguments import methods_except, show_in_short
from hftlight.config import EndpointOptions, Evaluation, RunConfig
from hftlight.console import guarded, quiet
from hftlight.errors import ConditionError, InputError
from hftlight.files import check_cache, ensure_writable, write_json, write_rows
from hftlight.folders import ENDPOINT

# What ``--help`` shows; ``--help all`` shows the rest.
COMMON = (
    *("model", "save", "attack", "alpaca_eval", "template", "system", "data.test", "data.task", "data.over_refusal"),
    *("evaluation.judge", "evaluation.prompts", "evaluation.task_rows", "fail_if", "precision", "accelerator"),
    *("endpoint.base_url", "endpoint.prices", "endpoint.budget"),
)
MEASURING = {
    "trust_remote_code",
    "tuning",
    "template",
    "system",
    "precision",
    "accelerator",
    "data",
    "evaluation",
}
OF_ATTACK = ("template", "data.columns")  # options that an attack sets for the prompts to the fine-tuned model


def evaluate(argv: Sequence[str] | None = None) -> int:
    """Run ``hftlight evaluate`` and return its exit status."""

    def work() -> None:
        from hftlight.cli.parser import read_names

        names = read_names(sys.argv[1:] if argv is None else argv, [], ["attack"])
        attack_name = names.defaults.get("attack")
        parser = _parser(attack_name)
        if names.help == "short":
            show_in_short(parser, COMMON, [attack_name] if attack_name else [])
        # A run's configuration names one model.
        if isinstance(names.defaults.get("model"), str):
            names.defaults["model"] = [names.defaults["model"]]
        others = {*RunConfig.__dataclass_fields__, *methods_except([])} - MEASURING - {"model", "attack", attack_name}
        parser.take_defaults(names.defaults, others)
        values = parser.parse(names)
        try:
            ready = parser.instantiate_classes(values)
        except (ValueError, TypeError) as error:  # an attack refuses its arguments
            raise InputError(str(error)) from error
        config = RunConfig(**{key: ready[key] for key in MEASURING})
        config.check()
        attack = ready[attack_name] if attack_name else None
        _check(values, config, ready.endpoint)
        quiet()
        _measure_all(values, config, attack, ready.endpoint)

    return guarded(work)


def _parser(attack: str | None) -> Any:
    """Return the parser, with the arguments of the attack if one is named."""
    from hftlight.cli.parser import Parser

    parser = Parser(
        prog="hftlight evaluate",
        usage="hftlight evaluate --model MODEL ... [options]",
        description="Measure any model: an artifact of a run, a folder, a hub id, or a model behind an endpoint.",
    )
    add = parser.add_argument
    add("--config", type=str, default=None, help="YAML file with any of these values, such as a run's config.yaml")
    add(
        "--model",
        nargs="+",
        type=str,
        default=["smollm2-135m"],
        help=f"artifact, folder, hub id, smollm2-135m, tiny, or {ENDPOINT}NAME for a model behind an OpenAI-compatible"
        " endpoint. Several models are measured on the same prompts and shown side by side",
    )
    add("--save", type=str, default=None, help="folder for scores.json and generations.jsonl")
    add(
        "--attack",
        type=str,
        default=None,
        help="attack whose system text, prefix and decoding the harmful prompts get, such as identity_shift",
    )
    add(
        "--fail_if",
        nargs="+",
        type=str,
        default=[],
        help="conditions on the scores, such as 'harmful_score_high>5' (in quotes); exit status 3 if one is met."
        " Any metric, with _low or _high for the ends of its 95 %% interval",
    )
    add(
        "--alpaca_eval",
        type=str,
        default=None,
        help="file with AlpacaEval's instructions; the answers for its judge go to alpaca_eval.json in --save",
    )
    parser.add_class_arguments(EndpointOptions, "endpoint", as_group=True)
    if attack:
        from hftlight.attacks.registry import get_attack

        parser.add_class_arguments(get_attack(attack), attack, as_group=True)
    parser.add_class_arguments(RunConfig, as_group=True, skip=set(RunConfig.__dataclass_fields__) - MEASURING)
    parser.ease()
    return parser


def _check(values: Any, config: RunConfig, options: EndpointOptions) -> None:
    """Refuse what cannot be measured, before any model is loaded or asked.

    Raises:
        InputError: naming the option and the way out.
    """
    from hftlight.evaluation.conditions import Condition

    for text in values.fail_if:
        Condition.parse(text)
    staged = ("at", "embedding_drift", "loss_rows")
    if any(getattr(config.evaluation, name) != getattr(Evaluation(), name) for name in staged):
        raise InputError(
            f"{', '.join(f'--evaluation.{name}' for name in staged)} need the stages of a run. Leave them out, or use"
            " hftlight train."
        )
    if len(set(values.model)) < len(values.model):
        raise InputError(f"--model takes each model once, got {' '.join(values.model)}.")
    options.check(sum(model.startswith(ENDPOINT) for model in values.model))
    if values.alpaca_eval is not None and values.save is None:
        raise InputError("--alpaca_eval needs a folder for the answers; name it with --save FOLDER.")
    if values.alpaca_eval is not None and len(values.model) > 1:
        raise InputError(f"--alpaca_eval takes the answers of one model, got {len(values.model)} models.")
    if values.save is not None:
        ensure_writable(Path(values.save), "--save")


def _measure_all(values: Any, config: RunConfig, attack: Any, options: EndpointOptions) -> None:
    """Measure every model, print the scores, and write them to ``--save``."""
    from rich.console import Console

    from hftlight.attacks.attack import overridden
    from hftlight.data.records import Record, read_records
    from hftlight.data.table import read_rows
    from hftlight.evaluation.alpaca_eval import export_alpaca_eval
    from hftlight.evaluation.conditions import Condition
    from hftlight.model_files import trust_remote_code
    from hftlight.models.base import check_accelerator
    from hftlight.runs.measuring.hosted import HostedModel, Measured, endpoints, unmeasured
    from hftlight.runs.measuring.side_by_side import differences
    from hftlight.runs.prepare import test_sets
    from hftlight.runs.show import difference_lines, scores_table, side_by_side_table
    from hftlight.runs.sources import Sources

    def show(text: Any) -> None:
        Console(markup=False).print(text, soft_wrap=isinstance(text, str))

    check_cache()
    clients = endpoints(values.model, options)
    for reason in unmeasured(config) if clients else ():
        if len(clients) == len(values.model):
            raise InputError(f"{reason} Leave the option out.")
        show(f"Not for models behind an endpoint: {reason}")
    if len(clients) < len(values.model):
        check_accelerator(config)
    trust_remote_code(config.trust_remote_code)
    if attack is not None:
        attack = attack.resolved(config)
        config = overridden(config, {k: v for k, v in attack.settings().items() if k in OF_ATTACK})
    system = attack.test_system if config.system is None and attack is not None else config.system
    instructions: list[Record] = []
    if values.alpaca_eval is not None:
        # AlpacaEval's files name the source of an instruction in one of these columns.
        part = next((c for c in ("dataset", "subset") if c in read_rows(values.alpaca_eval)[0][1]), None)
        columns = {"kind": part} if part else None
        instructions = read_records(values.alpaca_eval, role="test", columns=columns, need_response=False)
    tests = test_sets(config, attack, Sources(config.data))
    measured: list[Measured] = []
    for model in values.model:
        own = replace(config, model=model)
        if model in clients:
            hosted, client = HostedModel(model, own, tests, system, clients[model]), clients[model]
            missing = client.missing(hosted.requests)
            most = sum(map(client.highest_cost, missing))
            price = f", which cost {most:.4g} at most" if client.prices is not None and missing else ""
            show(f"{model} at {client.base_url}: {len(missing)} of {len(hosted.requests)} answers are missing{price}.")
            try:
                measured.append(hosted.measure())
                rows = hosted.answers_to(instructions, own.evaluation.max_new_tokens) if instructions else []
            finally:
                show(client.line())
        else:
            of_model, rows = _measure_local(own, tests, system, instructions, show)
            measured.append(of_model)
    several = len(measured) > 1
    if several:
        show(side_by_side_table({each.model: each.scores for each in measured}))
        for each in measured[1:]:
            found = differences(each.generations, measured[0].generations, tests)
            for line in difference_lines(each.model, measured[0].model, found):
                show(line)
    else:
        show(scores_table(measured[0].model, measured[0].scores))
    if values.save is not None:
        _save(Path(values.save), measured, several, {m: client.paid() for m, client in clients.items()})
    if instructions:
        name = Path(values.model[0].removeprefix(ENDPOINT)).name
        export_alpaca_eval(rows, Path(values.save) / "alpaca_eval.json", name)
    for each in measured:
        met = [str(c) for c in map(Condition.parse, values.fail_if) if c.holds(each.scores)]
        if met:
            raise ConditionError(f"--fail_if: {' and '.join(met)} holds for {each.model}.")


def _measure_local(
    config: RunConfig, tests: Any, system: str | None, instructions: Sequence[Any], show: Any
) -> tuple[Any, list[dict[str, Any]]]:
    """Return what was measured of a model on this machine, and its answers to AlpacaEval's instructions."""
    from hftlight.data.templates import get_template
    from hftlight.models.serving import Artifact
    from hftlight.runs.measuring.hosted import Measured
    from hftlight.runs.measuring.measure import answers_to, measure_model
    from hftlight.runs.model_checks import Limits, template_notes

    artifact = Artifact.of(config.model)
    # The artifact's own template wins over --template. --system wins over the artifact's system text.
    config = replace(config, template=artifact.serving.get("template") or config.template)
    slot = artifact.slot(config.system)
    if system is not None:
        slot = replace(slot, text=system)
    limits = Limits.of(config.model)
    limits.check_tests(config, replace(tests, over_refusal=[*tests.over_refusal, *instructions]), slot)
    for note in template_notes(get_template(config.template, limits.tokenizer), limits.tokenizer, slot.text):
        show(note)
    scores, generations = measure_model(config, tests, slot=slot)
    return Measured(config.model, scores, generations), answers_to(config, instructions, slot) if instructions else []


def _save(folder: Path, measured: Sequence[Any], several: bool, paid: dict[str, Any]) -> None:
    """Write scores, answers, prompts that a service refused, and what was paid. Rows of several models name theirs."""

    def named(model: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"arm": model, **row} for row in rows] if several else list(rows)

    write_json(folder / "scores.json", [row for each in measured for row in named(each.model, each.scores)])
    write_rows(folder / "generations.jsonl", [r for each in measured for r in named(each.model, each.generations)])
    if paid:
        blocked = [row for each in measured for row in named(each.model, each.blocked)]
        write_rows(folder / "refused_by_service.jsonl", blocked)
        write_json(folder / "usage.json", paid)
