"""hftlight: defenses against harmful fine-tuning as PyTorch Lightning callbacks."""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_HOMES = {
    "MeasureAt": "hftlight.runs.measuring.own",
    "SafetyModule": "hftlight.models.module",
    "StreamsDataModule": "hftlight.data.streams",
    "run": "hftlight.runs.run",
}
__all__ = ["MeasureAt", "SafetyModule", "StreamsDataModule", "__version__", "run"]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that ``--help`` prints without importing torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'hftlight' has no attribute {name!r}")
