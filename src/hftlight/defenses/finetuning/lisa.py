"""Lisa: alternate between alignment data and the user's data, and keep each phase close to its start."""

import math
from collections.abc import Mapping, MutableMapping
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from hftlight.engine import (
    Defense,
    Slot,
    Stage,
    Vector,
    add_to_grad,
    difference,
    extend,
    norm,
    packed,
    placed,
    snapshot,
    trainable,
)
from hftlight.engine.step.defense import Loader
from hftlight.engine.step.vectors import whole
from hftlight.engine.weights.lora import lora_updates


def proximal_pull(weights: Vector, anchor: Vector, proximal: float) -> Vector:
    r"""Return :math:`\rho (w - R)`, the gradient of :math:`\rho/2 \|w - R\|_2^2`.

    Args:
        weights: w; parameter name -> tensor of that parameter's shape.
        anchor: R; same names and shapes.
        proximal: rho, nats per squared L2 distance.
    """
    pull = difference(weights, anchor)
    torch._foreach_mul_(list(pull.values()), proximal)
    return pull


def update_pull(b: Tensor, a: Tensor, anchor_b: Tensor, anchor_a: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    r"""Return the gradient of :math:`c/2 \|BA - B'A'\|_F^2` for B and for A, without forming the product B A.

    Let :math:`\Delta B = B - B'` and :math:`\Delta A = A - A'`; brackets mark r x r Gram matrices. The gradient is
    :math:`c (\Delta B [A A^T] + B' [\Delta A A^T])` for B and :math:`c ([B^T \Delta B] A + [B^T B'] \Delta A)` for A.

    Args:
        b: B, ``[out, r]``.
        a: A, ``[r, in]``.
        anchor_b: B', like B.
        anchor_a: A', like A.
        strength: c, which is ``rho * s**2`` for LoRA's scale s and rho nats per squared distance of the weights.
    """
    change_b, change_a = b - anchor_b, a - anchor_a
    for_b = change_b @ (a @ a.T) + anchor_b @ (change_a @ a.T)
    for_a = (b.T @ change_b) @ a + (b.T @ anchor_b) @ change_a
    return strength * for_b, strength * for_a


def fitted(align_steps: int, finetune_steps: int, total: int, cycles: int) -> tuple[int, int]:
    """Return the steps of both phases, shrunk in proportion if the run is too short for ``cycles`` cycles.

    Shrunk cycles fill the run. The last cycle may lack up to ``cycles - 1`` steps at its end. Each phase keeps at least
    one step.

    Args:
        align_steps: optimizer steps of an alignment phase.
        finetune_steps: optimizer steps of a fine-tuning phase.
        total: optimizer steps of the run.
        cycles: minimum number of cycles of a run; 0 leaves the steps unchanged.
    """
    both = align_steps + finetune_steps
    if cycles == 0 or total >= cycles * both or not (align_steps and finetune_steps):
        return align_steps, finetune_steps
    cycle = max(2, math.ceil(total / cycles))
    align = min(max(1, round(cycle * align_steps / both)), cycle - 1)
    return align, cycle - align


class Lisa(Defense):
    r"""Alternate between alignment data and the user's data, and pull each phase back to its start.

    Phases of :math:`K_1` optimizer steps on the alignment loss f and of :math:`K_2` on the user's loss h alternate,
    alignment first. In a phase with loss :math:`\ell`, which is f or h, the optimizer receives the gradient

    .. math:: \nabla \ell(w) + \rho (w - R)

    R is the last iterate of the other phase, which is the start of the current phase. In the first phase, R is the
    aligned model.

    Args:
        align_steps: K1, optimizer steps of an alignment phase, >= 0; 0 is fine-tuning with a pull to the aligned model.
        finetune_steps: K2, optimizer steps of a fine-tuning phase, >= 0. The official code counts 100 and 900
            micro-batches per phase; at four per optimizer step, these are 25 and 225 steps.
        proximal: rho, nats per squared L2 distance of the weights, >= 0; 0 only alternates (the paper's BSO).
        quiet: fraction of the run, from its start, that is without the pull, in [0, 1].
        cycles: minimum number of cycles of a run, >= 0. In a shorter run both phases shrink in proportion. With 3
            cycles, 100 and 900 steps stay unchanged on 3,000 steps and more, and become 2 and 14 on 48. 0 leaves the
            steps unchanged.
        mode: ``"drop"`` skips the user's batches whose place an alignment phase takes, K1 / (K1 + K2) of all (official
            code). ``"pause"`` delays them, which needs a StreamsDataModule.
        space: ``"factors"`` measures the distance of the trained tensors, for LoRA of A and B separately (official
            code). ``"delta"`` measures that of LoRA's product s B A, which does not depend on how its factors share a
            scale.
        streams: loader of the stream ``"alignment"`` (harmful prompts with safe answers), needed only without a
            StreamsDataModule. Batches must then be dictionaries.

    Raises:
        ValueError: if an argument is out of range, or a mode cannot work with this data module or model. Also if the
            run never reaches the user's data, or ``quiet`` or ``cycles`` needs a run length that is unknown.
        TypeError: if batches are no dictionaries and there is no StreamsDataModule.

    Cost: no extra pass: alignment steps replace the user's steps. Memory holds one copy of the trainable weights, and
    briefly a second one in each step.
    Source: Huang et al., "Lisa", NeurIPS 2024, arXiv:2405.18641, Algorithm 2, and the official trainer. Paper and
    scripts have K1 100, K2 900 and rho 1. Preset ``paper`` pulls from the first step. Preset ``repo`` is quiet for a
    tenth of the run, which is in the code only. Preset ``booster`` has rho 0.01, as re-run for Booster.
    Differs: phases count optimizer steps. The official code counts micro-batches, so that a switch can fall inside an
    accumulation window. The README's pairing of anchors contradicts trainer and paper, and is not followed. One copy of
    the weights replaces two, since the end of the other phase is the start of this one. The pull is added to the
    gradient once per step, before clipping, instead of to every loss. The result is the same, since weights do not move
    in between. ``cycles``, ``pause`` and ``delta`` are not in the paper. AdamW's weight decay also pulls to 0; the
    scripts set it to 0.
    """

    stage, slots = Stage.FINETUNING, (Slot.STREAM, Slot.GRADIENT)
    streams: tuple[str, ...] = ("alignment",)
    claims: tuple[str, ...] = ("anchor that weights are pulled to",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"align_steps": 100, "finetune_steps": 900, "proximal": 1.0, "quiet": 0.0, "cycles": 0},
        "repo": {"align_steps": 100, "finetune_steps": 900, "proximal": 1.0, "quiet": 0.1, "cycles": 0},
        "booster": {"align_steps": 100, "finetune_steps": 900, "proximal": 0.01, "quiet": 0.1, "cycles": 0},
    }

    def __init__(
        self,
        align_steps: int = 100,
        finetune_steps: int = 900,
        proximal: float = 1.0,
        quiet: float = 0.1,
        cycles: int = 3,
        mode: Literal["drop", "pause"] = "drop",
        space: Literal["factors", "delta"] = "factors",
        streams: Mapping[str, Loader] | None = None,
    ) -> None:
        for name, value, what in (
            ("align_steps", align_steps, "optimizer steps"),
            ("finetune_steps", finetune_steps, "optimizer steps"),
            ("cycles", cycles, "cycles"),
        ):
            if not (isinstance(value, int) and value >= 0):
                raise ValueError(f"Lisa: {name} must be a whole number of {what} >= 0, got {value}.")
        if align_steps + finetune_steps == 0:
            raise ValueError("Lisa: align_steps and finetune_steps are both 0, so there is nothing to train on.")
        if not 0 <= proximal < math.inf:
            raise ValueError(f"Lisa: proximal must be >= 0 nats per squared distance (0 turns it off), got {proximal}.")
        if not 0 <= quiet <= 1:
            raise ValueError(f"Lisa: quiet is a fraction of the run and must lie in [0, 1], got {quiet}.")
        if mode not in ("drop", "pause"):
            raise ValueError(f"Lisa: mode must be 'drop' or 'pause', got {mode!r}.")
        if space not in ("factors", "delta"):
            raise ValueError(f"Lisa: space must be 'factors' or 'delta', got {space!r}.")
        super().__init__(streams)
        self.align_steps, self.finetune_steps, self.proximal, self.quiet = align_steps, finetune_steps, proximal, quiet
        self.cycles, self.mode, self.space = cycles, mode, space
        self.pauses = mode == "pause"
        if align_steps == 0:
            self.streams = ()
        if proximal == 0:
            self.claims = ()
        self._planned = 0
        self._phases = align_steps, finetune_steps
        self._loaded: dict[str, Any] | None = None
        self._anchor: Vector = {}
        self._pairs: list[tuple[str, str, float]] = []
        self._exchanges = False
        self._exchanged: dict[Any, Any] | None = None

    @override
    def stream_at(self, step: int) -> str:
        align, finetune = self._phases
        return "alignment" if step % (align + finetune) < align else "task"

    @override
    def steps_on(self, name: str, step: int) -> int:
        align, finetune = self._phases
        whole_cycles, rest = divmod(step, align + finetune)
        on_alignment = whole_cycles * align + min(rest, align)
        return on_alignment if name == "alignment" else step - on_alignment

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "planned": self._planned, "anchor": packed(self._anchor)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # A checkpoint from before the first step, such as that of the learning rate finder, holds no plan yet.
        self._loaded = state_dict if state_dict["planned"] or state_dict["anchor"] else None

    @override
    def manifest(self) -> dict[str, Any]:
        return {**super().manifest(), "phases": list(self._phases), "quiet_steps": self.quiet * self._planned}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._phases = self.align_steps, self.finetune_steps
        self._planned, self._loaded, self._anchor, self._exchanged = 0, None, {}, None
        datamodule: Any = getattr(trainer, "datamodule", None)
        self._exchanges = not hasattr(datamodule, "follow")
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        probing = [type(c).__name__ for c in callbacks if Slot.FORWARD in getattr(c, "slots", ())]
        if self._exchanges and (self.pauses or probing):
            why = "mode 'pause' needs it" if self.pauses else f"{probing[0]} reads a batch before Lisa can replace it"
            raise ValueError(f"Lisa: this list of defenses needs a StreamsDataModule ({why}); give the Trainer one.")
        if not self._exchanges and self._loaders:
            raise ValueError(
                "Lisa: a StreamsDataModule provides the batches of both phases; pass alignment=... to it and omit"
                " streams=... here."
            )
        if not self._exchanges and datamodule.main != "task":
            raise ValueError(
                f"Lisa: the main stream of the data module must be 'task', the user's data, got {datamodule.main!r}."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loaded, self._loaded = self._loaded, None
        self._planned = self._length(trainer) if loaded is None else loaded["planned"]
        self._phases = fitted(self.align_steps, self.finetune_steps, self._planned, self.cycles)
        self._look_at_the_end()
        if self.proximal == 0:
            return
        self._anchor = snapshot(pl_module) if loaded is None else placed(loaded["anchor"], pl_module)
        self._pairs = _factor_pairs(pl_module) if self.space == "delta" else []

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._exchanges or self.stream_at(trainer.global_step) == "task":
            return
        if not isinstance(batch, MutableMapping):
            raise TypeError(
                "Lisa: without a StreamsDataModule alignment rows replace those of the batch, so it must be a"
                f" dictionary, got {type(batch).__name__}."
            )
        # The batch is replaced in place, since Lightning has passed this object to training_step already. Its content
        # is saved here, and restored in on_train_batch_end.
        drawn = self.draw("alignment")
        self._exchanged = dict(batch)
        batch.clear()
        batch.update(drawn)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._exchanged is not None:  # the user's data set may own the object and return it again
            batch.clear()
            batch.update(self._exchanged)
            self._exchanged = None

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        step = trainer.global_step
        on_alignment = self.stream_at(step) == "alignment"
        recorded: dict[str, float | Tensor] = {"alignment_steps": float(on_alignment)}
        logged: dict[str, float | Tensor] = {"lisa/alignment": float(on_alignment)}
        if self.proximal > 0 and extend(self._anchor, pl_module) and self.space == "delta":
            self._pairs = _factor_pairs(pl_module)
        # At a phase switch the current weights are the other phase's last iterate: they become the anchor before the
        # pull is computed, so that the first step of a phase has no pull.
        if self.proximal > 0 and step > 0 and self.stream_at(step) != self.stream_at(step - 1):
            ended = {name: p.detach() for name, p in trainable(pl_module).items()}
            drift = norm(difference(ended, self._anchor))
            recorded |= {"switches": 1.0, "drift": drift}
            logged["lisa/drift"] = drift
            for name, p in ended.items():
                self._anchor[name].copy_(p)
        if self.proximal > 0 and step > self.quiet * self._planned:
            pull = self._pull(pl_module)
            recorded |= {"pulls": 1.0, "pull_norm": (length := norm(pull))}
            logged["lisa/pull_norm"] = length
            logged["lisa/loss_gradient_norm"] = norm(
                {name: p.grad for name, p in trainable(pl_module).items() if p.grad is not None}
            )
            add_to_grad(pl_module, pull)
        self.record(**recorded)
        pl_module.log_dict(logged)

    def _pull(self, pl_module: LightningModule) -> Vector:
        """Return the pull on every trainable weight: on LoRA's product for paired factors, else on the tensor."""
        weights = {name: p.detach() for name, p in trainable(pl_module).items()}
        paired = {name for pair in self._pairs for name in pair[:2]}
        others = {name: w for name, w in weights.items() if name not in paired}
        pull = proximal_pull(others, self._anchor, self.proximal) if others else {}
        products: Vector = {}
        for b, a, scale in self._pairs:
            now, then = ([whole(vector[name]) for name in (b, a)] for vector in (weights, self._anchor))
            products[b], products[a] = update_pull(now[0], now[1], then[0], then[1], self.proximal * scale**2)
        return pull | placed(products, pl_module)

    def _length(self, trainer: Trainer) -> int:
        """Return the planned optimizer steps of the run, or 0 if they are unknown and not needed.

        Raises:
            ValueError: if they are unknown, and ``cycles`` or ``quiet`` needs them.
        """
        planned = trainer.estimated_stepping_batches
        if 0 < planned < math.inf:
            return int(planned)
        if self.cycles or self.quiet:
            raise ValueError(
                "Lisa: quiet and cycles need the length of the run, which is unknown; set max_steps on the Trainer, or"
                " set quiet=0 and cycles=0."
            )
        return 0

    def _look_at_the_end(self) -> None:
        """Refuse a run that ends in its first alignment phase, and warn if it ends inside a later one."""
        align, finetune = self._phases
        if not (self._planned and align and finetune):
            return
        if self._planned <= align:
            raise ValueError(
                f"Lisa: a run of {self._planned} steps ends within the first alignment phase of {align} steps, so it"
                " never reaches the user's data. Train longer, lower align_steps, or set cycles=3 to shrink the phases."
            )
        if self.stream_at(self._planned - 1) == "alignment":
            rank_zero_warn(
                f"Lisa: {self._planned} steps in phases of {align} and {finetune} end inside an alignment phase. The"
                " model is then safer, and less adapted to the task, than at the end of a cycle."
            )


def _factor_pairs(pl_module: LightningModule) -> list[tuple[str, str, float]]:
    """Return the parameter names of B and A, and the scale, of each trained LoRA layer.

    Raises:
        ValueError: if there is no plain LoRA adapter, or only one factor of a layer is trained.
    """
    names = {id(p): name for name, p in trainable(pl_module).items()}
    try:
        updates = lora_updates(pl_module).values()
    except TypeError as error:
        raise ValueError(
            "Lisa: space 'delta' needs the product of LoRA's factors, and this model has no plain LoRA adapter"
            f" ({error}) Use space='factors'."
        ) from error
    pairs = [(names.get(id(u.b)), names.get(id(u.a)), u.scale) for u in updates]
    if any((b is None) != (a is None) for b, a, _ in pairs):
        raise ValueError("Lisa: space 'delta' needs both factors of a layer trained; use space='factors'.")
    return [(b, a, scale) for b, a, scale in pairs if b is not None and a is not None]
