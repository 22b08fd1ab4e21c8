"""Regions: the entries of weight matrices that are important to safety but not to utility."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hftlight.engine.step.vectors import local, whole
from hftlight.engine.weights.lora import LoraUpdate, has_adapter, lora_updates
from hftlight.engine.weights.masks import (
    Overlap,
    chance_overlap,
    count_of,
    digest,
    largest,
    minus,
    overlap,
    pack,
    whole_rows,
)
from hftlight.engine.weights.scores import (
    Batch,
    Loss,
    calibration,
    checked,
    gradient_sums,
    input_moments,
    snip_scores,
    wanda_scores,
    without_end,
)
from hftlight.engine.weights.shards import Share, share
from hftlight.engine.weights.stored import plain_name


def top(scores: Tensor, ratio: float, rows: Share | None = None) -> Tensor:
    """Return the mask of the top fraction of one matrix.

    The count of entries is exact, rounded down; ties go to the first entry. Let S be the mask of the safety scores and
    U the mask of the utility scores. Then ``minus(S, U)`` is the region.

    Args:
        scores: ``[rows, in]``, >= 0; higher is more important.
        ratio: fraction of all entries of the matrix, in [0, 1].
        rows: which rows of the matrix these are; None means all rows.
    """
    total = (rows.total if rows else len(scores)) * scores.shape[1]
    return largest(scores, count_of(ratio, total), rows)


@dataclass(frozen=True)
class Target:
    """One linear layer whose weight is scored.

    Attributes:
        name: plain name of the weight.
        layer: module whose input and output are those of the weight.
        weight: W, ``[out, in]``, without the adapter's update.
        update: the adapter's update; None if the layer has no adapter.
    """

    name: str
    layer: nn.Module
    weight: Tensor
    update: LoraUpdate | None = None

    @property
    def rows(self) -> Share:
        """Rows of the weight that this rank holds."""
        return share(self.weight)

    def values(self) -> Tensor:
        """Return this rank's rows of the weight as the model uses it, with its adapter's update added."""
        values = local(self.weight.detach())
        if self.update is None:
            return values
        a, b = whole(self.update.a.detach()), local(self.update.b.detach())
        return values + self.update.scale * (b @ a) if bool(b.any()) else values


def linear_targets(
    model: nn.Module, layers_of: Callable[[nn.Module], nn.Module], who: str, frozen: bool = False
) -> dict[str, Target]:
    """Return the linear layers inside a model's decoder layers, by the plain name of their weight.

    Under an adapter, these are the adapted layers.

    Args:
        model: a causal LM, with or without an adapter.
        layers_of: returns the module that contains the model's decoder layers.
        who: name of the defense, for errors.
        frozen: whether layers whose weight is not trained are targets too; without effect under an adapter.

    Raises:
        TypeError: if the model's config counts no decoder layers, no layer is a target, or a target is quantized or
            not linear.
    """
    if not hasattr(getattr(model, "config", None), "num_hidden_layers"):
        raise TypeError(f"{who}: {type(model).__name__} has no config that counts decoder layers; use a causal LM.")
    inside = set(layers_of(model).modules())
    targets: dict[str, Target] = {}
    if has_adapter(model):
        for name, u in lora_updates(model).items():
            if u.layer in inside:
                targets[name] = Target(name, u.layer, u.weight, u)
    else:
        weight_ids: set[int] = set()  # a weight tied to several modules is a target once
        for name, layer in model.named_modules():
            trained = isinstance(layer, nn.Linear) and (frozen or layer.weight.requires_grad)
            if trained and layer in inside and id(layer.weight) not in weight_ids:
                weight_ids.add(id(layer.weight))
                targets[plain_name(name) + ".weight"] = Target(plain_name(name) + ".weight", layer, layer.weight)
    if not targets:
        raise TypeError(f"{who}: no linear layer in the decoder layers of {type(model).__name__} is trained.")
    for name, target in targets.items():
        base = target.layer if target.update is None else target.update.layer.get_base_layer()  # type: ignore[operator]
        if not isinstance(base, nn.Linear) or not target.weight.is_floating_point():
            what = "quantized" if isinstance(base, nn.Linear) else type(base).__name__
            raise TypeError(f"{who}: {name} is {what}; weights are scored in linear layers that are not quantized.")
    return targets


@dataclass(frozen=True)
class Selection:
    r"""Rule that selects the region of each matrix.

    Let S(q) be the top fraction q of a matrix by safety score, and U(p) the top fraction p by utility score. The region
    is :math:`M = S(q) \setminus U(p)`.

    Attributes:
        owner: name of the defense, for errors.
        safety_ratio: q, fraction of the entries of each matrix, in [0, 1].
        utility_ratio: p, likewise; 0 spares no entry and reads no utility rows.
        score: ``"snip"`` or ``"wanda"``; only ``region`` reads it.
        samples: number of rows of each kind that are scored, over all ranks, >= 1.
        safety: stream of safety rows.
        utility: stream of utility rows; must differ from ``safety``.
        end: whether the last response token of each row counts in the scores.
        spread: whether the rows come from the whole stream; by default its first rows are scored.

    Raises:
        ValueError: if a ratio lies outside [0, 1], ``samples`` is not a whole number >= 1, or the two streams do not
            differ.
    """

    owner: str
    safety_ratio: float
    utility_ratio: float
    score: str
    samples: int
    safety: str
    utility: str
    end: bool = False
    spread: bool = False

    def __post_init__(self) -> None:
        who = self.owner
        for name, ratio in (("safety_ratio", self.safety_ratio), ("utility_ratio", self.utility_ratio)):
            if not 0 <= ratio <= 1:
                hint = f" If that is a percentage, write {ratio / 100:g}." if 1 < ratio <= 100 else ""
                raise ValueError(
                    f"{who}: {name} is a fraction of each matrix and must lie in [0, 1], got {ratio}.{hint}"
                )
        if not (self.samples >= 1 and float(self.samples).is_integer()):
            raise ValueError(f"{who}: samples counts rows and must be a whole number >= 1, got {self.samples}.")
        if not (self.safety and self.utility and self.safety != self.utility):
            raise ValueError(
                f"{who}: safety and utility must name two different streams, got {self.safety!r} and {self.utility!r}."
            )

    def check(self, targets: Mapping[str, Target], by_row: bool) -> None:
        """Refuse a safety ratio that selects nothing of a matrix, unless the ratio is 0.

        Args:
            targets: from ``linear_targets``.
            by_row: whether whole rows are selected.

        Raises:
            ValueError: with the name of the first such matrix.
        """
        for name, target in targets.items():
            entries = target.weight.shape[0] if by_row else target.weight.numel()
            if count_of(self.safety_ratio, entries) == 0 and self.safety_ratio > 0:
                unit = "rows" if by_row else "entries"
                raise ValueError(
                    f"{self.owner}: safety_ratio {self.safety_ratio} is less than one of the {entries} {unit} of"
                    f" {name}, so none would be selected. Use safety_ratio >= {1 / entries:.3g}."
                )

    def region(
        self,
        targets: Mapping[str, Target],
        loss: Loss,
        batches: Callable[[str], Iterable[Batch]],
        by_row: bool,
        split: bool = True,
    ) -> tuple[dict[str, Tensor], dict[str, Overlap]]:
        """Return the mask of each matrix's region, and the overlap of S and U, by the name of the weight.

        Args:
            targets: from ``linear_targets``; the scores are taken at their weights.
            loss: mean loss of a batch in nats per response token.
            batches: returns the batches of a stream, equally many on every rank.
            by_row: whether whole rows are selected, by the sum of their scores.
            split: whether the ranks hold different batches.

        Returns:
            This rank's masks, ``[rows, in]``, or ``[rows, 1]`` for whole rows; and counts over all ranks.
        """
        wanted = self._tops(targets, loss, batches(self.safety), self.safety_ratio, by_row, split)
        spared = {}
        if self.utility_ratio > 0:
            spared = self._tops(targets, loss, batches(self.utility), self.utility_ratio, by_row, split)
        masks, table = {}, {}
        for name, target in targets.items():
            s, u = wanted.pop(name), spared.pop(name, None)
            table[name] = overlap(s, u, target.rows, target.weight.shape[1])
            masks[name] = minus(s, u)
        return masks, table

    def counted(self, batches: Iterable[Batch], split: bool) -> list[tuple[Batch, int]]:
        """Return the rows that are scored, as ``calibration`` returns them, with the labels that count."""
        data = calibration(batches, self.samples, split, spread=self.spread)
        return data if self.end else [(without_end(batch), count) for batch, count in data]

    def numbers(
        self, targets: Mapping[str, Target], masks: Mapping[str, Tensor], table: Mapping[str, Overlap]
    ) -> dict[str, Any]:
        """Return summary numbers of all matrices together.

        Every rank must call this.
        """
        packed = {name: pack(whole_rows(m.to(torch.uint8), targets[name].weight).bool()) for name, m in masks.items()}
        pooled = sum(table.values(), Overlap(0, 0, 0, 0))
        return {
            "requested_fraction": self.safety_ratio,
            "realised_fraction": pooled.fraction,
            "kept_entries": pooled.safety - pooled.both,
            "jaccard": pooled.jaccard,
            "jaccard_by_chance": chance_overlap(self.utility_ratio, self.safety_ratio),
            "mask_digest": int(digest(packed)[:12], 16),  # 48 bits, exact as a float
        }

    def empty(self) -> str:
        """Return why every region is empty, and the remedy, for a warning."""
        return (
            f"no weight is among the top {self.safety_ratio:g} of safety and not among the top {self.utility_ratio:g}"
            " of utility; raise safety_ratio, or lower utility_ratio."
        )

    def _tops(
        self,
        targets: Mapping[str, Target],
        loss: Loss,
        batches: Iterable[Batch],
        ratio: float,
        by_row: bool,
        split: bool,
    ) -> dict[str, Tensor]:
        """Return the mask of the top fraction of each matrix by its score on some rows."""
        layers = {name: t.layer for name, t in targets.items()}
        data = self.counted(batches, split)
        if self.score == "snip":
            statistics = gradient_sums(loss, layers, {name: t.weight for name, t in targets.items()}, data, split)
        else:
            statistics = input_moments(loss, layers, data, split=split)
        masks = {}
        for name, target in targets.items():
            rule = snip_scores if self.score == "snip" else wanda_scores
            # ``pop`` frees each matrix's statistics once its scores are known.
            scores = checked(rule(target.values(), statistics.pop(name)), name)
            if by_row:
                scores = scores.sum(dim=1, keepdim=True)
            masks[name] = top(scores, ratio, target.rows)
        return masks


def overlap_row(counts: Overlap) -> dict[str, Any]:
    """Return one matrix's counts in the form of a report."""
    return {"entries": counts.total, "kept": counts.safety - counts.both, "jaccard": counts.jaccard}
