"""What a reproduction runs: one comparison per configuration, and every departure from the paper's setting."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hftlight.attacks.protocols.protocol import Preset
from hftlight.attacks.protocols.results import JUDGED, PaperTable, Value
from hftlight.comparison.grid import Grid, value_text
from hftlight.config import RunConfig
from hftlight.folders import file_name
from hftlight.take import SOURCES

BUILTIN = "builtin"
# Options that change neither the training nor the compared numbers, or that a reproduction treats by themselves.
FREE = frozenset(
    {"accelerator", "devices", "num_nodes", "strategy", "gradient_checkpointing", "seed", "harmful_ratio", "defense",
     "baseline", "attack", "model", "base", "alignment.batch_size", "alignment.accumulate", "finetuning.steps",
     "finetuning.batch_size", "finetuning.accumulate", "data.split", "data.columns",
     *(f"data.{source}" for source in SOURCES),
     *(f"evaluation.{name}" for name in ("batch_size", "over_refusal_prompts", "judge", "refusal_judge", "perplexity",
       "embedding_drift", "loss_rows", "at", "at_prompts"))}
)  # fmt: skip

Arguments = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Departure:
    """One option that differs from the paper's setting.

    Attributes:
        option: the option.
        published: the paper's value.
        here: the value of this run.
    """

    option: str
    published: Any
    here: Any

    def __str__(self) -> str:
        return f"--{self.option} {_text(self.here)} instead of {_text(self.published)}"


@dataclass(frozen=True)
class Part:
    """The columns of a table that share one configuration, and so are one comparison.

    Attributes:
        values: the values of what varies.
        config: the configuration.
        grid: the cells.
        folder: folder of the comparison.
    """

    values: tuple[Value, ...]
    config: RunConfig
    grid: Grid
    folder: Path

    @property
    def counted(self) -> RunConfig:
        """The configuration, with one row in the upload if the user has not said how many there are."""
        return self.config if self.config.num_samples else replace(self.config, num_samples=1)


@dataclass(frozen=True)
class Reproduction:
    """A table of a paper as it is repeated here.

    Attributes:
        preset: the protocol.
        table: the paper's table.
        arms: the repeated arms.
        values: the repeated values of what varies.
        folder: folder of the result.
        parts: the comparisons.
        departures: what differs from the paper's setting.
        uncompared: reason by metric that cannot be compared.
    """

    preset: Preset
    table: PaperTable
    arms: tuple[str, ...]
    values: tuple[Value, ...]
    folder: Path
    parts: tuple[Part, ...]
    departures: tuple[Departure, ...] = ()
    uncompared: Mapping[str, str] = field(default_factory=dict)

    def part(self, value: Value) -> Part:
        """Return the part that holds a value's cells."""
        return next(part for part in self.parts if value in part.values)


def part_folder(folder: Path, table: PaperTable, value: Value) -> Path:
    """Return the folder of a value's comparison. All harmful ratios are one comparison."""
    return folder if table.varies == "p" else folder / file_name(f"{table.varies}={value_text(value)}")


def departures(
    published: tuple[RunConfig, Arguments], here: tuple[RunConfig, Arguments], table: PaperTable, model: str
) -> list[Departure]:
    """Return what differs from the paper's setting.

    Args:
        published: configuration and arguments of defenses and attack, without any option of the user.
        here: those of the run.
        table: the paper's table.
        model: the paper's model.
    """
    before, after = _flat(*published), _flat(*here)
    free = {f"data.{source}" for source in table.files}
    free |= set() if published[0].num_samples else {"num_samples"}  # the protocol leaves it to the user
    if not any(metric not in JUDGED for metric in table.cells):  # a table without an accuracy does not use the task
        free |= {"evaluation.task_rows", "evaluation.task_max_new_tokens"}
    options = [o for o in {**before, **after} if o not in free and before.get(o) != after.get(o)]
    found = [Departure(option, before.get(option), after.get(option)) for option in options]
    if not same_model(model, here[0].model):
        found.insert(0, Departure("model", model, here[0].model))
    for source in table.files:
        if getattr(here[0].data, source) == BUILTIN:
            found.append(Departure(f"data.{source}", table.files[source], "rows of the made-up world"))
    return found


def same_model(published: str, name: str) -> bool:
    """Tell whether a model's name, or a part of its path, is the published model's name without its owner."""
    own = published.rpartition("/")[2].casefold()
    return own in (part.casefold() for part in re.split(r"[/\\@]|--", name))


def _flat(config: RunConfig, arguments: Arguments) -> dict[str, Any]:
    """Return what decides a result by dotted option, rows of a step included and ``FREE`` left out."""
    values: dict[str, Any] = {}

    def add(prefix: str, part: Mapping[str, Any]) -> None:
        for name, value in part.items():
            option = f"{prefix}{name}"
            if option in FREE:
                continue
            if isinstance(value, Mapping):
                add(f"{option}.", value)
            elif value is not None:
                values[option] = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value

    add("", config.deciding())
    add("", arguments)
    share = config.devices * config.num_nodes
    values["alignment.batch_size"] = config.alignment.batch_size * config.alignment.accumulate * share
    return values


def settings_of(here: Reproduction) -> dict[str, Any]:
    """Return the configuration and the arguments of each part by the name of its folder, as plain values."""
    return {p.folder.name: {"config": asdict(p.config), "arguments": p.grid.arguments} for p in here.parts}


def _text(value: Any) -> str:
    return "nothing" if value is None else value_text(value) if not isinstance(value, list) else str(value)
