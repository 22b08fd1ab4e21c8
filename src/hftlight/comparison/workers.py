"""Where the cells of a comparison run: in this process, in several of this machine, or on a Ray cluster."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from itertools import cycle
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any, Literal

from filelock import Timeout

from hftlight.attacks.registry import get_attack
from hftlight.comparison.grid import Cell
from hftlight.comparison.share import GPUS, threads
from hftlight.config import RunConfig
from hftlight.errors import InputError
from hftlight.files import cache_dir, write_json, write_text
from hftlight.registry import made
from hftlight.runs.ranks import main_process

ERROR, LOG, STARTED = "error.txt", "log.txt", "started.json"
SPEC, OUTCOME = "cell.json", "outcome.txt"  # of a cell on several devices: its values, and its error or nothing
LOCK_WAIT = 30.0  # seconds for which a process that is about to end may still hold a cell's lock
LOST = 10  # nodes or processes that one attempt at a cell may lose on a Ray cluster
RAY_PORT = 6379  # where ``ray start --head`` listens
Backend = Literal["processes", "ray"]


def run_cell(spec: Mapping[str, Any]) -> str:
    """Run one cell; return nothing, or the error in one line. Its output goes into its log.

    A cell on several devices is a command of its own: Lightning runs the command again for each further device, and
    that of a comparison would be a second comparison.
    """
    config = spec["config"]
    if config["devices"] * config["num_nodes"] == 1:
        return _run_here(spec)
    folder = Path(config["output"]) / str(config["name"])
    folder.mkdir(parents=True, exist_ok=True)
    each = max(1, spec["threads"] // config["devices"])
    write_json(folder / SPEC, {**spec, "threads": each})
    (folder / OUTCOME).unlink(missing_ok=True)
    with (folder / LOG).open("a") as log, _environment(OMP_NUM_THREADS=str(each)):
        command = [sys.executable, "-m", "hftlight.comparison.workers", str(folder / SPEC)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    if (folder / OUTCOME).is_file():
        return (folder / OUTCOME).read_text()
    return f"RuntimeError: the cell's command ended with status {done.returncode}; see {folder / LOG}"


def main(path: str) -> None:
    """Be one process of a cell on several devices; ``path`` is the file of its values."""
    _end_with(os.getppid())
    error = _run_here(json.loads(Path(path).read_text()))
    if main_process():
        write_text(Path(path).with_name(OUTCOME), error)
    sys.exit(1 if error else 0)


def _run_here(spec: Mapping[str, Any]) -> str:
    """Run one cell in this process, or with those that the same command has started beside it."""
    from hftlight.console import quiet
    from hftlight.runs.run import run

    config = RunConfig.of(spec["config"])
    folder = Path(config.output) / str(config.name)
    chosen = [made(name, **spec["arguments"].get(name, {})) for name in config.defense]
    attack = get_attack(config.attack)(**spec["arguments"].get(config.attack, {}))
    quiet()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        first = main_process()
        where = {"host": socket.gethostname(), "process": os.getpid(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        if first:
            write_json(folder / STARTED, where)
        with (folder / LOG).open("a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
            print("started on {host}, process {process}, {time}".format(**where))
            try:
                with threads(spec["threads"]):
                    _once_unlocked(folder, lambda: run(config, chosen, attack))
            except Exception:
                if first:
                    (folder / ERROR).write_text(traceback.format_exc())
                raise
    except Exception as error:
        return _in_one_line(error, folder)
    if first:
        (folder / ERROR).unlink(missing_ok=True)
    return ""


def _once_unlocked(folder: Path, work: Callable[[], object]) -> None:
    """Run a cell; wait for some seconds where a process that is being killed still holds its lock."""
    until = time.monotonic() + LOCK_WAIT
    while True:
        try:
            _set_aside_half_written(folder)
            work()
            return
        except InputError as error:
            if not isinstance(error.__cause__, Timeout) or time.monotonic() > until:
                raise
        time.sleep(0.5)


def _in_one_line(error: BaseException, folder: Path | None = None) -> str:
    said = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no message')}"
    cause: BaseException | None = error
    while cause is not None and not _no_space(cause):
        cause = cause.__cause__ or cause.__context__
    if cause is None or folder is None:
        return said
    file = getattr(cause, "filename", None)
    places = dict.fromkeys([str(folder), str(Path(file).parent if file else cache_dir())])
    return (
        f"{said}. The disk of {' or '.join(places)} is full: make room (`hftlight cache list` shows what is kept, and"
        " HFTLIGHT_CACHE and --output move it), then give the same command again; finished cells are kept."
    )


def _no_space(error: BaseException) -> bool:
    """Tell whether an error is a full disk; safetensors has it in its words alone."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def _set_aside_half_written(folder: Path) -> None:
    """Remove a manifest that was cut off, which would keep the run from going on."""
    path = folder / "manifest.json"
    if path.is_file():
        try:
            json.loads(path.read_text())
        except ValueError:
            path.unlink()


def work(
    specs: Mapping[Cell, Mapping[str, Any]],
    jobs: int,
    backend: Backend,
    on_cell: Callable[[Cell, str], None] | None,
    gpus: Sequence[str] = (),
) -> Iterator[tuple[Cell, str]]:
    """Yield each cell with its error, or with nothing, as they end.

    Args:
        specs: the cells, as plain values.
        jobs: processes on this machine.
        backend: where the cells run.
        on_cell: called with a cell and ``"started"``.
        gpus: ``CUDA_VISIBLE_DEVICES`` of each process on this machine; nothing leaves it as it is.
    """

    def tell(cell: Cell) -> None:
        if on_cell is not None:
            on_cell(cell, "started")

    if backend == "ray":
        yield from _with_ray(specs, _Starts(specs, tell))
    elif jobs == 1:
        from hftlight.models.base import drop_base

        try:
            for cell, spec in specs.items():
                tell(cell)
                yield cell, run_cell(spec)
        finally:
            drop_base()
    else:
        yield from _with_processes(specs, jobs, _Starts(specs, tell), gpus)


class _Starts:
    """Cells that other processes have started, as their folders say, which every node sees.

    Args:
        specs: the cells.
        tell: called with a cell each time it starts.
    """

    def __init__(self, specs: Mapping[Cell, Mapping[str, Any]], tell: Callable[[Cell], None]) -> None:
        self.tell = tell
        self.files = {c: Path(s["config"]["output"]) / c.name / STARTED for c, s in specs.items()}
        self.known = {cell: self._time(cell) for cell in specs}

    def _time(self, cell: Cell) -> int:
        try:
            return self.files[cell].stat().st_mtime_ns
        except OSError:
            return 0

    def look(self) -> None:
        """Tell of the cells that have started since the last look."""
        for cell, before in self.known.items():
            if (now := self._time(cell)) != before:
                self.known[cell] = now
                self.tell(cell)


class _Worker(SpawnProcess):
    """A process that sees GPUs of its own, from its start on."""

    gpus: Iterator[str] | None = None  # of the processes to come; in this process alone

    def start(self) -> None:
        with _environment(**({GPUS: next(self.gpus)} if self.gpus else {})):
            super().start()


class _Workers(SpawnContext):
    Process = _Worker  # type: ignore[assignment]


def _with_processes(
    specs: Mapping[Cell, Mapping[str, Any]], jobs: int, starts: _Starts, gpus: Sequence[str]
) -> Iterator[tuple[Cell, str]]:
    """Run the cells in processes of this machine.

    A process that dies (out of memory, say) takes its pool with it. Cells that had not begun then go to a new pool, and
    those that had are tried again one at a time, so that only a cell whose own process dies fails.
    """
    left, alone = dict(specs), {}
    with _environment(OMP_NUM_THREADS=str(next(iter(specs.values()))["threads"] if specs else 1)):
        while left:
            before, waiting, error = starts.known.copy(), left, ""
            left = {}
            for cell, error, died in _in_pool(waiting, jobs, starts, gpus):
                if not died:
                    yield cell, error
                elif starts.known[cell] != before[cell]:
                    alone[cell] = specs[cell]
                else:
                    left[cell] = specs[cell]
            if len(left) == len(waiting):  # not one of them could even begin
                yield from ((cell, error) for cell in left)
                break
        for cell, spec in alone.items():
            yield from ((cell, error) for _, error, _ in _in_pool({cell: spec}, 1, starts, gpus))


def _in_pool(
    specs: Mapping[Cell, Mapping[str, Any]], jobs: int, starts: _Starts, gpus: Sequence[str] = ()
) -> Iterator[tuple[Cell, str, bool]]:
    """Yield each cell with its error, or with nothing, and whether the pool broke before the cell had ended."""
    settings: dict[str, Any] = {"initializer": _end_with, "initargs": (os.getpid(),)}
    _Worker.gpus = cycle(gpus) if gpus else None
    with ProcessPoolExecutor(jobs, mp_context=_Workers(), **settings) as pool:
        futures: dict[Future[str], Cell] = {pool.submit(run_cell, spec): cell for cell, spec in specs.items()}
        while futures:
            ended, _ = wait(futures, timeout=1, return_when=FIRST_COMPLETED)
            starts.look()
            for future in ended:
                error = future.exception()
                said = _in_one_line(error) if error is not None else future.result()
                yield futures.pop(future), said, isinstance(error, BrokenProcessPool)


def _end_with(parent: int) -> None:
    """End this process when its parent is gone, so that a killed comparison leaves nothing behind that holds locks."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set variables for the processes that start inside the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _with_ray(specs: Mapping[Cell, Mapping[str, Any]], starts: _Starts) -> Iterator[tuple[Cell, str]]:
    """Run the cells on a Ray cluster; a cell whose node dies starts again on another one and resumes."""
    try:
        import ray
    except ImportError as error:
        raise InputError('--backend ray needs Ray: pip install "hftlight[ray]".') from error
    own = not ray.is_initialized()
    if own:
        _connect()
    remote = ray.remote(run_cell)
    waiting: dict[Any, Cell] = {}
    try:
        for cell, spec in specs.items():
            share = _share(spec)
            reference = remote.options(max_retries=LOST, runtime_env={"env_vars": _shared_variables()}, **share)
            waiting[reference.remote({**spec, "threads": share["num_cpus"]})] = cell
        while waiting:
            ended, _ = ray.wait(list(waiting), num_returns=1, timeout=1)
            starts.look()
            for reference in ended:
                cell = waiting.pop(reference)
                try:
                    yield cell, ray.get(reference)
                except Exception as error:
                    yield cell, _in_one_line(error)
    finally:  # Ctrl-C too: no worker goes on with a cell that nobody waits for
        for reference in waiting:
            ray.cancel(reference, force=True)
        if own:
            ray.shutdown()


def _connect() -> None:
    """Connect to the cluster at ``RAY_ADDRESS``; tried by hand first, since Ray itself hangs where nobody listens."""
    import ray

    address = os.environ.get("RAY_ADDRESS") or f"127.0.0.1:{RAY_PORT}"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False)
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        raise InputError(
            f"--backend ray: no Ray cluster answers at {address} ({_in_one_line(error)}). Start one with `ray start"
            f" --head`, and on every other node `ray start --address=HEAD:{RAY_PORT}`; RAY_ADDRESS=HOST:PORT names one"
            " that is not on this machine."
        ) from error


def _share(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cores and GPUs of one cell, no more cores than the smallest node has.

    Raises:
        InputError: if no node has the GPUs that a cell needs.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    config = spec["config"]
    gpus = max((int(node.get("GPU", 0)) for node in nodes), default=0)
    wanted = config["devices"] if config["accelerator"] != "cpu" and (gpus or config["accelerator"] == "gpu") else 0
    if wanted > gpus or not cores:
        raise InputError(
            f"--backend ray: a cell needs a node with a core and {wanted} GPUs, the cluster's best node has {gpus}"
            f" GPUs, and {len(cores)} nodes have cores. Lower --devices, or add nodes."
        )
    return {"num_cpus": min(spec["threads"], *cores), "num_gpus": wanted}


def _shared_variables() -> dict[str, str]:
    """Return what the workers on all nodes take over: where this code lies, and the ``HFTLIGHT_*`` variables."""
    code, own = str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [code, *(os.path.abspath(path) for path in own if path)]
    given = {name: value for name, value in os.environ.items() if name.startswith("HFTLIGHT_")}
    return {**given, "PYTHONPATH": os.pathsep.join(paths)}


if __name__ == "__main__":
    main(*sys.argv[1:])
