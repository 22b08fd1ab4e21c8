"""A comparison: a run for each cell of defenses x attacks x harmful ratios x tasks x seeds, parallel and resumable."""

import errno
import json
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from hftlight.attacks.attack import Attack
from hftlight.attacks.registry import get_attack
from hftlight.config import Data, Evaluation, Lora, RunConfig, Search, Training
from hftlight.engine import Defense, Stage
from hftlight.errors import InputError
from hftlight.files import cache_dir, digest, ensure_writable, write_json
from hftlight.registry import defense_class
from hftlight.runs.prepare import prepare

SHARED = 3  # pieces of a run that cells with one aligned model share: base measured, alignment, aligned measured
DEFAULT_ATTACK = "harmful_mix"
CELLS, GRID, ERROR, LOG, STARTED = "cells", "grid.json", "error.txt", "log.txt", "started.json"
LOCK_WAIT = 30.0  # seconds for which a process that is about to end may still hold a cell's lock
LOST = 10  # nodes or processes that one attempt at a cell may lose on a Ray cluster
RAY_PORT = 6379  # where ``ray start --head`` listens
Backend = Literal["processes", "ray"]


@dataclass(frozen=True, order=True)
class Cell:
    """One run of a comparison.

    Attributes:
        defenses: names of the defenses; none is the undefended arm.
        harmful_ratio: p, harmful fraction of the upload, 0-1.
        task: the user's task, as ``--data.task`` takes it.
        seed: the run's seed.
        attack: what is uploaded, as ``--attack`` takes it.
    """

    defenses: tuple[str, ...]
    harmful_ratio: float
    task: str
    seed: int
    attack: str = DEFAULT_ATTACK

    @property
    def arm(self) -> str:
        """The defenses' names joined by ``+``, or ``"none"``."""
        return "+".join(self.defenses) or "none"

    @property
    def name(self) -> str:
        """The cell's folder."""
        where = [Path(self.task).stem, f"p{self.harmful_ratio:g}", f"s{self.seed}"]
        return "-".join([self.arm, *([] if self.attack == DEFAULT_ATTACK else [self.attack]), *where])


@dataclass(frozen=True)
class Grid:
    """What is compared.

    Args:
        defenses: combinations such as ``"none"``, ``"booster"``, ``"booster+lisa+antidote"``.
        harmful_ratios: p, each 0-1.
        tasks: what ``--data.task`` takes.
        seeds: number of seeds, counted from ``first_seed``, >= 1.
        first_seed: the first of them.
        arguments: arguments of defenses and attacks by name, the same in every cell.
        attacks: what is uploaded; one that has no p of its own gets one cell instead of one per harmful ratio.

    Raises:
        InputError: if a list is empty or has an entry twice, a value is out of range, a name is unknown, or a defense
            refuses its arguments.
    """

    defenses: tuple[str, ...] = ("none",)
    harmful_ratios: tuple[float, ...] = (0.1,)
    tasks: tuple[str, ...] = ("builtin",)
    seeds: int = 1
    first_seed: int = 0
    arguments: Mapping[str, Mapping[str, Any]] | None = None
    attacks: tuple[str, ...] = (DEFAULT_ATTACK,)

    def __post_init__(self) -> None:
        for option, values in (
            ("--defenses", [parts(word) for word in self.defenses]),
            ("--harmful_ratios", self.harmful_ratios),
            ("--tasks", self.tasks),
            ("--attacks", self.attacks),
        ):
            if not values:
                raise InputError(f"{option}: name at least one.")
            if twice := [v for i, v in enumerate(values) if v in values[:i]]:
                shown = "+".join(twice[0]) if isinstance(twice[0], tuple) else twice[0]
                raise InputError(f"{option}: {shown!r} stands there twice.")
        for p in self.harmful_ratios:
            if not 0 <= p <= 1:
                hint = f" If that is a percentage, write {p / 100:g}." if 1 < p <= 100 else ""
                raise InputError(f"--harmful_ratios must lie in [0, 1], got {p:g}.{hint}")
        if self.seeds < 1:
            raise InputError(f"--seeds must be >= 1, got {self.seeds}.")
        try:
            for word in self.defenses:
                self.made(parts(word))
            for name in self.attacks:
                self.ratios(name)
        except (ValueError, TypeError) as error:
            raise InputError(str(error)) from error

    def made(self, names: Sequence[str]) -> list[Defense]:
        """Return fresh instances of a combination."""
        given = self.arguments or {}
        return [defense_class(name)(**given.get(name, {})) for name in names]

    def attack(self, name: str) -> Attack:
        """Return an attack with its arguments."""
        return get_attack(name)(**(self.arguments or {}).get(name, {}))

    def ratios(self, attack: str) -> tuple[float, ...]:
        """Return the harmful ratios at which an attack is run; of one without p the fraction that it has."""
        made = self.attack(attack)
        own, fields = getattr(made, "p", 0.0), made.__dataclass_fields__
        if "p" not in fields or fields["p"].default is not None:
            return (own,)
        if own is not None:
            raise InputError(f"--{attack}.p: in a comparison --harmful_ratios decides p, got {own}.")
        return self.harmful_ratios

    def cells(self) -> list[Cell]:
        """Return all cells, those first whose aligned model no cell before them trains."""
        every = [
            Cell(parts(word), p, task, seed, attack)
            for seed in range(self.first_seed, self.first_seed + self.seeds)
            for task in self.tasks
            for attack in self.attacks
            for p in self.ratios(attack)
            for word in self.defenses
        ]
        first: dict[Any, Cell] = {}
        for cell in every:
            first.setdefault(self.aligned(cell), cell)
        return [*first.values(), *(cell for cell in every if first[self.aligned(cell)] != cell)]

    def aligned(self, cell: Cell) -> tuple[Any, ...]:
        """Return what decides a cell's aligned model."""
        return cell.seed, tuple(n for n in cell.defenses if defense_class(n).stage is Stage.ALIGNMENT)


def parts(word: str) -> tuple[str, ...]:
    """Return the names in a combination such as ``"booster+lisa"``; none for ``"none"``."""
    names = tuple(name.replace("-", "_") for name in word.split("+"))
    return () if names == ("none",) else names


def compare(
    config: RunConfig,
    grid: Grid,
    folder: str | Path,
    jobs: int = 1,
    retries: int = 1,
    backend: Backend = "processes",
    on_cell: Callable[[Cell, str], None] | None = None,
) -> dict[Cell, str]:
    """Run every cell that is not finished, and return what became of each: ``"done"``, or its error.

    A cell is a run in ``folder/cells``, with a log; cells share aligned models through the cache. Killed anywhere, the
    same call goes on. More cells may be added by a larger grid; a changed ``config`` needs another folder.

    Args:
        config: everything that the grid does not decide.
        grid: the cells.
        folder: the comparison's folder.
        jobs: cells at one time, >= 1; each gets its share of the cores.
        retries: how often a failed cell is tried again, >= 0.
        backend: ``"processes"`` on this machine, or ``"ray"`` on the Ray cluster at ``RAY_ADDRESS`` (this machine's
            own without it), whose nodes all see ``folder``. A cell whose node or process dies goes on on another one,
            ``LOST`` times before that counts as a failure; ``HFTLIGHT_*`` variables of this process hold on all nodes.
        on_cell: called with a cell and ``"started"``, ``"done"`` or its error; ``"started"`` again on another node.

    Raises:
        InputError: if an argument cannot be used, a cell could not start, the folder belongs to another comparison, or
            another process works in it.
    """
    if jobs < 1 or retries < 0:
        raise InputError(f"--jobs must be >= 1 and --retries >= 0, got {jobs} and {retries}.")
    folder = Path(folder)
    ensure_writable(folder, "the comparison's folder")
    cells = grid.cells()
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        with lock:
            _claim(folder, config, grid)
            waiting = [c for c in cells if not finished(folder / CELLS / c.name)]
            plan(config, grid, waiting)
            jobs_of = {cell: _spec(config, grid, cell, folder, jobs) for cell in waiting}
            outcome = dict.fromkeys(cells, "done")
            for attempt in range(1 + retries):
                failed = {}
                for cell, error in _work(jobs_of, jobs, backend, on_cell):
                    outcome[cell] = error or "done"
                    if error:
                        failed[cell] = jobs_of[cell]
                    if on_cell is not None:
                        on_cell(cell, outcome[cell])
                jobs_of = failed
                if not failed or attempt == retries:
                    break
            return outcome
    except Timeout as error:
        raise InputError(
            f"Another process works on the comparison in {folder}; wait for it, or choose another --comparison."
        ) from error


def finished(folder: Path) -> bool:
    """Tell whether a cell's run came to its end; a manifest that was cut off counts as none."""
    try:
        return "finished" in json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return False


def comparison_of(run: Path) -> Path | None:
    """Return the folder of the comparison that a run is a cell of, if it is one."""
    folder = run.resolve().parent.parent
    return folder if run.resolve().parent.name == CELLS and (folder / GRID).is_file() else None


def _claim(folder: Path, config: RunConfig, grid: Grid) -> None:
    """Refuse a folder that belongs to another configuration, and write down this one's."""
    varied = ("seed", "harmful_ratio", "defense", "baseline", "attack")
    values = {k: v for k, v in config.deciding().items() if k not in varied}
    values["data"] = {k: v for k, v in values["data"].items() if k != "task"}
    mine = {"settings": digest(values)}
    path = folder / GRID
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {**mine}
    given = {name: json.loads(json.dumps(a)) for name, a in (grid.arguments or {}).items()}
    others = known.get("arguments", {})
    if changed := [name for name in given if name in others and others[name] != given[name]]:
        raise InputError(
            f"{folder} holds cells of {changed[0]} with other arguments ({others[changed[0]]}). Choose another"
            " --comparison."
        )
    if known["settings"] != mine["settings"]:
        raise InputError(
            f"{folder} holds a comparison with other settings; only defenses, attacks, harmful ratios, tasks"
            " and seeds may be added. Choose another --comparison."
        )
    listed = {c["name"]: c for c in known.get("cells", [])}
    listed |= {c.name: {"name": c.name, **asdict(c), "arm": c.arm} for c in grid.cells()}
    write_json(path, {**mine, "config": asdict(config), "arguments": others | given, "cells": [*listed.values()]})


def plan(config: RunConfig, grid: Grid, cells: Sequence[Cell]) -> dict[Cell, float]:
    """Return the seconds that each cell may take on two CPU cores, what cells share counted with the first of them.

    One cell of each kind is prepared, so that what cannot work is refused before anything trains.

    Raises:
        InputError: naming the cell that cannot start.
    """
    kinds: dict[Any, tuple[float, float]] = {}
    seconds, begun = {}, set()
    for cell in cells:
        kind = (cell.defenses, cell.task, cell.harmful_ratio, cell.attack)
        if kind not in kinds:
            try:
                made = grid.made(cell.defenses), grid.attack(cell.attack)
                units = prepare(cell_config(config, cell), *made).units()
            except ValueError as error:
                raise InputError(f"{cell.name}: {error}") from error
            kinds[kind] = sum(u.seconds for u in units[:SHARED]), sum(u.seconds for u in units[SHARED:])
        shared, own = kinds[kind]
        seconds[cell] = own + (0.0 if grid.aligned(cell) in begun else shared)
        begun.add(grid.aligned(cell))
    return seconds


def cell_config(config: RunConfig, cell: Cell) -> RunConfig:
    """Return a cell's configuration; ``{task}`` in the paths of the task's files stands for the cell's task."""
    data = replace(config.data, task=cell.task)
    for name in ("task_train", "task_test"):
        if path := getattr(data, name):
            data = replace(data, **{name: path.replace("{task}", Path(cell.task).stem)})
    return replace(
        config,
        defense=list(cell.defenses),
        baseline=False,
        attack=cell.attack,
        harmful_ratio=cell.harmful_ratio,
        seed=cell.seed,
        data=data,
    )


def _spec(config: RunConfig, grid: Grid, cell: Cell, folder: Path, jobs: int) -> dict[str, Any]:
    """Return a cell as plain values, which any process can be sent."""
    place = replace(cell_config(config, cell), output=str(folder / CELLS), name=cell.name)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    return {"config": asdict(place), "arguments": grid.arguments or {}, "threads": threads}


def run_cell(spec: Mapping[str, Any]) -> str:
    """Run one cell in this process; return nothing, or the error in one line. Its output goes into its log."""
    import torch

    from hftlight.cli import quiet
    from hftlight.runs.run import run

    parts_of: dict[str, Any] = {"alignment": Training, "finetuning": Training, "lora": Lora, "data": Data}
    parts_of |= {"evaluation": Evaluation, "search": Search}
    values = spec["config"]
    config = RunConfig(**{**values, **{name: kind(**values[name]) for name, kind in parts_of.items()}})
    folder = Path(config.output) / str(config.name)
    made = [defense_class(name)(**spec["arguments"].get(name, {})) for name in config.defense]
    attack = get_attack(config.attack)(**spec["arguments"].get(config.attack, {}))
    quiet()
    torch.set_num_threads(spec["threads"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        where = {"host": socket.gethostname(), "process": os.getpid(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        write_json(folder / STARTED, where)
        with (folder / LOG).open("a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
            print("started on {host}, process {process}, {time}".format(**where))
            try:
                _once_unlocked(folder, lambda: run(config, made, attack))
            except Exception:
                (folder / ERROR).write_text(traceback.format_exc())
                raise
    except Exception as error:
        return _in_one_line(error, folder)
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
        f"{said}. The disk of {' or '.join(places)} is full: make room (`recipes/cache.py list` shows what is kept, and"
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


def _work(
    specs: Mapping[Cell, Mapping[str, Any]], jobs: int, backend: Backend, on_cell: Callable[[Cell, str], None] | None
) -> Iterator[tuple[Cell, str]]:
    """Yield each cell with its error, or with nothing, as they end."""

    def tell(cell: Cell) -> None:
        if on_cell is not None:
            on_cell(cell, "started")

    if backend == "ray":
        yield from _with_ray(specs, _Starts(specs, tell))
    elif jobs == 1:
        from hftlight.base_model import drop_base

        try:
            for cell, spec in specs.items():
                tell(cell)
                yield cell, run_cell(spec)
        finally:
            drop_base()
    else:
        yield from _with_processes(specs, jobs, _Starts(specs, tell))


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


def _with_processes(specs: Mapping[Cell, Mapping[str, Any]], jobs: int, starts: _Starts) -> Iterator[tuple[Cell, str]]:
    """Run the cells in processes of this machine.

    A process that dies (out of memory, say) takes its pool with it. Cells that had not begun then go to a new pool, and
    those that had are tried again one at a time, so that only a cell whose own process dies fails.
    """
    left, alone = dict(specs), {}
    with _environment(OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // jobs))):
        while left:
            before, waiting, error = starts.known.copy(), left, ""
            left = {}
            for cell, error, died in _in_pool(waiting, jobs, starts):
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
            yield from ((cell, error) for _, error, _ in _in_pool({cell: spec}, 1, starts))


def _in_pool(specs: Mapping[Cell, Mapping[str, Any]], jobs: int, starts: _Starts) -> Iterator[tuple[Cell, str, bool]]:
    """Yield each cell with its error, or with nothing, and whether the pool broke before the cell had ended."""
    settings: dict[str, Any] = {"initializer": _end_with, "initargs": (os.getpid(),)}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), **settings) as pool:
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
