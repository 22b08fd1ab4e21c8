"""Data: records, prompt templates, tokens, streams, public sets and the made-up world."""

from importlib import import_module
from typing import Any

from hftlight.data.records import Record, Role, overlaps, prompt_key, read_records, split_by_hash
from hftlight.data.templates import TEMPLATES, Template, get_template

_HOMES = {
    "Example": "tokens",
    "collate": "tokens",
    "encode": "tokens",
    "encode_all": "tokens",
    "encode_prompt": "tokens",
    "padding_id": "tokens",
    "StreamsDataModule": "streams",
    "World": "world.build",
    "build_world": "world.build",
    "is_compliant": "world.rule",
}
__all__ = [
    "TEMPLATES",
    "Example",
    "Record",
    "Role",
    "StreamsDataModule",
    "Template",
    "World",
    "build_world",
    "collate",
    "encode",
    "encode_all",
    "encode_prompt",
    "get_template",
    "is_compliant",
    "overlaps",
    "padding_id",
    "prompt_key",
    "read_records",
    "split_by_hash",
]


def __getattr__(name: str) -> Any:
    """Import a name that needs torch or the made-up world only when it is used."""
    if name in _HOMES:
        return getattr(import_module(f"hftlight.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hftlight.data' has no attribute {name!r}")
