"""``hftlight analyze``: why safety broke, as tables and pictures."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hftlight.cli.arguments import show_in_short
from hftlight.cli.evaluate import MEASURING
from hftlight.config import RunConfig
from hftlight.console import guarded, quiet
from hftlight.errors import InputError
from hftlight.files import check_cache
from hftlight.folders import ANALYSIS, STAGES

# Options that describe plain models. Those given also override the configuration of a run.
OPTIONS = MEASURING - {"model", "tuning"}

# What ``--help`` shows; ``--help all`` shows the rest.
COMMON = (
    *("analyses", "stages", "reference", "save", "logger", "template", "data.test", "data.over_refusal"),
    *("evaluation.prompts", "evaluation.judge", "accelerator"),
)


def analyze(argv: Sequence[str] | None = None) -> int:
    """Run ``hftlight analyze`` and return its exit status."""

    def work() -> None:
        from hftlight.analysis.registry import DEFAULT, analysis_class
        from hftlight.cli.parser import read_names

        names = read_names(sys.argv[1:] if argv is None else argv, ["analyses"])
        chosen = names.listed("analyses") or list(DEFAULT)
        # The help lists the analyses without importing them, and shows the arguments of those that are named.
        shown = names.listed("analyses") if names.help else chosen
        classes = {name: analysis_class(name) for name in shown}
        parser = _parser(classes)
        if names.help == "short":
            show_in_short(parser, COMMON, shown)
        parser.take_defaults({k: v for k, v in names.defaults.items() if k != "analyses"})
        values = parser.parse(names)
        try:
            ready = parser.instantiate_classes(values)
        except (ValueError, TypeError) as error:  # an analysis refuses its arguments
            raise InputError(str(error)) from error
        if not values.places:
            raise InputError("name at least one run, comparison or model: hftlight analyze RUN|MODEL ...")
        if unknown := [stage for stage in values.stages if stage not in STAGES]:
            raise InputError(f"--stages: names are {', '.join(STAGES)}, got {unknown[0]!r}.")
        quiet()
        check_cache()
        from hftlight.analysis.page import write_study
        from hftlight.analysis.study import study
        from hftlight.models.base import check_accelerator

        config = RunConfig(**{name: ready[name] for name in OPTIONS})
        check_accelerator(config)
        subjects = _subjects(values, config, _given(names.rest, OPTIONS))
        done = study(subjects, [ready[name] for name in chosen])
        folder = _folder(values)
        written = write_study(done, folder, _title(values.places))
        _link(values.places, folder)
        if values.logger == "wandb":
            from hftlight.analysis.log import log_study

            log_study(done, folder, _title(values.places))
        print(f"Written to {written}.")

    return guarded(work)


def _parser(classes: dict[str, Any]) -> Any:
    from hftlight.analysis.registry import ANALYSES, DEFAULT, docstring
    from hftlight.cli.parser import Parser

    listed = "\n".join(f"  {n:18} {docstring(n).splitlines()[0]}" for n in ANALYSES)
    parser = Parser(
        prog="hftlight analyze",
        usage="hftlight analyze RUN|MODEL ... [--analyses NAME ...] [options]",
        description=(
            "Analyse why safety broke: the models of runs and comparisons, or any models."
            f"\n\nanalyses (--analyses NAME ... --help shows their arguments):\n{listed}"
        ),
    )
    parser.add_argument(
        "places",
        type=str,
        nargs="*",
        default=[],
        help="folders of runs or comparisons, or models: artifacts, folders, hub ids",
    )
    parser.add_argument("--analyses", nargs="+", type=str, default=list(DEFAULT), help="what to measure")
    parser.add_argument(
        "--reference", type=str, default=None, help="the aligned model that plain models are compared with"
    )
    parser.add_argument(
        "--stages", nargs="+", type=str, default=list(STAGES), help=f"stages of a run to analyse: {', '.join(STAGES)}"
    )
    parser.add_argument(
        "--save", type=str, default=None, help="folder for table, figures and page; a run's own is RUN/analysis"
    )
    parser.add_argument("--logger", type=str, default="none", help="wandb for tables and images in Weights & Biases")
    for name, kind in classes.items():
        parser.add_class_arguments(kind, name, as_group=True)
    parser.add_class_arguments(RunConfig, as_group=True, skip=set(RunConfig.__dataclass_fields__) - OPTIONS)
    parser.ease()
    return parser


def _given(rest: Sequence[str], options: set[str]) -> list[str]:
    """Return the words of a command line that set one of the options, or a part of one."""
    words: list[str] = []
    taking = False
    for word in rest:
        if word.startswith("--"):
            taking = word[2:].replace("-", "_").partition("=")[0].partition(".")[0] in options
        if taking:
            words.append(word)
    return words


def _subjects(values: Any, config: RunConfig, given: Sequence[str]) -> list[Any]:
    """Return the models of all places, plain models last."""
    from hftlight.analysis.subjects import plain_subjects, runs_in, subjects_of_run
    from hftlight.cli.train import parse_train

    subjects, plain = [], []
    for place in values.places:
        runs = runs_in(place)
        if runs is None:
            plain.append(place)
        for run in runs or []:
            command = parse_train(["--config", str(run / "config.yaml"), *given])
            subjects += subjects_of_run(run, command.config, command.attack, values.stages)
    if plain:
        config.check()
        subjects += plain_subjects(plain, config, values.reference)
    return subjects


def _folder(values: Any) -> Path:
    if values.save is not None:
        return Path(values.save).expanduser()
    first = Path(values.places[0]).expanduser()
    if (first / "manifest.json").is_file() and len(values.places) == 1:
        return (first / ANALYSIS).parent
    return Path(RunConfig().output) / f"analysis-{first.name}"


def _title(places: Sequence[str]) -> str:
    return "Analysis of " + ", ".join(Path(place).name for place in places)


def _link(places: Sequence[str], folder: Path) -> None:
    """Write the report of a run anew if its analysis lies in its folder, so that the report links to the page."""
    from hftlight.report import write_report

    run = Path(places[0]).expanduser()
    if folder.parent == run and (run / "report.html").is_file():
        write_report(run)
