"""Parsing in two steps: first the names of defenses, attack and configuration, then their arguments."""

import argparse
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from typing_extensions import override

from hftlight.errors import InputError
from hftlight.registry import defense_class, defenses

# Options that no longer exist, with the replacement.
MOVED = {"--freeze.mode": "Freeze keeps weights fixed in the training, and --defense rewind restores them after it."}
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


class _Underscores(argparse.ArgumentParser):
    """A parser that reads hyphens in option names as underscores."""

    @override
    def _parse_optional(self, arg_string: str) -> Any:
        if arg_string.startswith("--"):
            name, equals, value = arg_string.partition("=")
            arg_string = f"--{name[2:].replace('-', '_')}{equals}{value}"
        return super()._parse_optional(arg_string)  # type: ignore[misc]


@dataclass(frozen=True)
class Names:
    """What the first step reads.

    Attributes:
        defaults: values for the second parser: of the configuration, then of the names themselves.
        presets: preset by defense.
        rest: arguments for the second step, in their order.
        swept: several values of an option that takes one, by option name. Only the first value is in ``rest`` and
            ``defaults``.
        help: ``"short"``, ``"all"``, or None if no help is asked for.
        prints: whether the configuration is to be printed.
    """

    defaults: dict[str, Any]
    presets: dict[str, str]
    rest: list[str]
    help: str | None = None
    prints: bool = False
    swept: Mapping[str, list[Any]] = field(default_factory=dict)

    def listed(self, option: str) -> list[str]:
        """Return the names in an option that takes several, with underscores and without repetition."""
        return list(dict.fromkeys(name.replace("-", "_") for name in self.defaults.get(option) or []))


class _NamesParser(_Underscores):
    @override
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}. See --help.")


def read_names(argv: Sequence[str], lists: Collection[str], singles: Collection[str] = ()) -> Names:
    """Read the options that decide which further options exist.

    Args:
        argv: the arguments of the command.
        lists: options that name several things, without hyphens in front, such as ``defense``.
        singles: options that name one thing, such as ``attack``.

    Raises:
        InputError: if an option lacks its value, or a configuration cannot be read.
    """
    parser = _NamesParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", nargs="?", const="short", choices=("short", "all"))
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--print_config", action="store_true")
    for name in lists:
        parser.add_argument(f"--{name}", nargs="*")
    for name in singles:
        parser.add_argument(f"--{name}")
    for name in defenses():
        parser.add_argument(f"--{name}.preset")
    found, rest = parser.parse_known_args(argv)
    values = vars(found)
    defaults: dict[str, Any] = {}
    for place in found.config:
        defaults = _merged(defaults, read_config(place))
    for name in lists:
        if values[name] is not None:
            defaults[name] = split_words(values[name])
        elif isinstance(defaults.get(name), str):
            defaults[name] = split_words([defaults[name]])
        if name in defaults:
            defaults[name] = [word for word in defaults[name] or [] if word not in ("None",)]
    defaults |= {name: values[name] for name in singles if values[name] is not None}
    presets = {name: value for name in defenses() if (value := values[f"{name}.preset"]) is not None}
    return Names(defaults, presets, rest, found.help, found.print_config)


def split_words(words: Sequence[str]) -> list[str]:
    """Return the values of an option that takes several: apart, with commas between them, or as one list."""
    return " ".join(words).strip().removeprefix("[").removesuffix("]").replace(",", " ").split()


def read_config(place: str) -> dict[str, Any]:
    """Return the options in a YAML file.

    Raises:
        InputError: if there is no such file, or it holds no YAML mapping.
    """
    import yaml

    path = Path(place).expanduser()
    if not path.is_file():
        raise InputError(f"--config: there is no file {place!r}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"--config: {place} is not a UTF-8 text file ({error}).") from error
    except yaml.YAMLError as error:
        raise InputError(f"--config: {place} is not valid YAML: {' '.join(str(error).split())}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(
            f"--config: {place} must hold options with their values, such as 'seed: 1', got {type(values).__name__}."
        )
    return values


class Parser(_Underscores, ArgumentParser):  # type: ignore[misc]
    """jsonargparse's parser, with lists as words, switches without a value, and errors in one sentence."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **options)
        self.lists: dict[str, bool] = {}  # by option, whether it may be null

    def ease(self) -> None:
        """Let lists take their values as words, and switches go without a value. Call it after the last argument."""
        for action in self._actions:
            kind = getattr(action, "_typehint", None)
            if kind is bool:
                action.nargs, action.const = "?", True
            elif (element := _element_of(kind)) is not None:
                # With nargs, jsonargparse checks each value by itself, so the type is that of a value.
                action.nargs, action._typehint, action.metavar = "*", element, "VALUE"  # type: ignore[attr-defined]
                self.lists[action.dest] = type(None) in typing.get_args(kind)

    @override
    def _get_values(self, action: Any, arg_strings: list[str]) -> Any:
        if action.dest in self.lists:
            arg_strings = split_words(arg_strings)
        return super()._get_values(action, arg_strings)

    def take_defaults(self, values: Mapping[str, Any], ignored: Collection[str] = ()) -> None:
        """Take values by option name, nested or dotted, as defaults of the options.

        Args:
            values: values by name.
            ignored: names of other commands' options, and of methods that are not chosen.

        Raises:
            InputError: if there is no option of a name. The message suggests the nearest.
        """
        taken: dict[str, Any] = {}
        leaves = {action.dest: action for action in self._actions if type(action).__name__ != "_ActionConfigLoad"}
        for name, value in _flat({k: v for k, v in values.items() if k not in ignored}, leaves):
            if name not in leaves:
                raise InputError(f"--config: there is no option {name!r}.{_nearest(name, leaves)}")
            if name in self.lists:
                value = split_words([value]) if isinstance(value, str) else value
                value = [value] if isinstance(value, (int, float)) else value
                if value is None and not self.lists[name]:
                    raise InputError(f"--config: {name} must be a list, got null. Leave it out for the default.")
            taken[name] = value
        # Defaults are not checked, so the values go through the parser once, which gives them their types.
        typed = self.parse_object(taken, defaults=False)
        self.set_defaults({name: typed[name] for name in taken})  # type: ignore[call-arg]

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        unknown = re.search(r"[uU]nrecognized arguments: (\S+)", message)
        if unknown:
            name = "--" + unknown[1].partition("=")[0].removeprefix("--").replace("-", "_")
            options = [option for action in self._actions for option in action.option_strings]
            hint = f" {MOVED[name]}" if name in MOVED else _nearest(name, options)
            raise InputError(f"There is no option {unknown[1]}.{hint} See --help all.") from ex
        text = re.sub(r'Parser key "([\w.]+)"', r"--\1", " ".join(message.split())).removeprefix("argument ")
        for kind, words in KINDS.items():
            text = re.sub(rf": Expected a <class '{kind}'>\. Got value: (.*)", rf" must be {words}, got \1.", text)
        raise InputError(text) from ex

    def parse(self, names: Names) -> Any:
        """Return the values of the second step. ``--help`` and ``--print_config`` print and exit.

        Raises:
            InputError: if an option is unknown or a value cannot be used.
            SystemExit: with status 0 after ``--help`` and ``--print_config``.
        """
        if names.help:
            self.print_help()
            raise SystemExit(0)
        values = self.parse_args(names.rest)
        if names.prints:
            shown = values.clone()
            # The values of the first three are already among the others. An export is no setting of a run.
            for name in ("config", "preset", "print_config", "export_upload"):
                shown.pop(name, None)
            print(_with_values(self.dump(shown, skip_none=False), self.typed(names.swept)), end="")
            raise SystemExit(0)
        return values

    def typed(self, swept: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Any, ...]]:
        """Return the values of swept options in the options' types.

        Raises:
            InputError: if a value has another type, with the option's name.
        """
        return {o: tuple(self.parse_object({o: v}, defaults=False)[o] for v in values) for o, values in swept.items()}

    def takes_one(self, option: str) -> bool:
        """Tell whether an option takes one number, text or switch, and no list or mapping."""
        kinds = {action.dest: getattr(action, "_typehint", None) for action in self._actions}
        return option not in self.lists and kinds.get(option) is not None and _is_single(kinds[option])


def swept_apart(names: Names, parser: Parser, swept: Collection[str], fixed: Collection[str]) -> Names:
    """Return the names with the options that have several values set apart.

    Args:
        names: from the first step.
        parser: the parser of the second step, after ``ease``.
        swept: groups whose options may have several values, such as ``antidote`` of ``--antidote.prune_ratio``.
        fixed: groups whose options may not.

    Raises:
        InputError: if an option has several values that takes only one, or a list.
    """
    found: dict[str, list[Any]] = {}
    defaults = dict(names.defaults)
    for option, value in _flat(defaults, ()):
        group, _, argument = option.partition(".")
        if group in (*swept, *fixed) and isinstance(value, list) and len(value) > 1 and parser.takes_one(option):
            found[option] = _several(option, value, parser, swept)
            if option in defaults:
                defaults[option] = value[0]
            else:
                defaults[group] = {**defaults[group], argument: value[0]}
    rest, at = list[str](), 0
    while at < len(names.rest):
        word, equals, first = names.rest[at].partition("=")
        end = at + 1
        while end < len(names.rest) and not names.rest[end].startswith("--"):
            end += 1
        words = names.rest[at:end]
        values = [*([first] if equals else []), *words[1:]]
        option = word.removeprefix("--").replace("-", "_")
        if word.startswith("--") and option.partition(".")[0] in (*swept, *fixed) and option not in parser.lists:
            found.pop(option, None)  # of several mentions the last one counts
            if len(values) > 1:
                found[option] = _several(option, values, parser, swept)
                words = words[: 1 if equals else 2]
        rest += words
        at = end
    return replace(names, defaults=defaults, rest=rest, swept=found)


def _several(option: str, values: list[Any], parser: Parser, swept: Collection[str]) -> list[Any]:
    """Return several values of an option, unless the option takes only one."""
    if option.partition(".")[0] not in swept:
        raise InputError(
            f"--{option} takes one value here, got {len(values)}. Only arguments of defenses may be varied."
        )
    if option in {action.dest for action in parser._actions} and not parser.takes_one(option):
        raise InputError(
            f"--{option} takes one list, such as '[{values[0]}, {values[1]}]', got {len(values)} words. Only numbers,"
            " texts and switches may be varied."
        )
    return values


def _with_values(text: str, swept: Mapping[str, Sequence[Any]]) -> str:
    """Return a dumped configuration with the values of swept options as lists."""
    import yaml

    if not swept:
        return text
    values = yaml.safe_load(text)
    for option, several in swept.items():
        group, _, argument = option.partition(".")
        values[group][argument] = list(several)
    return yaml.safe_dump(values, sort_keys=False)


class _Formatter(DefaultHelpFormatter):  # type: ignore[misc]
    """Help formatter that keeps the line breaks of the description."""

    @override
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.splitlines())


def preset_values(names: Names, chosen: Sequence[str]) -> dict[str, Any]:
    """Return the arguments that ``--NAME.preset`` stands for, by dotted name.

    Raises:
        InputError: if a defense is not chosen, or has no preset of that name.
    """
    values: dict[str, Any] = {}
    for name, preset in names.presets.items():
        if name not in chosen:
            raise InputError(
                f"--{name}.preset: {name} is not among the chosen defenses ({', '.join(chosen) or 'none'})."
            )
        presets = defense_class(name).presets
        if preset not in presets:
            raise InputError(f"--{name}.preset: presets of {name} are {', '.join(presets) or 'none'}, got {preset!r}.")
        values |= {f"{name}.{key}": value for key, value in presets[preset].items()}
    return values


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return two nests of values as one. The second wins."""
    both = {key for key in first if isinstance(first[key], Mapping) and isinstance(second.get(key), Mapping)}
    return {**first, **second, **{key: _merged(first[key], second[key]) for key in both}}


def _element_of(kind: Any) -> Any:
    """Return the type of a list's values, or None if the type is no list."""
    for option in (kind, *typing.get_args(kind)):
        if typing.get_origin(option) is list:
            return typing.get_args(option)[0]
    return None


def _is_single(kind: Any) -> bool:
    """Tell whether a type has only numbers, texts, switches and null."""
    if typing.get_origin(kind) is typing.Literal:
        return True
    options = typing.get_args(kind)
    return all(map(_is_single, options)) if _is_union(kind) else kind in (int, float, bool, str, type(None))


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _flat(values: Mapping[str, Any], leaves: Collection[str], prefix: str = "") -> list[tuple[str, Any]]:
    """Return values by dotted name. A mapping is one value if an option has its name."""
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in leaves:
            pairs += _flat(value, leaves, f"{name}.")
        else:
            pairs.append((name, value))
    return pairs


def _nearest(name: str, names: Collection[str]) -> str:
    near = get_close_matches(name, names, n=1, cutoff=0.7)
    return f" Did you mean {near[0]}?" if near else ""
