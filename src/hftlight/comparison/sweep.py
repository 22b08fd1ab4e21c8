"""A comparison: a run for each cell of defenses x attacks x harmful ratios x tasks x seeds, parallel and resumable."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hftlight.comparison.grid import Cell, Grid, cell_config
from hftlight.comparison.share import gpus_each, threads_each
from hftlight.comparison.workers import Backend, work
from hftlight.config import RunConfig
from hftlight.data.sources import TASKS
from hftlight.errors import InputError
from hftlight.files import digest, ensure_writable, file_digest, folder_digest, write_json
from hftlight.folders import CELLS, GRID
from hftlight.model_files import model_hash
from hftlight.runs.manifest import identity
from hftlight.runs.plan import Step
from hftlight.runs.plan import plan as steps_of_run
from hftlight.runs.prepare import prepare

ATTACK_FILES = (
    "source",
    "scores",
    "chats",
    "pattern_file",
)  # arguments of attacks that may name a file or a folder of rows


def compare(
    config: RunConfig,
    grid: Grid,
    folder: str | Path,
    jobs: int = 1,
    retries: int = 1,
    backend: Backend = "processes",
    on_cell: Callable[[Cell, str], None] | None = None,
    share_gpus: bool = False,
) -> dict[Cell, str]:
    """Run every cell that is not finished, and return the outcome of each cell: ``"done"`` or its error.

    A cell is a run in ``folder/cells`` with a log. Cells share aligned models through the cache. If the process is
    killed, the same call continues. A larger grid may add cells. A changed ``config`` needs another folder.

    Args:
        config: everything that the grid does not decide.
        grid: the cells.
        folder: the comparison's folder.
        jobs: number of cells that run at one time, >= 1. Each cell gets an equal share of the cores that this process
            may use, at most ``OMP_NUM_THREADS``, and its own GPUs. Weights are equal bit for bit only for equal numbers
            of threads. A run's manifest records the number.
        retries: how often a failed cell is tried again, >= 0.
        backend: ``"processes"`` on this machine, or ``"ray"`` on the Ray cluster at ``RAY_ADDRESS``. Without
            ``RAY_ADDRESS`` it is the cluster of this machine. All nodes must see ``folder``. A cell whose node or
            process dies restarts on another one; an attempt fails after ``LOST`` restarts. The ``HFTLIGHT_*`` variables
            of this process are set on all nodes.
        on_cell: called with a cell and ``"started"``, ``"done"`` or its error. A cell that restarts on another node
            reports ``"started"`` again.
        share_gpus: whether more cells may run at one time than there are GPUs for. False refuses that.

    Raises:
        InputError: if an argument is invalid, a cell cannot start, the folder belongs to another comparison, or another
            process uses the folder.
    """
    if jobs < 1 or retries < 0:
        raise InputError(f"--jobs must be >= 1 and --retries >= 0, got {jobs} and {retries}.")
    gpus = gpus_each(asdict(config), jobs, share_gpus) if jobs > 1 and backend == "processes" else []
    folder = Path(folder)
    ensure_writable(folder, "the comparison's folder")
    cells = grid.cells()
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        with lock:
            claim = _claim(folder, config, grid)
            waiting = _waiting(config, grid, folder)
            plan(config, grid, waiting)  # before the claim is written, so that a refused grid may still be changed
            write_json(folder / GRID, claim)
            jobs_of = {cell: _spec(config, grid, cell, folder, jobs) for cell in waiting}
            outcome = dict.fromkeys(cells, "done")
            # Every further attempt runs only the cells that failed in the previous one.
            for attempt in range(1 + retries):
                failed = {}
                for cell, error in work(jobs_of, jobs, backend, on_cell, gpus):
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
    """Return whether a cell's run is complete and its result files are unchanged.

    A manifest that was cut off counts as no manifest. The first missing or changed file is printed.
    """
    manifest = _manifest(folder)
    for name, known in manifest.get("files", {}).items():
        if not (folder / name).is_file() or file_digest(folder / name) != known:
            print(
                f"hftlight: {folder / name} is missing or differs from what the run wrote. The cell counts as"
                " unfinished.",
                file=sys.stderr,
            )
            return False
    return "finished" in manifest


def _manifest(folder: Path) -> dict[str, Any]:
    """Return a cell's manifest, empty if it is missing or was cut off."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        return manifest
    except (OSError, ValueError):
        return {}


def _waiting(config: RunConfig, grid: Grid, folder: Path) -> list[Cell]:
    """Return the cells to run: unfinished cells, and finished cells that other code or versions measured."""
    waiting, other, identities = [], 0, dict[Any, dict[str, Any]]()
    for cell in grid.cells():
        known, kind = _manifest(folder / CELLS / cell.name), (cell.defenses, cell.attack, cell.swept)
        done = finished(folder / CELLS / cell.name)
        # Cells of one arm and attack have one identity. It is computed only for finished cells.
        if done and kind not in identities:
            made = grid.made(cell.defenses, cell.swept)
            identities[kind] = identity(config.model, [*made, grid.attack(cell.attack)])
        now = identities.get(kind, {})
        same = all(known.get(part) == now[part] for part in now)
        other += done and not same
        if not (done and same):
            waiting.append(cell)
    if other:
        cells = "1 finished cell was" if other == 1 else f"{other} finished cells were"
        print(
            f"hftlight: {cells} measured with other code or versions. The steps that this changes run again.",
            file=sys.stderr,
        )
    return waiting


def _claim(folder: Path, config: RunConfig, grid: Grid) -> dict[str, Any]:
    """Refuse a folder that holds another comparison, and return the new content of its ``grid.json``."""
    # The grid varies these values and the task. All other values must equal those of the folder's first cells.
    varied = ("seed", "harmful_ratio", "defense", "baseline", "attack")
    values = {k: v for k, v in config.deciding().items() if k not in varied}
    values["data"] = {k: v for k, v in values["data"].items() if k != "task"}
    path = folder / GRID
    mine = {"settings": digest(values), "config": asdict(config), "arguments": _arguments(grid)}
    cells = {c.name: {"name": c.name, **asdict(c), "arm": c.arm, "swept": dict(c.swept)} for c in grid.cells()}
    for cell in cells.values():  # cells without swept arguments are recorded as before there were any
        if not cell["swept"]:
            del cell["swept"]
    mine |= {"files": _files(config, grid), "cells": cells}
    # As JSON returns them: tuples become lists, so that both sides compare equal.
    mine = json.loads(json.dumps(mine, default=str))
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"settings": mine["settings"]}
    known["cells"] = {cell["name"]: cell for cell in known.get("cells", [])}

    def changed(kind: str) -> str | None:
        """Return the first name whose value differs from the recorded one."""
        before = known.setdefault(kind, {})
        return next((name for name, value in mine[kind].items() if before.get(name, value) != value), None)

    another = "Choose another --comparison."
    if name := changed("arguments"):
        options = " and ".join(f"--{option}" for option in grid.sweeps if option.partition(".")[0] == name)
        said = f", and this command varies {options}" if options else ""
        raise InputError(
            f"{folder} holds cells of {name} with other arguments ({known['arguments'][name]}){said}. {another}"
        )
    if known["settings"] != mine["settings"]:
        raise InputError(
            f"{folder} holds a comparison with other settings; only defenses, attacks, harmful ratios, tasks"
            f" and seeds may be added. {another}"
        )
    if name := changed("cells"):
        cell = known["cells"][name]
        swept = "".join(f" and --{option} {value}" for option, value in cell.get("swept", {}).items())
        raise InputError(f"{folder} holds another cell named {name}, with --tasks {cell['task']}{swept}. {another}")
    if name := changed("files"):
        raise InputError(
            f"{name} has changed since cells of {folder} were measured with it. Restore it, or choose another"
            " --comparison."
        )
    # Recorded entries come first. Entries of earlier grids stay, although this grid may not have them.
    for kind in ("arguments", "files", "cells"):
        mine[kind] = known[kind] | mine[kind]
    return {**mine, "cells": [*mine["cells"].values()]}


def _arguments(grid: Grid) -> dict[str, dict[str, Any]]:
    """Return the fixed arguments of each defense and attack in the grid, defaults included."""
    names = dict.fromkeys(name for cell in grid.cells() for name in cell.defenses)
    fixed = {}
    for name in names:
        arguments = grid.made([name], grid.variants([name])[0])[0].arguments()
        fixed[name] = {a: v for a, v in arguments.items() if f"{name}.{a}" not in grid.sweeps}
    return fixed | {n: asdict(grid.attack(n)) for n in grid.attacks}


def _files(config: RunConfig, grid: Grid) -> dict[str, str]:
    """Return the hash of the model, and the SHA-256 of each file or folder of rows that a cell reads."""
    read = [asdict(cell_config(config, cell).data) for cell in grid.cells()]
    read += [{name: getattr(grid.attack(attack), name, None) for name in ATTACK_FILES} for attack in grid.attacks]
    # Every text value that is neither a known task nor empty may be a path.
    named = {value for values in read for value in values.values() if isinstance(value, str)} - {*TASKS, ""}
    paths = {name: Path(name).expanduser() for name in sorted(named)}
    hashes = {f"--model {config.model}": model_hash(config.model)}
    hashes |= {name: file_digest(path) for name, path in paths.items() if path.is_file()}
    return hashes | {name: folder_digest(path, "**/*") for name, path in paths.items() if path.is_dir()}


def plan(config: RunConfig, grid: Grid, cells: Sequence[Cell]) -> dict[Cell, float]:
    """Return the estimated seconds of each cell on two CPU cores. A shared step counts only for its first cell.

    One cell of each kind is prepared, so that an invalid cell is refused before any training.

    Raises:
        InputError: if a cell cannot start, with the cell's name.
    """
    kinds: dict[Any, list[Step]] = {}
    seconds, begun = {}, set[tuple[str, int]]()
    for cell in cells:
        # Cells that differ only in their seed have the same steps.
        kind = (cell.arm, cell.task, cell.harmful_ratio, cell.attack)
        if kind not in kinds:
            try:
                instances = grid.made(cell.defenses, cell.swept), grid.attack(cell.attack)
                kinds[kind] = steps_of_run(prepare(cell_config(config, cell), *instances))
            except ValueError as error:
                raise InputError(f"{cell.name}: {error}") from error
        new = [step for step in kinds[kind] if (step.key, cell.seed) not in begun]
        seconds[cell] = sum(step.seconds for step in new)
        begun |= {(step.key, cell.seed) for step in new}
    return seconds


def _spec(config: RunConfig, grid: Grid, cell: Cell, folder: Path, jobs: int) -> dict[str, Any]:
    """Return a cell as plain values, which can be sent to any process."""
    place = replace(cell_config(config, cell), output=str(folder / CELLS), name=cell.name)
    return {"config": asdict(place), "arguments": grid.arguments_with(cell.swept), "threads": threads_each(jobs)}
