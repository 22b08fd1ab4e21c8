"""Repair models under one strategy, after a training with learning rate 0: ``STRATEGY FOLDER``.

The folder contains the base and the aligned model. The repaired models go into ``FOLDER/STRATEGY``. The harmful stream
and the pairs have four batches each, which two processes share.
"""

import sys
from pathlib import Path

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from hftlight import SafetyModule
from hftlight.defenses.post_finetuning import RESTA, SOMF, Antidote, SafeLoRA, SafetyLock, TaskArithmetic
from tests.helpers.quadratic import quiet_trainer
from tests.helpers.repairs import batch_of, moved_model, with_update

TRAINED = [batch_of([[3, 5, 7, 11], [2, 4, 6, 8]])]
HARMFUL = [batch_of([[3 + k, 5, 7], [2, 4 + k]]) for k in range(4)]
PAIRS = [{**batch_of([[9, 2 + k, 5, 7, 1], [9, 2 + k, 20 + k, 1]]), "pairs": 1} for k in range(4)]
for pair in PAIRS:
    pair["labels"][:, :2] = -100
ALIKE = [{**batch_of([[3, 5, 7, 9], [3, 5, 2, 4], [6, 8, 1, 4], [6, 8, 9, 9]]), "pairs": 2}] * 4  # alike on all ranks


def cases(folder: Path, out: Path):
    """Return name -> (model to train, its repairs)."""
    base, aligned = str(folder / "base"), str(folder / "aligned")
    streams = {"harmful": HARMFUL}

    def model():
        return AutoModelForCausalLM.from_pretrained(aligned)

    def place(name: str) -> str:
        return str(out / name)

    return {
        "delta": (
            with_update(model()),
            [
                SafeLoRA(fraction=0.5, base=base, output=place("delta-projected")),
                Antidote(0.2, "delta", "matrix", streams=streams, output=place("delta-pruned")),
            ],
        ),
        "factor": (
            with_update(model()),
            [
                SafeLoRA(2, operator="normalized", base=base, aligned=aligned, output=place("factor-projected")),
                Antidote(0.2, "factor", "model", streams=streams, output=place("factor-pruned")),
            ],
        ),
        "locked": (
            with_update(model()),
            [SafetyLock(3, tokens=2, streams={"pairs": PAIRS}, output=place("locked"))],
        ),
        "sum": (
            with_update(model()),
            [
                RESTA(0.5, 0.3, unaligned=base, output=place("sum-added")),
                TaskArithmetic(0.5, 0.7, keep=0.1, aligned=aligned, unaligned=base, output=place("sum-trimmed")),
            ],
        ),
        "mask": (
            with_update(model()),
            [
                TaskArithmetic(0.7, output=place("mask-scaled")),
                SOMF(steps=2, streams={"pairs": ALIKE}, output=place("mask-learned")),
            ],
        ),
        "full": (
            moved_model(model(), 0.05, seed=2),
            [
                SOMF("row", 2, streams={"pairs": ALIKE}, aligned=aligned, output=place("full-masked")),
                SafeLoRA(fraction=0.5, base=base, aligned=aligned, output=place("full-projected")),
                Antidote(0.1, "delta", "row", streams=streams, aligned=aligned, output=place("full-pruned")),
            ],
        ),
    }


def main(strategy: str, folder: str) -> None:
    for model, repairs in cases(Path(folder), Path(folder) / strategy).values():
        chosen = {
            "one": lambda: "auto",
            "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
            "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        }[strategy]()
        trainer = quiet_trainer(
            strategy=chosen,
            devices=1 if strategy == "one" else 2,
            max_steps=1,
            use_distributed_sampler=False,
            callbacks=repairs,
        )
        module = SafetyModule(model.train(), lr=0.0, optimizer="sgd")
        trainer.fit(module, DataLoader(TRAINED, batch_size=None))
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
