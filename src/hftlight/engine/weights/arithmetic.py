"""Task arithmetic: the user's update, thinned and scaled, minus a harm vector, added to the aligned weights."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from hftlight.engine.step.simulation import draws
from hftlight.engine.step.vectors import local
from hftlight.engine.weights.lora import LoraUpdate, has_adapter, lora_updates, put_factors, sharded
from hftlight.engine.weights.lowrank import LowRank, combined
from hftlight.engine.weights.masks import count_of
from hftlight.engine.weights.repair import Repair, check_layout
from hftlight.engine.weights.shards import share
from hftlight.engine.weights.stored import Adapted, Difference, ModelWeights, Weights, displacement
from hftlight.engine.weights.subject import Subject
from hftlight.engine.weights.top_k import Top

BLOCK = 1024  # rows in memory at one time; also the rows that share one seed of DARE


def rescaled(update: Tensor, kept: Tensor, drop: float) -> Tensor:
    r"""Return DARE's update :math:`m \circ \Delta / (1 - p)`.

    Each entry of m is 1 with probability 1 - p, so that the expectation is :math:`\Delta`.

    Args:
        update: :math:`\Delta`, ``[rows, in]``.
        kept: m, bool, likewise.
        drop: p, in [0, 1).
    """
    return update * kept / (1 - drop)


def kept_entries(seed: int, name: str, start: int, stop: int, shape: tuple[int, int], drop: float) -> Tensor:
    """Return which entries of some rows of a matrix DARE keeps, bool ``[stop - start, in]``, on the CPU.

    Each entry is kept with probability ``1 - drop``. The result depends on the seed, the name and the place of the
    entry alone, not on blocks or ranks.

    Args:
        seed: seed of the run.
        name: plain name of the weight.
        start: first row.
        stop: one past the last row.
        shape: ``(out, in)`` of the whole matrix.
        drop: probability that an entry is dropped, in [0, 1).
    """
    first = start - start % BLOCK
    parts = []
    for at in range(first, stop, BLOCK):
        generator = torch.Generator().manual_seed(draws(seed, at, name).getrandbits(48))
        parts.append(torch.rand(min(BLOCK, shape[0] - at), shape[1], generator=generator) >= drop)
    return torch.cat(parts)[start - first : stop - first]


def thinned(update: LowRank, seed: int, name: str, drop: float) -> LowRank:
    """Return an update without some of its singular components, the others divided by ``1 - drop``.

    Each component is dropped with probability ``drop``. Singular components do not depend on how the update is split
    into factors.
    """
    u, s, vh = update.svd()
    random = draws(seed, 0, name)
    kept = [k for k in range(len(s)) if random.random() >= drop]
    return LowRank(u[:, kept] * s[kept], vh[kept], 1 / (1 - drop))


def harm_vectors(subject: Subject, who: str) -> dict[str, LowRank | Difference]:
    """Return the displacement of the unaligned from the aligned model, by weight. Unmoved weights are left out.

    Raises:
        RuntimeError: if there is no unaligned or no aligned model.
        ValueError: if one of the two models lacks a weight, or the shapes differ.
    """
    start, unaligned = aligned_weights(subject, who), subject.unaligned
    if unaligned is None:
        raise RuntimeError(
            f"{who}: it subtracts what a harmful training adds, and no unaligned model is known. Give"
            " unaligned=..., the aligned model after training on harmful rows, a folder or hub id."
        )
    vectors = {}
    for name in ModelWeights.of(subject.model).parameters:
        try:
            vector = _harm_vector(unaligned, start, name)
        except ValueError as error:
            raise ValueError(
                f"{who}: {name} must have one shape in the aligned and in the unaligned model, got"
                f" {start.shape(name)} and {unaligned.shape(name)}. Give models of one architecture that are not"
                " quantized."
            ) from error
        if vector is not None:
            vectors[name] = vector
    return vectors


def _harm_vector(unaligned: Weights, start: Weights, name: str) -> LowRank | Difference | None:
    """Return what ``displacement`` returns, also as factors if the aligned model is an adapter on the unaligned one."""
    if isinstance(start, Adapted) and start.under == unaligned:
        update = start.updates.get(name)
        return None if update is None else LowRank(update.b, update.a, -update.scale)
    return displacement(unaligned, start, name)


def aligned_weights(subject: Subject, who: str) -> Weights:
    """Return the weights that the user's fine-tuning started from.

    Raises:
        RuntimeError: if they are not known, or an earlier repair has merged the update into them.
    """
    if subject.start is None or (subject.dense and subject.aligned is None):
        raise RuntimeError(
            f"{who}: it needs the aligned model, which is not under an adapter; give aligned=..., a folder or hub id."
        )
    return subject.start


class Arithmetic(Repair):
    r"""Replace the fine-tuned weights by a weighted sum of the user's update and of a harm vector.

    .. math:: W' = W_{al} + k \, \mathrm{DARE}_p(W_{ft} - W_{al}) - g \, \mathrm{Trim}_K(W_{un} - W_{al})

    With thin vectors and an adapter the factors are stacked, so that the sum is exact. Everything else is done by
    blocks of rows, in place.

    Args:
        update_weight: k, >= 0.
        harm_weight: g, >= 0; 0 needs no unaligned model.
        drop: p, in [0, 1).
        drop_unit: ``"entry"`` or ``"component"``.
        keep: K, fraction in (0, 1].
        output: as in ``Repair``.
        aligned: as in ``Repair``.
        unaligned: as in ``Repair``.
    """

    repair_order = 5
    harm_name = "harm_weight"  # what the subclass calls g, for errors

    def __init__(
        self,
        update_weight: float,
        harm_weight: float,
        drop: float,
        drop_unit: Literal["entry", "component"],
        keep: float,
        output: str | None,
        aligned: str | None,
        unaligned: str | None,
    ) -> None:
        who = type(self).__name__
        for name, value in (("update_weight", update_weight), (self.harm_name, harm_weight)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{who}: {name} is a factor and must be >= 0 and finite, got {value}.")
        for name, value, inside in (("drop", drop, 0 <= drop < 1), ("keep", keep, 0 < keep <= 1)):
            if not inside:
                hint = f" If that is a percentage, write {value / 100:g}." if 1 < value < 100 else ""
                allowed = "[0, 1), where 0 drops nothing" if name == "drop" else "(0, 1], where 1 keeps all"
                raise ValueError(f"{who}: {name} is a fraction in {allowed}; got {value}.{hint}")
        if drop_unit not in ("entry", "component"):
            raise ValueError(f"{who}: drop_unit must be 'entry' or 'component', got {drop_unit!r}.")
        super().__init__(None, output, aligned, unaligned=unaligned)
        self.drop, self.drop_unit = drop, drop_unit
        self._update_weight, self._harm_weight, self._keep = update_weight, harm_weight, keep
        self.needs = ("aligned", "unaligned") if harm_weight else ("aligned",)

    @property
    @override
    def neutral(self) -> bool:
        return self._update_weight == 1 and self._harm_weight == 0 and self.drop == 0

    @override
    def check_model(self, model: nn.Module) -> None:
        """Refuse adapters on transposed weights, and an adapter that must be added to weights of 16 bits or fewer."""
        who = type(self).__name__
        if not has_adapter(model):
            self._check_unit(adapter=False)
            return
        check_layout(model, who)
        if (self.drop and self.drop_unit == "entry") or (self._harm_weight and self._keep < 1):
            self._check_types(lora_updates(model))

    def _check_unit(self, adapter: bool) -> None:
        if self.drop and self.drop_unit == "component" and not adapter:
            raise TypeError(
                f"{type(self).__name__}: drop_unit='component' needs the update in a LoRA adapter; use"
                " drop_unit='entry'."
            )

    def _check_types(self, updates: Mapping[str, LoraUpdate]) -> None:
        for name, update in updates.items():
            if update.weight.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"{type(self).__name__}: the update must be added to {name}, which is stored in"
                    f" {update.weight.dtype}. In this type most of a small update would round away. Load the model in"
                    " float32, or use drop_unit='component' and an unaligned model that is an adapter on the aligned"
                    " one."
                )

    @override
    def edit(self, subject: Subject) -> None:
        who, model = type(self).__name__, subject.model
        self.check_model(model)
        updates = lora_updates(model) if has_adapter(model) and not subject.dense else {}
        self._check_unit(bool(updates))
        harm = harm_vectors(subject, who) if self._harm_weight else {}
        if self._stays_thin(updates, harm):
            table = self._stack(subject, updates, harm)
        else:
            if updates:
                self._check_types(updates)
            table = self._write(subject, updates, harm)
        norms = {key: math.hypot(*(row[key] for row in table.values())) for key in ("update_norm", "repaired_norm")}
        subject.report |= {
            "weights": table,
            # A plain shrink by this factor is the control with the same distance from the aligned model.
            "norm_ratio": norms["repaired_norm"] / norms["update_norm"] if norms["update_norm"] else 0.0,
            "changed_entries": sum(row["changed_entries"] for row in table.values()),
        }
        if all(row["update_norm"] == row["harm_norm"] == 0 for row in table.values()):
            subject.report["unchanged_because"] = "the update and the harm vector are zero."

    def _stays_thin(self, updates: Mapping[str, LoraUpdate], harm: Mapping[str, LowRank | Difference]) -> bool:
        """Tell whether the result is an adapter: all vectors are thin, within its layers, and no entry is masked."""
        thin = all(isinstance(h, LowRank) and name in updates for name, h in harm.items())
        masked = (self.drop and self.drop_unit == "entry") or (harm and self._keep < 1)
        # An adapter that FSDP2 has sharded cannot grow.
        return bool(updates) and thin and not masked and not (harm and sharded(updates))

    def _stack(
        self, subject: Subject, updates: Mapping[str, LoraUpdate], harm: Mapping[str, LowRank | Difference]
    ) -> dict[str, dict[str, float]]:
        """Write the sum into an adapter of larger rank, and return norms and counts by weight."""
        factors, table = {}, {}
        for name, update in updates.items():
            own = update.factors()
            terms = [(self._update_weight, self._components(own, subject.seed, name))]
            vector = harm.get(name)
            if isinstance(vector, LowRank):
                vector = LowRank(vector.b.to(own.b), vector.a.to(own.a), vector.scale)
                terms.append((-self._harm_weight, vector))
            total = factors[name] = combined(terms)
            rank = total.b.shape[1]
            before = nn.functional.pad(own.scale * own.b, (0, rank))[:, :rank]
            table[name] = {
                "update_norm": _norm(own),
                "harm_norm": _norm(vector) if isinstance(vector, LowRank) else 0.0,
                "repaired_norm": _norm(total),
                "rank": rank,
                "changed_entries": int((before != total.b).sum()),
            }
        put_factors(subject.model, factors)
        return table

    def _components(self, update: LowRank, seed: int, name: str) -> LowRank:
        """Return an adapter's update without the components that are dropped."""
        by_component = self.drop and self.drop_unit == "component"
        return thinned(update, seed, name, self.drop) if by_component else update

    def _write(
        self, subject: Subject, updates: Mapping[str, LoraUpdate], harm: Mapping[str, LowRank | Difference]
    ) -> dict[str, dict[str, float]]:
        """Write the sum into the weights by blocks, and return norms and counts by weight."""
        parameters = {name: p for name, p in ModelWeights.of(subject.model).parameters.items() if p.is_floating_point()}
        # Without an adapter, an update that is neither scaled nor thinned need not be read where there is no harm.
        moved: Mapping[str, Any] = updates or (parameters if self._update_weight != 1 or self.drop else {})
        names = [name for name in parameters if name in moved or name in harm]
        with_harm = [name for name in names if name in harm]
        top = self._trimmed(with_harm, parameters, harm)
        start = None if updates else aligned_weights(subject, type(self).__name__)
        table = {}
        for name in names:
            subject.on_weight(name)
            # The mask of the largest entries takes the blocks in the order in which it counted them.
            number = with_harm.index(name) if name in harm else 0
            mask = partial(top.mask, number) if top is not None else None
            own = updates[name].factors() if name in updates else None
            table[name] = self._write_one(subject.seed, name, parameters[name], own, start, harm.get(name), mask)
        for update in updates.values():
            local(update.b.detach()).zero_()
        subject.dense = subject.dense or bool(updates)
        lost = [name for name, row in table.items() if row["rounding"] > 0.5]
        if lost:
            warnings.warn(
                f"{type(self).__name__}: more than half of the change of {len(lost)} weights, such as {lost[0]}, is"
                f" lost by rounding to {parameters[lost[0]].dtype}. Load the model in float32.",
                stacklevel=4,
            )
        return table

    def _trimmed(
        self, names: list[str], parameters: Mapping[str, Tensor], harm: Mapping[str, LowRank | Difference]
    ) -> Top | None:
        """Return the selection of the harm vector's largest entries, of all weights together; None keeps all."""
        if self._keep == 1 or not names:
            return None

        def magnitudes() -> Iterator[tuple[int, Tensor]]:
            for number, name in enumerate(names):
                mine = _matrix(parameters[name])
                for at, stop in _blocks(parameters[name]):
                    yield number, _rows_of(harm[name], at, stop, mine).abs().float()

        count = count_of(self._keep, sum(parameters[name].numel() for name in names))
        if count == 0:
            raise ValueError(
                f"{type(self).__name__}: keep {self._keep} is less than one entry of the harm vector; raise keep."
            )
        first = parameters[names[0]]
        return Top(magnitudes, count, share(first), local(first).device)

    def _write_one(
        self,
        seed: int,
        name: str,
        parameter: Tensor,
        own: LowRank | None,
        start: Weights | None,
        harm: LowRank | Difference | None,
        mask: Callable[[Tensor], Tensor] | None,
    ) -> dict[str, float]:
        """Write one weight in place.

        Without ``start`` the weight is the aligned one, and its update is that of its adapter, if it has one.
        """
        mine, rows = _matrix(parameter), share(parameter)
        dtype = torch.promote_types(mine.dtype, torch.float32)
        thin = None if own is None else self._components(own, seed, name)
        sums = torch.zeros(6, dtype=torch.float64, device=mine.device)
        for at, stop in _blocks(parameter):
            part = mine[at - rows.start : stop - rows.start]
            aligned = part.to(dtype)
            if start is not None:
                aligned = _shaped(start.rows(name, at, stop), part, name, type(self).__name__)
            delta = part.to(dtype) - aligned if own is None else own.rows(at, stop).to(dtype)
            before = part.clone() if own is None else (aligned + delta).to(mine.dtype)
            sums[0] += delta.square().sum()
            used = delta if thin is None or thin is own else thin.rows(at, stop).to(dtype)
            change = self._update_weight * used
            if self.drop and self.drop_unit == "entry":
                kept = kept_entries(seed, name, at, stop, (rows.total, mine.shape[1]), self.drop)
                change = self._update_weight * rescaled(used, kept.to(mine.device), self.drop)
            if harm is not None:
                vector = _rows_of(harm, at, stop, part)
                sums[1] += vector.square().sum()
                if mask is not None:
                    vector = vector * mask(vector.abs().float())
                change = change - self._harm_weight * vector
            # The sum of both vectors is added at once, so that equal vectors cancel exactly.
            exact = aligned + change
            part.copy_(exact.to(mine.dtype))
            sums[2] += change.square().sum()
            sums[3] += (part != before).sum()
            sums[4] += (part.to(dtype) - exact).square().sum()
            sums[5] += (exact - before.to(dtype)).square().sum()
        update_square, harm_square, after, changed, lost, moved = rows.sum(sums)[0].tolist()
        return {
            "update_norm": math.sqrt(update_square),
            "harm_norm": math.sqrt(harm_square),
            "repaired_norm": math.sqrt(after),
            "rounding": math.sqrt(lost / moved) if moved else 0.0,
            "changed_entries": int(changed),
        }


def _norm(m: LowRank) -> float:
    return float(m.squared_norm().clamp_min(0).sqrt())  # rounding can leave a zero matrix below 0


def _matrix(parameter: Tensor) -> Tensor:
    """Return this rank's rows of a parameter as a matrix that shares its storage."""
    mine = local(parameter.detach())
    return mine.flatten(1) if mine.dim() > 1 else mine.unsqueeze(1)


def _blocks(parameter: Tensor) -> Iterator[tuple[int, int]]:
    """Yield the first row, and one past the last row, of each block of this rank's rows."""
    rows = share(parameter)
    at = rows.start
    while at < rows.stop:
        stop = min(rows.stop, at - at % BLOCK + BLOCK)
        yield at, stop
        at = stop


def _rows_of(vector: LowRank | Difference, start: int, stop: int, like: Tensor) -> Tensor:
    """Return rows of a harm vector as a matrix on the device of ``like``, at least in float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return vector.rows(start, stop).to(like.device, dtype).reshape(stop - start, -1)


def _shaped(rows: Tensor, part: Tensor, name: str, who: str) -> Tensor:
    """Return rows of the aligned model in the shape, type and device of the fine-tuned rows.

    Raises:
        ValueError: if the shapes differ.
    """
    if rows.numel() != part.numel():
        raise ValueError(
            f"{who}: {name} has another shape in the aligned model. Give the model that the fine-tuning started from."
        )
    return rows.to(part.device, torch.promote_types(part.dtype, torch.float32)).reshape(part.shape)
