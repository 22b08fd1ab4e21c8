"""Safe LoRA: project updates that point away from the alignment onto what the alignment moved."""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from hftlight.engine.step.vectors import local, whole
from hftlight.engine.weights.lora import has_adapter, lora_updates
from hftlight.engine.weights.lowrank import LowRank
from hftlight.engine.weights.repair import Repair, check_layout, linear_weights
from hftlight.engine.weights.shards import Share, share
from hftlight.engine.weights.spectrum import Displacement, back_and_forth, leading
from hftlight.engine.weights.subject import Subject
from hftlight.models.repaired import repair_model

PROBES = 8  # random directions for the spread of a random update's cosine
COLUMNS = 1024  # columns of a full-parameter update in memory at one time
ZERO = "the update is zero"
UNMOVED = "the alignment did not move it"
NOISE = "the alignment moved it by less than the rounding of the stored weights"


def chosen(cosines: Mapping[str, float], count: int | None, threshold: float | None) -> list[str]:
    """Return the names to project, by rising cosine: exactly ``count`` of them, or those up to ``threshold``.

    A tie goes to the earlier name, so that ``count`` is never exceeded. With a threshold, ``count`` is ignored.
    """
    ranked = sorted(cosines, key=lambda name: cosines[name])  # stable: ties keep the model's order
    if threshold is not None:
        return [name for name in ranked if cosines[name] <= threshold]
    return ranked[:count]


@dataclass
class WeightUpdate:
    """One weight's update on this rank, in column blocks: LoRA's B in one, or ``W_ft - W_aligned`` in several.

    Attributes:
        name: plain name of the weight.
        v: the alignment displacement.
        rows: the rows that this rank holds.
        target: the tensor that is written, B or W_ft.
        gram: ``A A^T`` times the squared scale, so that norms are those of the whole update. None if the blocks are the
            update itself.
        blocks: yields the columns of each block and this rank's rows of it.
        start: returns this rank's rows of ``W_aligned`` for some columns. None if the target is the update itself.
        image: ``V V^T B``, stored by ``measure`` for ``write``, since it is thin. None if it is not stored.
    """

    name: str
    v: Displacement
    rows: Share
    target: Tensor
    gram: Tensor | None
    blocks: Callable[[], Iterator[tuple[slice, Tensor]]]
    start: Callable[[slice], Tensor] | None = None
    image: Tensor | None = None

    def dot(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the inner product of two updates from their left factors."""
        return ((left if self.gram is None else left @ self.gram) * right).sum()

    def measure(self) -> Tensor:
        """Return one row of numbers about the update, in the order of ``MEASURED``."""
        # Per block x: t = V^T x and y = V V^T x. The cosine is <t, t> / (|y| |x|), each term summed over all blocks.
        # t is already a sum over all ranks. x and y are this rank's rows, so their products are summed over ranks here.
        sums: list[Tensor] = []
        null, squares = torch.zeros(2), torch.zeros(2)
        for number, (_, x) in enumerate(self.blocks()):
            width = x.shape[1]
            if number == 0:  # the random probes are extra columns of the first block, so that V is read once
                x = torch.cat([x, self._probes(x)], dim=1)
            y, t, v_squares = back_and_forth(self.v, x, self.rows)
            if number == 0:
                squares, null = v_squares, self._null(x[:, width:], y[:, width:], t[:, width:], v_squares[0])
                x, y, t = x[:, :width], y[:, :width], t[:, :width]
            if self.gram is not None:
                self.image = y
            sums.append(torch.stack([self.dot(t, t), *self.rows.sum(self.dot(y, y), self.dot(x, x))]))
        inner, image_square, update_square = torch.stack(sums).sum(dim=0)
        length = (image_square * update_square).sqrt()
        cosine = torch.where(length > 0, inner / length, torch.zeros_like(length)).clamp(max=1.0)
        return torch.cat([torch.stack([cosine, update_square]), squares, null])

    def _probes(self, like: Tensor) -> Tensor:
        """Return this rank's rows of random signs, independent of the number of ranks."""
        seed = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:6], "big")
        signs = torch.randint(2, (self.v.shape[0], PROBES), generator=torch.Generator().manual_seed(seed))
        return signs[self.rows.start : self.rows.stop].to(like).mul_(2).sub_(1)

    def _null(self, z: Tensor, y: Tensor, t: Tensor, squares: Tensor) -> Tensor:
        """Return the cosine of a random update, and its standard deviation over random updates of rank 1.

        Args:
            z: random signs, ``[rows, PROBES]``.
            y: ``V V^T z``, likewise.
            t: ``V^T z``, ``[in, PROBES]``.
            squares: squared Frobenius norm of V, 0-d.
        """
        lengths, sizes = self.rows.sum(y.square().sum(dim=0), z.square().sum(dim=0))
        inner, tiny = t.square().sum(dim=0), torch.finfo(y.dtype).tiny
        cosines = inner / (lengths * sizes).sqrt().clamp_min(tiny)
        fourth = lengths.mean()
        if isinstance(self.v, LowRank):
            fourth = self.v.svd()[1].pow(4).sum().to(y)
        else:
            # fourth estimates the sum of sigma^4 from the probes. The estimate of |V|^2 from the same probes errs in
            # the same direction, so the ratio is better than with the exact norm.
            squares = inner.mean()
        return torch.stack([squares / (self.v.shape[0] * fourth).sqrt().clamp_min(tiny), cosines.std()])

    def write(self, operator: Callable[[Tensor], Tensor] | None, factor: float, strength: float) -> list[Tensor]:
        """Move the target toward its projection, and return two sums over all ranks.

        Args:
            operator: maps this rank's rows of an update to its image; None for ``V V^T``.
            factor: multiplies the image.
            strength: g, in [0, 1].

        Returns:
            The number of changed entries, and the squared norm of the update afterwards.
        """
        changed, after = [], []
        for columns, x in self.blocks():
            if operator is not None:
                y = operator(x)
            elif self.image is not None:
                y = self.image
            else:
                y = back_and_forth(self.v, x, self.rows)[0]
            # Not x + g (factor y - x): at full strength the result must not contain the rounding of x.
            new = factor * y if strength == 1 else (1 - strength) * x + strength * factor * y
            if self.start is not None:
                new = self.start(columns).to(new) + new
            view = local(self.target)[:, columns]
            written = new.to(view.dtype)
            changed.append((written != view).sum())
            after.append(
                self.dot(new, new) if self.start is None else (new - self.start(columns).to(new)).square().sum()
            )
            view.copy_(written)
        return self.rows.sum(torch.stack(changed).sum().double(), torch.stack(after).sum().double())


MEASURED = ("cosine", "update", "displacement", "noise", "null", "null_spread")


class SafeLoRA(Repair):
    r"""Project the updates that point away from the alignment onto what the alignment moved.

    Let :math:`V = W_{al} - W_{base}` be the alignment displacement of one weight. Let :math:`\Delta = s B A` (or
    :math:`W_{ft} - W_{al}`) be the user's update. Then

    .. math:: C = V V^T / \|V\|_F, \qquad \cos = \langle C \Delta, \Delta \rangle / (\|C \Delta\|_F \|\Delta\|_F),
              \qquad B \leftarrow (1 - g) B + g \, C B \ \text{ where the cosine is low}

    C is no projector. Its eigenvalues are :math:`\sigma_k^2 / \|V\|_F`, with the mean :math:`\|V\|_F / d_{out}`. It
    nearly deletes a chosen update, except along the strongest alignment directions. Twice the displacement writes twice
    the update. A random update has :math:`\cos \approx \|V\|_F^2 / (\sqrt{d_{out}} \|V V^T\|_F)`. This value differs
    between kinds of layers; each weight's report has it as ``null``.

    Args:
        number: number of weights to project, those with the lowest cosines, >= 1. A tie goes to the weight that comes
            first in the model.
        threshold: project the weights with a cosine up to this value, in [0, 1]; excludes ``number``.
        fraction: fraction of the weights to project if neither ``number`` nor ``threshold`` is set, in (0, 1]. The
            count is rounded down, but is at least one.
        operator: ``"released"`` for C. ``"normalized"`` for :math:`V V^T / \|V\|_2^2`, which leaves the strongest
            direction unchanged. ``"projector"`` for :math:`U_k U_k^T` of the ``rank`` leading left singular vectors of
            V.
        rank: k of ``"projector"``, >= 1; by default all directions of a thin V. A dense V needs a rank.
        strength: g, in [0, 1]; 0 turns it off.
        output: as in ``Repair``.
        aligned: as in ``Repair``.
        base: as in ``Repair``.

    Raises:
        ValueError: if an argument is out of range, or both ``number`` and ``threshold`` are set.

    Cost: no data and no pass. Under LoRA each weight takes two reads of the aligned and the base weight, by blocks of
        rows. It takes 4 (r + 8) out x in operations, against 2 out^2 x in and an out x out matrix. With a thin
        alignment adapter no dense weight is read. With all parameters trained, a weight takes 4 out x in x min(out, in)
        operations, and a chosen weight twice as many.
    Source: Hsu et al., "Safe LoRA", NeurIPS 2024, arXiv:2405.16833. The operator, the cosine and the rule are those of
        the official code. It divides by the first power of the Frobenius norm.
    Differs: the default projects 15 % of the weights (paper: threshold 0.35 for Llama-2; official code: the 10 lowest).
        Weights are paired by name and chosen by the type of their layer. Never more weights are projected than
        requested. The cosine is not rounded to five decimals. A zero update is skipped. A weight that the alignment did
        not move is skipped with a warning. A move below the rounding of the stored weights counts as none. The paper's
        "exact" operator :math:`V (V^T V)^{-1} V^T` is the identity wherever V has full row rank. It is not offered;
        ``"projector"`` is.
    """

    needs = ("aligned", "base")
    dials = ("number", "threshold", "fraction", "operator", "rank", "strength")
    repair_order = 0
    claims = ("projection of the update",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {"threshold": 0.35}, "repo": {"number": 10}}

    def __init__(
        self,
        number: int | None = None,
        threshold: float | None = None,
        fraction: float = 0.15,
        operator: Literal["released", "normalized", "projector"] = "released",
        rank: int | None = None,
        strength: float = 1.0,
        output: str | None = None,
        aligned: str | None = None,
        base: str | None = None,
    ) -> None:
        if number is not None and threshold is not None:
            raise ValueError(f"SafeLoRA: set number or threshold, not both, got {number} and {threshold}.")
        if number is not None and not (number >= 1 and number % 1 == 0):
            raise ValueError(f"SafeLoRA: number counts weights and must be a whole number >= 1, got {number}.")
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"SafeLoRA: threshold is a cosine and must lie in [0, 1], got {threshold}.")
        if not 0 < fraction <= 1:
            raise ValueError(f"SafeLoRA: fraction of the weights must lie in (0, 1], got {fraction}.")
        if operator not in ("released", "normalized", "projector"):
            raise ValueError(f"SafeLoRA: operator must be 'released', 'normalized' or 'projector', got {operator!r}.")
        if rank is not None and not (operator == "projector" and rank >= 1 and rank % 1 == 0):
            raise ValueError(
                f"SafeLoRA: rank must be a whole number >= 1, and only operator='projector' uses it, got rank={rank}."
            )
        if not 0 <= strength <= 1:
            raise ValueError(f"SafeLoRA: strength must lie in [0, 1] (0 turns it off), got {strength}.")
        super().__init__(None, output, aligned, base)
        self.number, self.threshold, self.fraction = number, threshold, fraction
        self.operator, self.rank, self.strength = operator, rank, strength

    @property
    @override
    def neutral(self) -> bool:
        return self.strength == 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        model = getattr(pl_module, "model", pl_module)
        updates = lora_updates(model) if has_adapter(model) else {}
        if self.aligned is None and not all(u.weight.is_floating_point() for u in updates.values()):
            raise ValueError(
                "SafeLoRA: the weights under the adapter are quantized; give aligned=..., the folder of the aligned"
                " model that they were loaded from."
            )

    @override
    def check_model(self, model: nn.Module) -> None:
        check_layout(model, "SafeLoRA")
        if self.number is not None:
            self._check_number(len(lora_updates(model) if has_adapter(model) else linear_weights(model)))

    @override
    def scored(self, subject: Subject) -> dict[str, Tensor]:
        """Return each weight's numbers in the order of ``MEASURED``, and its ``V V^T B`` if that is thin.

        A new product would differ from the measured one in its last bits, so ``edit`` needs the stored one.
        """
        check_layout(subject.model, "SafeLoRA")
        parts, _ = _parts(subject)
        scores = {}
        for name, part in parts.items():
            subject.on_weight(name)
            scores[name] = part.measure().double().cpu()
        return scores | {f"{name} (image)": p.image.cpu() for name, p in parts.items() if p.image is not None}

    @override
    def edit(self, subject: Subject) -> None:
        check_layout(subject.model, "SafeLoRA")
        parts, skipped = _parts(subject)
        for name, part in parts.items():
            if (image := subject.scores.get(f"{name} (image)")) is not None:
                part.image = image.to(part.target.device)
        table = self._table(parts, subject.scores, skipped)
        usable = {name: part for name, part in parts.items() if name not in skipped}
        if not usable and set(skipped.values()) - {ZERO}:
            raise ValueError(
                "SafeLoRA: the aligned and the base model differ by no more than rounding in every weight that was"
                " fine-tuned; give the model before its alignment as base, in float32 if available."
            )
        names = self._choose({name: table[name]["cosine"] for name in usable})
        changed = 0
        for name in names:
            subject.on_weight(name)
            table[name] |= self._project(usable[name], table[name])
            changed += table[name]["changed_entries"]
        subject.report |= {
            "weights": table,
            "skipped": skipped,
            "projected": names,
            "projected_fraction": len(names) / max(1, len(parts)),
            "changed_entries": changed,
        }
        if usable and not names:
            lowest = min(table[name]["cosine"] for name in usable)
            subject.report["unchanged_because"] = (
                f"the lowest cosine is {lowest:.3f}, above the threshold {self.threshold}; raise threshold, or use"
                " number."
            )
        self._warn(table, skipped, names)

    def _table(
        self, names: Iterable[str], scores: Mapping[str, Tensor], skipped: dict[str, str]
    ) -> dict[str, dict[str, Any]]:
        """Return the table of all weights, and add those that cannot be projected to ``skipped`` in place."""
        table: dict[str, dict[str, Any]] = {}
        for name in names:
            row = scores[name].tolist()
            values = dict(zip(MEASURED, row, strict=True))
            if not all(map(math.isfinite, row)):
                raise RuntimeError(
                    f"SafeLoRA: the update or the alignment displacement of {name} has an entry that is not finite."
                )
            if values["update"] == 0:
                skipped[name] = ZERO
            elif values["displacement"] == 0:
                skipped[name] = UNMOVED
            elif values["displacement"] < 2 * values["noise"]:
                skipped[name] = NOISE
            table[name] = {
                "cosine": values["cosine"],
                "null": values["null"],
                "null_spread": values["null_spread"],
                "displacement_norm": math.sqrt(values["displacement"]),
                "noise_norm": math.sqrt(values["noise"]),
                "update_norm": math.sqrt(values["update"]),
            }
        return table

    def _choose(self, cosines: dict[str, float]) -> list[str]:
        if self.number is not None and cosines:
            self._check_number(len(cosines))
        return chosen(cosines, self.number or max(1, int(self.fraction * len(cosines))), self.threshold)

    def _check_number(self, weights: int) -> None:
        if self.number is not None and self.number > weights:
            raise ValueError(
                f"SafeLoRA: number is {self.number}, but only {weights} weights can be projected; lower number, or omit"
                " it to project a fraction."
            )

    def _project(self, part: WeightUpdate, row: dict[str, Any]) -> dict[str, Any]:
        """Write one weight's projection, and return details for the report."""
        operator: Callable[[Tensor], Tensor] | None = None
        factor = 1 / row["displacement_norm"]
        details: dict[str, Any] = {}
        _, like = next(part.blocks())
        if self.operator == "normalized":
            top = float(leading(part.v, 1, part.rows, like)[1][0])
            factor = 1 / top**2
            details["top_singular_value"] = top
        elif self.operator == "projector":
            rank = self.rank or (part.v.b.shape[1] if isinstance(part.v, LowRank) else 0)
            if rank == 0:
                raise ValueError(
                    "SafeLoRA: give rank=..., the number of directions of a dense displacement that 'projector' keeps."
                )
            u = leading(part.v, rank, part.rows, like)[0]
            # U U^T x with the rows of U and x spread over ranks: U^T x is summed over ranks, then each keeps its rows.
            mine = u[part.rows.start : part.rows.stop]
            operator, factor = lambda x: mine @ part.rows.sum(mine.T @ x)[0], 1.0
            details["rank"] = u.shape[1]
        changed, after = torch.stack(part.write(operator, factor, self.strength)).tolist()
        return {**details, "changed_entries": int(changed), "repaired_norm": math.sqrt(after)}

    def _warn(self, table: dict[str, dict[str, Any]], skipped: dict[str, str], names: list[str]) -> None:
        unaligned = [name for name, why in skipped.items() if why != ZERO]
        if unaligned:
            warnings.warn(
                f"SafeLoRA: {len(unaligned)} weights stay unchanged, such as {unaligned[0]}. The alignment did not"
                " move them, or moved them by less than their rounding.",
                stacklevel=4,
            )
        grown = [name for name in names if table[name]["repaired_norm"] > table[name]["update_norm"]]
        if grown:
            warnings.warn(
                f"SafeLoRA: {len(grown)} projected updates grew, such as {grown[0]}, since the displacement is large."
                " Consider operator='normalized'.",
                stacklevel=4,
            )


def _parts(subject: Subject) -> tuple[dict[str, WeightUpdate], dict[str, str]]:
    """Return the updates of a model by weight, and the weights without an alignment displacement."""
    parts: dict[str, WeightUpdate] = {}
    skipped: dict[str, str] = {}
    adapter = has_adapter(subject.model)
    targets: Mapping[str, Any] = lora_updates(subject.model) if adapter else linear_weights(subject.model)
    for name, target in targets.items():
        v = subject.alignment(name)
        if v is None:
            skipped[name] = UNMOVED
            continue
        parts[name] = thin_update(name, target, v) if adapter else dense_update(name, target, v, subject)
    return parts, skipped


def thin_update(name: str, update: Any, v: Displacement) -> WeightUpdate:
    """Return a LoRA layer's update, whose B is projected.

    Raises:
        ValueError: if the aligned weight has another shape.
    """
    dtype = torch.promote_types(update.b.dtype, torch.float32)
    a = whole(update.a.detach()).to(dtype)
    gram = update.scale**2 * (a @ a.T)
    b = local(update.b.detach())
    _check_shape(name, v, (update.b.shape[0], update.a.shape[1]))
    return WeightUpdate(name, v, share(update.b), update.b, gram, lambda: iter([(slice(None), b.to(dtype))]))


def dense_update(name: str, weight: nn.Parameter, v: Displacement, subject: Subject) -> WeightUpdate:
    """Return the update ``W_ft - W_aligned`` of a trained weight, computed by column blocks.

    Raises:
        ValueError: if the aligned weight has another shape.
    """
    rows, start = share(weight), subject.start
    assert start is not None
    mine, dtype = local(weight.detach()), torch.promote_types(weight.dtype, torch.float32)
    _check_shape(name, v, tuple(weight.shape))

    def aligned(columns: slice) -> Tensor:
        return start.rows(name, rows.start, rows.stop)[:, columns].to(mine.device)

    def blocks() -> Iterator[tuple[slice, Tensor]]:
        for at in range(0, mine.shape[1], COLUMNS):
            columns = slice(at, at + COLUMNS)
            yield columns, mine[:, columns].to(dtype) - aligned(columns).to(dtype)

    return WeightUpdate(name, v, rows, weight, None, blocks, aligned)


def _check_shape(name: str, v: Displacement, shape: tuple[int, ...]) -> None:
    if tuple(v.shape) != shape:
        raise ValueError(
            f"SafeLoRA: {name} has shape {list(shape)} in the fine-tuned model and {list(v.shape)} in the aligned one;"
            " give the model that the fine-tuning started from."
        )


def safe_lora(model: nn.Module | str | Path, base: str, aligned: str | None = None, **arguments: Any) -> dict[str, Any]:
    """Repair a fine-tuned model with SafeLoRA in one call, without Lightning.

    Args:
        model: a PEFT model whose active adapter is the user's update, or a causal LM with all parameters trained. It is
            changed in memory. Or the folder of either, which stays unchanged.
        base: the model before its alignment, a folder or hub id with safetensors files. It is read by blocks of rows.
        aligned: the aligned model, likewise, or the adapter that aligned ``base``. With that adapter no dense weight is
            read. By default the weights under the model's adapter.
        **arguments: further arguments of ``SafeLoRA``, such as ``output``, the folder for the repaired model.

    Returns:
        The report: per weight the cosine, ``null``, the norms, and the changed entries.

    Raises:
        RuntimeError: if the model is already repaired.
        ValueError: if an argument of ``SafeLoRA`` is out of range, or a folder is repaired without ``output``.
    """
    return repair_model(SafeLoRA(base=base, aligned=aligned, **arguments), model)
