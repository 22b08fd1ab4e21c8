"""Arguments that several commands share. Heavy libraries are imported inside the functions that need them."""

import argparse
import json
import re
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hftlight.config import RunConfig
from hftlight.errors import InputError
from hftlight.registry import defense_class

LISTS = {
    "--lora.targets",
    "--evaluation.at",
    *(f"--search.{axis}" for axis in ("steps", "lr", "rank", "num_samples", "harmful_ratio")),
}  # options that take several values
SWITCHES = {f"--{name}" for name, f in RunConfig.__dataclass_fields__.items() if f.type is bool} | {"--share_gpus"}


def plain_names(argv: Sequence[str]) -> list[str]:
    """Return the arguments in the parser's form: underscores in option names, one value per list, explicit switches."""
    result: list[str | tuple[str, list[str]]] = []
    names: list[str] | None = None  # values of the list option that is open; result holds the same list object
    for position, argument in enumerate(argv):
        if argument.startswith("--"):
            option, equals, value = argument.partition("=")
            option = "--" + option[2:].replace("-", "_")
            names = None
            if option in ("--defense", *LISTS) and not equals:
                names = []
                result.append((option, names))
                continue
            # A switch without a value is followed by another option, or by nothing.
            bare = option in SWITCHES and not equals and next(iter(argv[position + 1 :]), "--").startswith("--")
            result.append(option + equals + value + ("=true" if bare else ""))
        elif names is not None:
            names.append(argument)
        else:
            result.append(argument)
    return [a if isinstance(a, str) else f"{a[0]}={(listed if a[0] == '--defense' else _values)(a[1])}" for a in result]


def _values(words: Sequence[str]) -> str:
    """Return the values of an option, ``10 20`` for example, as one list. A list or null stays unchanged."""
    text = " ".join(words)
    return text if text.startswith("[") or text == "null" else f"[{', '.join(text.replace(',', ' ').split())}]"


def listed(names: Sequence[str]) -> str:
    """Return names as one list in the parser's form, with underscores."""
    return "[" + ", ".join(name.replace("-", "_") for name in names) + "]"


def chosen_defenses(argv: Sequence[str]) -> list[str]:
    """Return the names of the defenses in the arguments or in their configuration file. The later one wins."""
    import yaml

    names: list[str] = []
    for position, argument in enumerate(argv):
        option, _, value = argument.partition("=")
        if option == "--config":
            value = value or next(iter(argv[position + 1 :]), "")
            if not Path(value).is_file():
                raise InputError(f"--config: there is no file {value!r}.")
            loaded = yaml.safe_load(Path(value).read_text()) or {}
            names = list(loaded.get("defense") or [])
        elif option == "--defense":
            names = [n for n in value.strip("[]").replace(",", " ").split() if n not in ("none", "None")]
    return names


def chosen_attack(argv: Sequence[str]) -> str:
    """Return the name of the attack in the arguments, in their configuration file or in their preset.

    The preset applies only if neither the arguments nor the file name an attack.
    """
    import yaml

    preset = chosen_preset(argv)
    name = preset.attack.name if preset else "harmful_mix"
    for position, argument in enumerate(argv):
        option, equals, value = argument.partition("=")
        value = value if equals else next(iter(argv[position + 1 :]), "")
        if option == "--config" and Path(value).is_file():
            name = (yaml.safe_load(Path(value).read_text()) or {}).get("attack") or name
        elif option == "--attack":
            name = value.replace("-", "_")
    return name


def chosen_preset(argv: Sequence[str]) -> Any:
    """Return the published protocol of ``--preset NAME`` or ``--preset NAME:TASK``, None if there is no preset.

    Without TASK the task is that of ``--data.task`` if it is one of ``PRESET_TASKS``, else the first of them.

    Raises:
        InputError: if there is no such protocol, or it has no such task.
    """
    from hftlight.attacks.protocols.protocol import PRESET_TASKS, get_preset

    word = option_value(argv, "--preset")
    if word is None:
        return None
    name, _, task = word.partition(":")
    own = (option_value(argv, "--data.task") or "").removesuffix("_step_by_step")
    return get_preset(name, task or (own if own in PRESET_TASKS else PRESET_TASKS[0]))


def option_value(argv: Sequence[str], option: str) -> str | None:
    """Return the last value of an option, None if the option is absent."""
    last = None
    for position, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name == option:
            last = value if equals else next(iter(argv[position + 1 :]), "")
    return last


def with_presets(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the arguments with ``--NAME.preset PRESET`` replaced by the preset's arguments. Later arguments win.

    Raises:
        InputError: if a defense has no preset of that name.
    """
    result: list[str] = []
    rest = iter(argv)
    for argument in rest:
        option, equals, value = argument.partition("=")
        name = option[2:].removesuffix(".preset")
        if not (option.endswith(".preset") and name in names):
            result.append(argument)
            continue
        value = value if equals else next(rest, "")
        presets = defense_class(name).presets
        if value not in presets:
            raise InputError(f"{option}: presets of {name} are {', '.join(presets) or 'none'}, got {value!r}.")
        result += [f"--{name}.{key}={_text(given)}" for key, given in presets[value].items()]
    return result


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def preset_help() -> str:
    """Return the help of ``--preset``."""
    from hftlight.attacks.protocols.protocol import PRESETS

    return f"published protocol, NAME or NAME:TASK, which other options override: {', '.join(PRESETS)}"


def formatter() -> Any:
    """Return the class that formats a parser's help text."""
    from jsonargparse import DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter):
        """Help formatter that keeps the line breaks of the description."""

        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return "\n".join(indent + line for line in text.splitlines())

    return Formatter


def asks_for_all(argv: Sequence[str]) -> tuple[list[str], bool]:
    """Return the arguments with ``--help all`` as ``--help``, and whether the help shows every option.

    Options are hidden only for a plain ``--help``, because ``--print_config`` omits hidden options.
    """
    shown, everything = list[str](), not {"--help", "-h"} & set(argv)
    for argument in argv:
        if argument == "all" and shown and shown[-1] in ("--help", "-h"):
            everything = True
        else:
            shown.append(argument)
    return shown, everything


def show_in_short(parser: Any, options: Collection[str], groups: Collection[str] = ()) -> None:
    """Make a parser's help show only the options that most people set, one line each.

    Args:
        parser: the parser. Its other options still work, but the help does not show them.
        options: names of the options that get a line.
        groups: prefixes of options that the help shows in full, such as the name of a chosen defense.
    """
    lines = {}
    for action in parser._actions:
        if action.dest in options:
            lines[action.dest] = _line(action)
        if action.dest.partition(".")[0] not in groups:
            action.help = argparse.SUPPRESS
    parser.epilog = "\n".join(
        ["options that most people set (--help all shows every one):", *(lines[name] for name in options)]
    )


def _line(action: Any) -> str:
    """Return an option's name, first sentence and default as one line of the help."""
    text = re.split(r"[.;] ", action.help.rstrip("."))[0]
    value = action.default
    value = " ".join(map(str, value)) if isinstance(value, list) else value
    default = "" if value in (None, "", argparse.SUPPRESS) or action.nargs == 0 else f" [{_text(value)}]"
    return f"  --{action.dest:20} {textwrap.shorten(text, 94 - len(default), placeholder=' ...')}{default}"
