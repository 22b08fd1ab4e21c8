"""``hftlight repair``: repair the model of a folder, in the files and one matrix at a time."""

import inspect
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hftlight.config import OWN_TRAINER
from hftlight.console import guarded, quiet
from hftlight.errors import InputError, RunError
from hftlight.files import ensure_writable
from hftlight.registry import called, defense_class, defenses

OTHERS = {
    "aligned": "the aligned model, where the fine-tuning started",
    "base": "the model before its alignment",
    "unaligned": "a model without safety, for repairs that subtract the way to it",
}


def repair(argv: Sequence[str] | None = None) -> int:
    """Run ``hftlight repair`` and return its exit status."""

    def work() -> None:
        from hftlight.cli.parser import preset_values, read_names

        names = read_names(sys.argv[1:] if argv is None else argv, ["defense"])
        chosen = names.listed("defense")
        if not chosen and not names.help:
            raise InputError(f"--defense: name at least one repair: {', '.join(_repairs())}.")
        parser = _parser(chosen)
        parser.take_defaults(preset_values(names, chosen))
        values = parser.parse(names)
        try:
            ready = parser.instantiate_classes(values)
        except (ValueError, TypeError) as error:  # a repair refuses its arguments
            raise InputError(str(error)) from error
        if values.output is None:
            raise InputError(
                "name the fine-tuned model and the folder for the repaired one: hftlight repair MODEL OUTPUT."
            )
        output = Path(values.output).expanduser()
        if output.exists():
            raise InputError(f"{output} exists already; choose another folder.")
        ensure_writable(output.parent, "the second argument")
        quiet()
        reports = _repaired([called(ready[name], name) for name in chosen], values, output)
        for name, report in reports:
            print(f"{name}: {report['changed_entries']:,} entries changed")
        print(f"Written to {output}.")

    return guarded(work)


def _repairs() -> list[str]:
    """Return the names of the repairs."""
    return [name for name, entry in defenses().items() if entry.stage == "post_finetuning"]


def _parser(chosen: Sequence[str]) -> Any:
    from hftlight.cli.parser import Parser

    if wrong := [name for name in chosen if name not in _repairs()]:
        raise InputError(
            f"--defense: {wrong[0]} is no repair of a finished model. Repairs are {', '.join(_repairs())}."
        )
    parser = Parser(
        prog="hftlight repair",
        usage="hftlight repair MODEL OUTPUT --defense NAME ... [options]",
        description=(
            "Repair a fine-tuned model in its files, one matrix at a time, so that it need not fit into memory."
            f"\n\nrepairs: {', '.join(_repairs())}"
        ),
    )
    # The first reading of presets has no model yet, so both are checked by hand.
    parser.add_argument("model", type=str, nargs="?", help="the fine-tuned model: a whole model or an adapter")
    parser.add_argument("output", type=str, nargs="?", help="folder for the repaired model; it must not exist yet")
    parser.add_argument("--defense", nargs="+", type=str, default=[], help="the repairs")
    for name, what in OTHERS.items():
        parser.add_argument(f"--{name}", type=str, default=None, help=f"{what}, as a folder or hub id")
    parser.add_argument(
        "--scores",
        type=str,
        default=None,
        help="safetensors file with what the repair measured on data; needed by a repair that reads data",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for random choices of a repair")
    parser.add_argument(
        "--trust_remote_code", type=bool, default=False, help="let the model run the code that comes with it"
    )
    for name in chosen:
        known = set(inspect.signature(defense_class(name).__init__).parameters)
        parser.add_class_arguments(defense_class(name), name, skip=(OWN_TRAINER | {*OTHERS}) & known, as_group=True)
    parser.ease()
    return parser


def _repaired(repairs: Sequence[Any], values: Any, output: Path) -> list[tuple[str, dict[str, Any]]]:
    """Repair the model and return each repair's name and report."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from safetensors.torch import load_file

    from hftlight.engine.step.slots import check, in_order
    from hftlight.model_files import stands_on, trust_remote_code
    from hftlight.models.repaired import repair_files

    trust_remote_code(values.trust_remote_code)
    ordered = in_order(repairs)
    try:
        check(ordered)
    except ValueError as error:  # repairs that cannot be combined
        raise InputError(str(error)) from error
    if growing := [type(d).__name__ for d in ordered if d.adds_parameters and not d.neutral]:
        raise InputError(
            f"{growing[0]}: adds parameters, and this command edits only those that the files hold. Use hftlight train,"
            " or repair the model in memory."
        )
    reading = [d for d in ordered if d.streams and not d.neutral]
    if reading and (values.scores is None or len(reading) > 1):
        what = "is given" if values.scores is None else f"serves only one of {len(reading)} repairs"
        raise InputError(
            f"{' and '.join(type(d).__name__ for d in reading)}: measures the model on data, which this command does"
            f" not do, and --scores {what}. Take the scores that a run has kept, or repair with hftlight train."
        )
    if values.scores is not None and not Path(values.scores).expanduser().is_file():
        raise InputError(f"--scores: there is no file {values.scores!r}.")
    under = stands_on(values.model)  # the aligned model, if the fine-tuned one is an adapter
    scores = load_file(Path(values.scores).expanduser()) if values.scores is not None else None
    for d in ordered:
        for name in OTHERS:
            setattr(d, name, getattr(values, name) or getattr(d, name))
        missing = [n for n in d.needs if getattr(d, n) is None and not (n == "aligned" and under is not None)]
        if missing and not d.neutral:
            raise InputError(f"{type(d).__name__}: give --{missing[0]}, {OTHERS[missing[0]]}.")
    since, who = time.perf_counter(), " and ".join(type(d).__name__ for d in ordered)
    try:
        # A repair decides itself how often it comes to a weight, so the end is not known.
        with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as progress:
            bar = progress.add_task(f"{who}: copying and checking files")

            def show(name: str) -> None:
                progress.update(bar, description=f"{who}: {name}")

            reports = repair_files(ordered, values.model, output, scores, values.seed, show)
    except (RuntimeError, TypeError, ValueError) as error:  # a refusal names the repair; any other is a defect
        if not str(error).startswith(tuple(type(d).__name__ for d in ordered)):
            raise
        raise RunError(str(error)) from error
    print(f"Repaired in {time.perf_counter() - since:.0f} s.")
    return [(type(d).__name__, report) for d, report in zip(ordered, reports, strict=True)]
