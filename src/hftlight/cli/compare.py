"""``hftlight compare``: one run per combination of defenses, attack, task, harmful ratio and seed."""

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from hftlight.cli.arguments import (
    asks_for_all,
    chosen_preset,
    formatter,
    plain_names,
    preset_help,
    show_in_short,
    with_presets,
)
from hftlight.config import OWN_TRAINER, RunConfig
from hftlight.console import guarded, quiet
from hftlight.errors import InputError
from hftlight.registry import defense_class

NO_DEFENSE = ("none", "unaligned")  # arms of a comparison without a defense
GRID_FIELDS = {"defense", "baseline", "attack", "harmful_ratio", "seed", "name"}  # set by the grid in every cell
Backend = Literal["processes", "ray"]
# What ``--help`` shows; ``--help all`` shows the rest.
COMMON = (
    *("defenses", "attacks", "harmful_ratios", "tasks", "seeds", "jobs", "comparison", "dry_run", "report_only"),
    *("preset", "config", "model", "tuning", "num_samples", "finetuning.steps", "finetuning.lr"),
    *("data.alignment", "data.harmful", "data.attack", "data.test", "evaluation.judge", "output", "logger"),
)


def compare_parser(names: Sequence[str], attacks: Sequence[str] = (), everything: bool = True) -> Any:
    """Return the parser of ``hftlight compare``, with a group of arguments for each compared defense and attack.

    Args:
        names: names of the compared defenses.
        attacks: names of the compared attacks.
        everything: whether the help shows every option, not only those that most people set.
    """
    from jsonargparse import ArgumentParser

    from hftlight.attacks.registry import get_attack

    parser = ArgumentParser(
        prog="hftlight compare",
        usage="hftlight compare --defenses none booster booster+lisa [options]",
        description=(
            "Compare combinations of defenses: one run per combination, attack, task, harmful ratio and seed, then a\n"
            "table, figures and every answer. The same command continues a comparison that was killed."
        ),
        formatter_class=formatter(),
        default_env=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these values")
    add = parser.add_argument
    add("--preset", type=str, default=None, help=preset_help())
    add(
        "--defenses",
        nargs="+",
        type=str,
        default=["none"],
        help="combinations such as booster+lisa, none, or unaligned (no defense, no alignment stage)",
    )
    add("--attacks", nargs="+", type=str, default=["harmful_mix"], help="attacks, each as --attack of hftlight train")
    add("--harmful_ratios", nargs="+", type=float, default=[0.1], help="harmful fractions p of the upload, each 0-1")
    add(
        "--tasks",
        nargs="+",
        type=str,
        default=["builtin"],
        help="tasks, each as in --data.task of hftlight train; the task's name replaces {task} in --data.task_train and"
        " --data.task_test",
    )
    add("--seeds", type=int, default=3, help="number of seeds, >= 1")
    add("--first_seed", type=int, default=0, help="the first seed")
    add(
        "--jobs",
        type=int,
        default=1,
        help="cells that run at one time, each with its share of cores and GPUs, >= 1",
    )
    add("--share_gpus", type=bool, default=False, help="let cells share GPUs if --jobs needs more GPUs than there are")
    add("--retries", type=int, default=1, help="how often a failed cell is tried again, >= 0")
    add("--backend", type=Backend, default="processes", help="processes (this machine) or ray (a Ray cluster)")
    add("--comparison", type=str, default="comparison", help="name of the comparison's folder in --output")
    add("--report_only", action="store_true", help="write table and report of the finished cells, and run nothing")
    add("--dry_run", action="store_true", help="print the cells and a time estimate, then stop")
    for name in names:
        known = set(inspect.signature(defense_class(name).__init__).parameters)
        parser.add_class_arguments(defense_class(name), name, skip=OWN_TRAINER & known, as_group=True)
    for name in attacks:
        parser.add_class_arguments(get_attack(name), name, as_group=True)
    parser.add_class_arguments(RunConfig, as_group=True, skip={*GRID_FIELDS, "data.task"})
    if not everything:
        show_in_short(parser, COMMON, [*names, *(a for a in attacks if a != "harmful_mix")])
    return parser


def compare(argv: Sequence[str] | None = None) -> int:
    """Run ``hftlight compare`` and return its exit status, 1 if a cell failed."""

    def work() -> None:
        raw, everything = asks_for_all(sys.argv[1:] if argv is None else argv)
        arguments = plain_names(raw)
        words = words_of(arguments, "--defenses")
        names = list(dict.fromkeys(n.replace("-", "_") for w in words for n in w.split("+") if n not in NO_DEFENSE))
        preset = chosen_preset(arguments)
        attacks = [n.replace("-", "_") for n in words_of(arguments, "--attacks")]
        attacks = attacks or [preset.attack.name if preset else "harmful_mix"]
        parser = compare_parser(names, attacks, everything)
        if preset:
            known, defaults = {a.dest for a in parser._actions}, preset.defaults(names)
            # A preset sets options of one run. A grid takes lists of two of them.
            columns = {"harmful_ratios": "harmful_ratio", "tasks": "data.task"}
            defaults |= {option: [defaults[one]] for option, one in columns.items() if one in defaults}
            parser.set_defaults({k: v for k, v in defaults.items() if k in known})
        values = parser.parse_args(with_presets(arguments, names))
        try:
            ready = parser.instantiate_classes(values.clone())
        except (ValueError, TypeError) as error:  # a defense or an attack refuses its arguments
            raise InputError(str(error)) from error
        config = RunConfig(**{key: ready[key] for key in RunConfig.__dataclass_fields__ if key not in GRID_FIELDS})
        config.check()
        quiet()
        from hftlight.comparison.grid import Grid
        from hftlight.comparison.show import compare_and_show

        grid = Grid(
            tuple(values.defenses),
            tuple(values.harmful_ratios),
            tuple(values.tasks),
            values.seeds,
            values.first_seed,
            {name: values[name].as_dict() for name in [*names, *attacks]},
            tuple(attacks),
        )
        folder = Path(config.output) / values.comparison
        how = {name: values[name] for name in ("jobs", "retries", "backend", "share_gpus")}
        compare_and_show(config, grid, folder, values.dry_run, values.report_only, **how)

    return guarded(work)


def words_of(arguments: Sequence[str], option: str) -> list[str]:
    """Return the values of an option that takes several values, ``[]`` if the option is absent."""
    words: list[str] = []
    inside = False
    for argument in arguments:
        if argument.startswith("--"):
            inside = argument.partition("=")[0] == option
            words += [w for w in argument.partition("=")[2].strip("[]").replace(",", " ").split() if inside]
        elif inside:
            words.append(argument)
    return words
