"""Seconds per step and memory of Booster against plain fine-tuning, in one run: ``python benchmarks/booster.py``.

Plain and defended steps alternate on the same batch, so that both see the same machine; the floor is three passes.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
from hftlight import SafetyModule
from hftlight.cli import quiet
from hftlight.config import Lora, RunConfig
from hftlight.defenses import Booster
from hftlight.runs.artifact import trainable_model


class Alternating(Booster):
    """Booster in every second step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step % 2:
            super().on_before_optimizer_step(trainer, pl_module, optimizer)


class Clock(Callback):
    def __init__(self):
        self.seconds = []

    def on_train_batch_start(self, *args):
        self.since = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, *args):
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.since)


class Same(torch.utils.data.Dataset):
    def __init__(self, batch, length):
        self.batch, self.length = batch, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.batch


def measure(config: RunConfig, pairs: int, rows: int, tokens: int) -> None:
    module = SafetyModule(trainable_model(config, None), lr=1e-4)
    ids = torch.randint(10, 200, (rows, tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    batch["labels"][:, : tokens // 2] = -100
    clock = Clock()
    trainer = Trainer(
        max_steps=2 * pairs + 4,
        accelerator=config.accelerator,
        devices=1,
        precision=config.precision,
        gradient_clip_val=1.0,
        callbacks=[Alternating(streams={"harmful": [batch]}), clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Same(batch, 2 * pairs + 4), batch_size=None))
    plain, defended = clock.seconds[4::2], clock.seconds[5::2]
    ratios = sorted(d / p for d, p in zip(defended, plain, strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    print(
        f"{config.model} {config.tuning}, {rows} x {tokens} tokens, {len(ratios)} pairs: SFT"
        f" {statistics.median(plain):.3f} s/step, Booster {statistics.median(defended):.3f} s/step, ratio median"
        f" {statistics.median(ratios):.3f} (quartiles {low:.3f} to {high:.3f}; three passes are the floor)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--pairs", type=int, default=15, help="alternating pairs of steps (default 15)")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--precision", default="32-true")
    options = parser.parse_args()
    quiet()
    for tuning in ("lora", "full"):
        config = RunConfig(model=options.model, tuning=tuning, accelerator=options.accelerator, lora=Lora())
        config.precision = options.precision
        measure(config, options.pairs, options.rows, options.tokens)


if __name__ == "__main__":
    main()
