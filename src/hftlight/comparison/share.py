"""What a cell of a comparison gets of this machine: a number of threads and GPUs of its own."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hftlight.errors import InputError

GPUS = "CUDA_VISIBLE_DEVICES"


def cores() -> int:
    """Return the number of cores that this process may use: its affinity, which a machine's count may exceed."""
    if hasattr(os, "process_cpu_count"):
        return os.process_cpu_count() or 1  # type: ignore[no-any-return]
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_each(jobs: int) -> int:
    """Return the threads of each of ``jobs`` cells: an equal share of the cores, at most ``OMP_NUM_THREADS``."""
    share = max(1, cores() // jobs)
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(share, int(given)) if given.isdigit() and int(given) > 0 else share


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the block with so many threads of torch, and put their number back, since it changes the last bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them; CUDA is not initialised."""
    import torch

    count = torch.cuda.device_count()
    named = [gpu.strip() for gpu in os.environ.get(GPUS, "").split(",") if gpu.strip()]
    return (named or [str(i) for i in range(count)])[:count]


def gpus_each(config: Mapping[str, Any], jobs: int, shared: bool) -> list[str]:
    """Return what ``CUDA_VISIBLE_DEVICES`` is to be for each of ``jobs`` cells; nothing where no GPU is used.

    Args:
        config: ``accelerator`` and ``devices`` of a cell.
        jobs: cells at one time.
        shared: several cells may have the same GPUs.

    Raises:
        InputError: if there are fewer GPUs than the cells need.
    """
    gpus = visible_gpus() if config["accelerator"] in ("auto", "gpu", "cuda") else []
    if not gpus:
        return []
    each = config["devices"]
    groups = [",".join(gpus[i : i + each]) for i in range(0, len(gpus) - each + 1, each)]
    if not groups or (len(groups) < jobs and not shared):
        fitting = f"--jobs {len(groups)}" if groups else f"--devices {len(gpus)}"
        raise InputError(
            f"--jobs {jobs} with --devices {each} needs {jobs * each} GPUs, one cell's own each, and {len(gpus)} can be"
            f" seen ({', '.join(gpus)}). Lower it to {fitting}, or"
            + (" let cells share GPUs with --share_gpus." if groups else " use a larger machine.")
        )
    return [groups[i % len(groups)] for i in range(jobs)]
