"""Arguments that several commands share. Heavy libraries are imported inside the functions that need them."""

import argparse
import json
import re
import textwrap
from collections.abc import Collection, Sequence
from typing import Any

from hftlight.registry import defenses


def chosen_preset(word: str | None, task: str | None = None) -> Any:
    """Return the published protocol of ``--preset NAME`` or ``--preset NAME:TASK``, None if there is no preset.

    Without TASK the task is that of ``--data.task`` if it is one of ``PRESET_TASKS``, else the first of them.

    Args:
        word: value of ``--preset``.
        task: value of ``--data.task``.

    Raises:
        InputError: if there is no such protocol, or it has no such task.
    """
    from hftlight.attacks.protocols.protocol import PRESET_TASKS, get_preset

    if word is None:
        return None
    name, _, own = word.partition(":")
    task = (task or "").removesuffix("_step_by_step")
    return get_preset(name, own or (task if task in PRESET_TASKS else PRESET_TASKS[0]))


def methods_except(chosen: Sequence[str]) -> set[str]:
    """Return the names of the other defenses and attacks, whose arguments a run's configuration may hold."""
    from hftlight.attacks.registry import ATTACKS

    return {*defenses(), *ATTACKS} - {*chosen}


def preset_help() -> str:
    """Return the help of ``--preset``."""
    from hftlight.attacks.protocols.protocol import PRESETS

    return f"published protocol, NAME or NAME:TASK, which other options override: {', '.join(PRESETS)}"


def add_common(parser: Any) -> None:
    """Add the options that the first step reads, so that the help shows them."""
    parser.add_argument(
        "--config", type=str, default=None, help="YAML file with any of these values, such as a run's config.yaml"
    )
    parser.add_argument("--print_config", action="store_true", help="print every value as a YAML file, then stop")
    parser.add_argument("--preset", type=str, default=None, help=preset_help())


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


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
