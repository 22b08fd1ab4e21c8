"""``hftlight reproduce PRESET[:TASK]``: repeat a table of a paper, and print paper, ours and the difference."""

import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from hftlight.cli.arguments import methods_except, show_in_short
from hftlight.cli.compare import GRID_FIELDS, NO_DEFENSE, add_methods, add_running, for_grid, seeds_of
from hftlight.config import RunConfig, inside
from hftlight.console import guarded, quiet
from hftlight.errors import InputError
from hftlight.folders import file_name

if TYPE_CHECKING:
    from hftlight.attacks.protocols.protocol import Preset
    from hftlight.attacks.protocols.results import PaperTable, Value
    from hftlight.cli.parser import Names

# What ``--help`` shows; ``--help all`` shows the rest.
COMMON = (
    *("table", "arms", "values", "dry_run", "report_only", "seeds", "jobs", "comparison", "config", "model"),
    *("data.alignment", "data.harmful", "data.pairs", "data.attack", "data.task_train", "data.task_test", "data.test"),
    *("num_samples", "alignment.steps", "evaluation.judge", "evaluation.prompts", "evaluation.task_rows", "output"),
)
USAGE = "hftlight reproduce PRESET[:TASK] [options]"


class Column(NamedTuple):
    """The settings of one column of a table.

    Attributes:
        config: the configuration.
        arguments: arguments by defense and attack.
        harmful_ratio: p, 0-1.
    """

    config: RunConfig
    arguments: dict[str, dict[str, Any]]
    harmful_ratio: float


def reproduce_parser(names: Sequence[str], attack: str, about: str = "") -> Any:
    """Return the parser of ``hftlight reproduce``, with a group of arguments for each arm's defense and the attack.

    Args:
        names: names of the defenses.
        attack: name of the protocol's attack.
        about: what the help says about the chosen protocol.
    """
    from hftlight.cli.parser import Parser

    parser = Parser(
        prog="hftlight reproduce",
        usage=USAGE,
        description=(
            "Repeat a table of a paper: check the files, run the arms of the table through a comparison, and print\n"
            "the paper's numbers, ours with 95 % intervals, and the difference. Options override the protocol. Each\n"
            f"override is listed in the result. The same command continues a reproduction that was killed.{about}"
        ),
    )
    add = parser.add_argument
    add("--config", type=str, default=None, help="YAML file with any of these values")
    add("--print_config", action="store_true", help="print every value as a YAML file, then stop")
    add("--table", type=str, default=None, help="name of the table; by default the first one of the task")
    add("--arms", nargs="+", type=str, help="arms of the table to run, such as none booster; all by default")
    add("--values", nargs="+", type=str, help="values of what varies to run; all by default")
    add("--dry_run", action="store_true", help="check the files, print arms, cells, steps and time, then stop")
    add_running(parser, None, seeds=1)
    add_methods(parser, names, [attack])
    return parser


def reproduce(argv: Sequence[str] | None = None) -> int:
    """Run ``hftlight reproduce`` and return its exit status, 1 if a cell failed."""

    def work() -> None:
        from hftlight.cli.parser import read_names

        words = list(sys.argv[1:] if argv is None else argv)
        word = words.pop(0) if words and not words[0].startswith("-") else None
        names = read_names(words, ["arms", "values"], ["table"])
        if word is None:
            _help_or_refuse(names)
        of, how = _asked(str(word), names)
        quiet()
        from hftlight.comparison.reproduction.show import reproduce_and_show
        from hftlight.models.base import check_accelerator

        for part in of.parts if how["backend"] == "processes" else ():
            check_accelerator(part.config)
        reproduce_and_show(of, **how)

    return guarded(work)


def _help_or_refuse(names: "Names") -> None:
    """Print the help without a protocol and exit, or refuse the command.

    Raises:
        InputError: if no help is asked for.
        SystemExit: with status 0 after the help.
    """
    from hftlight.attacks.protocols.protocol import PRESETS

    if not names.help:
        raise InputError(f"{USAGE}: name a protocol, such as booster25:sst2. Protocols are {', '.join(PRESETS)}.")
    listed = textwrap.fill(f"protocols: {', '.join(PRESETS)}", 100)
    about = f"\n\n{listed}\nhftlight reproduce PRESET --help shows the tables of a protocol."
    parser = reproduce_parser([], "harmful_mix", about)
    for action in parser._actions:  # the protocol decides these values
        action.default = None if "." in action.dest or action.dest in ("model", "num_samples") else action.default
    if names.help == "short":
        show_in_short(parser, COMMON)
    parser.print_help()
    raise SystemExit(0)


def _asked(word: str, names: "Names") -> tuple[Any, dict[str, Any]]:
    """Return the reproduction that the arguments ask for, and how its cells run.

    Args:
        word: ``PRESET`` or ``PRESET:TASK``.
        names: from the first step of parsing.
    """
    from hftlight.attacks.protocols.protocol import get_preset
    from hftlight.attacks.protocols.results import paper_table, paper_tables

    preset_name, _, task = word.partition(":")
    base = get_preset(preset_name, task) if task else get_preset(preset_name)
    table = paper_table(base, task or None, names.defaults.get("table"))
    arms = _picked("--arms", names.listed("arms"), list(table.arms))
    values: list[Any] = _values(names.defaults.get("values"), table, task)
    if names.help:
        # The short help names no argument of a defense, so that it need not import one.
        shown = arms if names.help == "all" else []
        parser, _ = _parser_of(_preset_of(base.name, table, task, values[0]), table, shown, values[0])
        parser.description += _about(base, paper_tables(base))
        if names.help == "short":
            show_in_short(parser, COMMON)
        parser.print_help()
        raise SystemExit(0)
    bare = replace(names, defaults={}, rest=[], presets={})
    columns: dict[Any, Column] = {}
    found: dict[str, Any] = {}
    # All harmful ratios share one configuration, and so one comparison.
    values_of = [values] if table.varies == "p" else [[value] for value in values]
    parsed: Any = None
    for some in values_of:
        preset = _preset_of(base.name, table, task, some[0])
        parsed, column = _column(preset, table, arms, some[0], names)
        _, published = _column(preset, table, arms, some[0], bare)
        column = column._replace(config=_complete(column.config, table))
        columns[some[0]] = column
        found |= {d.option: d for d in _departures(preset, table, some[0], published, column)}
    return _reproduction(base, table, arms, values_of, columns, tuple(found.values()), parsed)


def _reproduction(
    preset: "Preset",
    table: "PaperTable",
    arms: Sequence[str],
    values_of: Sequence[Sequence["Value"]],
    columns: Mapping[Any, Column],
    found: tuple[Any, ...],
    parsed: Any,
) -> tuple[Any, dict[str, Any]]:
    """Return the reproduction with its parts, and how its cells run."""
    from hftlight.comparison.grid import Grid
    from hftlight.comparison.reproduction.inputs import uncompared
    from hftlight.comparison.reproduction.settings import Part, Reproduction, part_folder

    name = parsed.comparison or file_name(f"{preset.name}-{table.task or preset.attack.name}-{table.name}")
    first = columns[values_of[0][0]].config
    folder = inside(first.output, name, "--comparison")
    parts = []
    for some in values_of:
        column = columns[some[0]]
        ratios = tuple(float(value) for value in some) if table.varies == "p" else (column.harmful_ratio,)
        grid = Grid(
            tuple(arms),
            ratios,
            (column.config.data.task or "builtin",),
            seeds_of(parsed),
            parsed.first_seed,
            column.arguments,
            (preset.attack.name,),
        )
        parts.append(Part(tuple(some), column.config, grid, part_folder(folder, table, some[0])))
    values = tuple(value for some in values_of for value in some)
    of = Reproduction(
        preset, table, tuple(arms), values, folder, tuple(parts), found, uncompared(table, first.evaluation.judge)
    )
    how = ("jobs", "retries", "backend", "share_gpus", "dry_run", "report_only")
    return of, {key: parsed[key] for key in how}


def _preset_of(name: str, table: "PaperTable", task: str, value: "Value") -> "Preset":
    """Return the protocol of one column: with the table's task, its changes of the attack, and the column's value."""
    from hftlight.attacks.protocols.protocol import get_preset

    changes = dict(table.attack)
    if table.varies in ("n", "lr", "epochs"):
        changes[table.varies] = value
    own = str(value) if table.varies == "task" else table.task or task or "sst2"
    return get_preset(name, own, **changes)


def _parser_of(preset: "Preset", table: "PaperTable", arms: Sequence[str], value: "Value") -> tuple[Any, float]:
    """Return the parser with the paper's setting of one column as its defaults, and the column's harmful ratio."""
    from hftlight.attacks.protocols.results import CHOSEN_BY_USER

    defenses, attack = [arm for arm in arms if arm not in NO_DEFENSE], preset.attack.name
    parser = reproduce_parser(defenses, attack)
    defaults = {**preset.defaults(defenses), **table.run}
    # Mappings such as data.rows have entries of the protocol and of the table.
    for option, own in table.run.items():
        if isinstance(own, Mapping):
            defaults[option] = {**preset.overrides.get(option, {}), **own}
    for arm in defenses:
        defaults |= {f"{arm}.{name}": argument for name, argument in table.arguments(arm).items()}
    if "." in table.varies:
        defaults[table.varies] = value
    ratio = float(defaults.get("harmful_ratio", 0.1))
    defaults |= {"model": value if table.varies == "model" else preset.model, "evaluation.judge": "auto"}
    defaults |= {f"data.{source}": CHOSEN_BY_USER for source in table.files}
    if preset.attack.n is None and attack != "identity_shift":
        defaults["num_samples"] = 0
    known = {action.dest for action in parser._actions}
    parser.take_defaults({option: default for option, default in defaults.items() if option in known})
    return parser, ratio


def _column(
    preset: "Preset", table: "PaperTable", arms: Sequence[str], value: "Value", names: "Names"
) -> tuple[Any, Column]:
    """Return the parsed values, and the settings of one column.

    Args:
        preset: the protocol of the column.
        table: the paper's table.
        arms: the arms.
        value: the column's value.
        names: from the first step of parsing; without options for the paper's own setting.
    """
    from hftlight.cli.parser import preset_values

    defenses, attack = [arm for arm in arms if arm not in NO_DEFENSE], preset.attack.name
    parser, ratio = _parser_of(preset, table, arms, value)
    given = {k: v for k, v in names.defaults.items() if k not in ("arms", "values", "table")}
    for_grid(given)
    if task := given.pop("tasks", None):
        given["data.task"] = task[0]
    for axis in ("defenses", "attacks", "harmful_ratios"):  # the table decides them
        given.pop(axis, None)
    parser.take_defaults(given, methods_except([*defenses, attack]))
    parser.take_defaults(preset_values(names, defenses))
    parsed = parser.parse(names)
    try:
        ready = parser.instantiate_classes(parsed.clone())
    except (ValueError, TypeError) as error:  # a defense or the attack refuses its arguments
        raise InputError(str(error)) from error
    config = RunConfig(**{key: ready[key] for key in RunConfig.__dataclass_fields__ if key not in GRID_FIELDS})
    arguments = {name: parsed[name].as_dict() for name in [*defenses, attack]}
    return parsed, Column(config, arguments, ratio)


def _complete(config: RunConfig, table: "PaperTable") -> RunConfig:
    """Return a configuration with shared files filled in, and with the paper's judge if this machine has it.

    Raises:
        InputError: if a value is out of range.
    """
    from hftlight.comparison.reproduction.inputs import filled, judge_here

    config = replace(config, data=filled(config.data, list(table.files), table))
    judge = config.evaluation.judge
    if judge == "auto":
        judge = table.judge if judge_here(table.judge) else "builtin" if config.data.test == "builtin" else "keyword"
        config = replace(config, evaluation=replace(config.evaluation, judge=judge))
    replace(config, num_samples=config.num_samples or 1).check()
    return config


def _departures(preset: "Preset", table: "PaperTable", value: "Value", published: Column, column: Column) -> list[Any]:
    """Return what a column changes of the paper's setting.

    Raises:
        InputError: if the user sets an option that the attack's own count of epochs overrides.
    """
    from hftlight.comparison.reproduction.settings import departures

    attack = preset.attack.name
    for option, instead in (("steps", "epochs"), ("batch_size", "batch_size")):
        before, after = (getattr(c.config.finetuning, option) for c in (published, column))
        if before != after and column.arguments[attack].get(instead) is not None:
            raise InputError(
                f"--finetuning.{option} has no effect here, since the protocol counts rows and epochs, got {after}. Use"
                f" --{attack}.{instead} instead."
            )
    model = str(value) if table.varies == "model" else preset.model
    return departures(published[:2], column[:2], table, model)


def _picked(option: str, words: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the chosen names in the order of the table, all of them if none is chosen."""
    if unknown := [word for word in words if word not in known]:
        raise InputError(f"{option}: the table has {', '.join(known)}, got {unknown[0]!r}.")
    return [one for one in known if one in words] or list(known)


def _values(words: Sequence[str] | None, table: "PaperTable", task: str) -> list["Value"]:
    """Return the chosen values of what the table varies, in the order of the table."""
    if not words:
        return [task] if table.varies == "task" and task else list(table.values)
    known = {str(value): value for value in table.values}
    chosen = []
    for word in words:
        if word not in known:
            word = next((text for text, value in known.items() if _equal(value, word)), word)
        if word not in known:
            raise InputError(f"--values: the table has {table.varies} = {', '.join(known)}, got {word!r}.")
        chosen.append(known[word])
    return [value for value in table.values if value in chosen]


def _equal(value: "Value", word: str) -> bool:
    try:
        return not isinstance(value, str) and float(word) == value
    except ValueError:
        return False


def _about(preset: "Preset", tables: Sequence["PaperTable"]) -> str:
    """Return what the help says about a protocol: its paper and its tables."""
    lines = [
        f"  {table.name!r:18} {table.task or '-':6} {table.varies} = "
        f"{', '.join(str(value).rpartition('/')[2] for value in table.values)}; {', '.join(table.arms)}"
        for table in tables
    ]
    return "\n".join([f"\n\n{preset.name}: {preset.source}", *lines])
