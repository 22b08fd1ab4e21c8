"""SafetyModule: a Hugging Face causal language model as a LightningModule."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR
from typing_extensions import override

from hftlight.data.tokens import IGNORED
from hftlight.engine.step.activations import captured, hooked
from hftlight.engine.step.vectors import trainable


class SafetyModule(LightningModule):
    """Any Hugging Face causal LM with full parameters, LoRA or QLoRA, trained on response tokens only.

    Checkpoints hold only the trainable parameters; the frozen parameters come with the model.

    Args:
        model: a causal LM, or a PEFT model around one. Parameters that must not train have ``requires_grad`` off.
        lr: learning rate, > 0.
        weight_decay: AdamW's decoupled weight decay, >= 0; unused by SGD.
        optimizer: ``"adamw"`` or ``"sgd"``.
        schedule: ``"constant"``, which takes no warm-up, or ``"cosine"`` down to 0.
        warmup_ratio: fraction of all steps over which the cosine schedule rises linearly, in [0, 1).
        betas: AdamW's decay rates of the moments, each in [0, 1).
        decay: factor on a constant learning rate after each epoch, in (0, 1].

    Raises:
        ValueError: if ``decay`` is out of range, or below 1 with the cosine schedule.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 5e-4,
        weight_decay: float = 0.1,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        schedule: Literal["constant", "cosine"] = "constant",
        warmup_ratio: float = 0.0,
        betas: Sequence[float] = (0.9, 0.999),
        decay: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 < decay <= 1 or (decay < 1 and schedule != "constant"):
            raise ValueError(
                f"SafetyModule: decay must lie in (0, 1], and a decay below 1 needs the constant schedule, got"
                f" {decay} and {schedule!r}."
            )
        self.model = model
        self.betas, self.decay = (betas[0], betas[1]), decay
        self.lr, self.weight_decay, self.optimizer_name = lr, weight_decay, optimizer
        self.schedule, self.warmup_ratio = schedule, warmup_ratio
        self.strict_loading = False
        self.loss_terms: list[LossTerm] = []
        self.parameter_groups: Callable[[dict[str, nn.Parameter]], list[dict[str, Any]]] | None = None
        self.curves: dict[str, Any] | None = None  # from here a run's ``Curves`` takes logged values
        self._aligned: Reference | None = None

    @override
    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """Log a value as Lightning does, except that in a run ``Curves`` passes it to the loggers."""
        if self.curves is None or options.get("logger") is False:
            super().log(name, value, *args, **options)
            return
        super().log(name, value, *args, **{**options, "logger": False})
        if self._current_fx_name == "on_train_epoch_end":  # a resumed stage does not run this hook again
            return
        if options.get("sync_dist"):  # the mean over processes, if Lightning has computed it
            value = self.trainer.callback_metrics.get(name, value)
        self.curves[name] = value.detach().clone() if isinstance(value, Tensor) else value

    def token_losses(self, batch: dict[str, Any]) -> Tensor:
        """Return the next-token cross-entropy of every response token, in nats.

        Logits are computed at response positions only, since the hidden states are selected before the output layer.

        Args:
            batch: ``input_ids``, ``attention_mask`` and ``labels``, each int64 ``[batch, tokens]``; labels are -100 on
                tokens without a loss.

        Returns:
            ``[response tokens of the batch]``, row by row, at least float32.

        Raises:
            ValueError: if every label is masked.
        """
        return self.run(self.model, batch).token_losses

    def run(self, model: nn.Module, batch: dict[str, Any], taps: Mapping[str, nn.Module] | None = None) -> "Forward":
        """Return one forward pass of a model at the response positions of a batch.

        Args:
            model: this module's model, or another causal LM.
            batch: as for ``token_losses``.
            taps: layers, by any name, whose outputs go into ``Forward.features``.

        Raises:
            ValueError: if every label is masked.
        """
        # Position t predicts token t + 1: shift the labels left by one, and index the flattened [batch * tokens].
        targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED).flatten()
        chosen = (targets != IGNORED).nonzero().squeeze(1)
        if len(chosen) == 0:
            raise ValueError(
                f"SafetyModule: all labels of a batch of {len(batch['labels'])} rows are masked, so there is nothing to"
                f" learn; labels other than {IGNORED} must stand on response tokens."
            )

        def select(_: str, hidden: Tensor) -> Tensor:
            return hidden.flatten(0, 1)[chosen]

        head = model.get_output_embeddings()  # type: ignore[operator]
        with hooked({"head": head}, select, inputs=True), captured(taps or {}) as features:
            output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        logits = output.logits if output.logits.dtype == torch.float64 else output.logits.float()
        losses = F.cross_entropy(logits, targets[chosen], reduction="none")
        return Forward(batch, losses, logits, targets[chosen], chosen, features)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the mean of ``token_losses(batch)`` in nats per response token, 0-d."""
        return self.token_losses(batch).mean()

    def reference(self) -> "Reference":
        """Return the aligned model: the weights that training starts from, frozen.

        The first call must come before training starts. ``Defense.setup`` makes it for the loss slot.
        """
        if self._aligned is None:
            self._aligned = Reference(self.model)
        return self._aligned

    def forget_reference(self) -> None:
        """Remove the aligned model, since a later training starts from other weights."""
        if self._aligned is not None:
            self._aligned.remove()
            self._aligned = None

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if self.loss_terms or "window_tokens" in batch:
            return self._assembled(batch)
        loss = self.loss(batch)
        self.log("train/loss", loss.detach(), batch_size=len(batch["input_ids"]))
        return loss

    def _assembled(self, batch: dict[str, Any]) -> Tensor:
        """Return the loss with the terms and token weights of the loss slot."""
        taps = {name: layer for term in self.loss_terms for name, layer in term.taps(self.model).items()}
        forward = self.run(self.model, batch, taps)
        forward.reference_pass = lambda: self._reference_pass(batch)
        losses = forward.token_losses
        weights = [w for term in self.loss_terms if (w := term.token_weights(forward)) is not None]
        # At most one defense may claim token weights. ``window_tokens`` turns Lightning's mean over micro-batches and
        # ranks into a mean over all their tokens.
        weighted = losses * weights[0] if weights else losses
        tokens = batch.get("window_tokens")
        loss = weighted.mean() if tokens is None else weighted.sum() / tokens
        for term in self.loss_terms:
            if (value := term.loss_term(forward)) is not None:
                loss = loss + value
        self.log("train/loss", losses.detach().mean(), batch_size=len(batch["input_ids"]))
        return loss

    def _reference_pass(self, batch: dict[str, Any]) -> "Forward":
        reference = self.reference()
        with reference.at_work() as model:
            taps = {name: layer for term in self.loss_terms for name, layer in term.taps(model).items()}
            return self.run(model, batch, taps)

    @override
    def configure_model(self) -> None:
        """Shard the model layer by layer under ``ModelParallelStrategy`` (FSDP2), else do nothing."""
        mesh = self.device_mesh
        if mesh is None or getattr(self, "_sharded", False):
            return
        from torch.distributed.fsdp import fully_shard

        # Layers come first: the call on the whole model then shards only the remaining parameters.
        copies = self._aligned.copies if self._aligned is not None else []
        for model in (self.model, *copies):
            for layer in decoder_layers(model):
                fully_shard(layer, mesh=mesh["data_parallel"])
            fully_shard(model, mesh=mesh["data_parallel"])
        self._sharded = True

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        named = trainable(self)
        parameters = list(named.values()) if self.parameter_groups is None else self.parameter_groups(named)
        optimizer: torch.optim.Optimizer
        if self.optimizer_name == "sgd":
            optimizer = torch.optim.SGD(parameters, lr=self.lr)
        else:
            optimizer = torch.optim.AdamW(parameters, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        if self.decay < 1:
            by_epoch = ExponentialLR(optimizer, self.decay)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": by_epoch, "interval": "epoch"}}
        if self.schedule == "constant":
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = LambdaLR(optimizer, lambda step: cosine_factor(step, steps, self.warmup_ratio))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if getattr(getattr(self._trainer, "strategy", None), "_save_distributed_checkpoint", False):
            return  # each rank writes its shards, and loading requires all parameters
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {name: t for name, t in checkpoint["state_dict"].items() if name in trained}


@dataclass
class Forward:
    """One forward pass at the response positions of a batch.

    N is the number of response tokens of the batch. Tensors of length N go through the batch row by row.

    Attributes:
        batch: the input batch.
        token_losses: next-token cross-entropy in nats, ``[N]``, at least float32.
        logits: ``[N, vocabulary]``, at least float32.
        targets: the response tokens themselves, int64 ``[N]``.
        positions: position that predicts each response token, as an index into the flattened ``[batch, tokens]``,
            int64 ``[N]``.
        features: first output tensor of each requested layer, ``[batch, tokens, hidden]``.
        reference_pass: function that computes ``reference``; None outside training.
    """

    batch: dict[str, Any]
    token_losses: Tensor
    logits: Tensor
    targets: Tensor
    positions: Tensor
    features: dict[str, Tensor]
    reference_pass: "Callable[[], Forward] | None" = None

    @property
    def rows(self) -> Tensor:
        """Row in the batch of each response token, int64 ``[N]``."""
        return self.positions // self.batch["labels"].shape[1]

    @property
    def places(self) -> Tensor:
        """Place of each response token within its response, from 0, int64 ``[N]``."""
        # As in ``run``, position t belongs to token t + 1, so the counts are shifted left by one.
        counted = (self.batch["labels"][:, 1:] != IGNORED).cumsum(1) - 1
        return F.pad(counted, (0, 1)).flatten()[self.positions]

    @cached_property
    def reference(self) -> "Forward":
        """The aligned model's pass over the same batch, without gradient and dropout.

        The pass is computed once, at the first use.

        Raises:
            RuntimeError: if this pass was computed outside training.
        """
        if self.reference_pass is None:
            raise RuntimeError(
                "Forward: the aligned model's pass exists in training steps with a loss-slot defense only."
            )
        return self.reference_pass()


class LossTerm(Protocol):
    """Methods of a loss-slot defense that ``SafetyModule`` calls."""

    def taps(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the layers, by any name, whose outputs the loss term reads."""

    def loss_term(self, forward: Forward) -> Tensor | None:
        """Return the term to add to the loss of this micro-batch, 0-d in nats, or None for no term."""

    def token_weights(self, forward: Forward) -> Tensor | None:
        """Return the factor of every response token's loss, ``[N]``, without gradient, or None for no factors."""


class Reference:
    """The aligned model: the weights that a model has now, stored for later passes.

    An adapter with B = 0 does not change the model's outputs yet, and is switched off, which costs nothing. Any other
    adapter is copied into a second, frozen adapter. A model without an adapter is copied whole.

    Args:
        model: a causal LM, with or without PEFT around it; not sharded yet.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._adapter: str | None = None
        self.copies: list[nn.Module] = []  # a list is no submodule, so the copy is neither trained nor saved
        if not hasattr(model, "peft_config"):
            copied = copy.deepcopy(model).requires_grad_(False)
            self.copies.append(copied)
        elif any(bool(p.detach().any()) for name, p in model.named_parameters() if "lora_B" in name):
            self._adapter = _frozen_twin(model)

    @contextmanager
    def at_work(self) -> Iterator[nn.Module]:
        """Yield the aligned model in evaluation mode and without gradients, then restore all modes and adapters."""
        model: Any = self.copies[0].to(next(self._model.parameters()).device) if self.copies else self._model
        training = {module: module.training for module in model.modules()}
        off = nullcontext() if self.copies else self._switched(model)
        try:
            with torch.no_grad(), off:
                model.eval()
                yield model
        finally:
            for module, mode in training.items():
                module.training = mode

    def remove(self) -> None:
        """Remove the frozen adapter or the copy that was added for the aligned model."""
        if self._adapter is not None:
            # Deleting an adapter may change ``requires_grad`` of other parameters, so the flags are restored.
            flags = {p: p.requires_grad for p in self._model.parameters()}
            self._model.delete_adapter(self._adapter)  # type: ignore[operator]
            for p in self._model.parameters():
                p.requires_grad_(flags[p])
        self.copies.clear()

    @contextmanager
    def _switched(self, model: Any) -> Iterator[None]:
        if self._adapter is None:
            with model.disable_adapter():
                yield
            return
        # Each set_adapter changes ``requires_grad``, so the flags are restored.
        active = model.active_adapter
        flags = {p: p.requires_grad for p in model.parameters()}
        try:
            model.set_adapter(self._adapter)
            yield
        finally:
            model.set_adapter(active)
            for p, flag in flags.items():
                p.requires_grad_(flag)


def _frozen_twin(model: Any) -> str:
    """Add a frozen adapter with the weights of the active adapter and return its name."""
    name, active = "aligned", model.active_adapter
    flags = {p: p.requires_grad for p in model.parameters()}
    model.add_adapter(name, model.peft_config[active])
    values = dict(model.named_parameters())
    for key, p in values.items():
        if f".{name}." in key:
            p.data.copy_(values[key.replace(f".{name}.", f".{active}.")].data)
            p.requires_grad_(False)
    model.set_adapter(active)  # set_adapter makes the whole adapter trainable, frozen layers too
    for p, flag in flags.items():
        p.requires_grad_(flag)
    return name


def cosine_factor(step: int, steps: int, warmup_ratio: float) -> float:
    """Return the learning-rate factor at a step: a linear warm-up from 0, then half a cosine down to 0.

    Args:
        step: the optimizer step, from 0.
        steps: number of all optimizer steps.
        warmup_ratio: fraction of all steps in the warm-up, in [0, 1).
    """
    warmup = round(warmup_ratio * steps)
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def final_norm(model: nn.Module) -> nn.Module:
    """Return the norm between the last decoder layer and the output layer of a causal LM.

    Raises:
        TypeError: if the module that holds the decoder layers has no norm beside them, or several.
    """
    layers = decoder_layers(model)
    for module in model.modules():
        children = list(module.children())
        if any(child is layers for child in children):
            norms = [child for child in children if "norm" in type(child).__name__.lower()]
            if len(norms) == 1:
                return norms[0]
    raise TypeError(f"{type(model).__name__} does not have exactly one norm beside its decoder layers.")


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the list of decoder layers of a causal LM, with or without PEFT around it.

    Raises:
        TypeError: if no module list has as many entries as the model's config names hidden layers.
    """
    count = model.config.num_hidden_layers  # type: ignore[union-attr]
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise TypeError(
        f"{type(model).__name__} has no list of {count} decoder layers, so its layers cannot be addressed one by one."
    )
