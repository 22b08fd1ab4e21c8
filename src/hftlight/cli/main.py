"""``hftlight COMMAND``: the entry point of all commands."""

import sys
from collections.abc import Sequence
from importlib import import_module

from hftlight import __version__
from hftlight.console import BAD_INPUT

COMMANDS = {
    "train": "align a model, let an upload train it, repair and measure it",
    "compare": "run combinations of defenses over tasks, harmful ratios and seeds, and print a table",
    "evaluate": "measure any model: an artifact, a folder, a hub id, or a model behind an endpoint",
    "reproduce": "repeat a table of a paper, and print paper, ours and the difference",
    "analyze": "analyse why safety broke, as tables and pictures",
    "export": "write an artifact as one model folder, with its adapter merged in",
    "repair": "repair a fine-tuned model in its files, one matrix at a time",
    "rejudge": "judge saved answers with further judges",
    "dashboard": "write the specification of a W&B report of a comparison",
    "cache": "list or clear the cache",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: the command and its arguments; None means those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in COMMANDS:
        status: int = getattr(import_module(f"hftlight.cli.{name}"), name)(arguments[1:])
        return status
    if name == "--version":
        print(f"hftlight {__version__}")
        return 0
    if name in ("-h", "--help"):
        print(_help())
        return 0
    print(f"hftlight: there is no command {name!r}. Commands are {', '.join(COMMANDS)}.", file=sys.stderr)
    return BAD_INPUT


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    head = [
        "usage: hftlight COMMAND [options]",
        "",
        "Defenses against harmful fine-tuning, with attacks and measurements.",
        "",
    ]
    return "\n".join([*head, *lines, "", "hftlight COMMAND --help shows the options of a command."])


def entry() -> None:
    """Run the command ``hftlight`` and exit with its status."""
    sys.exit(main())
