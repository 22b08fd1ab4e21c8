"""SafetyModule: a Hugging Face causal language model as a LightningModule."""

import math
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from hftlight.data.tokens import IGNORED
from hftlight.engine.activations import hooked


class SafetyModule(LightningModule):
    """Any Hugging Face causal LM, full parameters, LoRA or QLoRA, trained on response tokens only.

    Checkpoints hold the trainable parameters alone; the frozen ones come with the model.

    Args:
        model: a causal LM, or a PEFT model around one; parameters that shall not train have ``requires_grad`` off.
        lr: learning rate, > 0.
        weight_decay: AdamW's decoupled weight decay, >= 0; unused by SGD.
        optimizer: ``"adamw"`` or ``"sgd"``.
        schedule: ``"constant"``, which takes no warm-up, or ``"cosine"`` down to 0.
        warmup_ratio: fraction of all steps over which the cosine schedule rises linearly, in [0, 1).
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 5e-4,
        weight_decay: float = 0.1,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        schedule: Literal["constant", "cosine"] = "constant",
        warmup_ratio: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.lr, self.weight_decay, self.optimizer_name = lr, weight_decay, optimizer
        self.schedule, self.warmup_ratio = schedule, warmup_ratio
        self.strict_loading = False

    def token_losses(self, batch: dict[str, Any]) -> Tensor:
        """Return the next-token cross-entropy of every response token, in nats.

        Logits are formed at response positions only: the hidden states are selected in front of the output layer.

        Args:
            batch: ``input_ids``, ``attention_mask`` and ``labels``, each int64 ``[batch, tokens]``; labels are -100
                where nothing is learned.

        Returns:
            ``[response tokens of the batch]``, row by row, at least float32.

        Raises:
            ValueError: if every label is masked.
        """
        targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED).flatten()
        chosen = (targets != IGNORED).nonzero().squeeze(1)
        if len(chosen) == 0:
            raise ValueError(
                f"SafetyModule: all labels of a batch of {len(batch['labels'])} rows are masked, so there is nothing to"
                f" learn; labels other than {IGNORED} must stand on response tokens."
            )

        def select(_: str, hidden: Tensor) -> Tensor:
            return hidden.flatten(0, 1)[chosen]

        head = self.model.get_output_embeddings()  # type: ignore[operator]
        with hooked({"head": head}, select, inputs=True):
            output = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        logits = output.logits if output.logits.dtype == torch.float64 else output.logits.float()
        return F.cross_entropy(logits, targets[chosen], reduction="none")

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the mean of ``token_losses(batch)``, in nats per response token; 0-d."""
        return self.token_losses(batch).mean()

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss.detach(), batch_size=len(batch["input_ids"]))
        return loss

    @override
    def configure_model(self) -> None:
        """Shard layer by layer under ``ModelParallelStrategy`` (FSDP2); otherwise nothing."""
        mesh = self.device_mesh
        if mesh is None or getattr(self, "_sharded", False):
            return
        from torch.distributed.fsdp import fully_shard

        for layer in decoder_layers(self.model):
            fully_shard(layer, mesh=mesh["data_parallel"])
        fully_shard(self.model, mesh=mesh["data_parallel"])
        self._sharded = True

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer
        if self.optimizer_name == "sgd":
            optimizer = torch.optim.SGD(parameters, lr=self.lr)
        else:
            optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        if self.schedule == "constant":
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = LambdaLR(optimizer, lambda step: cosine_factor(step, steps, self.warmup_ratio))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {name: t for name, t in checkpoint["state_dict"].items() if name in trained}


def cosine_factor(step: int, steps: int, warmup_ratio: float) -> float:
    """Return the learning-rate factor of a linear warm-up followed by half a cosine down to 0, both in steps."""
    warmup = round(warmup_ratio * steps)
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


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
        f"{type(model).__name__} has no list of {count} decoder layers; it cannot be sharded layer by layer."
    )
