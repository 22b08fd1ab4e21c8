"""Reads offline W&B runs back from W&B's own files."""

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7


@dataclass
class OfflineRun:
    """One offline run: its names, final state, configuration, history and summary."""

    folder: Path
    state: str = "crashed"
    group: str = ""
    job_type: str = ""
    name: str = ""
    tags: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> set[str]:
        """Names of all logged values, without W&B's own bookkeeping."""
        names = {key for row in self.history for key in row} | self.summary.keys()
        return {name for name in names if not name.startswith("_")} - {"trainer/global_step"}

    def table(self, name: str) -> dict[str, Any]:
        """Return a table's columns and data."""
        loaded: dict[str, Any] = json.loads((self.folder / "files" / self.summary[name]["path"]).read_text())
        return loaded


def _records(path: Path) -> Iterator[bytes]:
    """Yield the records of a file in blocks of 32 KiB. A record that crosses a block border is stored in pieces."""
    data = path.read_bytes()
    at, whole = HEADER, b""
    while at + HEADER <= len(data):
        # The end of a block is padding if too short for a header.
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if at + HEADER + length > len(data):
            return
        whole += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


def _items(items: Any) -> dict[str, Any]:
    """Return values by name. A table or a picture, stored field by field, is one value."""
    values: dict[str, Any] = {}
    for item in items:
        name, *field = item.nested_key or [item.key]
        if field:
            values.setdefault(name, {})["/".join(field)] = json.loads(item.value_json)
        else:
            values[name] = json.loads(item.value_json)
    return values


def read_offline(folder: Path, patience: float = 20.0) -> list[OfflineRun]:
    """Return all offline runs below a folder. Wait up to ``patience`` seconds until every run has ended."""
    until = time.monotonic() + patience
    paths = sorted(folder.rglob("offline-run-*/run-*.wandb"))
    while not all(_read(path)[1] for path in paths) and time.monotonic() < until:
        time.sleep(0.1)
    return [_read(path)[0] for path in paths]


def _read(path: Path) -> tuple[OfflineRun, bool]:
    """Return a run with all records so far, and whether the run has ended."""
    run = OfflineRun(path.parent)
    for data in _records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            r = record.run
            run.group, run.job_type, run.name, run.tags = r.run_group, r.job_type, r.display_name, tuple(r.tags)
            run.config |= _items(r.config.update)
        elif kind == "history":
            run.history.append(_items(record.history.item))
        elif kind == "summary":
            run.summary |= _items(record.summary.update)
        elif kind == "exit":
            run.state = "failed" if record.exit.exit_code else "finished"
    return run, run.state != "crashed"
