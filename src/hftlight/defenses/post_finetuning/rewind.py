"""Rewind: after the user's fine-tuning, restore the weights that matter to safety and not to utility."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from hftlight.engine.step.defense import Loader
from hftlight.engine.step.vectors import local
from hftlight.engine.weights.aligned import at_aligned, merge
from hftlight.engine.weights.lora import has_adapter, lora_updates
from hftlight.engine.weights.masks import Overlap, whole_rows
from hftlight.engine.weights.regions import Selection, Target, linear_targets, overlap_row
from hftlight.engine.weights.repair import Repair
from hftlight.engine.weights.scores import Batch, Loss, directions, input_moments, removed, undisturbed
from hftlight.engine.weights.shards import share
from hftlight.engine.weights.subject import Subject
from hftlight.models.module import SafetyModule, decoder_layers

BLOCK = 1024  # rows rewound at one time


def rank_factors(safety: Tensor, utility: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return D and U with :math:`D U^T = (I - \Pi_u) \Pi_s`, each ``[out, keep_s]``.

    Args:
        safety: orthonormal directions of :math:`\Pi_s`, ``[out, keep_s]``.
        utility: orthonormal directions of :math:`\Pi_u`, ``[out, keep_u]``.
    """
    return removed(safety, utility), safety


class Rewind(Repair):
    r"""Restore the aligned values of the weights that matter to safety and not to utility, after fine-tuning.

    Each weight matrix of the decoder layers is scored at the aligned model on safety rows and on utility rows. Let S(q)
    be the top fraction q of the matrix by safety score, and U(p) the top fraction p by utility score. The entries of
    :math:`M = S(q) \setminus U(p)` are rewound, that is, set back to their aligned values. The scores are

    .. math:: \text{SNIP: } |W_{ij}| \sum_n |\partial \ell_n / \partial W_{ij}|, \qquad
              \text{Wanda: } |W_{ij}| \sqrt{\textstyle\frac1N \sum_t x_{tj}^2}

    with the mean loss :math:`\ell_n` of example n in nats per response token, and inputs x at response tokens. Training
    is unconstrained, and the other weights do not adapt to M. Under LoRA the remaining update is added to the weights,
    and B becomes zero. The result is a whole model. With ``unit="row"`` rows are rewound within the adapter, which
    stays an adapter.

    ``score="actsvd"`` works on output directions instead of entries. Let :math:`\Pi_s` and :math:`\Pi_u` be the
    projectors on the leading left singular vectors of :math:`W X^T` on safety and on utility inputs. The update
    :math:`\Delta` becomes :math:`\Delta - (I - \Pi_u) \Pi_s \Delta`. An adapter stays an adapter.

    Rewind is a baseline: the authors report that a fine-tuning attack circumvents the weights that the method selects.

    Args:
        safety_ratio: q, fraction of the entries of each matrix, in [0, 1]; 0 turns it off.
        utility_ratio: p, likewise; 0 excludes nothing and needs no utility rows.
        score: ``"snip"``, ``"wanda"`` or ``"actsvd"``.
        unit: the unit of rewinding, ``"entry"`` or ``"row"`` (all weights of one output). ``"auto"`` means ``"entry"``,
            and is the only value for ``"actsvd"``.
        samples: number of rows of each kind that are scored, over all ranks, >= 1, chosen from the whole stream. A
            smaller stream contributes all its rows.
        keep_s: number of safety directions that :math:`\Pi_s` projects on, >= 0, with ``"actsvd"`` only. 0 turns it
            off; a matrix with fewer directions uses all.
        keep_u: number of utility directions that :math:`\Pi_u` projects on, likewise.
        safety: the stream of safety rows, harmful prompts with refusals. A run offers ``"refusals"``, the alignment
            rows that refuse. On your own Trainer, name a stream of ``streams`` or of the data module.
        utility: the stream of utility rows. The user's upload is always available, but may hide harmful rows, whose
            weights are then not rewound. ``"retain"`` is better if there is such a stream.
        end: whether the last token of each row, its end token, counts in the scores.
        streams: loaders of these two streams, needed only if the data module does not offer them.
        output: as in ``Repair``.
        aligned: as in ``Repair``.

    Raises:
        ValueError: if an argument is out of range, arguments conflict, or a ratio is less than one entry.
        TypeError: if the model has no decoder layers with linear layers, or these are quantized.
        RuntimeError: if the aligned weights are not known.

    Cost: one sweep for all layers after training. SNIP takes ``samples`` forward and backward passes per kind of row,
        and one float32 buffer of the size of the scored weights. Wanda takes forward passes and one number per input.
        ActSVD takes forward passes and one ``[in, in]`` buffer per distinct input. The mask takes one byte per scored
        weight. While the aligned model is scored, a copy of the trained weights lies on the CPU.
    Source: Wei et al., "Assessing the Brittleness of Safety Alignment via Pruning and Low-Rank Modifications", ICML
        2024, arXiv:2402.05162, including ActSVD, SNIP and Wanda.
    Differs: as in the official code, weights are restored after fine-tuning. The paper freezes them during fine-tuning,
        which is ``Freeze``. No preset sets a ratio; the 0.1 of both ratios here is the README's example of pruning. The
        sets come from scores of the intact model over the whole matrix, with exact counts. The official code infers a
        fine-tuned mask from weights near zero, so that tiny weights, norms and embeddings join the set. SNIP takes one
        sweep for all layers instead of one replay of the data per layer. Scores are never negative, so that none is
        ranked in reverse. As in the official code, safety rows are refusals only. Wanda's inputs are those at the
        positions of response tokens, not at the positions that predict them. The end token does not count, since the
        official responses have none. Rows under LoRA and rewinding ranks of an update are additions. By default the
        utility rows are the user's upload (paper: Alpaca without safety rows).
    """

    needs = ("aligned",)
    repair_order = 20  # late: rewinding may merge the adapter that projection and pruning need
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "repo": {"score": "snip", "samples": 128, "safety": "refusals", "end": False},
    }

    def __init__(
        self,
        safety_ratio: float = 0.1,
        utility_ratio: float = 0.1,
        score: Literal["snip", "wanda", "actsvd"] = "snip",
        unit: Literal["auto", "entry", "row"] = "auto",
        samples: int = 128,
        keep_s: int | None = None,
        keep_u: int | None = None,
        safety: str = "refusals",
        utility: str = "task",
        end: bool = False,
        streams: Mapping[str, Loader] | None = None,
        output: str | None = None,
        aligned: str | None = None,
    ) -> None:
        self._selection = Selection(
            "Rewind", safety_ratio, utility_ratio, score, samples, safety, utility, end, spread=True
        )
        for name, value, allowed in (
            ("score", score, ("snip", "wanda", "actsvd")),
            ("unit", unit, ("auto", "entry", "row")),
        ):
            if value not in allowed:
                raise ValueError(f"Rewind: {name} must be one of {list(allowed)}, got {value!r}.")
        for name, count in (("keep_s", keep_s), ("keep_u", keep_u)):
            if (count is None) == (score == "actsvd"):
                raise ValueError(
                    f"Rewind: score='actsvd' needs both keep_s and keep_u, and no other score takes them; {name} is"
                    f" {count}."
                )
            if count is not None and not (count >= 0 and float(count).is_integer()):
                raise ValueError(f"Rewind: {name} counts directions and must be a whole number >= 0, got {count}.")
        if score == "actsvd" and unit != "auto":
            raise ValueError(
                "Rewind: score 'actsvd' chooses output directions, not weights; it works with unit='auto', got"
                f" unit={unit!r}. To rewind entries or rows use score='snip'."
            )
        spared = keep_u if score == "actsvd" else utility_ratio
        self.streams = (safety, utility) if spared else (safety,)
        super().__init__(streams, output, aligned)
        self.safety_ratio, self.utility_ratio, self.score, self.unit = safety_ratio, utility_ratio, score, unit
        self.samples, self.keep_s, self.keep_u = samples, keep_s, keep_u
        self.safety, self.utility, self.end = safety, utility, end

    @property
    @override
    def neutral(self) -> bool:
        return (self.keep_s if self.score == "actsvd" else self.safety_ratio) == 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the model before the first step.

        Raises:
            TypeError: if the model has no layers to score, they are quantized, or the model cannot be saved.
            ValueError: if a ratio is less than one entry, or if ``output`` or a required model is missing.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not self.neutral:
            self._targets(getattr(pl_module, "model", pl_module))

    # No ratio is a dial. Another ratio needs the order of all scores, which are as large as the model twice over.
    @override
    def scored(self, subject: Subject) -> dict[str, Tensor]:
        """Return each matrix's mask and sizes of S and U, or with ``"actsvd"`` its factors D and U.

        The tensors stay on the model's device, since they are not stored.
        """
        model = subject.model
        targets = self._targets(model)
        if subject.aligned is None and (subject.dense or not has_adapter(model)):
            raise RuntimeError(
                "Rewind: it needs the aligned model, which is no longer under the adapter; give aligned=..., or apply"
                " Rewind to the fine-tuned model, not to a repaired one."
            )
        module = SafetyModule(model)

        def loss(batch: Batch) -> Tensor:
            with subject.context():
                return module.loss(dict(batch))

        device = next(model.parameters()).device
        # Scores are measured at the aligned weights; after this block the fine-tuned weights are back and are edited.
        with at_aligned(subject, "Rewind"), undisturbed(model, device):
            if self.score == "actsvd":
                factors = self._factors(targets, loss, subject.batches, subject.split)
                return {
                    f"{name} ({part})": f for name, pair in factors.items() for part, f in zip("DU", pair, strict=True)
                }
            masks, table = self._selection.region(targets, loss, subject.batches, self.unit == "row", subject.split)
        sizes = {f"{name} (sizes)": torch.tensor(astuple(counts)) for name, counts in table.items()}
        return masks | sizes

    @override
    def edit(self, subject: Subject) -> None:
        targets, scores = self._targets(subject.model), subject.scores
        if self.score == "actsvd":
            factors = {name: (scores[f"{name} (D)"], scores[f"{name} (U)"]) for name in targets}
            matrices = self._rewind_directions(subject, targets, factors)
            numbers: dict[str, Any] = {"keep_s": self.keep_s, "keep_u": self.keep_u}
        else:
            masks = {name: scores[name] for name in targets}
            table = {name: Overlap(*scores[f"{name} (sizes)"].tolist()) for name in targets}
            changed = self._rewind(subject, targets, masks)
            matrices = {name: {**overlap_row(o), "changed_entries": changed[name]} for name, o in table.items()}
            numbers = self._selection.numbers(targets, masks, table)
        total = sum(row["changed_entries"] for row in matrices.values())
        subject.report |= {**numbers, "matrices": matrices, "changed_entries": total}
        if self.score != "actsvd" and not any(row["kept"] for row in matrices.values()):
            subject.report["unchanged_because"] = self._selection.empty()

    def _targets(self, model: nn.Module) -> dict[str, Target]:
        """Return the linear layers that are scored, by the plain name of their weight."""
        targets = linear_targets(model, decoder_layers, "Rewind", frozen=True)
        if self.score != "actsvd":
            self._selection.check(targets, self.unit == "row")
        return targets

    def _rewind(self, subject: Subject, targets: Mapping[str, Target], masks: Mapping[str, Tensor]) -> dict[str, int]:
        """Restore the aligned values of masked entries, and return the number of changed entries by matrix."""
        if has_adapter(subject.model) and not subject.dense:
            updates = lora_updates(subject.model)
            if self.unit == "row":  # a zero row of B is a zero row of the update, so the adapter stays
                return {name: _zeroed_rows(t, masks[name]) for name, t in targets.items()}
            # Every adapter is merged, also outside the targets, since the result is saved without an adapter.
            counts = {name: merge(u, masks.get(name)) for name, u in updates.items()}
            subject.dense = True
            return {name: counts[name] for name in targets}
        assert subject.start is not None
        changed = {}
        for name, target in targets.items():
            mine, rows = local(target.weight.detach()), target.rows
            count = torch.zeros((), dtype=torch.int64, device=mine.device)
            for at in range(0, len(mine), BLOCK):
                part, mask = mine[at : at + BLOCK], masks[name][at : at + BLOCK]
                aligned = subject.start.rows(name, rows.start + at, rows.start + at + len(part)).to(part)
                count += ((part != aligned) & mask).sum()
                part.copy_(torch.where(mask, aligned, part))
            changed[name] = int(rows.sum(count)[0])
        return changed

    def _factors(
        self, targets: Mapping[str, Target], loss: Loss, batches: Callable[[str], Iterable[Batch]], split: bool
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the factors D and U of each weight, which ``_rewind_directions`` applies as D U^T."""
        layers = {name: t.layer for name, t in targets.items()}
        bases: dict[str, list[Tensor]] = {name: [] for name in targets}
        for stream, count in ((self.safety, self.keep_s), (self.utility, self.keep_u)):
            assert count is not None
            moments = {}
            if count:
                data = self._selection.counted(batches(stream), split)
                moments = input_moments(loss, layers, data, outer=True, split=split)
            for name, target in targets.items():
                weight = whole_rows(target.values(), target.weight)
                empty = weight.new_zeros(len(weight), 0, dtype=torch.float64)
                bases[name].append(directions(weight, moments[name], count) if count else empty)
        return {name: rank_factors(*pair) for name, pair in bases.items()}

    def _rewind_directions(
        self, subject: Subject, targets: Mapping[str, Target], factors: Mapping[str, tuple[Tensor, Tensor]]
    ) -> dict[str, dict[str, int]]:
        """Remove the safety directions from the update, and return the number of changed entries by matrix."""
        table = {}
        for name, target in targets.items():
            thin = target.update is not None and not subject.dense
            written = target.update.b if thin and target.update is not None else target.weight
            mine, rows = local(written.detach()), share(written)
            d, u = (f[rows.start : rows.stop] for f in factors[name])
            update = mine.double()
            if not thin:  # under an adapter, D U^T B is removed from B, since the update is s B A
                assert subject.start is not None
                update = update - subject.start.rows(name, rows.start, rows.stop).to(update)
            new = (mine.double() - d @ rows.sum(u.T @ update)[0]).to(mine.dtype)
            table[name] = {"changed_entries": int(rows.sum((new != mine).sum())[0])}
            mine.copy_(new)
        return table


def _zeroed_rows(target: Target, mask: Tensor) -> int:
    """Zero the rows of B that a mask ``[rows, 1]`` selects, and return the number of changed entries."""
    assert target.update is not None
    b = local(target.update.b.detach())
    count = ((b != 0) & mask).sum()
    b.masked_fill_(mask, 0)
    return int(share(target.update.b).sum(count)[0])
