"""NLSR: after fine-tuning, transplant regions of a safer reference into the most damaged layers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from hftlight.engine.step.defense import Loader
from hftlight.engine.weights.lora import LoraUpdate, has_adapter, lora_updates, other_updates, put_factors
from hftlight.engine.weights.lowrank import LowRank
from hftlight.engine.weights.masks import count_of, largest
from hftlight.engine.weights.repair import Repair, check_layout
from hftlight.engine.weights.scores import Batch, calibration, directions, framed_moments, kept, undisturbed
from hftlight.engine.weights.shards import share
from hftlight.engine.weights.stored import Adapted, stored
from hftlight.engine.weights.subject import Subject
from hftlight.engine.weights.top_k import top_of_rows
from hftlight.models.module import SafetyModule

Mode = Literal["paper", "released"]
TINY = 1e-6  # directions of a smaller singular value, relative to the largest, are rounding
UNMOVED = "the alignment did not move it"


def reference_gain(beta: float, mode: Mode) -> float:
    r"""Return g of the reference :math:`\Delta_e = g \Delta_a`, the extrapolated alignment displacement.

    It is :math:`1 + \beta`. In mode ``"released"`` it is :math:`(2\beta)^2`, since both LoRA matrices are multiplied by
    :math:`2\beta`.

    Args:
        beta: strength of the extrapolation, >= 0.
        mode: ``"paper"`` or ``"released"``.
    """
    return 1 + beta if mode == "paper" else (2 * beta) ** 2


def common_frame(*matrices: LowRank) -> Tensor:
    """Return orthonormal rows that span the row spaces of all matrices together, ``[directions, in]`` in float64.

    The number of directions is the rank of the matrices, not of their factors.
    """
    spaces = []
    for m in matrices:
        _, s, vh = LowRank(m.b.double(), m.a.double(), m.scale).svd()
        spaces.append(vh[s > TINY * s.max()] if len(s) else vh)
    _, s, vh = torch.linalg.svd(torch.cat(spaces), full_matrices=False)
    return vh[s > TINY]


def in_frame(matrix: LowRank, frame: Tensor) -> Tensor:
    """Return C with ``matrix = C Q``, ``[out, directions]`` in float64, for a frame Q that spans its rows."""
    return matrix.scale * matrix.b.double() @ (matrix.a.double() @ frame.T)


def region(
    reference: Tensor, variances: Tensor, rank: int, sparsity: float, mode: Mode, noise: Tensor | None = None
) -> Tensor:
    r"""Return the mask of the entries that matter most to safety, ``[out, directions]``.

    With the ``kept_rank`` leading left singular vectors U of the reference's outputs on safety data, the entries are
    ranked by :math:`|U U^T C_e|`. The mask selects a fraction ``1 - sparsity`` of each row, or in mode ``"released"``
    of the whole matrix.

    Args:
        reference: :math:`C_e`, ``[out, directions]``.
        variances: mean square of the safety data along each direction, ``[directions]``.
        rank: rank of the alignment displacement.
        sparsity: :math:`P_{SR}`, in [0, 1].
        mode: ``"paper"`` or ``"released"``.
        noise: random scores, ``[out, directions]``, to rank by instead: a control with as many entries.
    """
    if noise is None:
        u = directions(reference, torch.diag(variances), kept_rank(rank, sparsity, mode))
        noise = kept(reference, u).abs()
    if mode == "released":
        return largest(noise, count_of(1 - sparsity, noise.numel()))
    return top_of_rows(noise, count_of(1 - sparsity, noise.shape[1]))


def kept_rank(rank: int, sparsity: float, mode: Mode) -> int:
    """Return how many output directions ActSVD keeps of a displacement, at least 1.

    It is a fraction ``1 - sparsity`` of the rank, or in mode ``"released"`` a fraction ``sparsity``.
    """
    return max(1, count_of(sparsity if mode == "released" else 1 - sparsity, rank))


def similarity(reference: Tensor, tuned: Tensor, mask: Tensor) -> float:
    """Return the cosine of the masked entries of two matrices, 0 if one of them is zero there."""
    a, b = reference[mask], tuned[mask]
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if length else 0.0


def keep_probabilities(similarities: Sequence[float], keep: float, spread: float, mode: Mode) -> list[float]:
    r"""Return the probability :math:`P_j` with which each layer is kept as it is.

    .. math:: P_j = P_L + d \left(\frac{r_j}{N - 1} - \frac12\right)

    with the place :math:`r_j` of the layer by rising similarity, from 0. A layer that resembles the reference is kept
    more often. Mode ``"released"`` takes the place by falling similarity.

    Args:
        similarities: one per layer.
        keep: :math:`P_L`, the mean of the probabilities.
        spread: d, the difference between the largest and the smallest.
        mode: ``"paper"`` or ``"released"``.
    """
    last = len(similarities) - 1
    order = sorted(range(last + 1), key=lambda j: similarities[j] if mode == "paper" else -similarities[j])
    places = {j: place for place, j in enumerate(order)}
    return [keep + (spread * (places[j] / last - 0.5) if last else 0.0) for j in range(last + 1)]


def transplanted(reference: Tensor, tuned: Tensor, mask: Tensor) -> Tensor:
    """Return the reference at the masked entries, and the fine-tuned model elsewhere."""
    return torch.where(mask, reference, tuned)


class NLSR(Repair):
    r"""Transplant regions of an extrapolated alignment into the layers that fine-tuning damaged most.

    Let :math:`\Delta_a` be the alignment's LoRA displacement of one weight from the base model, and
    :math:`\Delta_t = \Delta_a + \Delta_u` the displacement after the user's update. The reference extrapolates the
    alignment. All three are written in one frame Q of orthonormal input directions, the principal axes of the safety
    data within the row spaces of :math:`\Delta_a` and :math:`\Delta_u`:

    .. math:: \Delta_e = (1 + \beta) \Delta_a = C_e Q, \qquad \Delta_t = C_t Q

    The region M holds the entries of :math:`C_e` that matter most to safety. ActSVD keeps the part of :math:`C_e` that
    writes into the strongest output directions on safety data, and M is the top fraction :math:`1 - P_{SR}` of each of
    its rows. With the similarity and its place :math:`r_j` among the N adapted layers, from 0 for the least similar,

    .. math:: S_j = \cos(M \odot C_e, M \odot C_t), \qquad
              P_j = P_L + d \left(\tfrac{r_j}{N - 1} - \tfrac12\right), \qquad
              C \leftarrow M \odot C_e + (1 - M) \odot C_t \ \text{ with probability } 1 - P_j

    A low similarity means a damaged layer, which is corrected more often. An adapter stays an adapter, of the rank of
    Q.

    Args:
        mode: ``"paper"``, or ``"released"`` for what the official code does: the reference is
            :math:`(2\beta)^2 \Delta_a`, ActSVD keeps the fraction :math:`P_{SR}` of the rank, M is the top fraction
            of the whole matrix, and the most similar layers are corrected more often.
        gate: ``"bernoulli"`` draws with the run's seed. ``"worst"`` corrects the :math:`(1 - P_L) N` layers of lowest
            similarity (rounded down; in mode ``"released"`` of highest).
        beta: strength of the extrapolation, dimensionless, >= 0.
        sparsity: :math:`P_{SR}`, fraction of the entries outside the region, in [0, 1]; 1 turns it off.
        keep: :math:`P_L`, mean probability that a layer is kept as it is, in [0, 1].
        spread: d, difference between the largest and the smallest probability; at most twice the distance of ``keep``
            from 0 and from 1. Unused by ``"worst"``.
        regions: ``"actsvd"``, or ``"random"`` for a control with as many entries in random places.
        samples: number of safety rows, over all ranks, >= 1, chosen from the whole stream.
        safety: the stream of safety rows, harmful prompts with refusals. A run offers ``"refusals"``, the alignment
            rows that refuse. On your own Trainer, name a stream of ``streams`` or of the data module.
        streams: loader of this stream, needed only if the data module does not offer it.
        output: as in ``Repair``.
        aligned: as in ``Repair``; on your own Trainer, the folder of the adapter that aligned ``base``.
        base: as in ``Repair``.

    Raises:
        ValueError: if an argument is out of range, the region of a layer is less than one entry, or the alignment is no
            LoRA adapter on the base model.
        TypeError: if the model has no plain LoRA adapter, or its adapter is sharded.

    Cost: one forward pass per safety row, at the reference, and one small matrix of the size of both ranks squared per
        layer. No matrix of a weight's size is formed. The rank of the adapter grows to that of Q, at most the sum of
        the ranks of alignment and update.
    Source: Yi et al., "NLSR: Neuron-Level Safety Realignment of Large Language Models Against Harmful Fine-Tuning",
        AAAI 2025, arXiv:2412.12497. Settings and mode ``"released"`` are those of the official code, xinykou/NLSR.
    Differs: paper and code mask both LoRA matrices, A and B, entry by entry. Such masks compare two models only if one
        adapter was trained further. A second adapter has components of its own, in which the reference is zero: it
        would never be masked, and every similarity would be 1. Here alignment and update share the input directions
        Q. The masks are those of C alone, and do not depend on how the displacements are factored or on the adapter
        protocol. In this form the sum of two masked products is exact and has the rank of Q. The official code splices
        A and B separately, which adds cross terms; mode ``"released"`` does not repeat them. The spread is centred, so
        that on average :math:`(1 - P_L) N` layers are corrected; 0.4 gives the probabilities 0.3 to 0.7 of the official
        code for four layers. The gate ``"worst"`` is an addition. A layer is one adapted weight. Counts are exact, and
        ties go to the first entry. The initial adapter has no displacement, since its B is zero. By default 128 rows
        are measured (code: 2000).
    """

    needs = ("aligned", "base")
    dials = ("sparsity", "keep", "spread", "gate", "regions")
    repair_order = 5  # after projections of the raw update, before pruning
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"mode": "paper", "beta": 0.9, "sparsity": 0.8, "keep": 0.5, "samples": 2000},
        "repo": {"mode": "released", "beta": 0.9, "sparsity": 0.8, "keep": 0.5, "samples": 2000},
    }

    def __init__(
        self,
        mode: Mode = "paper",
        gate: Literal["bernoulli", "worst"] = "bernoulli",
        beta: float = 0.9,
        sparsity: float = 0.8,
        keep: float = 0.5,
        spread: float = 0.4,
        regions: Literal["actsvd", "random"] = "actsvd",
        samples: int = 128,
        safety: str = "refusals",
        streams: Mapping[str, Loader] | None = None,
        output: str | None = None,
        aligned: str | None = None,
        base: str | None = None,
    ) -> None:
        for name, value, allowed in (
            ("mode", mode, ("paper", "released")),
            ("gate", gate, ("bernoulli", "worst")),
            ("regions", regions, ("actsvd", "random")),
        ):
            if value not in allowed:
                raise ValueError(f"NLSR: {name} must be one of {list(allowed)}, got {value!r}.")
        if not 0 <= beta < math.inf:
            raise ValueError(f"NLSR: beta must be >= 0 and finite (0 does not extrapolate), got {beta}.")
        for name, fraction in (("sparsity", sparsity), ("keep", keep)):
            if not 0 <= fraction <= 1:
                hint = f" If that is a percentage, write {fraction / 100:g}." if 1 < fraction <= 100 else ""
                raise ValueError(f"NLSR: {name} must lie in [0, 1], got {fraction}.{hint}")
        if gate == "bernoulli" and not 0 <= spread <= 2 * min(keep, 1 - keep) + 1e-12:
            raise ValueError(
                f"NLSR: spread must lie in [0, {2 * min(keep, 1 - keep):g}], so that the probabilities around keep"
                f" {keep} stay in [0, 1], got {spread}."
            )
        if not (samples >= 1 and float(samples).is_integer()):
            raise ValueError(f"NLSR: samples counts rows and must be a whole number >= 1, got {samples}.")
        if not safety:
            raise ValueError(f"NLSR: safety must name a stream, got {safety!r}.")
        self.streams = (safety,)
        super().__init__(streams, output, aligned, base)
        self.mode, self.gate, self.beta, self.sparsity = mode, gate, beta, sparsity
        self.keep, self.spread, self.regions = keep, spread, regions
        self.samples, self.safety = samples, safety

    @property
    @override
    def neutral(self) -> bool:
        return self.sparsity == 1

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        needed = stage == "fit" and not self.neutral
        if needed and (self.aligned is None or not isinstance(stored(self.aligned), Adapted)):
            raise ValueError(
                f"NLSR: aligned must be the folder of the LoRA adapter that aligned the base model, got"
                f" {self.aligned!r}. {_OTHERS}"
            )

    @override
    def check_model(self, model: nn.Module) -> None:
        if not has_adapter(model):
            raise TypeError(
                f"NLSR: it compares LoRA displacements, and {type(model).__name__} has no adapter. Fine-tune with LoRA."
                f" {_OTHERS}"
            )
        check_layout(model, "NLSR")
        for name, update in lora_updates(model).items():
            if share(update.b).group is not None:
                raise TypeError(
                    f"NLSR: the adapter of {name} is sharded (FSDP2), and its rank cannot grow. Repair the saved model"
                    " in one process."
                )

    @override
    def scored(self, subject: Subject) -> dict[str, Tensor]:
        model = subject.model
        updates, alignments, _ = self._parts(subject)
        frames = {name: common_frame(a, updates[name].factors()) for name, a in alignments.items()}
        beyond = reference_gain(self.beta, self.mode) - 1
        reference = {name: LowRank(a.b, a.a, beyond * a.scale) for name, a in alignments.items()}
        layers = {name: updates[name].layer for name in alignments}
        module = SafetyModule(model)

        def loss(batch: Batch) -> Tensor:
            with subject.context():
                return module.loss(dict(batch))

        rows = calibration(subject.batches(self.safety), self.samples, subject.split, spread=True)
        with undisturbed(model, next(model.parameters()).device), other_updates(updates, reference):
            moments = framed_moments(loss, layers, frames, rows, subject.split)
        scores: dict[str, Tensor] = {}
        for name, frame in frames.items():
            variances, axes = torch.linalg.eigh(moments[name])
            scores[f"frame {name}"] = (axes.T @ frame).contiguous()
            scores[f"variances {name}"] = variances.clamp(min=0)
        return scores

    @override
    def edit(self, subject: Subject) -> None:
        updates, alignments, skipped = self._parts(subject)
        gain = reference_gain(self.beta, self.mode)
        generator = torch.Generator().manual_seed(subject.seed)
        table: dict[str, dict[str, Any]] = {}
        repaired: dict[str, LowRank] = {}
        for name, alignment in alignments.items():
            frame = subject.scores[f"frame {name}"].to(alignment.b.device)
            variances = subject.scores[f"variances {name}"].to(frame)
            aligned = in_frame(alignment, frame)
            safe, tuned = gain * aligned, aligned + in_frame(updates[name].factors(), frame)
            self._check_region(name, safe)
            noise = None
            if self.regions == "random":
                noise = torch.rand(safe.shape, generator=generator, dtype=torch.float64).to(safe)
            rank = common_frame(alignment).shape[0]
            mask = region(safe, variances, rank, self.sparsity, self.mode, noise)
            table[name] = {
                "similarity": similarity(safe, tuned, mask),
                "entries": mask.numel(),
                "region": int(mask.sum()),
                "changed_entries": int(((safe != tuned) & mask).sum()),
            }
            repaired[name] = LowRank(transplanted(safe, tuned, mask) - aligned, frame)
        similarities = [row["similarity"] for row in table.values()]
        probabilities = keep_probabilities(similarities, self.keep, self.spread, self.mode)
        corrected = self._corrected(similarities, probabilities, generator)
        for row, probability, chosen in zip(table.values(), probabilities, corrected, strict=True):
            if self.gate == "bernoulli":
                row["keep_probability"] = probability
            row["corrected"] = chosen
            row["changed_entries"] *= chosen
        names = [name for name, row in table.items() if row["corrected"]]
        total = sum(row["entries"] for row in table.values())
        subject.report |= {
            "weights": table,
            "corrected": names,
            "skipped": skipped,
            "transplanted_fraction": sum(table[name]["region"] for name in names) / total,
            "changed_entries": sum(row["changed_entries"] for row in table.values()),
        }
        if names:
            # Layers that stay as they are keep their own factors.
            rest = {name: u.factors() for name, u in updates.items() if name not in names}
            factors = rest | {name: repaired[name] for name in names}
            put_factors(subject.model, factors)
            subject.report["rank"] = max(m.b.shape[1] for m in factors.values())
        else:
            subject.report["unchanged_because"] = f"no layer was chosen at keep {self.keep}; lower keep."

    def _parts(self, subject: Subject) -> tuple[dict[str, LoraUpdate], dict[str, LowRank], dict[str, str]]:
        """Return the user's updates and the alignment displacements by weight, and the weights without the latter.

        Raises:
            ValueError: if an alignment displacement is not of low rank, or the alignment moved no adapted weight.
        """
        self.check_model(subject.model)
        if subject.dense:
            raise RuntimeError(
                "NLSR: an earlier repair has added the update to the weights, so that it is no longer of low rank."
                " Apply NLSR first."
            )
        updates = lora_updates(subject.model)
        alignments: dict[str, LowRank] = {}
        skipped: dict[str, str] = {}
        for name, update in updates.items():
            v = subject.alignment(name)
            if v is None or (isinstance(v, LowRank) and not float(v.squared_norm())):
                skipped[name] = UNMOVED
            elif isinstance(v, LowRank):
                alignments[name] = LowRank(v.b.to(update.b.device), v.a.to(update.a.device), v.scale)
            else:
                raise ValueError(
                    f"NLSR: the alignment displacement of {name} is known as the difference of two whole models, and"
                    " not as LoRA factors. Align with LoRA in the same run, or give aligned=..., the folder of the"
                    f" adapter that aligned the base model. {_OTHERS}"
                )
        if not alignments:
            raise ValueError(
                "NLSR: the alignment moved no weight that was fine-tuned, so there is no reference. Adapt the same"
                " layers in both stages."
            )
        return updates, alignments, skipped

    def _check_region(self, name: str, entries: Tensor) -> None:
        """Refuse a region that is less than one entry of a row, or of the matrix."""
        unit, size = ("row", entries.shape[1]) if self.mode == "paper" else ("matrix", entries.numel())
        if count_of(1 - self.sparsity, size) == 0:
            raise ValueError(
                f"NLSR: sparsity {self.sparsity} leaves less than one of the {size} entries of each {unit} of {name}."
                f" Use sparsity <= {1 - 1 / size:.3g}, or adapters of a larger rank."
            )

    def _corrected(
        self, similarities: Sequence[float], probabilities: Sequence[float], generator: torch.Generator
    ) -> list[bool]:
        """Return which layers are corrected."""
        if self.gate == "bernoulli":
            draws = torch.rand(len(probabilities), generator=generator, dtype=torch.float64).tolist()
            return [draw >= p for draw, p in zip(draws, probabilities, strict=True)]
        sign = 1 if self.mode == "paper" else -1
        order = sorted(range(len(similarities)), key=lambda j: sign * similarities[j])
        chosen = set(order[: count_of(1 - self.keep, len(order))])
        return [j in chosen for j in range(len(order))]


_OTHERS = "SafeLoRA repairs whole models too."
