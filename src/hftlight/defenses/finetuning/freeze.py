"""Freeze: freeze the weights that matter to safety and not to utility while the user's data trains the others."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from hftlight.engine.step.defense import Loader
from hftlight.engine.step.slots import Slot, Stage
from hftlight.engine.step.vectors import local, whole
from hftlight.engine.weights.frozen import FreezesEntries, FrozenEntries, scoring_loss
from hftlight.engine.weights.lora import has_adapter
from hftlight.engine.weights.masks import Overlap, whole_rows
from hftlight.engine.weights.regions import Selection, Target, linear_targets, overlap_row
from hftlight.engine.weights.scores import Loss, undisturbed
from hftlight.engine.weights.shards import share
from hftlight.models.module import decoder_layers


class Freeze(FreezesEntries):
    r"""Keep the weights that matter to safety and not to utility at their aligned values.

    Each weight matrix of the decoder layers is scored at the aligned model on safety rows and on utility rows. Let S(q)
    be the top fraction q of the matrix by safety score, and U(p) the top fraction p by utility score. The entries of
    :math:`M = S(q) \setminus U(p)` are frozen. The scores are

    .. math:: \text{SNIP: } |W_{ij}| \sum_n |\partial \ell_n / \partial W_{ij}|, \qquad
              \text{Wanda: } |W_{ij}| \sqrt{\textstyle\frac1N \sum_t x_{tj}^2}

    with the mean loss :math:`\ell_n` of example n in nats per response token, and inputs x at response tokens. While
    the user's data trains the model, the gradient of M is set to zero. Weight decay and momentum move even a weight
    whose gradient is zero. Every step therefore restores the values of M bit for bit. The other weights adapt to M.

    Under LoRA single entries of B A cannot be frozen by freezing entries of B and A. Instead whole rows of a weight,
    chosen by the sum of their scores, are frozen through B's rows. If these rows of B are not zero at the start (an
    adapter whose training continues), A is frozen too.

    Freeze is a baseline: the authors report that a fine-tuning attack circumvents frozen weights.

    Args:
        safety_ratio: q, fraction of the entries of each matrix, in [0, 1]; 0 turns it off.
        utility_ratio: p, likewise; 0 excludes nothing and needs no utility rows.
        score: ``"snip"`` or ``"wanda"``.
        unit: the unit of freezing, ``"entry"`` or ``"row"`` (all weights of one output). ``"auto"`` means ``"row"``
            under LoRA, else ``"entry"``.
        samples: number of rows of each kind that are scored, over all ranks, >= 1. A smaller stream is repeated.
        safety: the stream of safety rows, harmful prompts with refusals. A run offers ``"refusals"``, the alignment
            rows that refuse. On your own Trainer, name a stream of ``streams`` or of the data module.
        utility: the stream of utility rows. The user's upload is always available, but may hide harmful rows, whose
            weights are then not frozen. ``"retain"`` is better if there is such a stream.
        end: whether the last token of each row, its end token, counts in the scores.
        streams: loaders of these two streams, needed only if the data module does not offer them.

    Raises:
        ValueError: if an argument is out of range, the two streams are the same, or a ratio is less than one entry.
        TypeError: if the model has no decoder layers with linear layers, these are quantized, or ``unit`` is
            ``"entry"`` under LoRA.

    Cost: one sweep for all layers before the first step. SNIP takes ``samples`` forward and backward passes per kind of
        row, and one float32 buffer of the size of the scored weights. Wanda takes forward passes and one number per
        input. Training steps take no extra pass. The mask takes one byte per scored weight, beside the frozen values. A
        checkpoint holds one bit per weight, and the frozen values.
    Source: Wei et al., "Assessing the Brittleness of Safety Alignment via Pruning and Low-Rank Modifications", ICML
        2024, arXiv:2402.05162, including SNIP and Wanda.
    Differs: as in the paper, weights are frozen during fine-tuning. The official code restores them afterwards, which
        is ``Rewind``. The paper's freezing experiment tries many ratios and helps only above one half, against ten
        harmful rows. The 0.1 of both ratios here is the README's example of pruning, and no preset sets a ratio. The
        sets come from scores of the intact model over the whole matrix, with exact counts. The official code infers a
        fine-tuned mask from weights near zero, so that tiny weights, norms and embeddings join the set. SNIP takes one
        sweep for all layers instead of one replay of the data per layer. Scores are never negative, so that none is
        ranked in reverse. As in the official code, safety rows are refusals only. Wanda's inputs are those at the
        positions of response tokens, not at the positions that predict them. The end token does not count, since the
        official responses have none. Rows under LoRA are an addition. By default the utility rows are the user's upload
        (paper: Alpaca without safety rows).
    """

    stage, slots = Stage.FINETUNING, (Slot.PROJECTION, Slot.UPDATE)
    claims = ("rows of the adapter",)
    instead = "remove that callback, or use Rewind."
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"score": "snip", "samples": 128, "safety": "refusals", "end": False},
    }

    def __init__(
        self,
        safety_ratio: float = 0.1,
        utility_ratio: float = 0.1,
        score: Literal["snip", "wanda"] = "snip",
        unit: Literal["auto", "entry", "row"] = "auto",
        samples: int = 128,
        safety: str = "refusals",
        utility: str = "task",
        end: bool = False,
        streams: Mapping[str, Loader] | None = None,
    ) -> None:
        self._selection = Selection("Freeze", safety_ratio, utility_ratio, score, samples, safety, utility, end)
        if score not in ("snip", "wanda"):
            way = " Score 'actsvd' chooses output directions, not weights; use Rewind." if score == "actsvd" else ""
            raise ValueError(f"Freeze: score must be one of ['snip', 'wanda'], got {score!r}.{way}")
        if unit not in ("auto", "entry", "row"):
            raise ValueError(f"Freeze: unit must be one of ['auto', 'entry', 'row'], got {unit!r}.")
        self.streams = (safety, utility) if utility_ratio else (safety,)
        super().__init__(streams)
        self.safety_ratio, self.utility_ratio, self.score, self.unit = safety_ratio, utility_ratio, score, unit
        self.samples, self.safety, self.utility, self.end = samples, safety, utility, end
        self.report: dict[str, Any] = {}

    @property
    def neutral(self) -> bool:
        """Whether the arguments ask for plain fine-tuning."""
        return self.safety_ratio == 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the model before the first step.

        Raises:
            TypeError: if the model has no layers to score, they are quantized, or ``unit`` is ``"entry"`` under LoRA.
            ValueError: if a ratio is less than one entry, or a callback averages weights.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not self.neutral:
            self._targets(_model_of(pl_module))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed(trainer, pl_module) or self.neutral:
            return
        model = _model_of(pl_module)
        targets, loss = self._targets(model), scoring_loss(trainer, pl_module)
        with undisturbed(pl_module, pl_module.device):
            masks, table = self._region(targets, loss, has_adapter(model))
        # After the block: within it FSDP2 may show gathered weights in place of the parameters.
        self._frozen = FrozenEntries.now(self._parameters(targets, masks), pl_module)
        numbers = self._selection.numbers(targets, masks, table)
        self.trace |= numbers
        self.report = {**numbers, "matrices": {name: overlap_row(o) for name, o in table.items()}}
        if not self._frozen.parts:
            warnings.warn(f"Freeze freezes no weight: {self._selection.empty()}", stacklevel=2)

    def _by_row(self, adapted: bool) -> bool:
        return self.unit == "row" or (self.unit == "auto" and adapted)

    def _targets(self, model: nn.Module) -> dict[str, Target]:
        """Return the linear layers that are scored, by the plain name of their weight.

        Raises:
            TypeError: as in ``setup``.
            ValueError: as in ``setup``.
        """
        adapted = has_adapter(model)
        by_row = self._by_row(adapted)
        if adapted and not by_row:
            raise TypeError(
                "Freeze: single entries of a weight cannot be frozen through a LoRA adapter; use unit='row', or Rewind,"
                " which makes a whole model."
            )
        targets = linear_targets(model, decoder_layers, "Freeze")
        self._selection.check(targets, by_row)
        return targets

    def _region(
        self, targets: Mapping[str, Target], loss: Loss, adapted: bool
    ) -> tuple[dict[str, Tensor], dict[str, Overlap]]:
        """Return the masks of the frozen entries, and the overlap of the two sets, by the name of the weight."""
        return self._selection.region(targets, loss, self._draws, self._by_row(adapted))

    def _parameters(
        self, targets: Mapping[str, Target], masks: Mapping[str, Tensor]
    ) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each trained parameter with frozen entries, and this rank's mask of it.

        The loop contains collectives, so every rank takes the same branches: they depend on sums over all ranks.
        """
        for name, target in targets.items():
            mask, u = masks[name], target.update
            everywhere = whole_rows(mask.to(torch.uint8), target.weight).bool() if u is not None else mask
            if not bool(target.rows.sum(mask.sum())[0]):
                continue
            if u is None:
                yield target.weight, mask  # type: ignore[misc]
                continue
            # Ranks may share the rows of B differently from those of W, so B's mask is cut from the whole one.
            b = share(u.b)
            yield u.b, everywhere[b.start : b.stop]
            if bool(
                (whole(u.b.detach()) * everywhere).any()
            ):  # a frozen row of B A that is not zero needs A frozen too
                yield u.a, torch.ones_like(local(u.a.detach())[:, :1], dtype=torch.bool)


def _model_of(pl_module: LightningModule) -> nn.Module:
    """Return ``pl_module.model`` if it is a module, else the LightningModule itself."""
    model = getattr(pl_module, "model", pl_module)
    return model if isinstance(model, nn.Module) else pl_module
