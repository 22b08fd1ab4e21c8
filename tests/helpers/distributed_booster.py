"""Train Booster on a tiny model under one strategy and save the trained weights: ``STRATEGY OUTPUT``.

Global batch number k holds rows ``4 k .. 4 k + 3``; two processes take two rows each, with equally many
response tokens.
"""

import sys

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader

from hftlight import SafetyModule
from hftlight.defenses import Booster
from tests.helpers.quadratic import quiet_trainer
from tests.helpers.tiny_lm import tiny_lm, token_batch

STEPS, MICRO = 4, 2


class Share(torch.utils.data.Dataset):
    """This rank's rows of each global batch."""

    def __init__(self, seed: int, count: int) -> None:
        self.batches = [token_batch(seed + k, rows=4, ragged=False) for k in range(count)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        rows = 4 // world
        return {name: t[rank * rows : (rank + 1) * rows] for name, t in self.batches[index].items()}


class Harmful(list):
    """Ready batches that every rank reads whole in the same order, each taking its rows."""

    def __init__(self) -> None:
        share = Share(500, STEPS)
        world = dist.get_world_size() if dist.is_initialized() else 1
        super().__init__(share[k] for k in range(STEPS) for _ in range(world))


class LateBooster(Booster):
    """Booster whose harmful batches are made once the process group exists."""

    def setup(self, trainer, pl_module, stage):
        self._loaders = {"harmful": Harmful()}
        super().setup(trainer, pl_module, stage)


def main(strategy: str, output: str) -> None:
    chosen = {
        "one": "auto",
        "ddp": DDPStrategy(process_group_backend="gloo"),
        "fsdp2": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    }[strategy]
    module = SafetyModule(tiny_lm(lora=True, dtype=torch.float32), lr=0.1, optimizer="sgd")
    trainer = quiet_trainer(
        strategy=chosen,
        devices=1 if strategy == "one" else 2,
        max_steps=STEPS,
        accumulate_grad_batches=MICRO,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        callbacks=[LateBooster(lam=5.0, alpha=0.1)],
    )
    trainer.fit(module, DataLoader(Share(0, STEPS * MICRO), batch_size=None))
    weights = {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()
        for name, p in module.named_parameters()
        if p.requires_grad
    }
    if trainer.is_global_zero:
        torch.save(weights, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
