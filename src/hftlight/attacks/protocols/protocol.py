"""Published protocols: the attack, the settings behind its numbers, and notes on what a run cannot reproduce.

Numbers of different protocols must not be compared. Their settings alone move the harmful score before any attack from
about 1 to about 50.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from hftlight.attacks.attack import FIELDS, Attack, overridden
from hftlight.attacks.registry import get_attack
from hftlight.config import RunConfig
from hftlight.errors import InputError

FOLDER = Path(__file__).parent
# In the order of help and messages. Each name is that of a YAML file in this folder; only a requested file is read.
PRESETS = (
    "booster25",
    "vaccine24",
    "lisa24",
    "antidote25",
    "tvaccine24",
    "panacea25",
    "qi24_explicit",
    "qi24_identity",
    "qi24_benign",
    "shadow23",
    "repnoise24",
)
PRESET_TASKS = ("sst2", "agnews", "gsm8k")
KEYS = (
    "source",
    "model",
    "attack",
    "run",
    "tasks",
    "arguments",
    "notes",
    "results",
)  # top-level keys of a protocol's file
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Preset:
    """A published protocol.

    Attributes:
        name: name of the protocol.
        attack: the attack with its published values.
        overrides: options of a RunConfig by dotted name, except those that the attack sets.
        model: model of the published numbers; a run takes its model from ``--model`` instead.
        notes: facts that a run's configuration cannot express, and differences between the run and the paper.
        source: authors and paper.
        arguments: arguments of other defenses in the protocol's comparison, by defense.
        results: the paper's tables as the file holds them; ``protocols.results`` reads them.
    """

    name: str
    attack: Attack
    overrides: Mapping[str, Any]
    model: str
    notes: tuple[str, ...]
    source: str
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)

    def config(self, config: RunConfig | None = None) -> RunConfig:
        """Return a run's configuration with the protocol's settings, by default on top of a default RunConfig."""
        return self.attack.applied(overridden(config or RunConfig(), self.overrides))

    def defaults(self, defenses: Sequence[str] = ()) -> dict[str, Any]:
        """Return the defaults of the command line under this protocol, by dotted name.

        Args:
            defenses: names of the defenses whose arguments the command line has.

        Returns:
            Options of a run, arguments of the attack, and arguments of these defenses.
        """
        own = {f"{d}.{key}": value for d in defenses for key, value in self.arguments.get(d, {}).items()}
        for one in dataclasses.fields(self.attack):
            value = getattr(self.attack, one.name)
            if value not in (None, one.default):
                # A value becomes the default of the run's option, if the attack's field has one. Epochs, steps and
                # batch size stay with the attack, since its batch counts all devices and micro-batches. So does a
                # field whose own default is not None, since that default hides the run's option.
                attack_only = one.name in ("epochs", "steps", "batch_size") or one.default is not None
                option = None if attack_only else FIELDS.get(one.name)
                own[option or f"{self.attack.name}.{one.name}"] = value
        return {**own, **self.overrides, "attack": self.attack.name}

    def published(self) -> dict[str, Any]:
        """Return the run options that the protocol sets, by dotted name.

        Epochs are converted to steps. The option of the harmful source is left out, since the user sets it.
        """
        values = {**self.attack.resolved(self.config()).settings(), **self.overrides}
        return {option: value for option, value in values.items() if option != FIELDS["source"]}

    def describe(self) -> dict[str, Any]:
        """Return every value and note."""
        return {
            "preset": self.name,
            "paper": self.source,
            "published on": self.model,
            **self.attack.resolved(self.config()).describe(),
            **self.overrides,
            "arguments": self.arguments,
            "notes": self.notes,
        }


def load(file: Path, task: str = "sst2") -> Preset:
    """Return the published protocol of a YAML file.

    The file must have the keys ``source``, ``model``, ``attack`` (its name and arguments) and ``notes``. The
    optional key ``run`` holds other options of a RunConfig. ``tasks`` holds changes of attack and run by task.
    ``arguments`` holds arguments of defenses in the protocol's comparison. ``results`` holds the paper's tables.

    Args:
        file: the file; its name without ``.yaml`` becomes the protocol's name.
        task: the user's task. A file without ``tasks`` has the same settings for every task.

    Raises:
        InputError: if a key is unknown or missing, if YAML read a number as text, or if the protocol has no such task.
            For an unknown key or task, the message suggests the nearest name.
    """
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    check_keys(file.name, values, KEYS, required=("source", "model", "attack", "notes"))
    changes = _changes(file, values.get("tasks", {}), task)
    overrides = {
        **options_in(f"{file.name}, run", values.get("run", {}), RunConfig()),
        **options_in(f"{file.name}, tasks.{task}.run", changes.get("run", {}), RunConfig()),
    }
    arguments, results = values.get("arguments", {}), values.get("results", {})
    _check_numbers(file.name, [overrides, arguments, results])
    return Preset(
        name=file.stem,
        attack=_attack(f"{file.name}, attack", values["attack"], changes.get("attack", {})),
        overrides=overrides,
        model=values["model"],
        notes=tuple(values["notes"]),
        source=values["source"],
        arguments=arguments,
        results=results,
    )


def _changes(file: Path, tasks: Mapping[str, Any], task: str) -> Mapping[str, Any]:
    """Return the changes that a task makes to a protocol. They are empty if the protocol has no tasks."""
    check_keys(f"{file.name}, tasks", tasks, PRESET_TASKS)
    for name, changes in tasks.items():
        check_keys(f"{file.name}, tasks.{name}", changes, ("attack", "run"))
    if tasks and task not in tasks:
        raise InputError(
            f"Preset {file.stem}: tasks are {', '.join(tasks)}, got {task!r}.{nearest(task, tuple(tasks))} For a task"
            " of your own, choose one of these and name yours with --data.task."
        )
    return tasks.get(task, {})


def _attack(where: str, *parts: Mapping[str, Any]) -> Attack:
    """Return the attack that the parts describe. A value of a later part overrides an earlier one."""
    values = {key: value for part in parts for key, value in part.items()}
    attack = get_attack(str(values.get("name")))
    check_keys(where, values, ("name", *(f.name for f in dataclasses.fields(attack))))
    _check_numbers(where, values)
    return attack(**{key: value for key, value in values.items() if key != "name"})


def options_in(where: str, values: Mapping[str, Any], part: Any) -> dict[str, Any]:
    """Return the nested options of one part of a RunConfig as a flat mapping by dotted name."""
    check_keys(where, values, tuple(f.name for f in dataclasses.fields(part)))
    options: dict[str, Any] = {}
    for name, value in values.items():
        inner = getattr(part, name)
        if dataclasses.is_dataclass(inner):
            options |= {f"{name}.{key}": v for key, v in options_in(f"{where}.{name}", value, inner).items()}
        else:
            options[name] = value
    return options


def check_keys(where: str, values: Any, known: tuple[str, ...], required: tuple[str, ...] = ()) -> None:
    """Refuse an entry that is no mapping, an unknown key and a missing one."""
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: must be a mapping with the keys {', '.join(known)}, got {values!r}.")
    if unknown := [str(key) for key in values if key not in known]:
        raise InputError(f"{where}: keys are {', '.join(known)}, got {unknown[0]!r}.{nearest(unknown[0], known)}")
    if missing := [key for key in required if key not in values]:
        raise InputError(f"{where}: the key {missing[0]!r} is missing.")


def _check_numbers(where: str, value: Any) -> None:
    """Refuse a number that YAML reads as text. YAML reads 1e-5 as text and 1.0e-5 as a number."""
    if isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            _check_numbers(where, inner)
    elif isinstance(value, str) and NUMBER.fullmatch(value):
        raise InputError(
            f"{where}: {value!r} is text in YAML. Write numbers as 1.0e-5, with a decimal point and a signed exponent."
        )


def get_preset(name: str = "booster25", task: str = "sst2", **changes: Any) -> Preset:
    """Return a published protocol.

    Args:
        name: one of ``PRESETS``; hyphens count as underscores.
        task: the user's task, one of ``PRESET_TASKS``; settings such as epochs can depend on it. The protocols on chat
            models (Qi et al., Shadow Alignment, Representation Noising) ignore it.
        **changes: fields of the attack to change, such as p=0.2; steps are computed anew.

    Raises:
        InputError: if there is no such protocol, task or field. The message suggests the nearest name.
    """
    key = name.replace("-", "_").lower()
    if key not in PRESETS:
        raise InputError(f"Preset: names are {', '.join(PRESETS)}, got {name!r}.{nearest(key, PRESETS)}")
    preset = load(FOLDER / f"{key}.yaml", task)
    fields = type(preset.attack).__dataclass_fields__
    if unknown := [field for field in changes if field not in fields]:
        raise InputError(
            f"Preset {key}: the attack has the fields {', '.join(fields)}, got {unknown[0]!r}."
            f"{nearest(unknown[0], tuple(fields))}"
        )
    return replace(preset, attack=replace(preset.attack, **changes))


def nearest(word: str, known: tuple[str, ...]) -> str:
    """Return a question that suggests the nearest known name, empty if none is near."""
    near = get_close_matches(word, known, n=1, cutoff=0.4)
    return f" Did you mean {near[0]!r}?" if near else ""
