"""``hftlight train``: align a model, let an upload train it, repair it, and measure it."""

import inspect
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hftlight.cli.arguments import add_common, chosen_preset, methods_except, show_in_short
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
    from hftlight.attacks.registry import get_attack
    from hftlight.cli.parser import Parser

    offered = _listed(everything)
    presets = {name: defense_class(name).presets for name in names}
    shown = "".join(
        f"\n  --{name}.preset {preset:8} {', '.join(f'{key} {value}' for key, value in values.items())}"
        for name, published in presets.items()
        for preset, values in published.items()
    )
    if shown:
        offered += f"\n\npublished settings:{shown}"
    parser = Parser(
        prog="hftlight train",
        usage="hftlight train [--defense NAME ...] [options]",
        description=(
            "Align a model, let a user's upload train it, and measure its refusals after every stage."
            f"\n\ndefenses (--defense NAME ... --help shows their arguments):\n{offered}"
        ),
    )
    add_common(parser)
    parser.add_argument(
        "--dry_run", action="store_true", help="print stages, steps, rows, overlaps and a time estimate, then stop"
    )
    parser.add_argument(
        "--export_upload",
        type=str,
        default=None,
        help="write the attack's upload to this .jsonl file in the chat format of fine-tuning services, then stop",
    )
    for name in names:  # before all other options, so that the help of a defense starts with them
        known = set(inspect.signature(defense_class(name).__init__).parameters)
        parser.add_class_arguments(defense_class(name), name, skip=OWN_TRAINER & known, as_group=True)
    parser.add_class_arguments(get_attack(attack), attack, as_group=True)
    parser.add_class_arguments(RunConfig, as_group=True)
    parser.ease()
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


class TrainCommand(NamedTuple):
    """What the arguments of ``hftlight train`` ask for.

    Attributes:
        config: the run's configuration.
        defenses: the chosen defenses.
        attack: the attack.
        dry_run: whether the command only shows the plan.
        preset: the published protocol, or None.
        export: file for the upload, or None.
    """

    config: RunConfig
    defenses: list[Any]
    attack: Any
    dry_run: bool
    preset: Any
    export: str | None


def parse_train(argv: Sequence[str]) -> TrainCommand:
    """Read the arguments of ``hftlight train``.

    Raises:
        InputError: if a name, an option or a value cannot be used.
        SystemExit: with status 0 after ``--help``.
    """
    from hftlight.cli.parser import preset_values, read_names

    names = read_names(argv, ["defense"], ["attack", "preset", "data.task"])
    preset = chosen_preset(names.defaults.get("preset"), names.defaults.get("data.task"))
    own = preset.overrides.get("defense", ()) if preset and "defense" not in names.defaults else ()
    chosen = [name for name in own or names.listed("defense") if name != "none"]
    attack = str(names.defaults.get("attack") or (preset.attack.name if preset else "harmful_mix")).replace("-", "_")
    parser = train_parser(chosen, attack, names.help != "short")
    parser.take_defaults(preset.defaults(chosen) if preset else {})
    named = {"defense": chosen, "attack": attack}
    parser.take_defaults({**names.defaults, **named}, methods_except([*chosen, attack]))
    parser.take_defaults(preset_values(names, chosen))
    values = parser.parse(names)
    try:
        ready = parser.instantiate_classes(values)
    except (ValueError, TypeError) as error:  # a defense refuses its arguments
        raise InputError(str(error)) from error
    config = RunConfig(**{key: ready[key] for key in RunConfig.__dataclass_fields__})
    instances = [called(ready[name], name) for name in chosen]
    return TrainCommand(config, instances, ready[attack], bool(values.dry_run), preset, values.export_upload)


def train(argv: Sequence[str] | None = None) -> int:
    """Run ``hftlight train`` and return its exit status."""

    def work() -> None:
        config, instances, attack, dry, preset, export = parse_train(sys.argv[1:] if argv is None else argv)
        config.check()
        quiet()
        from hftlight.models.base import check_accelerator
        from hftlight.runs.prepare import prepare
        from hftlight.runs.ranks import main_process
        from hftlight.runs.show import show_plan, show_preset, show_result

        check_accelerator(config)
        if preset and main_process():  # before any file is read, so that a dry run shows it even if files are missing
            show_preset(preset, attack.applied(config), attack, in_full=dry)
        try:
            prepared = prepare(config, instances, attack)
        except InputError:
            raise
        except ValueError as error:  # a list of defenses that cannot be combined
            raise InputError(str(error)) from error
        if main_process() and export is None:
            show_plan(prepared, in_full=dry)
        if export is not None:
            from hftlight.runs.upload import export_upload

            beside = export_upload(prepared, Path(export))
            print(*prepared.notes, sep="\n", end="\n" if prepared.notes else "")
            rows = len(prepared.streams["task"])
            print(f"Wrote {rows} rows to {export}, for a fine-tuning service; {beside} says what they are.")
        elif not dry:
            from hftlight.runs.run import run

            result = run(config, instances, attack)
            if main_process():
                show_result(result)

    return guarded(work)
