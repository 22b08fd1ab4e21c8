"""``hftlight compare``: one run per combination of defenses, attack, task, harmful ratio and seed."""

import inspect
import sys
from collections.abc import Collection, Sequence
from typing import Any, Literal

from hftlight.cli.arguments import add_common, chosen_preset, methods_except, show_in_short
from hftlight.config import OWN_TRAINER, RunConfig, inside
from hftlight.console import guarded, quiet
from hftlight.errors import InputError
from hftlight.registry import defense_class

NO_DEFENSE = ("none", "unaligned")  # arms of a comparison without a defense
GRID_FIELDS = {"defense", "baseline", "attack", "harmful_ratio", "seed", "name"}  # set by the grid in every cell
BACKEND: Any = Literal["processes", "ray"]
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
    from hftlight.cli.parser import Parser

    parser = Parser(
        prog="hftlight compare",
        usage="hftlight compare --defenses none booster booster+lisa [options]",
        description=(
            "Compare combinations of defenses: one run per combination, attack, task, harmful ratio and seed, then a\n"
            "table, figures and every answer. The same command continues a comparison that was killed.\n"
            "Several values of a defense's argument, such as --antidote.prune_ratio 0.01 0.05, are one run each. Only\n"
            "numbers, texts and switches may vary. An argument that is a list takes one, such as '[q_proj, v_proj]'."
        ),
    )
    add_common(parser)
    add = parser.add_argument
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
    add_running(parser, "comparison", seeds=3)
    add("--dry_run", action="store_true", help="print the cells and a time estimate, then stop")
    add_methods(parser, names, attacks, {"data.task"})
    if not everything:
        show_in_short(parser, COMMON, [*names, *(a for a in attacks if a != "harmful_mix")])
    return parser


def seeds_of(values: Any) -> int | tuple[int, ...]:
    """Return the value of ``--seeds`` as a grid takes it: a number of seeds, or several seeds."""
    return values.seeds[0] if len(values.seeds) == 1 else tuple(values.seeds)


def add_running(parser: Any, folder: str | None, seeds: int) -> None:
    """Add the options that say how a comparison's cells run.

    Args:
        parser: the parser.
        folder: default name of the comparison's folder.
        seeds: default number of seeds.
    """
    add = parser.add_argument
    add(
        "--seeds",
        nargs="+",
        type=int,
        default=[seeds],
        help="number of seeds, >= 1, or several seeds, such as 20 42 71",
    )
    add("--first_seed", type=int, default=0, help="the first seed, if --seeds is a number of seeds")
    add(
        "--jobs",
        type=int,
        default=1,
        help="cells that run at one time, each with its share of cores and GPUs, >= 1",
    )
    add("--share_gpus", type=bool, default=False, help="let cells share GPUs if --jobs needs more GPUs than there are")
    add("--retries", type=int, default=1, help="how often a failed cell is tried again, >= 0")
    add("--backend", type=BACKEND, default="processes", help="processes (this machine) or ray (a Ray cluster)")
    add("--comparison", type=str, default=folder, help="name of the comparison's folder in --output")
    add("--report_only", action="store_true", help="write table and report of the finished cells, and run nothing")


def add_methods(parser: Any, names: Sequence[str], attacks: Sequence[str], skip: Collection[str] = ()) -> None:
    """Add a group of arguments for each defense and attack, and the options of a run, as the last of a parser.

    Args:
        parser: the parser.
        names: names of the defenses.
        attacks: names of the attacks.
        skip: options of a run that the command sets itself, besides those of the grid.
    """
    from hftlight.attacks.registry import get_attack

    for name in names:
        known = set(inspect.signature(defense_class(name).__init__).parameters)
        parser.add_class_arguments(defense_class(name), name, skip=OWN_TRAINER & known, as_group=True)
    for name in attacks:
        parser.add_class_arguments(get_attack(name), name, as_group=True)
    parser.add_class_arguments(RunConfig, as_group=True, skip={*GRID_FIELDS, *skip})
    parser.ease()


def compare(argv: Sequence[str] | None = None) -> int:
    """Run ``hftlight compare`` and return its exit status, 1 if a cell failed."""

    def work() -> None:
        from hftlight.cli.parser import preset_values, read_names, swept_apart

        names = read_names(sys.argv[1:] if argv is None else argv, ["defenses", "attacks"], ["preset"])
        for_grid(names.defaults)
        combinations = names.listed("defenses") or ["none"]
        chosen = list(dict.fromkeys(n for word in combinations for n in word.split("+") if n not in NO_DEFENSE))
        preset = chosen_preset(names.defaults.get("preset"))
        attacks = names.listed("attacks") or [preset.attack.name if preset else "harmful_mix"]
        parser = compare_parser(chosen, attacks, names.help != "short")
        names = swept_apart(names, parser, chosen, attacks)
        if preset:
            known, defaults = {a.dest for a in parser._actions}, preset.defaults(chosen)
            for_grid(defaults)
            parser.take_defaults({k: v for k, v in defaults.items() if k in known})
        named = {"defenses": combinations, "attacks": attacks}
        parser.take_defaults({**names.defaults, **named}, methods_except([*chosen, *attacks]))
        parser.take_defaults(preset_values(names, chosen))
        values = parser.parse(names)
        sweeps = parser.typed(names.swept)
        from hftlight.comparison.grid import Grid, refusal

        try:
            ready = parser.instantiate_classes(values.clone())
        except (ValueError, TypeError) as error:  # a defense or an attack refuses its arguments
            raise InputError(refusal(error, sweeps)) from error
        config = RunConfig(**{key: ready[key] for key in RunConfig.__dataclass_fields__ if key not in GRID_FIELDS})
        config.check()
        quiet()
        from hftlight.comparison.show import compare_and_show
        from hftlight.models.base import check_accelerator

        if values.backend == "processes":
            check_accelerator(config)
        grid = Grid(
            tuple(values.defenses),
            tuple(values.harmful_ratios),
            tuple(values.tasks),
            seeds_of(values),
            values.first_seed,
            {name: values[name].as_dict() for name in [*chosen, *attacks]},
            tuple(attacks),
            sweeps,
        )
        folder = inside(config.output, values.comparison, "--comparison")
        how = {name: values[name] for name in ("jobs", "retries", "backend", "share_gpus")}
        compare_and_show(config, grid, folder, values.dry_run, values.report_only, **how)

    return guarded(work)


def for_grid(values: dict[str, Any]) -> None:
    """Turn options of one run, from its configuration or from a preset, into lists of the grid. Changes ``values``.

    Args:
        values: by option name. Options that a grid sets in every cell are removed.
    """
    task = values.pop("data.task", None) or (values.get("data") or {}).pop("task", None)
    defense = values.pop("defense", None)
    defense = [defense] if isinstance(defense, str) else defense
    one = {
        "defenses": "+".join(defense) if defense else None,
        "attacks": values.pop("attack", None),
        "harmful_ratios": values.pop("harmful_ratio", None),
        "tasks": task,
    }
    for option, value in one.items():
        if value is not None:
            values.setdefault(option, [value])
    for name in ("baseline", "name"):
        values.pop(name, None)
    if (seed := values.pop("seed", None)) is not None:
        values.setdefault("first_seed", seed)
