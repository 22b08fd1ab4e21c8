"""FreezePlus: freeze whole units that matter to safety more than to utility."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from hftlight.engine.step.defense import Loader
from hftlight.engine.step.order import trainer_seed
from hftlight.engine.step.simulation import draws
from hftlight.engine.step.slots import Slot, Stage
from hftlight.engine.weights.frozen import FreezesEntries, FrozenEntries, scoring_loss
from hftlight.engine.weights.masks import chance_overlap, count_of, digest, overlap, pack
from hftlight.engine.weights.neurons import Neurons, importance, kept_parts, loose_layers, trained_neurons
from hftlight.engine.weights.regions import Selection, Target
from hftlight.engine.weights.scores import Batch, Loss, calibration, checked, undisturbed
from hftlight.engine.weights.shards import Share
from hftlight.models.module import decoder_layers

Estimator = Literal["variance", "wanda", "snip"]


@dataclass(frozen=True)
class UnitGroups:
    """The four groups of units, bool ``[units]`` each. Every unit is in exactly one group.

    Attributes:
        safety: safety-critical units (SCU).
        utility: utility-critical units (UCU).
        redundant: redundant units (RU).
        complex: complex units (CU).
    """

    safety: Tensor
    utility: Tensor
    redundant: Tensor
    complex: Tensor


def importance_ranks(scores: Tensor) -> Tensor:
    r"""Return the rank of each unit, :math:`r_j = |\{k : I_k < I_j\}| / (n - 1)`, float64 in [0, 1].

    Args:
        scores: I, ``[n]``, of the units of one MLP or attention. Equal units have equal ranks.
    """
    values = scores.double().contiguous()
    return torch.searchsorted(values.sort().values, values).double() / max(1, len(values) - 1)


def unit_groups(safety: Tensor, utility: Tensor, scu: float, ucu: float, ru: float) -> UnitGroups:
    r"""Return the groups of units with ranks :math:`r_s` on safety rows and :math:`r_u` on utility rows.

    SCU are the fraction a with the largest :math:`r_s - r_u`, UCU the fraction b with the smallest. Of the rest, RU are
    those with the smallest :math:`r_s + r_u`, in number the fraction c of all units. CU are the others. Of equal units,
    the first counts as the more important one to safety, and as the less important one to both.

    Args:
        safety: r_s, ``[units]``.
        utility: r_u, ``[units]``.
        scu: a, fraction of all units.
        ucu: b, likewise.
        ru: c, likewise; ``scu + ucu + ru <= 1``.
    """
    n = len(safety)
    a, b, c = (count_of(fraction, n) for fraction in (scu, ucu, ru))
    order = (safety - utility).argsort(descending=True, stable=True)
    rest = order[a : n - b].sort().values
    rest = rest[(safety + utility)[rest].argsort(stable=True)]

    def mask(places: Tensor) -> Tensor:
        return torch.zeros(n, dtype=torch.bool, device=places.device).index_fill(0, places, True)

    return UnitGroups(mask(order[:a]), mask(order[n - b :]), mask(rest[:c]), mask(rest[c:]))


def top_complex(groups: UnitGroups, total: Tensor, cu: float) -> Tensor:
    """Return the fraction ``cu`` of the complex units with the largest ``r_s + r_u``, bool ``[units]``.

    Args:
        groups: from ``unit_groups``.
        total: r_s + r_u, ``[units]``.
        cu: fraction of the complex units, in [0, 1].
    """
    places = groups.complex.nonzero().flatten()
    best = places[total[places].argsort(descending=True, stable=True)][: count_of(cu, len(places))]
    return torch.zeros_like(groups.complex).index_fill(0, best, True)


class FreezePlus(FreezesEntries):
    r"""Keep the units that matter to safety more than to utility at their aligned values.

    A unit is a hidden unit of an MLP, or a channel of an attention's values. With the inputs x of the layer W that
    reads the units, over the response tokens t of some rows, and the columns j that read the unit, its importance is

    .. math:: I = \sum_j \mathrm{Var}_t(x_{tj}) \, \|W_{:j}\|_2^2

    Let :math:`r_s` and :math:`r_u` be its ranks by I among the units of its MLP or attention, on safety rows and on
    utility rows, in [0, 1]. Over all layers, the safety-critical units (SCU) have the largest :math:`r_s - r_u`, the
    utility-critical units (UCU) the smallest. Of the rest, the redundant units (RU) have the smallest
    :math:`r_s + r_u`, and the others are complex units (CU). SCU and the CU with the largest :math:`r_s + r_u` are
    frozen: their rows of the layers that write them, with biases, and their columns of the layer that reads them. In
    attention with grouped heads, the columns of all query heads that read the channel are frozen. Every step restores
    the frozen values bit for bit, because weight decay and momentum move even a weight without a gradient.

    Under LoRA the units of adapted layers count, since the others do not move. A row or a column of B A keeps its value
    only through the factors. In a new adapter B is zero. Its frozen rows stay zero, and the frozen columns of A are set
    to zero at the start, which leaves the model unchanged. If B is not zero (an adapter whose training continues), A is
    frozen with the rows of B, and B with the columns of A.

    Args:
        scu: a, fraction of all units that are safety-critical, in [0, 1].
        ucu: b, fraction that are utility-critical, in [0, 1].
        ru: c, fraction that are redundant, in [0, 1]. ``scu + ucu + ru`` must be <= 1.
        cu: fraction of the complex units that are frozen too, in [0, 1]. The paper's setting (i) has 0.06, its setting
            (ii) has 1. If ``scu`` and ``cu`` are 0, the defense is off.
        complex_epochs: number of epochs at the start in which all complex units are frozen, >= 0. The paper trains one
            such epoch before setting (i).
        estimator: ``"variance"`` as above. ``"wanda"`` and ``"snip"`` sum the scores of the unit's columns, as
            ``Freeze`` scores weights.
        units: ``"scored"``, or ``"random"`` for a control: as many random units of each MLP and attention as
            ``"scored"`` freezes.
        qk: whether a channel's rows of the query and key projections are frozen too.
        samples: number of rows of each kind that are scored, over all ranks, >= 1. A smaller stream is repeated.
        safety: stream of safety rows, harmful prompts with refusals. A run offers ``"refusals"``, the alignment rows
            that refuse. On your own Trainer, name a stream of ``streams`` or of the data module.
        utility: stream of utility rows. A run offers ``"ordinary"``, the other alignment rows. The user's upload,
            ``"task"``, may hide harmful rows.
        streams: loaders of these two streams, needed only if the data module does not offer them.

    Raises:
        ValueError: if an argument is out of range, the two streams are the same, ``scu`` is less than one unit, or a
            callback averages weights.
        TypeError: if the model has no units of a known form among its trained weights, a trained linear layer of a
            decoder layer holds none, or they are quantized.

    Cost: three sweeps over ``samples`` rows at most before the first step: safety rows, utility rows, and each half of
        the safety rows, whose SCU are compared. A sweep takes forward passes and two numbers per input; ``"snip"``
        takes forward and backward passes and a float32 buffer of the size of the reading layers. Training steps take no
        extra pass. Memory holds the frozen values, once more during ``complex_epochs``, and one number per unit.
    Source: Li and Kim, "Superficial Safety Alignment Hypothesis", ICLR 2026, arXiv:2410.10862; the importance is the
        fluctuation metric of An et al., "FLAP", AAAI 2024, arXiv:2312.11983.
    Differs: no training code was found. Reviews of the paper name structured pruning with the variance of activations,
        on 100 harmful prompts and on simple questions. That its form is FLAP's is an assumption, and that it reads
        response tokens. So are the ranks, which make layers and row sets comparable, and the unit of attention. The 6 %
        are read as a fraction of the complex units. The paper tunes the sizes of the groups by pruning until a
        benchmark collapses; the presets hold its results. Its defended runs train twice as many epochs as the
        undefended ones, which is an option of the run. Its Llama-3 runs also freeze the first 12 blocks; list
        ``SPPFT(first=0, last=11)`` too. If all weights train, units of frozen blocks belong to no group. LoRA, ``qk``,
        the overlap of halves and the random control are additions. The overlap is too high if the stream has fewer than
        ``samples`` rows, since the halves then share rows.
    """

    stage, slots = Stage.FINETUNING, (Slot.PROJECTION, Slot.UPDATE)
    claims = ("units of the adapter",)
    # Setting (i) of the paper for three models. Their runs also took twice the epochs of the undefended runs.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "llama2_7b_chat": {"scu": 0.013, "ucu": 0.133, "ru": 0.148, "cu": 0.06, "complex_epochs": 1},
        "llama3_8b_instruct": {"scu": 0.014, "ucu": 0.068, "ru": 0.066, "cu": 0.06, "complex_epochs": 1},
        "mistral_7b_instruct": {"scu": 0.02, "ucu": 0.013, "ru": 0.134, "cu": 0.06, "complex_epochs": 1},
    }

    def __init__(
        self,
        scu: float = 0.013,
        ucu: float = 0.133,
        ru: float = 0.148,
        cu: float = 0.06,
        complex_epochs: int = 0,
        estimator: Estimator = "variance",
        units: Literal["scored", "random"] = "scored",
        qk: bool = False,
        samples: int = 100,
        safety: str = "refusals",
        utility: str = "ordinary",
        streams: Mapping[str, Loader] | None = None,
    ) -> None:
        for name, fraction in (("scu", scu), ("ucu", ucu), ("ru", ru), ("cu", cu)):
            if not 0 <= fraction <= 1:
                hint = f" If that is a percentage, write {fraction / 100:g}." if 1 < fraction <= 100 else ""
                raise ValueError(f"FreezePlus: {name} is a fraction of units in [0, 1], got {fraction}.{hint}")
        if scu + ucu + ru > 1 + 1e-9:
            raise ValueError(
                f"FreezePlus: scu + ucu + ru must be <= 1, since no unit is in two groups, got {scu + ucu + ru:g}."
            )
        if not (complex_epochs >= 0 and float(complex_epochs).is_integer()):
            raise ValueError(
                f"FreezePlus: complex_epochs counts epochs and must be a whole number >= 0, got {complex_epochs}."
            )
        for name, value, known in (
            ("estimator", estimator, ("variance", "wanda", "snip")),
            ("units", units, ("scored", "random")),
        ):
            if value not in known:
                raise ValueError(f"FreezePlus: {name} must be one of {list(known)}, got {value!r}.")
        Selection("FreezePlus", scu, ucu, estimator, samples, safety, utility)  # checks samples and streams
        self.streams = (safety, utility)
        super().__init__(streams)
        self.scu, self.ucu, self.ru, self.cu, self.complex_epochs = scu, ucu, ru, cu, complex_epochs
        self.estimator, self.units, self.qk = estimator, units, qk
        self.samples, self.safety, self.utility = samples, safety, utility
        self.report: dict[str, Any] = {}
        self._later: FrozenEntries | None = None
        self._stored_later: dict[str, Any] | None = None

    @property
    def neutral(self) -> bool:
        """Whether the arguments ask for plain fine-tuning."""
        return self.scu == 0 and self.cu == 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the model before the first step.

        Raises:
            TypeError: as the class.
            ValueError: if ``scu`` is less than one unit, or a callback averages weights.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._later, self._stored_later = None, None
        if self.neutral:
            return
        total = sum(n.count for n in self._units(pl_module)[1])
        if self.scu > 0 and count_of(self.scu, total) == 0:
            raise ValueError(
                f"FreezePlus: scu {self.scu} is less than one of the model's {total} units, so none would be"
                f" safety-critical. Use scu >= {1 / total:.3g}."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed(trainer, pl_module):
            if self._stored_later is not None:
                self._later = FrozenEntries.stored(self._stored_later, pl_module, "FreezePlus")
            return
        if self.neutral:
            return
        (targets, neurons), loss = self._units(pl_module), scoring_loss(trainer, pl_module)
        with undisturbed(pl_module, pl_module.device):
            few, many = self._choose(loss, targets, neurons)
        # After the block: within it FSDP2 may show gathered weights in place of the parameters.
        if self.complex_epochs:
            self._frozen = FrozenEntries.now(self._parts(targets, neurons, many), pl_module)
            self._later = FrozenEntries.now(self._parts(targets, neurons, few), pl_module)
        else:
            self._frozen = FrozenEntries.now(self._parts(targets, neurons, few), pl_module)
        if not bool(few.any()):
            warnings.warn("FreezePlus freezes no unit, since no unit is complex; raise scu or cu.", stacklevel=2)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._later is not None and trainer.current_epoch >= self.complex_epochs:
            self._frozen, self._later = self._later, None

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._later is not None:
            self.trace["complex_steps"] = self.trace.get("complex_steps", 0) + 1

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state with the frozen entries, and with those that follow ``complex_epochs``.

        Under sharding every rank must call this method.
        """
        return super().state_dict() | ({"later": self._later.state()} if self._later is not None else {})

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._stored_later = state_dict.get("later")

    @override
    def manifest(self) -> dict[str, Any]:
        return {**super().manifest(), "estimator": self.estimator, "units": self.units}

    def _units(self, pl_module: LightningModule) -> tuple[dict[str, Target], list[Neurons]]:
        """Return the trained linear layers and the units.

        Raises:
            TypeError: as in ``setup``.
        """
        model: nn.Module = getattr(pl_module, "model", pl_module)  # type: ignore[assignment]
        targets, neurons = trained_neurons(model, decoder_layers, "FreezePlus")
        if loose := loose_layers(targets, neurons):
            raise TypeError(
                f"FreezePlus: {loose[0]} is trained and holds no unit of a known form, like {len(loose) - 1} more, so"
                " units would move with it. Under LoRA, adapt the layer that reads its outputs too, such as o_proj for"
                " v_proj. Else use Freeze."
            )
        return targets, neurons

    def _choose(self, loss: Loss, targets: Mapping[str, Target], neurons: Sequence[Neurons]) -> tuple[Tensor, Tensor]:
        """Return the units that are frozen, and those that are frozen during ``complex_epochs``, bool ``[units]``."""

        def ranks(data: Sequence[tuple[Batch, int]]) -> Tensor:
            scores = importance(self.estimator, loss, neurons, targets, data)
            return torch.cat([importance_ranks(checked(scores[n.name], n.name)).cpu() for n in neurons])

        rows = self._draws(self.safety)  # the second half goes on where the first one ends
        halves = [calibration(rows, count) for count in (-(-self.samples // 2), self.samples // 2) if count]
        useful = ranks(calibration(self._draws(self.utility), self.samples))
        safe = ranks([pair for half in halves for pair in half])
        groups = unit_groups(safe, useful, self.scu, self.ucu, self.ru)
        few, many = (groups.safety | top_complex(groups, safe + useful, cu) for cu in (self.cu, 1.0))
        if self.units == "random":
            few, many = _random_units(neurons, few, many)
        numbers: dict[str, float] = {
            "unit_count": len(safe),
            **{name: int(mask.sum()) for name, mask in vars(groups).items()},
            "frozen_units": int(few.sum()),
            "frozen_and_safety": int((few & groups.safety).sum()),
            "mask_digest": int(digest({"units": pack(few)})[:12], 16),  # 48 bits, exact as a float
        }
        if len(halves) == 2:
            first, second = (unit_groups(ranks(half), useful, self.scu, self.ucu, self.ru).safety for half in halves)
            share_of_units = int(first.sum()) / len(first)
            numbers["jaccard_of_halves"] = overlap(first[None], second[None], Share(0, 1, 1), len(first)).jaccard
            numbers["jaccard_by_chance"] = chance_overlap(share_of_units, share_of_units)
        self.trace |= numbers
        sizes = [n.count for n in neurons]
        tables = zip(neurons, *(mask.split(sizes) for mask in (*vars(groups).values(), few)), strict=True)
        names = (*vars(groups), "frozen")
        self.report = {
            **numbers,
            "estimator": self.estimator,
            "modules": {
                n.name: {name: int(mask.sum()) for name, mask in zip(names, masks, strict=True)} for n, *masks in tables
            },
        }
        return few, many

    def _parts(
        self, targets: Mapping[str, Target], neurons: Sequence[Neurons], chosen: Tensor
    ) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each trained parameter with frozen entries, and this rank's mask of it."""
        for n, own in zip(neurons, chosen.split([n.count for n in neurons]), strict=True):
            yield from kept_parts(n, own, targets, self.qk)


def _random_units(neurons: Sequence[Neurons], few: Tensor, many: Tensor) -> tuple[Tensor, Tensor]:
    """Return as many random units of each MLP and attention as two masks have, the first within the second."""
    sizes = [n.count for n in neurons]
    result: tuple[list[Tensor], list[Tensor]] = ([], [])
    for n, *masks in zip(neurons, few.split(sizes), many.split(sizes), strict=True):
        order = draws(trainer_seed(), 0, f"freeze_plus/{n.name}").sample(range(n.count), n.count)
        for into, mask in zip(result, masks, strict=True):
            places = torch.tensor(order[: int(mask.sum())], dtype=torch.long)
            into.append(torch.zeros(n.count, dtype=torch.bool).index_fill(0, places, True))
    return torch.cat(result[0]), torch.cat(result[1])
