"""Lightning's own callbacks and compiled models, together with every defense."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor

from hftlight import SafetyModule
from hftlight.engine import Defense
from hftlight.registry import defenses
from tests.helpers.contract import model_of, rows, train, weights_of
from tests.helpers.tiny_lm import tiny_lm

LATE, LATE_AT, DECAY = "layers.1.self_attn.o_proj", 2, 0.5


class UnfreezeLater(BaseFinetuning):
    """Freezes one layer until optimizer step ``LATE_AT``."""

    def __init__(self) -> None:
        super().__init__()
        self.late: list[Tensor] = []
        self.start: list[Tensor] = []
        self.waits = True

    def freeze_before_training(self, pl_module: Any) -> None:
        self.late = [p for name, p in pl_module.named_parameters() if LATE in name and p.requires_grad]
        self.start = [p.detach().clone() for p in self.late]
        for p in self.late:
            p.requires_grad_(False)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == LATE_AT and self.waits:
            self.waits = False
            for p in self.late:
                p.requires_grad_(True)
            lr = trainer.optimizers[0].param_groups[0]["lr"]
            trainer.optimizers[0].add_param_group({"params": self.late, "lr": lr})

    def finetune_function(self, *_: Any) -> None:
        """Do nothing per epoch."""


CALLBACKS: dict[str, Callable[[], list[Callback]]] = {
    "LearningRateFinder": lambda: [LearningRateFinder(num_training_steps=2)],
    "BaseFinetuning": lambda: [UnfreezeLater()],
    "StochasticWeightAveraging": lambda: [StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)],
    "EMAWeightAveraging": lambda: [EMAWeightAveraging(decay=DECAY)],
    "GradientAccumulationScheduler": lambda: [GradientAccumulationScheduler({0: 2})],
    "ModelCheckpoint": lambda: [ModelCheckpoint(save_last=True)],
    "torch.compile": list,
}


STRATEGIES = {"ddp": "DDPStrategy", "fsdp2": "ModelParallelStrategy"}  # other tests train with them


def table() -> str:
    """Return a Markdown table: which callback, compiled model and strategy works with which defense, by number."""
    names = [name for name, entry in defenses().items() if entry.module.startswith("hftlight.")]
    lines = [f"| | {' | '.join(str(i + 1) for i in range(len(names)))} |", f"|---{'|---' * len(names)}|"]
    for place, word in {**{name: name for name in CALLBACKS}, **STRATEGIES}.items():
        cells = ["–" if place in rows()[name].refuses else "●" for name in names]
        lines.append(f"| `{word}` | {' | '.join(cells)} |")
    return "\n".join(lines)


class Trajectory(Callback):
    """Keeps the weights before the first and after each optimizer step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights = [weights_of(pl_module)]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == len(self.weights):
            self.weights.append(weights_of(pl_module))


def fit_with(
    name: str, callbacks: list[Callback], folder: Any, compiled: bool = False, defense: Any = None
) -> tuple[Defense, SafetyModule]:
    """Train the tiny model with one defense's row and further callbacks. Return the defense and the module."""
    defense = rows()[name].make() if defense is None else defense
    if "output" in defense.arguments():
        defense.output = str(folder / "repaired")
        for need in {"base", "unaligned"} & set(defense.needs):
            setattr(defense, need, str(folder / need))
            tiny_lm(seed=1, dtype=torch.float64, vocabulary=259).save_pretrained(folder / need)
        if rows()[name].thin:
            defense.aligned = str(folder / "aligned")
            adapter: Any = tiny_lm(lora=True, dtype=torch.float64, vocabulary=259)
            adapter.peft_config["default"].base_model_name_or_path = defense.base
            adapter.save_pretrained(defense.aligned)
    tuning = rows()[name].tunings[0]
    model: Any = model_of(tuning)
    model = torch.compile(model, backend="eager") if compiled else model
    checkpointing = any(isinstance(c, (LearningRateFinder, ModelCheckpoint)) for c in callbacks)
    module = train(
        [defense],
        tuning,
        model=model,
        callbacks=callbacks,
        default_root_dir=str(folder),
        enable_checkpointing=checkpointing,
    )
    return defense, module
