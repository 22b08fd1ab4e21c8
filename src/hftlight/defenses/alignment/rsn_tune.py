"""RSNTune: align only the neurons that matter to safety and not to general ability."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from hftlight.engine.step.defense import Loader
from hftlight.engine.step.slots import Slot, Stage
from hftlight.engine.step.vectors import local
from hftlight.engine.weights.frozen import FreezesEntries, FrozenEntries, scoring_loss
from hftlight.engine.weights.masks import Overlap, overlap
from hftlight.engine.weights.neurons import Neurons, agreement, importance, kept_parts, trained_neurons
from hftlight.engine.weights.regions import Selection, Target
from hftlight.engine.weights.scores import calibration, undisturbed
from hftlight.engine.weights.shards import Share
from hftlight.models.module import decoder_layers

Score = Literal["deactivation", "snip", "wanda"]


class RSNTune(FreezesEntries):
    r"""Train only safety neurons that are no foundation neurons, so that a later upload moves them little.

    A neuron is a hidden unit of an MLP, or a channel of an attention's values. It owns a row of each weight that writes
    it and the columns that read it. The importance of neuron j on a row is the change of the layer's output if the
    neuron is set to zero,

    .. math:: I_j = \Big(\sum_t a_{tj}^2\Big)^{1/2} \|W_{:j}\|_2

    with its activation a at each real token t, and the columns W that read it. Safety neurons are among the most
    important ones of their MLP or attention on all safety rows. Foundation neurons are so on all utility rows. Training
    moves the safety neurons that are not foundation neurons. Every other weight keeps its value, bit for bit.

    Under LoRA a row or a column of B A keeps its value exactly only through the factors. If B is zero at the start, A's
    columns outside the neurons are set to zero, which leaves the model unchanged. If B is not zero (an adapter whose
    training continues), the factor that both kinds of entries share is frozen.

    Args:
        safety_ratio: fraction of the neurons of each MLP and attention that count as important on a safety row, in
            (0, 1].
        utility_ratio: likewise on a utility row, in [0, 1); 0 spares no neuron, which is SN-Tune.
        score: ``"deactivation"`` as above. ``"snip"`` and ``"wanda"`` rank a neuron by the summed scores of its reading
            columns over all rows, as ``Freeze`` scores weights.
        shared: fraction of the rows on which a neuron must be among the important ones, in (0, 1]; 1 is the
            intersection over all rows. Only ``"deactivation"`` uses it.
        samples: number of rows of each kind that are scored, over all ranks, >= 1.
        safety: stream of safety rows. A run offers ``"refusals"``, the alignment rows that refuse.
        utility: stream of utility rows. A run offers ``"ordinary"``, the other alignment rows.
        aligned_first: whether a run aligns plainly first and then trains the neurons of that model.
        streams: loaders of these two streams, needed only if the data module does not offer them.

    Raises:
        ValueError: if an argument is out of range, no neuron is left to train, or a callback averages weights.
        TypeError: if the model has no neurons of a known form among its trained weights, or they are quantized.

    Cost: a forward pass over ``samples`` rows of each kind before the first step; a forward and backward pass with
        ``"snip"``. Training steps take no extra pass. Memory holds one byte per trained weight, and the values that are
        kept.
    Source: Zhao et al., "Understanding and Enhancing Safety Mechanisms of LLMs via Safety-Specific Neuron", ICLR 2025.
    Differs: known from secondary sources only. Neurons are hidden units and value channels, whose deactivation has a
        closed form; the paper also counts single rows of the query and key projections. The paper takes fixed numbers
        of neurons per layer (1000 of attention, 2000 of the MLP). Fractions fit any width. The official detection needs
        a patched transformers, and no public fork holds its neuron lists. Rows and columns are kept exactly, also under
        LoRA, weight decay and momentum.
    """

    stage, slots = Stage.ALIGNMENT, (Slot.PROJECTION, Slot.UPDATE)

    def __init__(
        self,
        safety_ratio: float = 0.2,
        utility_ratio: float = 0.2,
        score: Score = "deactivation",
        shared: float = 1.0,
        samples: int = 64,
        safety: str = "refusals",
        utility: str = "ordinary",
        aligned_first: bool = False,
        streams: Mapping[str, Loader] | None = None,
    ) -> None:
        self._selection = Selection("RSNTune", safety_ratio, utility_ratio, score, samples, safety, utility)
        if not safety_ratio > 0:
            raise ValueError(f"RSNTune: safety_ratio must lie in (0, 1], got {safety_ratio}: nothing would train.")
        if not utility_ratio < 1:
            raise ValueError(f"RSNTune: utility_ratio must lie in [0, 1), got {utility_ratio}: nothing would train.")
        if score not in ("deactivation", "snip", "wanda"):
            raise ValueError(f"RSNTune: score must be one of ['deactivation', 'snip', 'wanda'], got {score!r}.")
        if not 0 < shared <= 1:
            raise ValueError(f"RSNTune: shared is a fraction of the rows and must lie in (0, 1], got {shared}.")
        self.streams = (safety, utility) if utility_ratio else (safety,)
        super().__init__(streams)
        self.safety_ratio, self.utility_ratio, self.score, self.shared = safety_ratio, utility_ratio, score, shared
        self.samples, self.safety, self.utility, self.aligned_first = samples, safety, utility, aligned_first
        self.report: dict[str, Any] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._found(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed(trainer, pl_module):
            return
        (targets, neurons), loss = self._found(pl_module), scoring_loss(trainer, pl_module)
        with undisturbed(pl_module, pl_module.device):
            safe = self._important(loss, self.safety, self.safety_ratio, targets, neurons)
            useful = (
                self._important(loss, self.utility, self.utility_ratio, targets, neurons) if self.utility_ratio else {}
            )
        chosen = {n.name: safe[n.name] & ~useful[n.name] if useful else safe[n.name] for n in neurons}
        self._report(neurons, safe, useful, chosen)
        # After the block: within it FSDP2 may show gathered weights in place of the parameters.
        self._frozen = FrozenEntries.now(self._masks(pl_module, targets, neurons, chosen), pl_module)

    def _found(self, pl_module: LightningModule) -> tuple[dict[str, Target], list[Neurons]]:
        """Return the trained linear layers and the neurons.

        Raises:
            TypeError: as the class.
        """
        model: nn.Module = getattr(pl_module, "model", pl_module)  # type: ignore[assignment]
        return trained_neurons(model, decoder_layers, "RSNTune")

    def _important(
        self, loss: Any, stream: str, ratio: float, targets: Mapping[str, Target], neurons: list[Neurons]
    ) -> dict[str, Tensor]:
        """Return which neurons are important on the rows of a stream, bool ``[neurons]`` by MLP or attention."""
        data = calibration(self._draws(stream), self.samples)
        if self.score == "deactivation":
            shares = agreement(loss, neurons, targets, data, ratio)
            return {name: share >= self.shared - 1e-6 for name, share in shares.items()}
        result = {}
        scores = importance(self.score, loss, neurons, targets, data)
        for n in neurons:
            best = scores[n.name].topk(max(1, round(ratio * n.count))).indices
            result[n.name] = torch.zeros_like(scores[n.name], dtype=torch.bool).index_fill(0, best, True)
        return result

    def _report(
        self,
        neurons: list[Neurons],
        safe: Mapping[str, Tensor],
        useful: Mapping[str, Tensor],
        chosen: Mapping[str, Tensor],
    ) -> None:
        """Record how many neurons train, and how far safety and foundation neurons overlap.

        Raises:
            ValueError: if no neuron is left.
        """
        total = Overlap(0, 0, 0, 0)
        for n in neurons:
            both = (safe[n.name][None], useful[n.name][None] if useful else None)
            total += overlap(*both, Share(0, 1, 1), n.count)
        trained = sum(int(c.sum()) for c in chosen.values())
        if not trained:
            raise ValueError(
                f"RSNTune: no neuron is a safety neuron and no foundation neuron: {total.safety} of {total.total} are"
                f" safety neurons, {total.both} of them foundation neurons too. Raise safety_ratio, or lower shared or"
                " utility_ratio."
            )
        self.report = {"neurons": total.total, "safety": total.safety, "both": total.both, "trained": trained}
        self.trace |= {**self.report, "jaccard": total.jaccard}

    def _masks(
        self, module: nn.Module, targets: Mapping[str, Target], neurons: list[Neurons], chosen: Mapping[str, Tensor]
    ) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each trained parameter with the mask of the entries that keep their values, on this rank.

        Parameters without a trained neuron keep all their values.
        """
        neurons_own = set[int]()  # what is not masked of these parameters trains
        for n in neurons:
            for name in (*n.writers, n.reader):
                weight, u = targets[name].weight, targets[name].update
                neurons_own |= {id(weight)} if u is None else {id(u.a), id(u.b)}
            yield from kept_parts(n, ~chosen[n.name], targets)
        for parameter in module.parameters():
            if parameter.requires_grad and id(parameter) not in neurons_own:
                mine = local(parameter.detach())
                yield parameter, torch.ones(len(mine), *[1] * (mine.dim() - 1), dtype=torch.bool, device=mine.device)
