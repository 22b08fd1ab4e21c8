"""Small models before and after an alignment or fine-tuning, and shards of a matrix without processes."""

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hftlight.engine.weights.shards import Share
from tests.helpers.tiny_lm import VOCABULARY


def small_llama(seed: int = 0, bias: bool = False, tied: bool = False, dtype: torch.dtype = torch.float64) -> Any:
    """Return a random two-layer Llama of plain transformers."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=bias,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    if bias:
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(p)
    return model.to(dtype).eval()


def moved_model(model: Any, size: float, seed: int) -> Any:
    """Return a copy of a model with random noise on its matrices."""
    config = model.config
    other = LlamaForCausalLM(config).to(model.dtype).eval()
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            if p.dim() == 2:
                p += size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    return other


def with_update(model: Any, seed: int = 0, **settings: Any) -> Any:
    """Return a PEFT model with a random update, as if a user had trained it."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}
    adapted: Any = get_peft_model(model, LoraConfig(**{**options, **settings}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if ".lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return adapted.to(model.dtype).eval()


def batch_of(rows: list[list[int]], width: int | None = None) -> dict[str, Tensor]:
    """Return rows of token ids as a right-padded batch."""
    width = width or max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@dataclass
class Table:
    """Exchanges values between threads that act as ranks."""

    world: int
    values: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.world, timeout=60)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        # Without the second wait, a fast thread would overwrite a value before a slow one reads it.
        everyone = [self.values[r] for r in range(self.world)]
        self.barrier.wait()
        return everyone


@dataclass(frozen=True)
class HandShare(Share):
    """Rows of a matrix that belong to one of several threads of this process."""

    table: Table | None = None
    rank: int = 0

    def sum(self, *parts: Tensor) -> list[Tensor]:
        everyone = self.table.exchange(self.rank, parts)
        return [torch.stack([theirs[i] for theirs in everyone]).sum(dim=0) for i in range(len(parts))]

    def gather(self, value: Any) -> tuple[list[Any], int]:
        return self.table.exchange(self.rank, value), self.rank


def on_shards(sizes: list[int], work: Any) -> list[Any]:
    """Run ``work(share)`` for consecutive shards of these numbers of rows, each in a thread, and return the results."""
    table, results, errors = Table(len(sizes)), {}, []

    def run(rank: int, start: int) -> None:
        try:
            with torch.no_grad():
                results[rank] = work(HandShare(start, start + sizes[rank], sum(sizes), None, table, rank))
        except BaseException as error:
            errors.append(error)
            table.barrier.abort()

    starts = [sum(sizes[:rank]) for rank in range(len(sizes))]
    threads = [threading.Thread(target=run, args=(rank, start)) for rank, start in enumerate(starts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(len(sizes))]
