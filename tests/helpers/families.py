"""Six families of causal LMs as tiny random folders with a byte tokenizer, as users would supply them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.helpers.tokenizers import CHATML, byte_tokenizer

IDS, POSITIONS = 259, 512
WIDE: dict[str, Any] = {
    "vocab_size": IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
SPECIAL = {name: WIDE[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**WIDE, num_key_value_heads=2),
    "qwen": lambda: transformers.Qwen3Config(**WIDE, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
    "gemma": lambda: transformers.Gemma3TextConfig(**WIDE, num_key_value_heads=1, head_dim=8, sliding_window=64),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**WIDE),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=IDS, n_embd=32, n_layer=2, n_head=4, n_positions=POSITIONS, **SPECIAL
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=IDS,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        **SPECIAL,
    ),
}


def write_family(folder: Path, family: str, chat_template: str = CHATML, **changes: Any) -> Path:
    """Write a random model of a family and its tokenizer, and return the folder.

    Args:
        folder: the target folder.
        family: one of ``FAMILIES``.
        chat_template: jinja text.
        **changes: overrides of the configuration.
    """
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer(chat_template=chat_template).save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    """Return a model's logits of a fixed row, float32 ``[tokens, ids]``."""
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        row_logits: torch.Tensor = model.eval()(input_ids=ids).logits[0].float()
    return row_logits
