"""Published protocols: the attack, the settings behind its numbers, and notes on what a run cannot reproduce.

Numbers of different protocols must not be compared. Their settings alone move the harmful score before any attack from
about 1 to about 50.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from hftlight.attacks.attack import FIELDS, Attack, overridden
from hftlight.attacks.protocols.facts import Code, Difference, NeededFile, PublishedJudge, check_keys, nearest
from hftlight.attacks.registry import get_attack
from hftlight.config import Data, RunConfig
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
    "durability25",
    "virus25_no_moderation",
    "virus25_moderation",
    "tamperbench_lora",
    "tamperbench_full",
    "tamperbench_low_poison",
    "safetunebed_low",
    "safetunebed_high",
    "bidirectional24",
    "lermen23",
    "zhan23",
    "yi23",
    "rosati24",
    "poppi24",
    "cmft24",
    "chen24",
)
PRESET_TASKS = ("sst2", "agnews", "gsm8k")
# Top-level keys of a protocol's file.
REQUIRED = ("source", "model", "attack", "code", "judge", "files", "differs", "notes")
KEYS = (*REQUIRED, "run", "tasks", "arguments", "results")
# Fields of an attack whose value is a file.
ATTACK_FILES = ("chats", "scores", "filter_words", "pattern_file")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Preset:
    """A published protocol.

    Attributes:
        name: name of the protocol.
        attack: the attack with its published values.
        overrides: options of a RunConfig by dotted name, except those that the attack sets.
        model: model of the published numbers; a run takes its model from ``--model`` instead.
        notes: facts about the protocol that are no numbers.
        source: authors and paper.
        code: the code behind the published numbers; None if no code was read.
        judge: the judge behind the published numbers.
        files: the files that the user brings, the task's own files aside.
        differs: the numbers that a run has otherwise than the paper.
        arguments: arguments of the defenses in the protocol's comparison, by defense.
        results: the paper's tables as the file holds them; ``protocols.results`` reads them.
    """

    name: str
    attack: Attack
    overrides: Mapping[str, Any]
    model: str
    notes: tuple[str, ...]
    source: str
    code: Code | None
    judge: PublishedJudge
    files: tuple[NeededFile, ...]
    differs: tuple[Difference, ...]
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
                # field whose own default is not None, since that default hides the run's option, and a number of
                # rows that the attack takes from its file instead of the run.
                attack_only = one.name in ("epochs", "steps", "batch_size") or one.default is not None
                attack_only |= one.name == "n" and self._counts_its_file(value)
                option = None if attack_only else FIELDS.get(one.name)
                own[option or f"{self.attack.name}.{one.name}"] = value
        return {**own, **self.overrides, "attack": self.attack.name}

    def _counts_its_file(self, n: int) -> bool:
        """Return whether the attack takes its number of rows from its file, whatever ``--num_samples`` says."""
        return replace(self.attack, n=None).resolved(RunConfig(num_samples=n + 1)).n != n + 1

    def published(self) -> dict[str, Any]:
        """Return the run options that the protocol sets, by dotted name.

        An option that the protocol leaves to the user is left out. Epochs are converted to steps, if the protocol sets
        the number of rows.
        """
        try:
            own = self.attack.settings()
        except InputError:  # the user sets the number of rows, and with it the number of steps
            own = replace(self.attack, epochs=None).settings()
        return {**own, **self.overrides}

    def own(self) -> dict[str, Any]:
        """Return the arguments of the attack that no run option holds, by dotted name, such as its way of counting."""
        values = {f.name: getattr(self.attack, f.name) for f in dataclasses.fields(self.attack) if f.name not in FIELDS}
        plain = type(self.attack)()
        return {f"{self.attack.name}.{name}": value for name, value in values.items() if value != getattr(plain, name)}

    def describe(self) -> dict[str, Any]:
        """Return every value and note."""
        return {
            "preset": self.name,
            "paper": self.source,
            "published on": self.model,
            **self.attack.resolved(self.config()).describe(),
            **self.overrides,
            "arguments": self.arguments,
            "code": asdict(self.code) if self.code else None,
            "judge": asdict(self.judge),
            "files": [asdict(file) for file in self.files],
            "differs": [asdict(one) for one in self.differs],
            "notes": self.notes,
        }


def load(file: Path, task: str = "sst2") -> Preset:
    """Return the published protocol of a YAML file.

    The file must have the keys of ``REQUIRED``: ``attack`` holds the attack's name and arguments, and the classes of
    ``facts`` describe ``code``, ``judge``, ``files`` and ``differs``. ``code`` is null if no code was read. The
    optional key ``run`` holds other options of a RunConfig. ``tasks`` holds changes of attack and run by task.
    ``arguments`` holds arguments of defenses in the protocol's comparison. ``results`` holds the paper's tables.

    Args:
        file: the file; its name without ``.yaml`` becomes the protocol's name.
        task: the user's task. A file without ``tasks`` has the same settings for every task.

    Raises:
        InputError: if a key is unknown or missing, a value has the wrong type, YAML read a number as text, or the
            protocol has no such task. For an unknown key or task, the message suggests the nearest name.
    """
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    check_keys(file.name, values, KEYS, required=REQUIRED)
    changes = _changes(file, values.get("tasks", {}), task)
    overrides = {
        **options_in(f"{file.name}, run", values.get("run", {}), RunConfig()),
        **options_in(f"{file.name}, tasks.{task}.run", changes.get("run", {}), RunConfig()),
    }
    arguments, results = values.get("arguments", {}), values.get("results", {})
    _check_numbers(file.name, [overrides, arguments, results, values["judge"], values["differs"]])
    attack = _attack(f"{file.name}, attack", values["attack"], changes.get("attack", {}))
    own = {f.name for f in dataclasses.fields(attack)}
    options = [f"data.{f.name}" for f in dataclasses.fields(Data) if f.type in (str, str | None)]
    options += [f"{attack.name}.{name}" for name in ATTACK_FILES if name in own]
    return Preset(
        name=file.stem,
        attack=attack,
        overrides=overrides,
        model=values["model"],
        notes=tuple(values["notes"]),
        source=values["source"],
        code=Code.read(f"{file.name}, code", values["code"]) if values["code"] is not None else None,
        judge=PublishedJudge.read(f"{file.name}, judge", values["judge"]),
        files=tuple(NeededFile.read(at, one, options) for at, one in _entries(file, "files", values)),
        differs=tuple(Difference.read(at, one) for at, one in _entries(file, "differs", values)),
        arguments=arguments,
        results=results,
    )


def _entries(file: Path, key: str, values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the entries of a list, each with its place, counted from 1."""
    if not isinstance(values[key], list):
        raise InputError(f"{file.name}: {key} must be a list, got {values[key]!r}.")
    return [(f"{file.name}, {key}, entry {number}", one) for number, one in enumerate(values[key], start=1)]


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
