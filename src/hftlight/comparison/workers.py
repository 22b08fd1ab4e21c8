"""Workers: run the cells of a comparison in this process, in several processes, or on a Ray cluster."""

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
from hftlight.files import full_disk, write_json, write_text
from hftlight.registry import made
from hftlight.runs.ranks import main_process

ERROR, LOG, STARTED = "error.txt", "log.txt", "started.json"
SPEC, OUTCOME = "cell.json", "outcome.txt"  # files of a cell on several devices: its values, and its error if any
LOCK_WAIT = 30.0  # longest wait in seconds for the lock of a cell whose process is about to end
LOST = 10  # nodes or processes that one attempt at a cell may lose on a Ray cluster
RAY_PORT = 6379  # where ``ray start --head`` listens
Backend = Literal["processes", "ray"]


def run_cell(spec: Mapping[str, Any]) -> str:
    """Run one cell and return its error in one line, empty on success. The output of the cell goes to its log.

    A cell on several devices runs as a separate command, because Lightning repeats its own command for each further
    device. Repeating the comparison's command would start a second comparison.
    """
    config = spec["config"]
    if config["devices"] * config["num_nodes"] == 1:
        return _run_here(spec)
    folder = Path(config["output"]) / str(config["name"])
    folder.mkdir(parents=True, exist_ok=True)
    each = max(1, spec["threads"] // config["devices"])
    write_json(folder / SPEC, {**spec, "threads": each})
    # An old outcome must go first: the file tells below whether the command came to its end.
    (folder / OUTCOME).unlink(missing_ok=True)
    with (folder / LOG).open("a") as log, _environment(OMP_NUM_THREADS=str(each)):
        command = [sys.executable, "-m", "hftlight.comparison.workers", str(folder / SPEC)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    if (folder / OUTCOME).is_file():
        return (folder / OUTCOME).read_text()
    return f"RuntimeError: the cell's command ended with status {done.returncode}; see {folder / LOG}"


def main(path: str) -> None:
    """Run one process of a cell on several devices. ``path`` is the file of the cell's values."""
    _end_with(os.getppid())
    error = _run_here(json.loads(Path(path).read_text()))
    if main_process():
        write_text(Path(path).with_name(OUTCOME), error)
    sys.exit(1 if error else 0)


def _run_here(spec: Mapping[str, Any]) -> str:
    """Run one cell, and return its error in one line, empty on success.

    On several devices, all processes of the cell's command run it together.
    """
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
            except Exception:  # the traceback is for the report, which shows why the cell is missing
                if first:
                    (folder / ERROR).write_text(traceback.format_exc())
                raise
    except Exception as error:
        return _in_one_line(error, folder)
    if first:
        (folder / ERROR).unlink(missing_ok=True)
    return ""


def _once_unlocked(folder: Path, work: Callable[[], object]) -> None:
    """Run a cell. If another process holds its lock, wait for up to ``LOCK_WAIT`` seconds.

    A process that is being killed may hold the lock for a short time.
    """
    until = time.monotonic() + LOCK_WAIT
    while True:
        try:
            _remove_cut_manifest(folder)
            work()
            return
        except InputError as error:
            if not isinstance(error.__cause__, Timeout) or time.monotonic() > until:
                raise
        time.sleep(0.5)


def _in_one_line(error: BaseException, folder: Path | None = None) -> str:
    """Return an error in one line. If a disk is full, the line names the folders and the way out."""
    said = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no message')}"
    full = full_disk(error, folder) if folder else None
    return f"{said}. {full}" if full else said


def _remove_cut_manifest(folder: Path) -> None:
    """Remove a manifest that was cut off, because the run could not resume with it."""
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
    """Yield each cell with its error as it ends. The error is empty on success.

    Args:
        specs: the cells, as plain values.
        jobs: number of processes on this machine.
        backend: where the cells run.
        on_cell: called with a cell and ``"started"``.
        gpus: ``CUDA_VISIBLE_DEVICES`` of each process on this machine. An empty sequence leaves the variable unchanged.
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
    """Watcher of cells in other processes. It reads the start files in the cells' folders, which every node sees.

    Args:
        specs: the cells.
        tell: called with a cell each time it starts.
    """

    def __init__(self, specs: Mapping[Cell, Mapping[str, Any]], tell: Callable[[Cell], None]) -> None:
        self.tell = tell
        self.files = {c: Path(s["config"]["output"]) / c.name / STARTED for c, s in specs.items()}
        # Modification time of each start file, in nanoseconds; 0 if the cell has not started.
        self.known = {cell: self._time(cell) for cell in specs}

    def _time(self, cell: Cell) -> int:
        try:
            return self.files[cell].stat().st_mtime_ns
        except OSError:
            return 0

    def look(self) -> None:
        """Report the cells that have started since the last call."""
        for cell, before in self.known.items():
            if (now := self._time(cell)) != before:
                self.known[cell] = now
                self.tell(cell)


class _Worker(SpawnProcess):
    """Process that sees only its own GPUs, from its start on."""

    gpus: Iterator[str] | None = None  # one value per process that starts next; set only in the parent process

    def start(self) -> None:
        with _environment(**({GPUS: next(self.gpus)} if self.gpus else {})):
            super().start()


class _Workers(SpawnContext):
    Process = _Worker  # type: ignore[assignment]


def _with_processes(
    specs: Mapping[Cell, Mapping[str, Any]], jobs: int, starts: _Starts, gpus: Sequence[str]
) -> Iterator[tuple[Cell, str]]:
    """Run the cells in processes of this machine.

    A process that dies, for example out of memory, breaks its pool. Cells that had not started then go to a new pool.
    Cells that had started are tried again one at a time. So a cell fails only if its own process dies.
    """
    left, alone = dict(specs), {}
    with _environment(OMP_NUM_THREADS=str(next(iter(specs.values()))["threads"] if specs else 1)):
        while left:
            before, waiting, error = starts.known.copy(), left, ""
            left = {}
            for cell, error, died in _in_pool(waiting, jobs, starts, gpus):
                if not died:
                    yield cell, error
                elif starts.known[cell] != before[cell]:  # started: its process may be the one that died
                    alone[cell] = specs[cell]
                else:
                    left[cell] = specs[cell]
            if len(left) == len(waiting):  # no cell could start, so that a new pool would break too
                yield from ((cell, error) for cell in left)
                break
        for cell, spec in alone.items():
            yield from ((cell, error) for _, error, _ in _in_pool({cell: spec}, 1, starts, gpus))


def _in_pool(
    specs: Mapping[Cell, Mapping[str, Any]], jobs: int, starts: _Starts, gpus: Sequence[str] = ()
) -> Iterator[tuple[Cell, str, bool]]:
    """Yield each cell, its error (empty on success), and whether the pool broke before the cell ended."""
    settings: dict[str, Any] = {"initializer": _end_with, "initargs": (os.getpid(),)}
    # Every process that starts takes the next value.
    _Worker.gpus = cycle(gpus) if gpus else None
    with ProcessPoolExecutor(jobs, mp_context=_Workers(), **settings) as pool:
        futures: dict[Future[str], Cell] = {pool.submit(run_cell, spec): cell for cell, spec in specs.items()}
        while futures:
            ended, _ = wait(futures, timeout=1, return_when=FIRST_COMPLETED)
            starts.look()
            for future in ended:
                error = future.exception()
                outcome = _in_one_line(error) if error is not None else future.result()
                yield futures.pop(future), outcome, isinstance(error, BrokenProcessPool)


def _end_with(parent: int) -> None:
    """End this process once its parent is gone, so that a killed comparison leaves no process that holds locks."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for processes that start inside the block, and restore them afterwards."""
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
    """Run the cells on a Ray cluster. A cell whose node dies restarts on another node and resumes."""
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
    finally:  # after Ctrl-C too: no worker may continue a cell that nobody waits for
        for reference in waiting:
            ray.cancel(reference, force=True)
        if own:
            ray.shutdown()


def _connect() -> None:
    """Connect to the cluster at ``RAY_ADDRESS``, by default that of this machine.

    A socket tests the address first, because Ray hangs if nothing listens there.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS") or f"127.0.0.1:{RAY_PORT}"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False)
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        raise InputError(
            f"--backend ray: no Ray cluster answers at {address} ({_in_one_line(error)}). Start one with `ray start"
            f" --head`, and on every other node `ray start --address=HEAD:{RAY_PORT}`; RAY_ADDRESS=HOST:PORT names a"
            " cluster on another machine."
        ) from error


def _share(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cores and GPUs of one cell. Its cores are at most those of the smallest node.

    Raises:
        InputError: if no node has a core, or no node has the GPUs that a cell needs.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    config = spec["config"]
    gpus = max((int(node.get("GPU", 0)) for node in nodes), default=0)
    # With accelerator "auto" a cell takes GPUs only if the cluster has some.
    wanted = config["devices"] if config["accelerator"] != "cpu" and (gpus or config["accelerator"] == "gpu") else 0
    if wanted > gpus or not cores:
        raise InputError(
            f"--backend ray: a cell needs one core and {wanted} GPUs on one node. The largest node has {gpus} GPUs, and"
            f" {len(cores)} nodes have a core. Lower --devices, or add nodes."
        )
    return {"num_cpus": min(spec["threads"], *cores), "num_gpus": wanted}


def _shared_variables() -> dict[str, str]:
    """Return the environment variables of the workers: the path of this code, and the ``HFTLIGHT_*`` variables."""
    code, own = str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [code, *(os.path.abspath(path) for path in own if path)]
    settings = {name: value for name, value in os.environ.items() if name.startswith("HFTLIGHT_")}
    return {**settings, "PYTHONPATH": os.pathsep.join(paths)}


if __name__ == "__main__":
    main(*sys.argv[1:])
