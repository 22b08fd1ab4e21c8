"""Resources of a cell on this machine: its number of threads and its GPUs."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hftlight.errors import InputError

GPUS = "CUDA_VISIBLE_DEVICES"


def cores() -> int:
    """Return the number of cores that this process may use. The machine may have more cores."""
    if hasattr(os, "process_cpu_count"):
        return os.process_cpu_count() or 1  # type: ignore[no-any-return]
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_each(jobs: int) -> int:
    """Return the number of threads per cell: an equal share of the cores, at most ``OMP_NUM_THREADS``."""
    # OMP_NUM_THREADS may list one number per nesting level; the first one counts.
    share = max(1, cores() // jobs)
    limit = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(share, int(limit)) if limit.isdigit() and int(limit) > 0 else share


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the block with ``count`` threads of torch, then restore the previous number.

    The number of threads changes the last bits of a result.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them.

    The function does not initialise CUDA.
    """
    import torch

    count = torch.cuda.device_count()
    named = [gpu.strip() for gpu in os.environ.get(GPUS, "").split(",") if gpu.strip()]
    # The variable may name more GPUs than the driver accepts.
    return (named or [str(i) for i in range(count)])[:count]


def gpus_each(config: Mapping[str, Any], jobs: int, shared: bool) -> list[str]:
    """Return the ``CUDA_VISIBLE_DEVICES`` of each of ``jobs`` cells. The list is empty if no GPU is used.

    Args:
        config: values of a cell; ``accelerator`` and ``devices`` are read.
        jobs: number of cells that run at one time.
        shared: whether several cells may use the same GPUs.

    Raises:
        InputError: if there are fewer GPUs than the cells need.
    """
    gpus = visible_gpus() if config["accelerator"] in ("auto", "gpu", "cuda") else []
    if not gpus:
        return []
    each = config["devices"]
    # Consecutive groups of ``devices`` GPUs. A rest that is too small for a group stays unused.
    groups = [",".join(gpus[i : i + each]) for i in range(0, len(gpus) - each + 1, each)]
    if not groups or (len(groups) < jobs and not shared):
        fitting = f"--jobs {len(groups)}" if groups else f"--devices {len(gpus)}"
        raise InputError(
            f"--jobs {jobs} with --devices {each} needs {jobs * each} GPUs, because every cell has its own. Visible"
            f" GPUs: {len(gpus)} ({', '.join(gpus)}). Use {fitting}, or"
            + (" let cells share GPUs with --share_gpus." if groups else " use a larger machine.")
        )
    return [groups[i % len(groups)] for i in range(jobs)]
