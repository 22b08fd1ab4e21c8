"""Analysis: whether a linear probe still recognizes harmful prompts in the hidden states, layer by layer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from hftlight.analysis.analysis import Analysis, Part, Picture, Row
from hftlight.analysis.drawing import layer_figure
from hftlight.analysis.ridge import probe
from hftlight.analysis.states import last_states
from hftlight.analysis.view import View
from hftlight.data.records import Record
from hftlight.data.world.build import build_world, phrasing
from hftlight.errors import InputError

PANELS = {
    "own": "own probe",
    "transferred": "aligned model's probe",
    "shuffled": "shuffled labels",
}
KEPT = 0.75  # fraction of the built-in world's phrasings that a split uses
FEWEST = 4  # prompts of each class


@dataclass(frozen=True)
class Recognition:
    """How well a probe tells harmful from ordinary prompts.

    Attributes:
        auroc: area under the ROC curve, 0-1, float64 ``[...]``; 0.5 is chance.
        accuracy: fraction of right classes, 0-1, float64 ``[...]``.
    """

    auroc: Tensor
    accuracy: Tensor


def recognition(train: Tensor, train_harmful: Tensor, test: Tensor, test_harmful: Tensor) -> Recognition:
    """Fit a linear probe on some prompts' states and judge it on other prompts' states, for all layers at once.

    States of one model on both sides give the probe of the model itself. States of the aligned model for ``train`` and
    of an attacked model for ``test`` give the transferred probe.

    Args:
        train: states to fit on, ``[..., n, hidden]``, such as the result of ``last_states``.
        train_harmful: which of them belong to harmful prompts, bool ``[n]``.
        test: states to judge on, ``[..., m, hidden]``.
        test_harmful: likewise, bool ``[m]``.

    Raises:
        ValueError: if one side lacks harmful or ordinary prompts.
    """
    for name, harmful in (("train", train_harmful), ("test", test_harmful)):
        if harmful.all() or not harmful.any():
            count = int(harmful.sum())
            raise ValueError(
                f"recognition: {name} needs harmful and ordinary prompts, got {count} and {len(harmful) - count}."
            )
    w, b = probe(train, train_harmful)
    values = (test.double() @ w[..., None]).squeeze(-1) + b[..., None]
    return Recognition(auroc(values, test_harmful), ((values > 0) == test_harmful).double().mean(-1))


def auroc(values: Tensor, positive: Tensor) -> Tensor:
    r"""Return the area under the ROC curve, float64 ``[...]``.

    .. math:: P(v_+ > v_-) + \tfrac12 P(v_+ = v_-)

    Args:
        values: v, ``[..., n]``. A higher one speaks for the positive class.
        positive: bool ``[n]``, with both classes.
    """
    above, below = values[..., positive, None], values[..., None, ~positive]
    return ((above > below).double() + (above == below).double() / 2).mean((-2, -1))


@dataclass(frozen=True)
class Split:
    """Prompts to fit a probe on and prompts to judge it on, as bool ``[prompts]``."""

    train: Tensor
    test: Tensor


def halves(groups: Sequence[str], harmful: Sequence[bool], seed: int) -> Split:
    """Return a split in which no group stands on both sides, with both classes on each side.

    Half of the groups that hold a harmful prompt go to each side, and half of the other groups.

    Args:
        groups: group of each prompt, from ``groups_of``.
        harmful: whether each prompt is harmful, at least two of each class.
        seed: deals the groups.
    """
    mixed = {group for group, bad in zip(groups, harmful, strict=True) if bad}
    chosen: set[str] = set()
    for own in (mixed, set(groups) - mixed):
        order = sorted(own)
        Random(f"{len(chosen)} {seed}").shuffle(order)
        chosen |= set(order[: (len(order) + 1) // 2])
    train = torch.tensor([group in chosen for group in groups])
    return Split(train, ~train)


def groups_of(kinds: Sequence[str], harmful: Sequence[bool]) -> tuple[list[str], str]:
    """Return the group of each prompt for ``halves``, and in words how prompts are grouped.

    A group is a kind. Harmful prompts of one kind only are groups of their own. So are ordinary prompts that have fewer
    than two kinds without harmful prompts.
    """
    mixed = {kind for kind, bad in zip(kinds, harmful, strict=True) if bad}
    own = set(kinds) - mixed
    by_row = {True: len(mixed) < 2 or not own, False: len(own) < 2}
    groups = [f"{kind} {row}" if by_row[kind in mixed] else kind for row, kind in enumerate(kinds)]
    words = {bad: "row" if by_row[bad] else "kind" for bad in (True, False)}
    if words[True] == words[False]:
        return groups, f"split by {words[True]}"
    return groups, f"split by {words[True]} (harmful) and {words[False]} (ordinary)"


@dataclass(frozen=True)
class Probes(Analysis):
    r"""Recognition of harmful prompts by linear probes on the hidden states, own and transferred.

    Rows: ``probe_auroc`` and ``probe_accuracy``, fractions 0-1, for each decoder layer, and their mean over the layers
    (layer None). ``position`` says which probe: ``own`` was fitted on the model's own states, ``transferred`` on the
    aligned model's states, and ``shuffled`` on the model's own states with shuffled labels, which is the control. The
    value is the mean over the seeds. The interval is the mean plus and minus 1.96 standard deviations over the seeds,
    the range of a single split. ``probe_prompts`` is the number of prompts, and its position says how they are split.

    If the transferred probe falls while the own one stays, the attack turned the representation. If both fall, it is
    lost.

    The probe reads the state of the last prompt token. It is judged on phrasings that it was not fitted on. In the
    built-in world it is fitted on the development prompts and judged on the test prompts, which share neither phrasing
    nor name. A seed chooses three quarters of the phrasings of each. Prompts from elsewhere are split by their
    ``kind``, by row if there is only one. Prompts are asked without an attack's prefix, which would give the class
    away.

    Args:
        prompts: harmful prompts on each side, and as many ordinary ones, >= 4.
        seeds: number of splits, >= 2.

    Cost: one forward pass per prompt, and one of the aligned model.
    Source: Leong et al., "No Two Devils Alike", 2024, arXiv:2405.16229, harmfulness recognition.
    Differs: ridge classifier in closed form instead of an unverified one, split by phrasing, and a control.
    """

    seconds: ClassVar[float] = 20.0

    prompts: int = 60
    seeds: int = 5

    def __post_init__(self) -> None:
        if self.prompts < FEWEST:
            raise ValueError(f"Probes: prompts must be >= {FEWEST}, got {self.prompts}.")
        if self.seeds < 2:
            raise ValueError(f"Probes: seeds must be >= 2 for a band over seeds, got {self.seeds}.")

    @override
    def measure(self, part: Part, view: View) -> list[Row]:
        records, harmful = probed(view, self.prompts)
        own = last_states(view.model, view.encoded(records))
        states = {"own": (own, own), "shuffled": (own, own)}
        if view.subject.reference is not None:
            states["transferred"] = (own if view.reference is view.model else _aligned(view, records), own)
        found: dict[str, list[Recognition]] = {name: [] for name in states}
        bad = torch.tensor(harmful)
        for seed in range(self.seeds):
            split = split_of(records, harmful, seed)
            for name, (fit, judged) in states.items():
                labels = bad[split.train]
                if name == "shuffled":
                    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
                found[name].append(recognition(fit[:, split.train], labels, judged[:, split.test], bad[split.test]))
        rows = [Row("probe_prompts", float(len(records)), position=kind_of_split(records, harmful))]
        for name, results in found.items():
            for metric in ("auroc", "accuracy"):
                values = torch.stack([getattr(result, metric) for result in results])  # [seeds, layers]
                rows += [_row(metric, name, of_layer, layer) for layer, of_layer in enumerate(values.T)]
                rows.append(_row(metric, name, values.mean(1), None))
        return rows

    @override
    def pictures(self, rows: Sequence[Row]) -> Iterator[Picture]:
        ways = sorted({str(row.position) for row in rows if row.metric == "probe_prompts"})
        yield Picture(
            "probes",
            "Recognition of harmful prompts",
            "AUROC of a linear probe on the state of the last prompt token after each decoder layer, judged on prompts"
            " that it was not fitted on. Left: fitted on the model itself. Middle: fitted on the aligned model. A probe"
            " that falls only in the middle panel was turned, not lost. Right: control with shuffled labels, at chance"
            f" (0.5) up to noise. Prompts are {' or '.join(ways)}. Bands: 1.96 standard deviations over the seeds.",
            layer_figure([r for r in rows if r.metric == "probe_auroc"], "probe_auroc", PANELS, "AUROC", at=0.5),
        )


def probed(view: View, count: int) -> tuple[list[Record], list[bool]]:
    """Return prompts with both classes equally often, and whether each is harmful.

    They are the built-in world's development and test prompts, up to ``count`` of each class and part, if the model is
    tested on that world. Else they are the test prompts, up to twice ``count`` of each class.

    Raises:
        InputError: if a class has fewer than ``FEWEST`` prompts.
    """
    tests = view.tests
    if all(phrasing(r.instruction) for r in (*tests.rows("harmful"), *tests.rows("over_refusal"))):
        world = build_world()
        parts = [(world.dev[:count], world.lookalike_dev[:count]), (world.test[:count], world.lookalike[:count])]
    else:
        parts = [(list(tests.rows("harmful")[: 2 * count]), list(tests.rows("over_refusal")[: 2 * count]))]
    records: list[Record] = []
    harmful: list[bool] = []
    for bad, good in parts:
        least = min(len(bad), len(good))
        if least < FEWEST:
            raise InputError(
                f"a probe needs at least {FEWEST} harmful and {FEWEST} ordinary prompts, got {len(bad)} and"
                f" {len(good)}. Raise --evaluation.prompts and --evaluation.over_refusal_prompts."
            )
        records += [*bad[:least], *good[:least]]
        harmful += [True] * least + [False] * least
    return records, harmful


def split_of(records: Sequence[Record], harmful: Sequence[bool], seed: int) -> Split:
    """Return the split of a seed: by phrasing if all prompts have one, else by kind."""
    known = [phrasing(record.instruction) for record in records]
    if not all(known):
        return halves(groups_of([record.kind for record in records], harmful)[0], harmful, seed)
    sides = {}
    for part in ("dev", "test"):
        frames = sorted({p.frame for p in known if p and p.part == part})
        kept = set(Random(f"{part} {seed}").sample(frames, max(2, round(KEPT * len(frames)))))
        sides[part] = torch.tensor([bool(p and p.part == part and p.frame in kept) for p in known])
    return Split(sides["dev"], sides["test"])


def kind_of_split(records: Sequence[Record], harmful: Sequence[bool]) -> str:
    """Return how ``split_of`` splits, in words."""
    if all(phrasing(record.instruction) for record in records):
        return "split by phrasing"
    return groups_of([record.kind for record in records], harmful)[1]


def _aligned(view: View, records: Sequence[Record]) -> Tensor:
    """Return the aligned model's states at the last token of each prompt, computed once for a study."""
    assert view.subject.reference is not None
    key = "last states", view.subject.reference.identity, tuple(map(tuple, view.encoded(records)))
    states: Tensor = view.shared(key, lambda: last_states(view.reference, view.encoded(records)))
    return states


def _row(metric: str, position: str, values: Tensor, layer: int | None) -> Row:
    """Return the mean over seeds as a row, with the range of a single split."""
    mean, half = float(values.mean()), 1.96 * float(values.std())
    return Row(f"probe_{metric}", mean, max(0.0, mean - half), min(1.0, mean + half), layer, position)
