"""Attack: the rows that a user uploads, the fine-tuning on them, and the prompts to the fine-tuned model."""

import dataclasses
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, Self

from hftlight.attacks.sources import missing_source
from hftlight.config import RunConfig
from hftlight.data.records import Record
from hftlight.data.table import Table
from hftlight.errors import InputError

FIELDS = {
    "n": "num_samples",
    "p": "harmful_ratio",
    "lr": "finetuning.lr",
    "batch_size": "finetuning.batch_size",
    "steps": "finetuning.steps",
    "tuning": "tuning",
    "template": "template",
    "adapter_protocol": "adapter_protocol",
    "source": "data.attack",
}  # a field of an attack -> the option of RunConfig that it sets


@dataclass(frozen=True)
class Choosing:
    """Rows that the aligned model scores in order to select an upload.

    Attributes:
        candidates: harmless rows to select from.
        harmful: harmful anchors.
        safe: anchors whose answer is a refusal.
    """

    candidates: Sequence[Record]
    harmful: Sequence[Record]
    safe: Sequence[Record]


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """Settings that all attacks share. A setting left at None comes from the run's configuration.

    Args:
        n: rows of the upload, >= 1.
        epochs: passes over the upload, > 0; instead of ``steps``.
        steps: optimizer steps, >= 1; instead of ``epochs``.
        lr: learning rate, > 0.
        batch_size: rows per optimizer step, summed over all devices and micro-batches, >= 1.
        tuning: lora (an adapter), full (all parameters) or qlora (an adapter on a 4-bit base).
        template: prompt template, in fine-tuning and in the prompts to the fine-tuned model.
        adapter_protocol: merge (the upload trains a new adapter) or continue (the upload trains the aligned adapter).
        source: file, folder or hub id of the harmful rows; the same as ``--data.attack``.
        system: system text of the attack, in fine-tuning and in the prompts to the fine-tuned model.

    Raises:
        ValueError: if a value is out of range.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    acts_on: ClassVar[Literal["rows", "pairs", "weights"]] = "rows"

    n: int | None = None
    epochs: float | None = None
    steps: int | None = None
    lr: float | None = None
    batch_size: int | None = None
    tuning: Literal["lora", "full", "qlora"] | None = None
    template: str | None = None
    adapter_protocol: Literal["merge", "continue"] | None = None
    source: str | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        for name in ("n", "steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and (value < 1 or value != int(value)):
                raise ValueError(f"{self._who}: {name} must be a whole number >= 1, got {value}.")
        for name in ("epochs", "lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{self._who}: {name} must be > 0, got {value}.")
        if self.epochs is not None and self.steps is not None:
            raise ValueError(
                f"{self._who}: epochs and steps both set the length of training, got {self.epochs} and {self.steps};"
                " give only one."
            )
        for name, allowed in (("tuning", ("lora", "full", "qlora")), ("adapter_protocol", ("merge", "continue"))):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ValueError(f"{self._who}: {name} must be one of {', '.join(allowed)}, got {value!r}.")

    @property
    def _who(self) -> str:
        return type(self).__name__

    @property
    def name(self) -> str:
        """Name of the attack on the command line: its class name in snake case."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", self._who).lower()

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """Return the number of rows that the upload takes from each source.

        A source that the upload does not read has no entry.

        Raises:
            InputError: if n is not known yet.
        """

    @abstractmethod
    def upload(self, sources: Mapping[str, Sequence[Record]], seed: int) -> list[Record]:
        """Return the rows that the user uploads.

        The result depends on the arguments alone and has exactly the rows that ``counts()`` states.

        Args:
            sources: rows by name, such as ``"attack"`` (harmful prompts with harmful answers) and ``"task"``.
            seed: seed of the draw, for attacks that draw rows at random.

        Raises:
            InputError: if a source is missing or has too few rows.
        """

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources that ``upload`` reads."""
        return tuple(self.counts())

    @property
    def rows(self) -> int:
        """Number of rows of the upload. An epoch is one pass over them."""
        return sum(self.counts().values())

    def phases(self) -> tuple["Attack", ...]:
        """Return the phases of the attack, each an attack with an upload and settings of its own.

        Each phase trains the model that the previous phase returned. Most attacks have one phase.
        """
        return (self,)

    @property
    def selects(self) -> bool:
        """Whether the aligned model's scores choose the upload before the fine-tuning."""
        return False

    def choosing(self, sources: Mapping[str, Sequence[Record]], safe: Sequence[Record]) -> Choosing:
        """Return the candidates and the anchors from which a selecting attack computes its scores.

        Args:
            sources: rows by name.
            safe: refusals of the alignment set.

        Raises:
            InputError: if there are too few rows.
            TypeError: if the attack does not select.
        """
        raise TypeError(f"{self._who} does not select its rows.")

    def chosen(self, choosing: Choosing, scores: str | None, seed: int) -> tuple[Self, list[Record]]:
        """Return the attack with its file of scores, and the rows that a selecting attack uploads.

        Args:
            choosing: candidates and anchors.
            scores: file that ``write_scores`` wrote. None means that there are no scores yet; the upload is then a
                placeholder with the same number of rows.
            seed: seed of the draw of a random control.

        Raises:
            TypeError: if the attack does not select.
        """
        raise TypeError(f"{self._who} does not select its rows.")

    def read(self, rows: Sequence[Record], table: Table | None) -> list[Record]:
        """Return the harmful rows in the form that the attack needs.

        Args:
            rows: the rows of ``--data.attack``.
            table: the file's rows with all columns; None if the rows do not come from a file.
        """
        return list(rows)

    @property
    def preference(self) -> float | None:
        """DPO's beta, per nat. None if the upload holds no pairs."""
        return None

    @property
    def test_system(self) -> str | None:
        """System text in every prompt to the fine-tuned model. None means the run's own system text."""
        return self.system

    @property
    def test_prefix(self) -> str:
        """Text in front of every harmful instruction to the fine-tuned model."""
        return ""

    @property
    def has_pattern(self) -> bool:
        """Whether a model is also measured on the harmful prompts without the attack's change of them."""
        return False

    def test_records(self, rows: Sequence[Record]) -> list[Record]:
        """Return harmful test prompts as the attacker sends them. Ids and answers do not change."""
        return [replace(row, instruction=self.test_prefix + row.instruction) for row in rows]

    def decode(self, response: str) -> str:
        """Return an answer as the attacker decodes it. A judge must see the decoded text."""
        return response

    def settings(self) -> dict[str, Any]:
        """Return the options of RunConfig that the attack sets, by dotted name. Epochs become steps.

        ``finetuning.batch_size`` is that of one device without accumulation; ``applied`` divides it.

        Raises:
            InputError: if epochs are set and n or the batch size is not known yet.
        """
        values = {option: getattr(self, field, None) for field, option in FIELDS.items()}
        if self.epochs is not None:
            if self.batch_size is None:
                raise InputError(
                    f"{self._who}: epochs={self.epochs:g} become steps only with a batch size; set batch_size, or call"
                    " resolved(config) first."
                )
            values["finetuning.steps"] = steps_of(self.rows, self.batch_size, self.epochs)
        return {option: value for option, value in values.items() if value is not None}

    def resolved(self, config: RunConfig) -> Self:
        """Return the attack with every value that is None filled in from a run's configuration."""
        values = {field: option_of(config, option) for field, option in FIELDS.items() if hasattr(self, field)}
        # A run states rows per device and micro-batch; an attack states rows per optimizer step.
        values["batch_size"] *= _share(config)
        if self.epochs is not None:
            del values["steps"]
        return replace(self, **{field: v for field, v in values.items() if getattr(self, field) is None})

    def applied(self, config: RunConfig) -> RunConfig:
        """Return a run's configuration with the attack's settings.

        Raises:
            InputError: if the batch size is not a multiple of devices times micro-batches.
        """
        values, share = self.resolved(config).settings(), _share(config)
        if values["finetuning.batch_size"] % share:
            raise InputError(
                f"{self._who}: batch_size counts the rows of all devices and micro-batches and must be a multiple of"
                f" {share}, got {values['finetuning.batch_size']}. Lower --finetuning.accumulate or --devices."
            )
        values["finetuning.batch_size"] //= share
        return overridden(config, values)

    def describe(self) -> dict[str, Any]:
        """Return every value, the row counts, the steps, and system text and prefix of the test prompts.

        Raises:
            InputError: if n is not known yet; call ``resolved(config)`` first.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        phases = [phase.describe() for phase in self.phases() if phase is not self]
        return {
            "attack": self.name,
            "p": getattr(self, "p", None),
            **values,
            "steps": self.settings().get("finetuning.steps"),
            "rows": self.counts(),
            "test_system": self.test_system,
            "test_prefix": self.test_prefix,
            **({"phases": [{k: v for k, v in phase.items() if k != "source"} for phase in phases]} if phases else {}),
        }

    def _known_n(self) -> int:
        if self.n is None:
            raise InputError(f"{self._who}: n, the rows of the upload, is not known; set n or call resolved(config).")
        return self.n

    def _take(self, sources: Mapping[str, Sequence[Record]], name: str) -> Sequence[Record]:
        """Return the rows of a source.

        Raises:
            InputError: if the source is missing or empty. The message names public sets, their columns and licences.
        """
        rows = sources.get(name)
        if not rows:
            raise missing_source(self._who, name)
        return rows

    def _first(self, sources: Mapping[str, Sequence[Record]], name: str, start: int, stop: int) -> list[Record]:
        """Return rows ``start`` to ``stop - 1`` of a source, in the order of the source."""
        if stop <= start:
            return []
        rows = self._take(sources, name)
        if len(rows) < stop:
            raise InputError(
                f"{self._who}: the upload needs rows {start} to {stop - 1} of the source {name!r}, which has"
                f" {len(rows)} rows. Give more rows or lower n."
            )
        return list(rows[start:stop])


def steps_of(rows: int, batch_size: int, epochs: float, accumulate: int = 1, drop_last: bool = False) -> int:
    r"""Return the optimizer steps of e epochs, :math:`\lceil e \max(1, \lfloor b / a \rfloor) \rceil`.

    b is the number of micro-batches per epoch, :math:`\lceil rows / batch \rceil`. With ``drop_last``, it is rounded
    down, since the last, smaller micro-batch is left out. a is the number of micro-batches per optimizer step. Hugging
    Face's trainer of the published runs counts in the same way.

    Args:
        rows: rows of the upload, >= 1.
        batch_size: rows per micro-batch, on all devices together, >= 1.
        epochs: passes over the rows, > 0.
        accumulate: micro-batches per optimizer step, >= 1.
        drop_last: leave out the last micro-batch if it is not full.

    Raises:
        ValueError: if a value is out of range.
    """
    if min(rows, batch_size, accumulate) < 1 or not epochs > 0:
        raise ValueError(
            f"steps_of: rows, batch_size and accumulate must be >= 1 and epochs > 0, got {rows}, {batch_size},"
            f" {accumulate} and {epochs}."
        )
    batches = rows // batch_size if drop_last else -(-rows // batch_size)
    return math.ceil(epochs * max(1, batches // accumulate))


def overridden(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return a configuration with options set by dotted name. A mapping is merged into the present one.

    Raises:
        InputError: if there is no such option. The message suggests the nearest name.
    """
    for option, value in values.items():
        config = _set_option(config, option.split("."), option, value)
    return config


def _set_option(part: Any, path: Sequence[str], option: str, value: Any) -> Any:
    """Return a copy of a part of the configuration in which the option at the end of ``path`` has a new value."""
    names = [f.name for f in dataclasses.fields(part)] if dataclasses.is_dataclass(part) else []
    if path[0] not in names:
        near = get_close_matches(path[0], names, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"RunConfig has no option {option!r}.{hint}")
    old = getattr(part, path[0])
    if len(path) > 1:
        value = _set_option(old, path[1:], option, value)
    elif isinstance(value, Mapping):
        value = {**(old or {}), **value}
    return replace(part, **{path[0]: value})


def option_of(config: RunConfig, option: str) -> Any:
    """Return the value of an option by dotted name."""
    value: Any = config
    for part in option.split("."):
        value = getattr(value, part)
    return value


def _share(config: RunConfig) -> int:
    """Return the micro-batches per optimizer step, counted over all devices."""
    return config.devices * config.num_nodes * config.finetuning.accumulate
