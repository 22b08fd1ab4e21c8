"""Analysis: the rows that an analysis measures on one model, and the pictures that it draws of them."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from matplotlib.figure import Figure

from hftlight.analysis.registry import ANALYSES

if TYPE_CHECKING:
    from hftlight.analysis.view import View

Part = Mapping[str, Any]  # a piece of an analysis of one model, as JSON values; it is measured and cached on its own


@dataclass(frozen=True)
class Row:
    """One number of an analysis.

    Attributes:
        metric: what was measured, with its unit in the analysis's docstring.
        value: the number.
        low: lower end of its interval, or None if it has none.
        high: upper end of its interval, or None.
        layer: number of the decoder layer, from 0; None for a number of the whole model.
        position: place within the layer or the model: a token's place, a module, a coordinate; None for none.
        model: the arm or the model that it was measured on. The study fills it in.
        stage: the stage of the arm; empty for a model outside a run. The study fills it in.
    """

    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    layer: int | None = None
    position: str | float | None = None
    model: str = ""
    stage: str = ""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Return a row from its JSON object. Other keys are ignored."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def labelled(self, model: str, stage: str) -> Self:
        """Return the row with the names of its model and stage."""
        return replace(self, model=model, stage=stage)


@dataclass(frozen=True)
class Picture:
    """A figure of an analysis.

    Attributes:
        name: file name without its end, such as ``"tone_layers"``; unique among all analyses.
        title: heading.
        caption: what the figure shows, how to read it, and where the numbers have no interval.
        figure: the figure.
    """

    name: str
    title: str
    caption: str
    figure: Figure


class Analysis(ABC):
    """A measurement of one model, or of one model against the aligned model that it comes from.

    A subclass is a frozen dataclass, whose fields are its arguments on the command line (``--tone.prompts 40``). The
    first line of its docstring is its help. Its maths are plain functions on transformers models in the same file.

    Attributes:
        compares: whether it reads the reference, which is the aligned model. A model without a reference is skipped.
        seconds: rough seconds for one model of 135M parameters on two CPU cores, for the time left.
    """

    compares: ClassVar[bool] = False
    seconds: ClassVar[float] = 20.0

    @classmethod
    def name(cls) -> str:
        """Return the name on the command line."""
        return next(name for name, own in ANALYSES.items() if own == cls.__name__)

    def parts(self, known: Mapping[str, Sequence[Row]], view: "View") -> Sequence[Part]:
        """Return the parts to measure, given those that are known.

        It is called again after each round, until it returns no new part. Independent parts make an analysis resumable
        and let a later round depend on an earlier one. By default an analysis of a model is one part.

        Args:
            known: rows of the measured parts, by ``part_name``.
            view: the model.
        """
        return [{}]

    @abstractmethod
    def measure(self, part: Part, view: "View") -> list[Row]:
        """Return the rows of one part for a model."""

    @abstractmethod
    def pictures(self, rows: Sequence[Row]) -> Iterator[Picture]:
        """Yield the figures of the rows of all models."""


def part_name(part: Part) -> str:
    """Return a part as a text that does not depend on the order of its keys."""
    return json.dumps(part, sort_keys=True)
