"""``hftlight evaluate``: measure any model."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hftlight.cli.arguments import methods_except, show_in_short
from hftlight.config import Evaluation, RunConfig
from hftlight.console import guarded, quiet
from hftlight.errors import ConditionError, InputError
from hftlight.files import check_cache, ensure_writable, write_json, write_rows

# What ``--help`` shows; ``--help all`` shows the rest.
COMMON = (
    *("model", "save", "alpaca_eval", "template", "system", "data.test", "data.task", "data.over_refusal"),
    *("evaluation.judge", "evaluation.prompts", "evaluation.task_rows", "fail_if", "precision", "accelerator"),
)
MEASURING = {
    "model",
    "trust_remote_code",
    "tuning",
    "template",
    "system",
    "precision",
    "accelerator",
    "data",
    "evaluation",
}


def evaluate(argv: Sequence[str] | None = None) -> int:
    """Run ``hftlight evaluate`` and return its exit status."""

    def work() -> None:
        from hftlight.cli.parser import Parser, read_names

        parser = Parser(
            prog="hftlight evaluate",
            usage="hftlight evaluate --model MODEL [options]",
            description="Measure any model: an artifact of a run, a folder, or a hub id.",
        )
        parser.add_argument(
            "--config", type=str, default=None, help="YAML file with any of these values, such as a run's config.yaml"
        )
        parser.add_argument("--save", type=str, default=None, help="folder for scores.json and generations.jsonl")
        parser.add_argument(
            "--fail_if",
            nargs="+",
            type=str,
            default=[],
            help="conditions on the scores, such as 'harmful_score_high>5' (in quotes); exit status 3 if one is met."
            " Any metric, with _low or _high for the ends of its 95 %% interval",
        )
        parser.add_argument(
            "--alpaca_eval",
            type=str,
            default=None,
            help="file with AlpacaEval's instructions; the answers for its judge go to alpaca_eval.json in --save",
        )
        parser.add_class_arguments(RunConfig, as_group=True, skip=set(RunConfig.__dataclass_fields__) - MEASURING)
        parser.ease()
        names = read_names(sys.argv[1:] if argv is None else argv, [])
        if names.help == "short":
            show_in_short(parser, COMMON)
        parser.take_defaults(names.defaults, {*RunConfig.__dataclass_fields__, *methods_except([])} - MEASURING)
        values = parser.parse(names)
        ready = parser.instantiate_classes(values)
        config = RunConfig(**{key: ready[key] for key in MEASURING})
        config.check()
        from hftlight.evaluation.conditions import Condition

        conditions = [Condition.parse(text) for text in values.fail_if]
        staged = ("at", "embedding_drift", "loss_rows")
        if any(getattr(config.evaluation, name) != getattr(Evaluation(), name) for name in staged):
            raise InputError(
                f"{', '.join(f'--evaluation.{name}' for name in staged)} need the stages of a run. Leave them out,"
                " or use hftlight train."
            )
        if values.alpaca_eval is not None and values.save is None:
            raise InputError("--alpaca_eval needs a folder for the answers; name it with --save FOLDER.")
        if values.save is not None:
            ensure_writable(Path(values.save), "--save")
        quiet()
        from hftlight.data.records import Record, read_records
        from hftlight.data.table import read_rows

        instructions: list[Record] = []
        if values.alpaca_eval is not None:
            # AlpacaEval's files name the source of an instruction in one of these columns.
            part = next((c for c in ("dataset", "subset") if c in read_rows(values.alpaca_eval)[0][1]), None)
            columns = {"kind": part} if part else None
            instructions = read_records(values.alpaca_eval, role="test", columns=columns, need_response=False)
        from rich.console import Console

        from hftlight.data.templates import get_template
        from hftlight.model_files import trust_remote_code
        from hftlight.models.base import check_accelerator
        from hftlight.models.serving import Artifact
        from hftlight.runs.measuring.measure import answers_to, measure_model
        from hftlight.runs.model_checks import Limits, template_notes
        from hftlight.runs.prepare import test_sets
        from hftlight.runs.show import scores_table
        from hftlight.runs.sources import Sources

        check_cache()
        check_accelerator(config)
        trust_remote_code(config.trust_remote_code)
        artifact = Artifact.of(config.model)
        # The artifact's own template wins over --template. --system wins over the artifact's system text.
        config.template = artifact.serving.get("template") or config.template
        slot = artifact.slot(config.system)
        if config.system is not None:
            slot = replace(slot, text=config.system)
        tests, limits = test_sets(config, None, Sources(config.data)), Limits.of(config.model)
        limits.check_tests(config, replace(tests, over_refusal=[*tests.over_refusal, *instructions]), slot)
        for note in template_notes(get_template(config.template, limits.tokenizer), limits.tokenizer, slot.text):
            Console(markup=False).print(note)
        scores, generations = measure_model(config, tests, slot=slot)
        Console(markup=False).print(scores_table(config.model, scores))
        if values.save is not None:
            write_json(Path(values.save) / "scores.json", scores)
            write_rows(Path(values.save) / "generations.jsonl", generations)
        if instructions:
            from hftlight.evaluation.alpaca_eval import export_alpaca_eval

            rows = answers_to(config, instructions, slot)
            export_alpaca_eval(rows, Path(values.save) / "alpaca_eval.json", Path(config.model).name)
        if met := [str(condition) for condition in conditions if condition.holds(scores)]:
            raise ConditionError(f"--fail_if: {' and '.join(met)} holds for {config.model}.")

    return guarded(work)
