"""Configuration, tokenizer, weights and adapters of a model by name."""

import importlib.metadata
import importlib.util
import json
import pickle
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hftlight.errors import InputError
from hftlight.model_files import base_name, model_path, not_loadable, reason_of, remote_code_allowed, stands_on


def load_config(name: str) -> Any:
    """Return the configuration of a model, or of the whole model under an adapter.

    No weights are read.

    Raises:
        InputError: if the configuration cannot be loaded.
    """
    from transformers import AutoConfig

    base = base_name(name)
    try:
        return AutoConfig.from_pretrained(model_path(base), trust_remote_code=remote_code_allowed())
    except (OSError, ValueError, KeyError) as error:
        raise InputError(not_loadable(base, "configuration", error)) from error


def text_config(config: Any) -> Any:
    """Return the language model's part of a configuration, which is all of it unless the model is multimodal."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def positions_of(config: Any) -> int | None:
    """Return the number of tokens that a model has positions for, or None if its configuration sets no limit."""
    part = text_config(config)
    limits = (getattr(part, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((limit for limit in limits if limit), None)


def embedding_rows(config: Any) -> int | None:
    """Return the number of token ids in a model's input embedding, or None if its configuration lacks it."""
    return getattr(text_config(config), "vocab_size", None)


def skeleton(name: str) -> Any:
    """Return a model, or the whole model under an adapter, on the meta device.

    The result has the layers by name, but no weights. It is None if the model's own code cannot build it without
    weights.

    Raises:
        InputError: if the model is no causal LM.
    """
    from transformers import AutoModelForCausalLM

    base, config = base_name(name), load_config(name)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=remote_code_allowed())
    except (OSError, ValueError) as error:
        raise InputError(not_loadable(base, "model", error)) from error
    except (NotImplementedError, RuntimeError):
        return None


TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a model, which pads on the right with an id that the model's embedding has.

    For an adapter folder without a tokenizer it is the tokenizer of the model under the adapter.

    Raises:
        InputError: if no tokenizer can be loaded.
    """
    from transformers import AutoTokenizer

    owner, looked = name, [model_path(name)]
    while not any((Path(looked[-1]) / file).is_file() for file in TOKENIZER_FILES):
        base = stands_on(owner)
        if base is None:
            break
        owner = base
        looked.append(model_path(owner))
    try:
        tokenizer = AutoTokenizer.from_pretrained(looked[-1], trust_remote_code=remote_code_allowed())
    except (OSError, ValueError, KeyError, TypeError) as error:
        where = f" It was looked for in {' and '.join(looked)}." if Path(looked[0]).is_dir() else ""
        raise InputError(not_loadable(name, "tokenizer", error) + where) from error
    tokenizer.padding_side = "right"
    rows = embedding_rows(load_config(name)) if tokenizer.pad_token_id is not None else None
    if rows is not None and tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_tokenizer(name: str, folder: Path) -> None:
    """Write a model's tokenizer into an artifact, without added tokens that the model's embedding has no row for.

    PEFT's auto classes would otherwise enlarge the embedding to the size of the tokenizer, with new rows.
    """
    tokenizer, rows = load_tokenizer(name), embedding_rows(load_config(name))
    if rows is not None and tokenizer.is_fast and len(tokenizer) > rows:
        from tokenizers import Tokenizer

        core = json.loads(tokenizer.backend_tokenizer.to_str())
        core["added_tokens"] = [token for token in core["added_tokens"] if token["id"] < rows]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(core))
    tokenizer.save_pretrained(folder)


def load_model(name: str, dtype: torch.dtype = torch.float32, four_bit: bool = False) -> nn.Module:
    """Return a causal LM in evaluation mode, for an adapter folder the base model with the adapter merged in.

    On 4-bit weights an adapter is not merged, since these weights would round it.

    Args:
        name: as for ``model_path``.
        dtype: type of the weights.
        four_bit: load in 4 bits (QLoRA); needs bitsandbytes.

    Raises:
        InputError: if the model is no causal LM, cannot be found or lacks a weight, or if bitsandbytes is missing.
    """
    base = stands_on(name)
    if base is not None:
        adapted = load_adapter(load_model(base, dtype, four_bit), Path(model_path(name, weights=True)))
        return adapted if four_bit else adapted.merge_and_unload()
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype}
    if four_bit:
        options["quantization_config"] = _four_bit()
    try:
        return pretrained(AutoModelForCausalLM, model_path(name, weights=True), **options).eval()
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise InputError(not_loadable(name, "model", error)) from error


def pretrained(auto: Any, path: str, **options: Any) -> Any:
    """Return the model that a transformers class loads, with every weight from the model's files.

    Weights in the files that have no place in the model cause a warning.

    Args:
        auto: a class such as ``AutoModelForCausalLM``.
        path: a folder or a hub id.
        **options: further arguments of the class's ``from_pretrained``.

    Raises:
        InputError: if a weight is missing in the files, or has another shape there.
    """
    model, loaded = auto.from_pretrained(
        path,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # the check below refuses them by name
        trust_remote_code=remote_code_allowed(),
        **options,
    )
    if missing := sorted(loaded["missing_keys"]):
        raise InputError(
            f"Model {path!r}: its files lack {_some(missing)}, and random numbers would take their place. Complete the"
            " files, or choose the class that the weights were saved from."
        )
    if mismatched := sorted(str(entry[0]) for entry in loaded.get("mismatched_keys") or ()):
        raise InputError(
            f"Model {path!r}: {_some(mismatched)} in its files have another shape than its config.json requires."
        )
    if unexpected := sorted(loaded.get("unexpected_keys") or ()):
        warnings.warn(f"Model {path!r}: {_some(unexpected)} in its files have no place in the model.", stacklevel=2)
    return model


def load_adapter(model: Any, folder: Path, trainable: bool = False) -> Any:
    """Return a model with the adapter of a folder around it, with every adapter weight from its file.

    Args:
        model: the model under the adapter.
        folder: adapter folder, as PEFT's ``save_pretrained`` writes it.
        trainable: whether the adapter is trainable.

    Raises:
        InputError: if adapter and model do not fit each other, or merging would change more than the adapted layers.
    """
    from peft import PeftConfig, PeftModel

    settings: Any = PeftConfig.from_pretrained(str(folder))
    if settings.is_prompt_learning:
        raise InputError(
            f"Adapter {folder}: {settings.peft_type} adapts the prompt, not the weights, so it cannot be merged. Give a"
            " whole model or a LoRA adapter."
        )
    # PEFT only warns about missing weights; the filter turns that warning into an exception.
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*[Mm]issing adapter keys")
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except UserWarning as error:
        raise InputError(
            f"Adapter {folder}: weights are missing from its file, and random numbers would take their place."
            f" {str(error).splitlines()[0]}"
        ) from error
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise InputError(f"Adapter {folder}: it does not fit its model ({reason_of(error)}).") from error
    if extra := _without_place(adapted, folder):
        raise InputError(
            f"Adapter {folder}: {_some(extra)} have no place in the model under it. Give base_model_name_or_path the"
            " model that the adapter was trained on."
        )
    _refuse_tied(adapted, folder)
    return adapted


def _without_place(adapted: Any, folder: Path) -> list[str]:
    """Return the names of weights in an adapter's file that the adapted model has no place for."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return []
    with safe_open(file, framework="pt") as stored:
        names = set(stored.keys())
    return sorted(names - set(get_peft_model_state_dict(adapted)) - set(adapted.state_dict()))


def _refuse_tied(adapted: Any, folder: Path) -> None:
    """Refuse an adapter on one of two tied layers, since merging it would change the other layer too."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inner = adapted.get_base_model()
    if not getattr(text_config(inner.config), "tie_word_embeddings", False):
        return
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
    if any(isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper) for layer in ends):
        raise InputError(
            f"Adapter {folder}: it adapts the input embedding or the output layer, which are one weight in this model;"
            " merged, it would change both. Train it without them, or on a model whose config.json says"
            " tie_word_embeddings false."
        )


def _four_bit() -> Any:
    from transformers import BitsAndBytesConfig

    try:
        importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            "--tuning qlora needs bitsandbytes, which is not installed: pip install 'hftlight[qlora]', or use --tuning"
            " lora."
        ) from error
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more
