"""Models: where they come from, how they are loaded, adapted, trained and served."""

import warnings
from importlib import import_module
from typing import Any

# Names that stood here until 0.2.0. They go with 0.3.0.
MOVED = {
    "load_model": "hftlight.models.load",
    "load_tokenizer": "hftlight.models.load",
    "model_hash": "hftlight.model_files",
    "model_path": "hftlight.model_files",
}


def __getattr__(name: str) -> Any:
    """Return a name that moved, with a warning."""
    if name not in MOVED:
        raise AttributeError(f"module 'hftlight.models' has no attribute {name!r}")
    warnings.warn(f"hftlight.models.{name} is now {MOVED[name]}.{name}.", DeprecationWarning, stacklevel=2)
    return getattr(import_module(MOVED[name]), name)
