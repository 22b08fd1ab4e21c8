"""A whole model whose weights stay in its files: edits go straight to the disk, one matrix at a time.

The weights are views of memory-mapped files. A page that an edit has changed is written by the operating system, and a
page that is not in use costs no memory.
"""

import json
import mmap
import shutil
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from hftlight.errors import InputError
from hftlight.models.load import skeleton

INTERVAL = 0.05  # seconds between two releases of pages
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class _Pages(threading.Thread):
    """Takes the pages of mapped files out of this process again and again, so that they do not count as its memory.

    The pages stay in the file cache of the operating system while there is room, and come back from there.
    """

    def __init__(self, maps: Sequence[mmap.mmap]) -> None:
        super().__init__(name="pages of mapped weights", daemon=True)
        self.maps = maps
        self._ended = threading.Event()

    @override
    def run(self) -> None:
        while not self._ended.wait(INTERVAL):
            for pages in self.maps:
                pages.madvise(mmap.MADV_DONTNEED)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self.join()


def mapped_tensors(path: Path, maps: list[mmap.mmap], private: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file as writable views of the file.

    Args:
        path: the file.
        maps: receives the mapping.
        private: whether edits stay in memory and leave the file unchanged.

    Raises:
        InputError: if a tensor has a type that PyTorch does not map.
    """
    with path.open("rb" if private else "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY if private else mmap.ACCESS_WRITE)
    maps.append(pages)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise InputError(
                f"{path}: {name} is stored in {entry['dtype']}, which cannot be read. Write it in float32."
            )
        dtype, (start, stop) = DTYPES[entry["dtype"]], entry["data_offsets"]
        count = (stop - start) // dtype.itemsize
        flat = torch.frombuffer(pages, dtype=dtype, count=count, offset=8 + length + start) if count else torch.empty(0)
        tensors[name] = flat.view(entry["shape"])
    return tensors


@contextmanager
def mapped_model(folder: Path, private: bool = False) -> Iterator[nn.Module]:
    """Yield the model of a folder with weights that are views of its safetensors files. Edits change the files.

    The model cannot compute, since its other tensors are not loaded.

    Args:
        folder: a whole model, as ``save_pretrained`` writes it.
        private: whether edits stay in memory and leave the files unchanged.

    Raises:
        InputError: if the folder has no safetensors files, or a weight of the model is not in them.
    """
    model: Any = skeleton(str(folder))
    if model is None:
        raise InputError(f"{folder}: the code of this model cannot build it without its weights. Repair it in memory.")
    maps: list[mmap.mmap] = []
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= mapped_tensors(path, maps, private)
    names = {name: name if name in found else name.partition(".")[2] for name in model.state_dict()}
    tied = {*(getattr(model, "_tied_weights_keys", None) or ())} if model.config.tie_word_embeddings else set()
    if missing := [name for name, stored in names.items() if stored not in found and name not in tied]:
        raise InputError(
            f"{folder}: {missing[0]} is in none of the safetensors files. Write the model with save_pretrained."
        )
    model.load_state_dict({n: found[s] for n, s in names.items() if s in found}, strict=False, assign=True)
    model.tie_weights()
    with _Pages([] if private else maps):  # releasing a private page would lose an edit
        yield model.requires_grad_(False).eval()
    for pages in maps:
        pages.flush()


def copy_model(source: Path, target: Path) -> None:
    """Copy the files of a model folder, without the marks that hftlight or a hub writes beside them.

    Args:
        source: a whole model.
        target: an existing folder.

    Raises:
        InputError: if the disk has no room for the copy.
    """
    files = [path for path in source.iterdir() if path.is_file() and not path.name.startswith(".")]
    needed, free = sum(path.stat().st_size for path in files), shutil.disk_usage(target).free
    if needed > free:
        raise InputError(
            f"{target}: the repaired model takes {needed / 2**30:.1f} GiB, but the disk has {free / 2**30:.1f} GiB"
            " free. Choose another output."
        )
    for path in files:
        shutil.copyfile(path, target / path.name)
