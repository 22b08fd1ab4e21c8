"""Safe LoRA: updates that point away from the alignment are projected onto what the alignment moved."""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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

PROBES = 8  # random directions that tell what the cosine of a random update would be
COLUMNS = 1024  # columns of a full-parameter update that are in memory at one time
ZERO = "the update is zero"
UNMOVED = "the alignment did not move it"
NOISE = "the alignment moved it by less than the rounding of the stored weights"


def chosen(cosines: Mapping[str, float], count: int | None, threshold: float | None) -> list[str]:
    """Return the names to project, by rising cosine: exactly ``count`` of them, or those up to ``threshold``.

    Ties go to the earlier name, so that ``count`` is never exceeded.
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
        target: what is written: B, or W_ft.
        gram: ``A A^T`` with the scale, so that norms are those of the whole update; None where the blocks are it.
        blocks: gives the columns of each block and this rank's rows of them.
        start: gives this rank's rows of ``W_aligned``, by columns; None where the target is the update itself.
        image: ``V V^T B``, kept from the measurement, since it is thin.
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
        """Return the inner product of two updates given by their left factors."""
        return ((left if self.gram is None else left @ self.gram) * right).sum()

    def measure(self) -> Tensor:
        """Return one row of numbers about the update, in the order of ``MEASURED``."""
        sums: list[Tensor] = []
        null, squares = torch.zeros(2), torch.zeros(2)
        for number, (_, x) in enumerate(self.blocks()):
            width = x.shape[1]
            if number == 0:
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
        """Return this rank's rows of random signs, the same whatever the number of ranks."""
        seed = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:6], "big")
        signs = torch.randint(2, (self.v.shape[0], PROBES), generator=torch.Generator().manual_seed(seed))
        return signs[self.rows.start : self.rows.stop].to(like).mul_(2).sub_(1)

    def _null(self, z: Tensor, y: Tensor, t: Tensor, squares: Tensor) -> Tensor:
        """Return the cosine that a random update would have, and its spread over random updates of rank 1."""
        lengths, sizes = self.rows.sum(y.square().sum(dim=0), z.square().sum(dim=0))
        inner, tiny = t.square().sum(dim=0), torch.finfo(y.dtype).tiny
        cosines = inner / (lengths * sizes).sqrt().clamp_min(tiny)
        fourth = lengths.mean()
        if isinstance(self.v, LowRank):
            fourth = self.v.svd()[1].pow(4).sum().to(y)
        else:
            squares = inner.mean()  # its error goes with that of the denominator: better than the exact value
        return torch.stack([squares / (self.v.shape[0] * fourth).sqrt().clamp_min(tiny), cosines.std()])

    def write(self, operator: Callable[[Tensor], Tensor] | None, factor: float, strength: float) -> list[Tensor]:
        """Move the target towards its projection; return counts and squares: changed entries, update afterwards."""
        changed, after = [], []
        for columns, x in self.blocks():
            if operator is not None:
                y = operator(x)
            elif self.image is not None:
                y = self.image
            else:
                y = back_and_forth(self.v, x, self.rows)[0]
            # Not written as x + g (factor y - x): full strength must not see the rounding of x.
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

    With the alignment displacement :math:`V = W_{al} - W_{base}` of one weight and the user's update
    :math:`\Delta = s B A` (or :math:`W_{ft} - W_{al}`),

    .. math:: C = V V^T / \|V\|_F, \qquad \cos = \langle C \Delta, \Delta \rangle / (\|C \Delta\|_F \|\Delta\|_F),
              \qquad B \leftarrow (1 - g) B + g \, C B \ \text{ where the cosine is low}

    C is no projector: its eigenvalues are :math:`\sigma_k^2 / \|V\|_F`, their mean :math:`\|V\|_F / d_{out}`, so a
    chosen update is nearly deleted except along the strongest alignment directions, and twice the displacement writes
    twice the update. A random update has :math:`\cos \approx \|V\|_F^2 / (\sqrt{d_{out}} \|V V^T\|_F)`, which differs
    from one kind of layer to another; each weight's report has it as ``null``.

    Args:
        number: how many weights to project, those of the lowest cosine, ties by their place in the model; >= 1.
        threshold: project weights with a cosine up to this, in [0, 1]; instead of ``number``.
        fraction: without both, project this fraction of the weights, rounded down but at least one, in (0, 1].
        operator: ``"released"`` for C; ``"normalized"`` for :math:`V V^T / \|V\|_2^2`, which keeps the strongest
            direction as it is; ``"projector"`` for :math:`U_k U_k^T` of the ``rank`` leading left singular vectors of
            V.
        rank: k of ``"projector"``, >= 1; by default all directions of a thin V.
        strength: g, in [0, 1]; 0 turns it off.
        output: as ``Repair`` takes it.
        aligned: likewise.
        base: likewise.

    Raises:
        ValueError: if an argument is out of range, or ``number`` and ``threshold`` are both given.

    Cost: no data and no pass. For LoRA per weight two reads of the aligned and the base weight by blocks of rows and
        4 (r + 8) out x in operations, against 2 out^2 x in and an out x out matrix; with a thin alignment adapter no
        dense weight is read. All parameters: 4 out x in x min(out, in) operations, chosen weights twice.
    Source: Hsu et al., "Safe LoRA", NeurIPS 2024, arXiv:2405.16833; the operator, the cosine and the rule as in the
        official code, which divides by the first power of the Frobenius norm.
    Differs: by default 15 % of the weights (paper: threshold 0.35 for Llama-2; official code: the 10 lowest); weights
        are paired by name, chosen by the type of their layer, and never more than asked for; the cosine is not rounded
        to five decimals; an update of zero is skipped, and a weight that the alignment did not move, or moved by less
        than the rounding of the stored weights, is skipped with a warning. The paper's "exact" operator
        :math:`V (V^T V)^{-1} V^T` is the identity wherever V has full row rank, and is not offered; ``"projector"`` is.
    """

    needs = ("aligned", "base")
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
            raise ValueError(f"SafeLoRA: give number or threshold, not both, got {number} and {threshold}.")
        if number is not None and not (number >= 1 and number % 1 == 0):
            raise ValueError(f"SafeLoRA: number counts weights and must be a whole number >= 1, got {number}.")
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"SafeLoRA: threshold is a cosine and must lie in [0, 1], got {threshold}.")
        if not 0 < fraction <= 1:
            raise ValueError(f"SafeLoRA: fraction of the weights must lie in (0, 1], got {fraction}.")
        if operator not in ("released", "normalized", "projector"):
            raise ValueError(f"SafeLoRA: operator must be 'released', 'normalized' or 'projector', got {operator!r}.")
        if rank is not None and not (operator == "projector" and rank >= 1 and rank % 1 == 0):
            raise ValueError(f"SafeLoRA: rank must be a whole number >= 1 and goes with 'projector', got {rank}.")
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
        self.check_model(model)
        if self.aligned is None and not all(u.weight.is_floating_point() for u in updates.values()):
            raise ValueError(
                "SafeLoRA: the weights under the adapter are quantized; give aligned=..., the folder they came from."
            )

    @override
    def check_model(self, model: nn.Module) -> None:
        check_layout(model, "SafeLoRA")
        if self.number is not None:
            self._check_number(len(lora_updates(model) if has_adapter(model) else linear_weights(model)))

    @override
    def edit(self, subject: Subject) -> None:
        check_layout(subject.model, "SafeLoRA")
        parts, skipped = _parts(subject)
        table = self._measure_all(parts, skipped)
        usable = {name: part for name, part in parts.items() if name not in skipped}
        if not usable and set(skipped.values()) - {ZERO}:
            raise ValueError(
                "SafeLoRA: the aligned and the base model differ in no weight that was fine-tuned, or by no more than"
                " rounding; give the model before its alignment as base, in float32 if it is at hand."
            )
        names = self._choose({name: table[name]["cosine"] for name in usable})
        changed = 0
        for name in names:
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
                f"the lowest cosine is {lowest:.3f}, above the threshold {self.threshold}; raise it, or use number."
            )
        self._warn(table, skipped, names)

    def _measure_all(self, parts: dict[str, WeightUpdate], skipped: dict[str, str]) -> dict[str, dict[str, Any]]:
        """Return the table of all weights, and add those that cannot be projected to ``skipped``."""
        if not parts:
            return {}
        numbers = torch.stack([part.measure().double().cpu() for part in parts.values()]).tolist()
        table: dict[str, dict[str, Any]] = {}
        for name, row in zip(parts, numbers, strict=True):
            values = dict(zip(MEASURED, row, strict=True))
            if not all(map(math.isfinite, row)):
                raise RuntimeError(f"SafeLoRA: {name} has an entry that is not finite, in the update or the alignment.")
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
                f"SafeLoRA: number is {self.number}, but only {weights} weights can be projected; lower it, or leave it"
                " out to project a fraction."
            )

    def _project(self, part: WeightUpdate, row: dict[str, Any]) -> dict[str, Any]:
        """Write one weight's projection; return what changed."""
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
                    "SafeLoRA: give rank=..., the directions that 'projector' keeps of a dense displacement."
                )
            u = leading(part.v, rank, part.rows, like)[0]
            mine = u[part.rows.start : part.rows.stop]
            operator, factor = lambda x: mine @ part.rows.sum(mine.T @ x)[0], 1.0
            details["rank"] = u.shape[1]
        changed, after = torch.stack(part.write(operator, factor, self.strength)).tolist()
        return {**details, "changed_entries": int(changed), "repaired_norm": math.sqrt(after)}

    def _warn(self, table: dict[str, dict[str, Any]], skipped: dict[str, str], names: list[str]) -> None:
        unaligned = [name for name, why in skipped.items() if why != ZERO]
        if unaligned:
            warnings.warn(
                f"SafeLoRA: {len(unaligned)} weights are left as they are, since the alignment did not move them, or by"
                f" less than their rounding, such as {unaligned[0]}.",
                stacklevel=4,
            )
        grown = [name for name in names if table[name]["repaired_norm"] > table[name]["update_norm"]]
        if grown:
            warnings.warn(
                f"SafeLoRA: the displacement is so large that {len(grown)} projected updates grew, such as {grown[0]};"
                " consider operator='normalized'.",
                stacklevel=4,
            )


def _parts(subject: Subject) -> tuple[dict[str, WeightUpdate], dict[str, str]]:
    """Return the updates of a model by weight, and the weights that the alignment is known not to have moved."""
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
    """Return a LoRA layer's B as what is projected.

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
    """Return ``W_ft - W_aligned`` of a trained weight as what is projected, formed by column blocks.

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
            f"SafeLoRA: {name} is {list(shape)} in the fine-tuned model and {list(v.shape)} in the aligned one; give"
            " the model that the fine-tuning started from."
        )


def safe_lora(model: nn.Module, base: str, aligned: str | None = None, **arguments: Any) -> dict[str, Any]:
    """Repair a fine-tuned model in memory, without Lightning.

    Args:
        model: a PEFT model whose active adapter is the user's update, or a causal LM with all parameters trained.
        base: the model before its alignment, a folder or hub id with safetensors files; read by blocks of rows.
        aligned: the aligned model, likewise, or the adapter that aligned ``base``, with which no dense weight is read.
            By default the weights under the model's adapter.
        **arguments: of ``SafeLoRA``.

    Returns:
        The report: per weight cosine, null, norms, and what changed.

    Raises:
        RuntimeError: if the model was repaired before.
    """
    subject = Subject(model)
    SafeLoRA(base=base, aligned=aligned, **arguments).apply(subject)
    return subject.report
