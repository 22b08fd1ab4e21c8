"""``hftlight train``: align a model, let an upload train it, repair it, and measure it."""

import inspect
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from hftlight.cli.arguments import (
    asks_for_all,
    chosen_attack,
    chosen_defenses,
    chosen_preset,
    formatter,
    listed,
    plain_names,
    preset_help,
    show_in_short,
    with_presets,
)
from hftlight.config import OWN_TRAINER, RunConfig
from hftlight.console import guarded, quiet
from hftlight.errors import InputError
from hftlight.registry import called, defense_class, defenses

# What ``--help`` shows; ``--help all`` shows the rest.
COMMON = (
    *(
        "defense",
        "baseline",
        "dry_run",
        "preset",
        "config",
        "model",
        "tuning",
        "attack",
        "harmful_ratio",
        "num_samples",
    ),
    *("finetuning.steps", "finetuning.lr", "data.alignment", "data.harmful", "data.attack", "data.task", "data.test"),
    *("evaluation.judge", "seed", "output", "logger"),
)


def train_parser(names: Sequence[str], attack: str = "harmful_mix", everything: bool = True) -> Any:
    """Return the parser of ``hftlight train``, with a group of arguments for each chosen defense and the attack.

    Args:
        names: names of the chosen defenses.
        attack: name of the chosen attack.
        everything: whether the help shows every option, not only those that most people set.

    Raises:
        InputError: if a name is unknown.
    """
    from jsonargparse import ArgumentParser

    from hftlight.attacks.registry import get_attack

    offered = _listed(everything)
    presets = {name: defense_class(name).presets for name in names}
    shown = "".join(
        f"\n  --{name}.preset {preset:8} {', '.join(f'{key} {value}' for key, value in values.items())}"
        for name, published in presets.items()
        for preset, values in published.items()
    )
    if shown:
        offered += f"\n\npublished settings:{shown}"
    parser = ArgumentParser(
        prog="hftlight train",
        usage="hftlight train [--defense NAME ...] [options]",
        description=(
            "Align a model, let a user's upload train it, and measure its refusals after every stage."
            f"\n\ndefenses (--defense NAME ... --help shows their arguments):\n{offered}"
        ),
        formatter_class=formatter(),
        default_env=False,
    )
    parser.add_argument(
        "--config", action="config", help="YAML file with any of these values, such as a run's config.yaml"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print stages, steps, rows, overlaps and a time estimate, then stop"
    )
    parser.add_argument("--preset", type=str, default=None, help=preset_help())
    for name in names:  # before all other options, so that the help of a defense starts with them
        known = set(inspect.signature(defense_class(name).__init__).parameters)
        parser.add_class_arguments(defense_class(name), name, skip=OWN_TRAINER & known, as_group=True)
    parser.add_class_arguments(get_attack(attack), attack, as_group=True)
    parser.add_class_arguments(RunConfig, as_group=True)
    if not everything:
        show_in_short(parser, COMMON, names if attack == "harmful_mix" else (*names, attack))
    return parser


def _listed(everything: bool) -> str:
    """Return the defenses as the help lists them: by stage, or one per line with its purpose."""
    if everything:
        return "\n".join(f"  {e.name:16} {e.stage:16} {e.purpose}" for e in defenses().values())
    stages: dict[str, list[str]] = {}
    for entry in defenses().values():
        stages.setdefault(entry.stage, []).append(entry.name)
    width = max(map(len, stages))
    lines = "\n".join(
        textwrap.fill(", ".join(v), 96, initial_indent=f"  {k:{width}} ", subsequent_indent=" " * (width + 3))
        for k, v in stages.items()
    )
    return lines


def parse_train(argv: Sequence[str]) -> tuple[RunConfig, list[Any], Any, bool]:
    """Return the configuration, the defenses, the attack and whether the command is a dry run.

    Raises:
        InputError: if a name or a value cannot be used.
        SystemExit: from argparse, with status 2 for an unknown option and 0 after ``--help``.
    """
    raw, everything = asks_for_all(argv)
    arguments = plain_names(raw)
    names = list(dict.fromkeys(name.replace("-", "_") for name in chosen_defenses(arguments)))
    # --defense goes to the parser once, as one list with underscores.
    known = [a for a in with_presets(arguments, names) if a.partition("=")[0] != "--defense"]
    if any(a.partition("=")[0] == "--defense" for a in arguments):
        known.append("--defense=" + listed(names))
    attack = chosen_attack(arguments)
    parser = train_parser(names, attack, everything)
    if preset := chosen_preset(arguments):
        parser.set_defaults(preset.defaults(names))
    values = parser.parse_args(known)
    try:
        ready = parser.instantiate_classes(values)
    except (ValueError, TypeError) as error:  # a defense refuses its arguments
        raise InputError(str(error)) from error
    config = RunConfig(**{key: ready[key] for key in RunConfig.__dataclass_fields__})
    return config, [called(ready[name], name) for name in names], ready[attack], bool(values.dry_run)


def train(argv: Sequence[str] | None = None) -> int:
    """Run ``hftlight train`` and return its exit status."""

    def work() -> None:
        config, instances, attack, dry = parse_train(sys.argv[1:] if argv is None else argv)
        config.check()
        quiet()
        from hftlight.runs.prepare import prepare
        from hftlight.runs.ranks import main_process
        from hftlight.runs.show import show_plan, show_preset, show_result

        preset = chosen_preset(plain_names(sys.argv[1:] if argv is None else argv))
        if preset and main_process():  # before any file is read, so that a dry run shows it even if files are missing
            show_preset(preset, attack.applied(config), in_full=dry)
        try:
            prepared = prepare(config, instances, attack)
        except InputError:
            raise
        except ValueError as error:  # a list of defenses that cannot be combined
            raise InputError(str(error)) from error
        if main_process():
            show_plan(prepared, in_full=dry)
        if not dry:
            from hftlight.runs.run import run

            result = run(config, instances, attack)
            if main_process():
                show_result(result)

    return guarded(work)
