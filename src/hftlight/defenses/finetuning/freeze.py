"""Freeze: keep the weights that matter to safety and not to utility at their aligned values."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from hftlight.engine.step.defense import Defense, Loader
from hftlight.engine.step.slots import Slot, Stage
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
    unpack,
    whole_rows,
)
from hftlight.engine.weights.repair import Repair, Share, plain_name, share
from hftlight.engine.weights.scores import (
    Batch,
    Loss,
    calibration,
    checked,
    directions,
    gradient_sums,
    input_moments,
    removed,
    snip_scores,
    undisturbed,
    wanda_scores,
    without_end,
)
from hftlight.engine.weights.subject import Subject
from hftlight.models.module import SafetyModule, decoder_layers

BLOCK = 1024  # rows that are rewound at one time


def top(scores: Tensor, ratio: float, rows: Share | None = None) -> Tensor:
    """Return the mask of the top fraction of one matrix: an exact count, rounded down, and ties to the first entry.

    With S(q) of the safety scores and U(p) of the utility scores, ``minus(S, U)`` is what Freeze keeps.

    Args:
        scores: ``[rows, in]``, >= 0; higher is more important.
        ratio: fraction of all entries of the matrix, in [0, 1].
        rows: which rows of the matrix these are; all by default.
    """
    total = (rows.total if rows else len(scores)) * scores.shape[1]
    return largest(scores, count_of(ratio, total), rows)


def rank_factors(safety: Tensor, utility: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return D and U with :math:`D U^T = (I - \Pi_u) \Pi_s`, each ``[out, keep_s]``.

    Args:
        safety: orthonormal directions of :math:`\Pi_s`, ``[out, keep_s]``.
        utility: orthonormal directions of :math:`\Pi_u`, ``[out, keep_u]``.
    """
    return removed(safety, utility), safety


@dataclass(frozen=True)
class _Target:
    """One linear layer that is scored.

    Attributes:
        name: plain name of its weight.
        layer: the module whose input and output are those of the weight.
        weight: W, without the adapter.
        update: its adapter, where there is one.
    """

    name: str
    layer: nn.Module
    weight: Tensor
    update: LoraUpdate | None = None

    @property
    def rows(self) -> Share:
        return share(self.weight)

    def values(self) -> Tensor:
        """Return this rank's rows of the weight as the model uses it, its adapter's update added."""
        values = local(self.weight.detach())
        if self.update is None:
            return values
        a, b = whole(self.update.a.detach()), local(self.update.b.detach())
        return values + self.update.scale * (b @ a) if bool(b.any()) else values


@dataclass(frozen=True)
class _Held:
    """What of one trained parameter stays: this rank's mask ``[rows, in]`` or ``[rows, 1]``, and the aligned values."""

    parameter: nn.Parameter
    mask: Tensor
    values: Tensor


class Freeze(Repair):
    r"""Keep the weights that matter to safety and not to utility at their aligned values.

    Each weight matrix of the decoder layers is scored at the aligned model on safety rows and on utility rows. With
    S(q) the top fraction q of the matrix by safety score, and U(p) the top fraction p by utility score, what is kept
    is :math:`M = S(q) \setminus U(p)`. The scores are

    .. math:: \text{SNIP: } |W_{ij}| \sum_n |\partial \ell_n / \partial W_{ij}|, \qquad
              \text{Wanda: } |W_{ij}| \sqrt{\textstyle\frac1N \sum_t x_{tj}^2}

    with the mean loss :math:`\ell_n` of example n in nats per response token, and inputs x at response tokens. Two ways
    of keeping, which do not end at the same weights:

    - ``mode="train"``: while the user's data trains the model, the gradient of M is zero and the values of M are put
      back after every step, bit for bit: weight decay and momentum move a weight whose gradient is zero. The other
      weights adapt to it.
    - ``mode="rewind"``: training is free, then M gets its aligned values back: a repair of the finished model.

    Under LoRA no set of single entries of B A can be held by holding entries of B and A. In mode ``"train"`` whole rows
    of a weight, chosen by the sum of their scores, are held through B's rows, and through A as well where these rows
    were not zero at the start (an adapter that training continues). Mode ``"rewind"`` writes what is kept of the update
    into the weights and leaves the adapter zero: the result is a whole model; rows are rewound within the adapter.

    ``score="actsvd"`` works on output directions instead of entries, in mode ``"rewind"``: with :math:`\Pi_s` and
    :math:`\Pi_u` the projectors on the leading left singular vectors of :math:`W X^T` on safety and on utility inputs,
    the update :math:`\Delta` becomes :math:`\Delta - (I - \Pi_u) \Pi_s \Delta`; an adapter stays an adapter.

    It is a baseline: the authors report that a fine-tuning attack goes around frozen weights.

    Args:
        safety_ratio: q, fraction of the entries of each matrix, in [0, 1]; 0 turns it off.
        utility_ratio: p, likewise; 0 spares nothing and needs no utility rows.
        mode: ``"train"`` holds them while the model trains; ``"rewind"`` puts them back afterwards.
        score: ``"snip"``, ``"wanda"`` or ``"actsvd"``.
        unit: what is kept, ``"entry"`` or ``"row"`` (all weights of one output); ``"auto"`` is ``"row"`` for LoRA in
            mode ``"train"``, else ``"entry"``.
        samples: rows of each kind that are scored, over all ranks, >= 1; a small stream is gone through again in mode
            ``"train"``, and gives what it has in mode ``"rewind"``.
        keep_s: directions of safety that :math:`\Pi_s` projects on, >= 0, with ``"actsvd"``; 0 turns it off, and a
            matrix with fewer gives all.
        keep_u: directions of utility that :math:`\Pi_u` projects on, likewise.
        safety: the stream of safety rows, harmful prompts with refusals. A run offers ``"refusals"``, the alignment
            rows that refuse; on a Trainer of one's own name one with its ``streams`` or its data module.
        utility: the stream of utility rows. The user's upload, which is always there, may hide harmful rows, whose
            weights are then spared; ``"retain"`` is better where there is such a stream.
        end: whether the last token of each row, its end token, counts in the scores.
        streams: loaders of these two streams, where the data module does not offer them.
        output: mode ``"rewind"`` on a Trainer of one's own: as ``Repair`` takes it.
        aligned: likewise.

    Raises:
        ValueError: if an argument is out of range, arguments do not go together, or a ratio is less than one entry.

    Cost: one sweep for all layers before the first step. SNIP: ``samples`` forward and backward passes per kind of row
        and one float32 buffer of the size of the scored weights; Wanda: forward passes and one number per input;
        ActSVD: forward passes and one ``[in, in]`` buffer per different input. Then nothing per step; one byte per
        scored weight for the mask, and the kept values. A checkpoint holds one bit per weight, and the kept values.
    Source: Wei et al., "Assessing the Brittleness of Safety Alignment via Pruning and Low-Rank Modifications", ICML
        2024, arXiv:2402.05162; ActSVD, SNIP and Wanda as there.
    Differs: the paper freezes during fine-tuning, the official code rewinds afterwards; here ``mode`` says which. Its
        freezing experiment tries many ratios and helps only above one half, against ten harmful rows; the 0.1 of both
        ratios here is the README's example of pruning, and no preset names a ratio. Sets are taken from scores of the
        intact model over the whole matrix, with exact counts (official code: a fine-tuned mask is read off weights near
        zero, so that tiny weights, norms and embeddings join). SNIP in one sweep for all layers instead of one replay
        of the data per layer. Scores are never negative, so that none is read upside down. As in the official code,
        safety rows are refusals only, Wanda's inputs are those at the positions of response tokens, not at the
        positions that predict them, and the end token does not count: the official responses have none. Rows under
        LoRA and rewinding ranks of an update are ours. By default the utility rows are the user's upload (paper: Alpaca
        without safety rows).
    """

    repair_order = 20  # after projection and pruning: rewinding under an adapter leaves no adapter to work on
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"mode": "train", "score": "snip", "samples": 128, "safety": "refusals", "end": False},
        "repo": {"mode": "rewind", "score": "snip", "samples": 128, "safety": "refusals", "end": False},
    }

    def __init__(
        self,
        safety_ratio: float = 0.1,
        utility_ratio: float = 0.1,
        mode: Literal["train", "rewind"] = "train",
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
        for name, ratio in (("safety_ratio", safety_ratio), ("utility_ratio", utility_ratio)):
            if not 0 <= ratio <= 1:
                hint = f" If that is a percentage, write {ratio / 100:g}." if 1 < ratio <= 100 else ""
                raise ValueError(
                    f"Freeze: {name} is a fraction of each matrix and must lie in [0, 1], got {ratio}.{hint}"
                )
        for name, value, allowed in (
            ("mode", mode, ("train", "rewind")),
            ("score", score, ("snip", "wanda", "actsvd")),
            ("unit", unit, ("auto", "entry", "row")),
        ):
            if value not in allowed:
                raise ValueError(f"Freeze: {name} must be one of {list(allowed)}, got {value!r}.")
        if not (samples >= 1 and float(samples).is_integer()):
            raise ValueError(f"Freeze: samples counts rows and must be a whole number >= 1, got {samples}.")
        for name, count in (("keep_s", keep_s), ("keep_u", keep_u)):
            if (count is None) == (score == "actsvd"):
                raise ValueError(
                    f"Freeze: keep_s and keep_u go with score='actsvd', and it needs both; {name} is {count}."
                )
            if count is not None and not (count >= 0 and float(count).is_integer()):
                raise ValueError(f"Freeze: {name} counts directions and must be a whole number >= 0, got {count}.")
        if score == "actsvd" and (mode == "train" or unit != "auto"):
            raise ValueError(
                f"Freeze: score 'actsvd' chooses output directions, not weights; it works with mode='rewind' and"
                f" unit='auto', got mode={mode!r} and unit={unit!r}. To hold weights during training use score='snip'."
            )
        if not (safety and utility and safety != utility):
            raise ValueError(f"Freeze: safety and utility must name two streams, got {safety!r} and {utility!r}.")
        spared = keep_u if score == "actsvd" else utility_ratio
        self.streams = (safety, utility) if spared else (safety,)
        super().__init__(streams, output, aligned)
        self.stage = Stage.FINETUNING if mode == "train" else Stage.POST_FINETUNING
        self.slots = (Slot.PROJECTION, Slot.UPDATE) if mode == "train" else (Slot.WEIGHTS,)  # type: ignore[assignment]
        self.needs = ("aligned",) if mode == "rewind" else ()
        self.safety_ratio, self.utility_ratio, self.mode, self.score = safety_ratio, utility_ratio, mode, score
        self.unit, self.samples, self.keep_s, self.keep_u = unit, samples, keep_s, keep_u
        self.safety, self.utility, self.end = safety, utility, end
        self._held: dict[str, _Held] | None = None
        self._stored: dict[str, dict[str, Tensor]] | None = None
        self._step = 0

    @property
    @override
    def neutral(self) -> bool:
        return (self.keep_s if self.score == "actsvd" else self.safety_ratio) == 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the model before the first step.

        Raises:
            TypeError: if the model has no such layers, they are quantized, or single entries are to be held under LoRA.
            ValueError: if a ratio is less than one entry, or a callback averages weights.
        """
        if self.mode == "rewind":
            super().setup(trainer, pl_module, stage)
        else:
            Defense.setup(self, trainer, pl_module, stage)
        if stage != "fit":
            return
        self._held, self._stored = None, None
        averages = (WeightAveraging, StochasticWeightAveraging)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if self.mode == "train" and isinstance(callback, averages):
                raise ValueError(
                    f"Freeze: {type(callback).__name__} averages weights after they moved, so that held ones would not"
                    " keep their values; leave it out, or use mode='rewind'."
                )
        if not self.neutral:
            self._targets(_model_of(pl_module))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if self.mode == "rewind":
            super().on_train_start(trainer, pl_module)
            return
        if self.neutral:
            return
        model = _model_of(pl_module)
        names = {id(p): name for name, p in pl_module.named_parameters()}
        targets = self._targets(model)
        if self._stored is not None:
            self._held = self._placed(self._stored, pl_module, self._by_row(has_adapter(model)))
            self._stored = None
            return
        self._held = {}
        plugin = trainer.precision_plugin
        # In float16 small gradients would vanish; a loss scaler is not needed to avoid that.
        context = nullcontext if getattr(plugin, "scaler", None) is not None else plugin.forward_context

        def loss(batch: Batch) -> Tensor:
            with context():
                return pl_module.loss(batch)  # type: ignore[operator]

        with undisturbed(pl_module, pl_module.device):
            masks, table = self._region(targets, loss, self._draws)
            for parameter, mask in self._parameters(targets, masks):
                values = local(parameter.detach())
                self._held[names[id(parameter)]] = _Held(parameter, mask, values[mask.expand_as(values)])
        numbers = self._numbers(targets, masks, table)
        self.trace |= numbers
        self.report = {**numbers, "matrices": {name: _row(o) for name, o in table.items()}}
        if not self._held:
            warnings.warn(f"Freeze holds no weight: {self._nothing()}", stacklevel=2)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._held is None:
            return
        for held in self._held.values():
            if held.parameter.grad is not None:
                local(held.parameter.grad).masked_fill_(held.mask, 0)
        self.record()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        with torch.no_grad():
            for held in (self._held or {}).values():
                local(held.parameter.detach()).masked_scatter_(held.mask, held.values)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.mode == "rewind":
            super().on_train_end(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.mode == "rewind":
            super().on_fit_end(trainer, pl_module)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.mode == "rewind":
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the masks as bits and the kept values too; under sharding every rank must call this."""
        state = super().state_dict()
        if self._held is not None:  # also where nothing is held: a resumed run must not choose anew
            masks, values = {}, {}
            for name, held in self._held.items():
                p = held.parameter
                mask = whole_rows(held.mask.to(torch.uint8), p).cpu().bool()
                dense = torch.zeros_like(local(p.detach())).masked_scatter_(held.mask, held.values)
                masks[name], values[name] = pack(mask), whole_rows(dense, p).cpu()[mask.expand(p.shape)]
            state |= {"masks": masks, "values": values}
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if "masks" in state_dict:
            self._stored = {"masks": state_dict["masks"], "values": state_dict["values"]}

    @override
    def edit(self, subject: Subject) -> None:
        if self.mode == "train":
            raise RuntimeError(
                "Freeze: mode 'train' acts while a Trainer is fitting; use mode='rewind' on a finished model."
            )
        model = subject.model
        targets = self._targets(model)
        if subject.aligned is None and (subject.dense or not has_adapter(model)):
            raise RuntimeError(
                "Freeze: rewinding needs the aligned model, which is no longer under the adapter; give aligned=..., or"
                " rewind the model as it was fine-tuned."
            )
        module = SafetyModule(model)

        def loss(batch: Batch) -> Tensor:
            with subject.context():
                return module.loss(dict(batch))

        device = next(model.parameters()).device
        with _at_aligned(subject), undisturbed(model, device):
            if self.score == "actsvd":
                factors = self._factors(targets, loss, subject.batches, subject.split)
            else:
                masks, table = self._region(targets, loss, subject.batches, subject.split)
        if self.score == "actsvd":
            matrices = self._rewind_directions(subject, targets, factors)
            numbers: dict[str, Any] = {"keep_s": self.keep_s, "keep_u": self.keep_u}
        else:
            changed = self._rewind(subject, targets, masks)
            matrices = {name: {**_row(o), "changed_entries": changed[name]} for name, o in table.items()}
            numbers = self._numbers(targets, masks, table)
        total = sum(row["changed_entries"] for row in matrices.values())
        subject.report |= {**numbers, "matrices": matrices, "changed_entries": total}
        if self.score != "actsvd" and not any(row["kept"] for row in matrices.values()):
            subject.report["unchanged_because"] = self._nothing()

    def _nothing(self) -> str:
        return (
            f"no weight is among the top {self.safety_ratio:g} of safety and not among the top {self.utility_ratio:g}"
            " of utility; raise safety_ratio, or lower utility_ratio."
        )

    def _by_row(self, adapted: bool) -> bool:
        return self.unit == "row" or (self.unit == "auto" and self.mode == "train" and adapted)

    def _draws(self, name: str) -> Iterator[Batch]:
        while True:
            yield self.draw(name)

    def _targets(self, model: nn.Module) -> dict[str, _Target]:
        """Return the layers that are scored by the plain name of their weight: linear ones in the decoder layers.

        Raises:
            TypeError: as ``setup`` does.
            ValueError: likewise.
        """
        by_row = self._by_row(has_adapter(model))
        if self.mode == "train" and has_adapter(model) and not by_row:
            raise TypeError(
                "Freeze: single entries of a weight cannot be held through a LoRA adapter; use unit='row', or"
                " mode='rewind', which makes a whole model."
            )
        if not hasattr(getattr(model, "config", None), "num_hidden_layers"):
            raise TypeError(
                f"Freeze: {type(model).__name__} has no config that counts decoder layers; use a causal LM."
            )
        inside = set(decoder_layers(model).modules())
        found: dict[str, _Target] = {}
        if has_adapter(model):
            for name, u in lora_updates(model).items():
                if u.layer in inside:
                    found[name] = _Target(name, u.layer, u.weight, u)
        else:
            seen: set[int] = set()
            for name, layer in model.named_modules():
                trained = isinstance(layer, nn.Linear) and (self.mode == "rewind" or layer.weight.requires_grad)
                if trained and layer in inside and id(layer.weight) not in seen:
                    seen.add(id(layer.weight))
                    found[plain_name(name) + ".weight"] = _Target(plain_name(name) + ".weight", layer, layer.weight)
        if not found:
            raise TypeError(f"Freeze: no linear layer in the decoder layers of {type(model).__name__} is trained.")
        for name, target in found.items():
            self._check(name, target, by_row)
        return found

    def _check(self, name: str, target: _Target, by_row: bool) -> None:
        base = target.layer if target.update is None else target.update.layer.get_base_layer()  # type: ignore[operator]
        if not isinstance(base, nn.Linear) or not target.weight.is_floating_point():
            what = "quantized" if isinstance(base, nn.Linear) else type(base).__name__
            raise TypeError(f"Freeze: {name} is {what}; weights are scored in linear layers that are not quantized.")
        if self.score == "actsvd":
            return
        entries = target.weight.shape[0] if by_row else target.weight.numel()
        if count_of(self.safety_ratio, entries) == 0 and not self.neutral:
            unit = "rows" if by_row else "entries"
            raise ValueError(
                f"Freeze: safety_ratio {self.safety_ratio} is less than one of the {entries} {unit} of {name}, so none"
                f" would be held. Use safety_ratio >= {1 / entries:.3g}."
            )

    def _region(
        self,
        targets: Mapping[str, _Target],
        loss: Loss,
        batches: Callable[[str], Iterable[Batch]],
        split: bool = True,
    ) -> tuple[dict[str, Tensor], dict[str, Overlap]]:
        """Return the masks of what is kept, and how the two sets lie to each other, by the name of the weight."""
        wanted = self._tops(targets, loss, batches(self.safety), self.safety_ratio, split)
        spared = {}
        if self.utility_ratio > 0:
            spared = self._tops(targets, loss, batches(self.utility), self.utility_ratio, split)
        masks, table = {}, {}
        for name, target in targets.items():
            s, u = wanted.pop(name), spared.pop(name, None)
            table[name] = overlap(s, u, target.rows, target.weight.shape[1])
            masks[name] = minus(s, u)
        return masks, table

    def _tops(
        self, targets: Mapping[str, _Target], loss: Loss, batches: Iterable[Batch], ratio: float, split: bool
    ) -> dict[str, Tensor]:
        """Return the mask of the top fraction of each matrix by its score on some rows."""
        layers = {name: t.layer for name, t in targets.items()}
        data = self._counted(batches, split)
        if self.score == "snip":
            found = gradient_sums(loss, layers, {name: t.weight for name, t in targets.items()}, data, split)
        else:
            found = input_moments(loss, layers, data, split=split)
        masks = {}
        for name, target in targets.items():
            rule = snip_scores if self.score == "snip" else wanda_scores
            scores = checked(rule(target.values(), found.pop(name)), name)
            if self._by_row(target.update is not None):
                scores = scores.sum(dim=1, keepdim=True)
            masks[name] = top(scores, ratio, target.rows)
        return masks

    def _counted(self, batches: Iterable[Batch], split: bool) -> list[tuple[Batch, int]]:
        """Return the rows that are scored, as ``calibration``, with the labels that count."""
        data = calibration(batches, self.samples, split, spread=self.mode == "rewind")
        return data if self.end else [(without_end(batch), count) for batch, count in data]

    def _parameters(
        self, targets: Mapping[str, _Target], masks: Mapping[str, Tensor]
    ) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield the trained parameters of which something is held, and this rank's mask of them."""
        for name, target in targets.items():
            mask, u = masks[name], target.update
            everywhere = whole_rows(mask.to(torch.uint8), target.weight).bool() if u is not None else mask
            if not bool(target.rows.sum(mask.sum())[0]):
                continue
            if u is None:
                yield target.weight, mask  # type: ignore[misc]
                continue
            b = share(u.b)
            yield u.b, everywhere[b.start : b.stop]
            if bool((whole(u.b.detach()) * everywhere).any()):
                yield u.a, torch.ones_like(local(u.a.detach())[:, :1], dtype=torch.bool)

    def _placed(
        self, stored: Mapping[str, Mapping[str, Tensor]], pl_module: LightningModule, by_row: bool
    ) -> dict[str, _Held]:
        """Return what a checkpoint says is held, on the device and in the shards of the parameters."""
        parameters = dict(pl_module.named_parameters())
        held = {}
        for name, bits in stored["masks"].items():
            if name not in parameters:
                raise RuntimeError(f"Freeze: the checkpoint holds values of {name}, which this model does not have.")
            p = parameters[name]
            rows = share(p)
            mask = unpack(bits, (p.shape[0], 1) if by_row else tuple(p.shape))
            values = stored["values"][name]
            dense = torch.zeros(p.shape, dtype=values.dtype).masked_scatter_(mask, values)[rows.start : rows.stop]
            mine = mask[rows.start : rows.stop]
            held[name] = _Held(p, mine.to(p.device), dense[mine.expand_as(dense)].to(p.device))
        return held

    def _numbers(
        self, targets: Mapping[str, _Target], masks: Mapping[str, Tensor], table: Mapping[str, Overlap]
    ) -> dict[str, Any]:
        """Return what is kept, as plain numbers."""
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

    def _rewind(self, subject: Subject, targets: Mapping[str, _Target], masks: Mapping[str, Tensor]) -> dict[str, int]:
        """Put aligned values back where the masks say; return how many entries changed."""
        if has_adapter(subject.model) and not subject.dense:
            updates = lora_updates(subject.model)
            if self.unit == "row":
                return {name: _zeroed_rows(t, masks[name]) for name, t in targets.items()}
            found = {name: _merged(u, masks.get(name)) for name, u in updates.items()}
            subject.dense = True
            return {name: found[name] for name in targets}
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
        self, targets: Mapping[str, _Target], loss: Loss, batches: Callable[[str], Iterable[Batch]], split: bool
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return D and U of each weight, with D U^T what is taken out of its update."""
        layers = {name: t.layer for name, t in targets.items()}
        found: dict[str, list[Tensor]] = {name: [] for name in targets}
        for stream, count in ((self.safety, self.keep_s), (self.utility, self.keep_u)):
            assert count is not None
            moments = {}
            if count:
                data = self._counted(batches(stream), split)
                moments = input_moments(loss, layers, data, outer=True, split=split)
            for name, target in targets.items():
                weight = whole_rows(target.values(), target.weight)
                empty = weight.new_zeros(len(weight), 0, dtype=torch.float64)
                found[name].append(directions(weight, moments[name], count) if count else empty)
        return {name: rank_factors(*pair) for name, pair in found.items()}

    def _rewind_directions(
        self, subject: Subject, targets: Mapping[str, _Target], factors: Mapping[str, tuple[Tensor, Tensor]]
    ) -> dict[str, dict[str, int]]:
        """Take the safety directions out of the update; return how many entries of each matrix changed."""
        table = {}
        for name, target in targets.items():
            thin = target.update is not None and not subject.dense
            written = target.update.b if thin and target.update is not None else target.weight
            mine, rows = local(written.detach()), share(written)
            d, u = (f[rows.start : rows.stop] for f in factors[name])
            update = mine.double()
            if not thin:
                assert subject.start is not None
                update = update - subject.start.rows(name, rows.start, rows.stop).to(update)
            new = (mine.double() - d @ rows.sum(u.T @ update)[0]).to(mine.dtype)
            table[name] = {"changed_entries": int(rows.sum((new != mine).sum())[0])}
            mine.copy_(new)
        return table


@contextmanager
def _at_aligned(subject: Subject) -> Iterator[None]:
    """Run the block at the aligned weights; afterwards, also after an exception, the fine-tuned ones are back."""
    model, start = subject.model, subject.start
    assert start is not None
    parameters: dict[str, nn.Parameter] = {}
    if has_adapter(model):
        parameters = {f"{name} (B)": u.b for name, u in lora_updates(model).items()}
    if subject.dense or not has_adapter(model):
        parameters |= {plain_name(name): p for name, p in model.named_parameters() if ".lora_" not in name}
    saved = {name: local(p.detach()).to("cpu", copy=True) for name, p in parameters.items()}
    try:
        for name, p in parameters.items():
            if name.endswith(" (B)"):
                local(p.detach()).zero_()
                continue
            if start.shape(name) != tuple(p.shape):
                raise ValueError(f"Freeze: {name} is {list(p.shape)}, in the aligned model {start.shape(name)}.")
            rows = share(p)
            local(p.detach()).copy_(start.rows(name, rows.start, rows.stop))
        yield
    finally:
        for name, p in parameters.items():
            local(p.detach()).copy_(saved[name])


def _row(o: Overlap) -> dict[str, Any]:
    return {"entries": o.total, "kept": o.safety - o.both, "jaccard": o.jaccard}


def _merged(update: LoraUpdate, mask: Tensor | None) -> int:
    """Write the update into the weight, masked entries left as they are; return how many of these it would change."""
    dtype = torch.promote_types(update.b.dtype, torch.float32)
    weight, b = local(update.weight.detach()), local(update.b.detach())
    a = whole(update.a.detach()).to(dtype)
    count = torch.zeros((), dtype=torch.int64, device=weight.device)
    for at in range(0, len(weight), BLOCK):
        part = weight[at : at + BLOCK]
        delta = update.scale * (b[at : at + BLOCK].to(dtype) @ a)
        held = torch.zeros_like(part, dtype=torch.bool) if mask is None else mask[at : at + BLOCK]
        count += ((delta != 0) & held).sum()
        part.copy_(torch.where(held, part, (part.to(dtype) + delta).to(part.dtype)))
    b.zero_()
    return int(share(update.weight).sum(count)[0])


def _zeroed_rows(target: _Target, mask: Tensor) -> int:
    """Zero the rows of B that a mask ``[rows, 1]`` names; return how many entries changed."""
    assert target.update is not None
    b = local(target.update.b.detach())
    count = ((b != 0) & mask).sum()
    b.masked_fill_(mask, 0)
    return int(share(target.update.b).sum(count)[0])


def _model_of(pl_module: LightningModule) -> nn.Module:
    model = getattr(pl_module, "model", pl_module)
    return model if isinstance(model, nn.Module) else pl_module
