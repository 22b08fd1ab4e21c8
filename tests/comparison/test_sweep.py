"""The grid of a comparison: its cells, its errors, and no second run of a finished cell, whatever dies."""

import csv
import errno
import json
import multiprocessing
import os
import shutil
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from hftlight.cli.compare import compare as compare_command
from hftlight.comparison import grid, share, sweep, workers
from hftlight.comparison.grid import Cell, Grid
from hftlight.comparison.leaderboard import leaderboard_csv, leaderboard_markdown
from hftlight.comparison.page import figures
from hftlight.comparison.read import read_comparison
from hftlight.comparison.sweep import compare, finished, plan
from hftlight.comparison.workers import ERROR, LOG, STARTED
from hftlight.config import Data, RunConfig, Search, Training
from hftlight.defenses import Lisa
from hftlight.errors import InputError
from hftlight.files import folder_digest, read_rows
from hftlight.folders import CELLS, GRID
from hftlight.model_files import model_path
from hftlight.runs.logging.stage import labels_of
from hftlight.runs.manifest import identity
from hftlight.runs.stages.checkpoint import AtomicCheckpointIO
from tests.helpers import warm
from tests.helpers.slow import some_slow
from tests.runs.test_run import config

ROOT = Path(__file__).parents[2]
GRID_OF_FOUR = Grid(("none", "lisa+antidote"), (0.1,), ("builtin",), 2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def runs(monkeypatch):
    """Record the names of cells that run, without training. ``runs.fail[name]`` counts a cell's failing runs."""

    class Runs(list):
        def __init__(self):
            super().__init__()
            self.fail = {}

    counter = Runs()

    def run(config, defenses, attack):
        counter.append(config.name)
        if counter.fail.get(config.name, 0) > 0:
            counter.fail[config.name] -= 1
            raise RuntimeError("out of memory\nmore words")
        print("what a run prints")
        folder = Path(config.output) / config.name
        made_of = identity(config.model, [*defenses, attack])
        (folder / "manifest.json").write_text(json.dumps({"finished": "now", **made_of}))

    monkeypatch.setattr("hftlight.runs.run.run", run)
    monkeypatch.setattr(sweep, "plan", lambda *_: {})
    return counter


def test_cells_are_all_combinations_and_new_aligned_models_come_first():
    grid = Grid(("none", "booster", "booster+lisa"), (0.0, 0.1), ("builtin", "sst2"), 2)
    cells = grid.cells()
    assert len(cells) == len(set(cells)) == 3 * 2 * 2 * 2
    first = [(c.seed, "booster" in c.defenses) for c in cells[:4]]
    assert sorted(first) == [(0, False), (0, True), (1, False), (1, True)]
    assert {c.name for c in cells} >= {"none-builtin-p0-s0", "booster+lisa-sst2-p0.1-s1"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"defenses": ()}, "--defenses: name at least one"),
        ({"defenses": ("lisa", "lisa")}, "'lisa' is listed twice"),
        ({"defenses": ("boster",)}, "booster"),
        ({"defenses": ("lisa",), "arguments": {"lisa": {"proximal": -1.0}}}, "proximal"),
        ({"harmful_ratios": (5.0,)}, "write 0.05"),
        ({"harmful_ratios": (0.1, 0.1)}, "0.1 is listed twice"),
        ({"tasks": ()}, "--tasks"),
        ({"seeds": 0}, "--seeds must be >= 1"),
        ({"seeds": (20, 42, 20)}, r"--seeds: \(20, 42, 20\) lists a seed twice"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(values, said):
    with pytest.raises(InputError, match=said):
        Grid(**values)


def test_seeds_are_counted_or_listed(tmp_path, capsys):
    assert [c.seed for c in Grid(seeds=3, first_seed=5).cells()] == [5, 6, 7]
    assert [c.seed for c in Grid(seeds=(20, 42, 71, 102, 106), first_seed=5).cells()] == [20, 42, 71, 102, 106]
    small = ["--model", "tiny", "--accelerator", "cpu", "--output", str(tmp_path), "--dry_run"]
    assert compare_command(["--seeds", "20", "106", *small]) == 0
    output = capsys.readouterr().out
    assert "2 cells" in " ".join(output.split())
    assert all(f"-s{seed}" in output for seed in (20, 106))


def test_what_cannot_work_together_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(InputError, match=r"lisa\+ewc.*cannot|EWC.*Lisa|Lisa.*EWC"):
        compare(config(tmp_path), Grid(("none", "lisa+ewc")), tmp_path / "c")
    assert not (tmp_path / "c" / CELLS).exists()


def test_finished_cells_are_not_run_again_and_a_larger_grid_adds_its_own(tmp_path, runs):
    assert set(compare(config(tmp_path), GRID_OF_FOUR, tmp_path / "c").values()) == {"done"}
    assert len(runs) == 4
    compare(config(tmp_path), GRID_OF_FOUR, tmp_path / "c")
    assert len(runs) == 4
    compare(config(tmp_path), Grid(("none", "lisa+antidote"), (0.1, 0.3), ("builtin",), 2), tmp_path / "c")
    assert len(runs) == 8
    assert len(json.loads((tmp_path / "c" / GRID).read_text())["cells"]) == 8
    compare(config(tmp_path), GRID_OF_FOUR, tmp_path / "c")  # a smaller grid removes no cell
    assert len(json.loads((tmp_path / "c" / GRID).read_text())["cells"]) == 8


def test_a_failed_cell_is_tried_again_and_then_reported(tmp_path, runs):
    runs.fail = {"none-builtin-p0.1-s1": 1, "lisa+antidote-builtin-p0.1-s0": 5}
    events = []
    outcome = compare(config(tmp_path), GRID_OF_FOUR, tmp_path / "c", on_cell=lambda *what: events.append(what))
    assert {c.name: what for c, what in outcome.items() if what != "done"} == {
        "lisa+antidote-builtin-p0.1-s0": "RuntimeError: out of memory"
    }
    assert runs.count("none-builtin-p0.1-s1") == 2
    assert runs.count("lisa+antidote-builtin-p0.1-s0") == 2
    folder = tmp_path / "c" / CELLS / "lisa+antidote-builtin-p0.1-s0"
    assert "more words" in (folder / ERROR).read_text()
    assert [what for cell, what in events if cell.name == "none-builtin-p0.1-s1"] == [
        "started", "RuntimeError: out of memory", "started", "done",
    ]  # fmt: skip
    runs.fail = {}
    assert set(compare(config(tmp_path), GRID_OF_FOUR, tmp_path / "c").values()) == {"done"}
    assert not (folder / ERROR).exists()
    assert "what a run prints" in (folder / LOG).read_text()


def test_other_settings_need_another_folder(tmp_path, runs):
    compare(config(tmp_path), GRID_OF_FOUR, tmp_path / "c")
    with pytest.raises(InputError, match="holds a comparison with other settings"):
        compare(config(tmp_path, num_samples=30), GRID_OF_FOUR, tmp_path / "c")
    changed = Grid(("none", "lisa"), arguments={"lisa": {"proximal": 0.5}})
    compare(config(tmp_path), Grid(("lisa",), arguments={"lisa": {"proximal": 1.0}}), tmp_path / "c")
    with pytest.raises(InputError, match="cells of lisa with other arguments"):
        compare(config(tmp_path), changed, tmp_path / "c")


def test_arguments_that_are_left_out_are_the_defaults(tmp_path, runs):
    compare(config(tmp_path), Grid(("lisa",)), tmp_path / "c")
    compare(config(tmp_path), Grid(("lisa",), arguments={"lisa": {"proximal": 1.0}}), tmp_path / "c")
    with pytest.raises(InputError, match="cells of lisa with other arguments"):
        compare(config(tmp_path), Grid(("lisa",), arguments={"lisa": {"proximal": 0.5}}), tmp_path / "c")
    compare(config(tmp_path), Grid(attacks=("explicit",), arguments={"explicit": {"n": 16}}), tmp_path / "c")
    with pytest.raises(InputError, match="cells of explicit with other arguments"):
        compare(config(tmp_path), Grid(attacks=("explicit",)), tmp_path / "c")


def test_a_task_of_the_same_name_is_not_taken_for_one_that_is_finished(tmp_path, runs):
    ours, theirs = str(tmp_path / "ours" / "sums.csv"), str(tmp_path / "theirs" / "sums.csv")
    with pytest.raises(InputError, match=r"ours/sums.csv and .*theirs/sums.csv have the same name"):
        Grid(tasks=(ours, theirs))
    compare(config(tmp_path), Grid(tasks=(ours,)), tmp_path / "c")
    with pytest.raises(InputError, match=r"another cell named none-sums-p0.1-s0, with --tasks .*ours/sums.csv"):
        compare(config(tmp_path), Grid(tasks=(theirs,)), tmp_path / "c")
    assert runs == ["none-sums-p0.1-s0"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_rows_that_change_between_two_commands_are_not_mixed(kind, tmp_path, runs):
    path = tmp_path / "mine"
    file = path / "rows.jsonl" if kind == "folder" else path
    file.parent.mkdir(exist_ok=True)
    file.write_text("one")
    settings = config(tmp_path, data=Data(task_train=str(tmp_path / "{task}"), alignment=str(tmp_path / "later")))
    compare(settings, Grid(tasks=("mine",)), tmp_path / "c")
    compare(settings, Grid(tasks=("mine",), harmful_ratios=(0.1, 0.2)), tmp_path / "c")
    file.write_text("two")
    with pytest.raises(InputError, match=r"mine has changed since .* Restore it, or choose another --comp"):
        compare(settings, Grid(tasks=("mine",), harmful_ratios=(0.3,)), tmp_path / "c")
    file.write_text("one")
    compare(settings, Grid(tasks=("mine",), harmful_ratios=(0.3,)), tmp_path / "c")
    assert len(runs) == 3


def test_rows_that_were_refused_may_be_mended(tmp_path):
    path = tmp_path / "task.csv"
    path.write_text("instruction,output\nOne?,1\n")
    with pytest.raises(InputError, match="needs 18 task rows"):
        compare(config(tmp_path), Grid(tasks=(str(path),)), tmp_path / "c")
    path.write_text("instruction,output\n" + "".join(f"What is {i}?,{i}\n" for i in range(60)))
    assert set(compare(config(tmp_path), Grid(tasks=(str(path),)), tmp_path / "c").values()) == {"done"}


def test_a_file_of_an_attack_counts_and_a_name_that_is_no_file_does_not(tmp_path, runs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text("one")
    for name in ("builtin", "drop"):  # folders with the names of a built-in set and of an argument of Lisa
        Path(name).mkdir()
    grid = Grid(("lisa",), attacks=("identity_shift",), arguments={"identity_shift": {"chats": "mine.jsonl"}})
    compare(config(tmp_path, system="long " * 2000), grid, tmp_path / "c")
    for name in ("builtin", "drop"):
        (Path(name) / "file").write_text("new")
    compare(config(tmp_path, system="long " * 2000), grid, tmp_path / "c")
    Path("mine.jsonl").write_text("two")
    with pytest.raises(InputError, match=r"^mine.jsonl has changed since"):
        compare(config(tmp_path, system="long " * 2000), grid, tmp_path / "c")


def test_cells_that_other_code_or_versions_measured_run_again(tmp_path, runs, monkeypatch, capsys):
    compare(config(tmp_path), TWO, tmp_path / "c")
    compare(config(tmp_path), TWO, tmp_path / "c")
    assert len(runs) == 2
    monkeypatch.setattr("hftlight.runs.manifest.versions", lambda: {"torch": "0.0"})
    compare(config(tmp_path), TWO, tmp_path / "c")
    assert len(runs) == 4
    assert "2 finished cells were measured with other code or versions" in capsys.readouterr().err
    code = sweep.identity("tiny", [Lisa()])["code"]
    assert code != sweep.identity("tiny", [])["code"]  # a defense's code is part of a cell's identity


def test_another_model_under_the_same_name_is_refused(tmp_path, runs):
    model = tmp_path / "m"
    shutil.copytree(model_path("tiny"), model)
    settings = config(tmp_path, model=str(model))
    compare(settings, Grid(), tmp_path / "c")
    (model / "generation_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"^--model .*m has changed since cells"):
        compare(settings, Grid(), tmp_path / "c")


def test_two_processes_do_not_work_in_one_folder(tmp_path, runs):
    (tmp_path / "c").mkdir()
    with FileLock(tmp_path / "c" / ".lock"), pytest.raises(InputError, match="Another process works on the comparison"):
        compare(config(tmp_path), GRID_OF_FOUR, tmp_path / "c")


@pytest.mark.parametrize(("jobs", "retries"), [(0, 1), (1, -1)])
def test_counts_out_of_range_are_refused(jobs, retries, tmp_path):
    with pytest.raises(InputError, match="--jobs must be >= 1 and --retries >= 0"):
        compare(config(tmp_path), GRID_OF_FOUR, tmp_path / "c", jobs=jobs, retries=retries)


def results(folder):
    """Return scores, weights and answers of every cell, without clocks and memory."""
    by_cell = {}
    for cell in sorted((folder / CELLS).iterdir()):
        scores = [r for r in read_rows(cell / "metrics.jsonl") if r["kind"] == "score"]
        weights = [folder_digest(path, "*.safetensors") for path in sorted(cell.glob("*/*ed"))]
        assert weights
        by_cell[cell.name] = (scores, weights, (cell / "generations.jsonl").read_text())
    return by_cell


def runs_of(folder):
    """Return how often each cell ran, counted in its log."""
    return {cell.name: (cell / LOG).read_text().count("started on ") for cell in (folder / CELLS).iterdir()}


TWO = Grid(("none", "lisa"))
SECOND = "lisa-builtin-p0.1-s0"


def test_a_full_disk_names_its_folder_and_the_same_command_goes_on(tmp_path, monkeypatch):
    settings, folder = config(tmp_path, checkpoint_every=1), tmp_path / "c"
    written = AtomicCheckpointIO.save_checkpoint
    trained = len(list((tmp_path / "cache").glob("stages/*")))

    def full(self, checkpoint, path, storage_options=None):
        if len(list((tmp_path / "cache").glob("stages/*"))) > trained + 2:  # the second cell's own fine-tuning
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).with_name(".half.tmp").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written(self, checkpoint, path, storage_options)

    with monkeypatch.context() as patched:
        patched.setattr(AtomicCheckpointIO, "save_checkpoint", full)
        outcome = {c.name: what for c, what in compare(settings, TWO, folder, retries=0).items()}
    assert outcome.pop("none-builtin-p0.1-s0") == "done"
    (message,) = outcome.values()
    assert message.startswith("OSError: [Errno 28] No space left on device")
    assert str(folder / CELLS / SECOND) in message
    assert str(tmp_path / "cache" / "stages") in message
    assert "Free some space" in message
    assert "finished parts stay" in message
    assert not finished(folder / CELLS / SECOND)
    assert set(compare(settings, TWO, folder).values()) == {"done"}
    assert runs_of(folder) == {"none-builtin-p0.1-s0": 1, SECOND: 2}
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "another"))
    compare(settings, TWO, tmp_path / "whole")
    assert results(folder) == results(tmp_path / "whole")


def test_a_full_disk_of_the_comparison_fails_the_cell_in_words(tmp_path, runs, monkeypatch):
    monkeypatch.setattr(
        "hftlight.runs.run.run", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    )
    (message,) = compare(config(tmp_path), Grid(), tmp_path / "c", retries=0).values()
    assert f"{tmp_path / 'c' / CELLS / 'none-builtin-p0.1-s0'} or {tmp_path / 'cache'}" in message
    monkeypatch.setattr("hftlight.runs.run.run", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "disk broken")))
    (message,) = compare(config(tmp_path), Grid(), tmp_path / "c", retries=0).values()
    assert message == "OSError: [Errno 5] disk broken"


def test_the_trace_of_an_error_that_cannot_be_written_is_no_second_error(tmp_path, runs, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    runs.fail = {"none-builtin-p0.1-s0": 1}
    with monkeypatch.context() as patched:
        patched.setattr(workers, "write_json", lambda path, *_: full(path, "") if path.name == STARTED else None)
        outcome = compare(config(tmp_path), TWO, tmp_path / "c", retries=0)
    assert all("is full. Free some space" in what for what in outcome.values())
    assert runs == []


@pytest.mark.parametrize("name", some_slow(["metrics.jsonl", "generations.jsonl"], fast={"generations.jsonl"}))
def test_a_finished_cell_whose_results_were_cut_runs_again(name, tmp_path, capsys):
    settings, folder = config(tmp_path), tmp_path / "c"
    compare(settings, Grid(), folder)
    before = results(folder)
    cell = folder / CELLS / "none-builtin-p0.1-s0"
    lines = (cell / name).read_text().splitlines(keepends=True)
    (cell / name).write_text("".join(lines[:-1]))  # cut at the end of a line, so that the file still parses
    assert not finished(cell)
    assert f"{cell / name} is missing or differs from what the run wrote" in capsys.readouterr().err
    assert set(compare(settings, Grid(), folder).values()) == {"done"}
    assert results(folder) == before


@pytest.mark.parametrize(
    "name", some_slow(["manifest.json", "metrics.jsonl", "generations.jsonl"], fast={"manifest.json"})
)
def test_a_cell_cut_off_in_the_middle_of_a_file_gives_the_same_again(name, tmp_path):
    settings, folder = config(tmp_path), tmp_path / "c"
    compare(settings, Grid(), folder)
    before = results(folder)
    cell = folder / CELLS / "none-builtin-p0.1-s0"
    manifest = json.loads((cell / "manifest.json").read_text())
    del manifest["finished"]
    (cell / "manifest.json").write_text(json.dumps(manifest))
    (cell / name).write_bytes((cell / name).read_bytes()[:-40])
    assert not finished(cell)
    assert set(compare(settings, Grid(), folder).values()) == {"done"}
    assert results(folder) == before
    assert runs_of(folder) == {cell.name: 2}


def test_a_cell_waits_for_a_process_that_is_dying_but_not_for_ever(tmp_path, runs, monkeypatch):
    tries = []

    def run(config, defenses, attack):
        tries.append(1)
        if len(tries) < 3:
            raise InputError("Another process works in ...") from Timeout("lock")
        raise InputError("something else")

    monkeypatch.setattr("hftlight.runs.run.run", run)
    (message,) = compare(config(tmp_path), Grid(), tmp_path / "c", retries=0).values()
    assert (message, len(tries)) == ("InputError: something else", 3)
    tries.clear()
    monkeypatch.setattr(workers, "LOCK_WAIT", -1.0)
    (message,) = compare(config(tmp_path), Grid(), tmp_path / "c", retries=0).values()
    assert (message, len(tries)) == ("InputError: Another process works in ...", 1)


@pytest.mark.slow
def test_a_second_command_on_the_same_folder_ends_with_status_2(tmp_path):
    folder = tmp_path / "runs" / "comparison"
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        second = warm.run([str(ROOT / "recipes" / "compare.py"), *COMMAND], cwd=tmp_path, timeout=200)
    assert second.returncode == 2
    assert "Another process works on the comparison in runs/comparison" in second.stderr
    assert "Traceback" not in second.stderr
    assert not (folder / CELLS).exists()


@pytest.mark.slow
def test_cells_in_other_processes_say_that_they_start(tmp_path):
    events = []
    compare(config(tmp_path), TWO, tmp_path / "c", jobs=2, on_cell=lambda cell, what: events.append((cell.arm, what)))
    assert sorted(events) == [("lisa", "done"), ("lisa", "started"), ("none", "done"), ("none", "started")]
    assert events.index(("lisa", "started")) < events.index(("lisa", "done"))


@pytest.fixture
def forked(monkeypatch):
    """Fork the processes of cells that do not train. Fresh interpreters would spend their time on imports."""
    monkeypatch.setattr(workers, "_Workers", lambda: multiprocessing.get_context("fork"))


def die_or_not(spec):
    """Stand in for ``run_cell`` and report the start. ``lisa`` kills its process during the first run of ``none``."""
    cells = Path(spec["config"]["output"])
    folder = cells / spec["config"]["name"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tries").open("a") as file:
        file.write("x")
    (folder / STARTED).write_text("{}")
    if spec["config"]["defense"] == ["lisa"]:
        while not any(cells.glob("none-*/tries")):
            time.sleep(0.05)
        os._exit(1)
    if not spec["config"]["defense"] and (folder / "tries").read_text() == "x":
        time.sleep(60)
    return ""


def test_a_process_that_dies_fails_its_own_cell_alone(tmp_path, monkeypatch, forked):
    """One of two concurrent cells dies. Both run again one by one, and the later cells run once."""
    monkeypatch.setattr(workers, "run_cell", die_or_not)
    monkeypatch.setattr(sweep, "plan", lambda *_: {})
    folder, events = tmp_path / "c", []
    grid = Grid(("none", "lisa", "ewc", "kl"), (0.1,))
    outcome = compare(
        config(tmp_path), grid, folder, jobs=2, retries=0, on_cell=lambda cell, what: events.append((cell.arm, what))
    )
    by_arm = {cell.arm: what for cell, what in outcome.items()}
    assert {arm for arm, what in by_arm.items() if what == "done"} == {"none", "ewc", "kl"}
    assert "terminated abruptly" in by_arm["lisa"]
    tries = {arm: (folder / CELLS / f"{arm}-builtin-p0.1-s0" / "tries").read_text() for arm in by_arm}
    assert tries == {"none": "xx", "lisa": "xx", "ewc": "x", "kl": "x"}
    assert [what for arm, what in events if arm == "ewc"] == ["started", "done"]


def tell_gpus(spec):
    """Stand in for ``run_cell`` and write the process's GPUs and threads once two cells have started."""
    import torch

    folder = Path(spec["config"]["output"]) / spec["config"]["name"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STARTED).write_text("{}")
    until = time.monotonic() + 60
    while len(list(folder.parent.glob(f"*/{STARTED}"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    environment = [os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"], torch.cuda.is_initialized()]
    (folder / "seen").write_text(json.dumps(environment))
    return ""


@pytest.mark.slow
def test_each_cell_sees_gpus_of_its_own_and_its_share_of_the_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "run_cell", tell_gpus)
    monkeypatch.setattr(sweep, "plan", lambda *_: {})
    monkeypatch.setattr(share, "cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7,8")
    before = dict(os.environ)
    settings = config(tmp_path, accelerator="auto", devices=2)
    assert set(compare(settings, TWO, tmp_path / "c", jobs=2).values()) == {"done"}
    environments = sorted(json.loads(path.read_text()) for path in (tmp_path / "c" / CELLS).glob("*/seen"))
    assert environments == [["3,5", "3", False], ["7,8", "3", False]]
    assert dict(os.environ) == before


def test_more_cells_than_gpus_are_refused_or_share_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "plan", lambda *_: {})
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a")
    settings = config(tmp_path, accelerator="auto")
    with pytest.raises(
        InputError, match=r"--jobs 2 with --devices 1 needs 2 GPUs.*Visible GPUs: 1 \(GPU-a\).*--share_gpus"
    ):
        compare(settings, TWO, tmp_path / "c", jobs=2)
    shared = []
    monkeypatch.setattr(sweep, "work", lambda *arguments: shared.append(arguments[-1]) or ())
    compare(settings, TWO, tmp_path / "c", jobs=2, share_gpus=True)
    assert shared == [["GPU-a", "GPU-a"]]


@pytest.mark.parametrize("fails", [False, True])
def test_one_job_leaves_the_number_of_threads_as_it_was(fails, tmp_path, monkeypatch):
    import torch

    counts, before = [], torch.get_num_threads()

    def counted(config, *_):
        counts.append(torch.get_num_threads())
        if fails:
            raise RuntimeError("no")

    monkeypatch.setattr("hftlight.runs.run.run", counted)
    monkeypatch.setattr(sweep, "plan", lambda *_: {})
    monkeypatch.setattr(sweep, "threads_each", lambda jobs: before + 2)
    compare(config(tmp_path), Grid(), tmp_path / "c", retries=0)
    assert set(counts) == {before + 2}
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_a_cell_on_two_devices_is_a_command_of_its_own(tmp_path):
    events = []
    settings = config(tmp_path, devices=2, strategy="ddp", alignment=Training(steps=2, batch_size=2, lr=1e-2))
    grid, folder = Grid(("lisa",), (0.1,), ("builtin",), 1), tmp_path / "c"
    outcome = compare(settings, grid, folder, jobs=1, on_cell=lambda cell, what: events.append((cell.arm, what)))
    assert set(outcome.values()) == {"done"}
    assert events == [("lisa", "started"), ("lisa", "done")]
    assert len(results(folder)) == 1
    with pytest.raises(InputError, match="is not a model folder"):
        compare(replace(settings, model=str(tmp_path)), grid, tmp_path / "bad", retries=0)


def never(spec):
    """Stand in for ``run_cell``: the process dies before it reports its start."""
    os._exit(1)


def test_processes_that_never_start_are_reported_and_not_tried_for_ever(tmp_path, monkeypatch, forked):
    monkeypatch.setattr(workers, "run_cell", never)
    monkeypatch.setattr(sweep, "plan", lambda *_: {})
    outcome = compare(config(tmp_path), Grid(("none", "lisa"), (0.1,)), tmp_path / "c", jobs=2, retries=0)
    assert all("terminated abruptly" in what for what in outcome.values())


def test_a_cell_keeps_what_a_searching_attacker_may_choose(tmp_path, monkeypatch):
    searches = []
    monkeypatch.setattr("hftlight.runs.run.run", lambda config, *_: searches.append(config.search))
    monkeypatch.setattr(sweep, "plan", lambda *_: {})
    compare(config(tmp_path, search=Search(lr=[1e-3])), Grid(), tmp_path / "c")
    assert searches == [Search(lr=[1e-3])]


def test_the_plan_counts_an_aligned_model_once(tmp_path):
    grid = Grid(("none", "lisa", "booster"), (0.1,), ("builtin",), 1)
    seconds = {cell.arm: took for cell, took in plan(config(tmp_path), grid, grid.cells()).items()}
    cells = [Cell((name,), 0.1, "builtin", 0) for name in ("lisa", "booster")]
    lisa, booster = (next(iter(plan(config(tmp_path), grid, [cell]).values())) for cell in cells)
    assert booster > seconds["none"] > seconds["lisa"]
    assert lisa == pytest.approx(seconds["none"])  # Lisa adds no forward or backward pass
    assert seconds["booster"] < booster  # the first cell's time includes the base model's measurement


@pytest.mark.slow
def test_a_half_written_cell_is_run_and_the_others_are_not(tmp_path):
    """Real cells, two at a time. One manifest is cut off, as a crash leaves it."""
    assert set(compare(config(tmp_path), TWO, tmp_path / "c", jobs=2).values()) == {"done"}
    cells = sorted((tmp_path / "c" / CELLS).iterdir())
    before = {cell.name: (cell / "metrics.jsonl").stat().st_mtime_ns for cell in cells}
    manifest = cells[0] / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole[: len(whole) // 2])
    assert set(compare(config(tmp_path), TWO, tmp_path / "c").values()) == {"done"}
    again = {cell.name for cell in cells if (cell / "metrics.jsonl").stat().st_mtime_ns != before[cell.name]}
    assert again == {cells[0].name}
    assert json.loads(manifest.read_text())["config_hash"] == json.loads(whole)["config_hash"]


COMMAND = [
    "--defenses", "none", "lisa+antidote", "--seeds", "2", "--model", "tiny", "--alignment.steps", "3",
    "--finetuning.steps", "3", "--num_samples", "20", "--evaluation.prompts", "4", "--evaluation.task_rows", "4",
    "--evaluation.loss_rows", "2",
    "--evaluation.over_refusal_prompts", "4", "--accelerator", "cpu",
]  # fmt: skip


def scores_of(folder):
    """Return the leaderboard's lines except those on time, memory and relative cost."""
    lines = (folder / "leaderboard.csv").read_text().splitlines()
    return [line for line in lines if "seconds" not in line and "memory" not in line and "relative" not in line]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the folder of the whole command's comparison, run once with a cache of its own."""
    place = tmp_path_factory.mktemp("undisturbed")
    fresh = {**os.environ, "HFTLIGHT_CACHE": str(place / "cache")}
    done = warm.run([str(ROOT / "recipes" / "compare.py"), *COMMAND], cwd=place, env=fresh)
    assert done.returncode == 0, done.stderr
    return place / "runs" / "comparison"


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_killed_and_run_again_it_ends_as_if_never_killed(jobs, tmp_path, undisturbed):
    command = [str(ROOT / "recipes" / "compare.py"), *COMMAND, "--jobs", jobs]
    process = warm.Command(command, cwd=tmp_path)
    cells = tmp_path / "runs" / "comparison" / CELLS
    until = time.monotonic() + 120
    while process.poll() is None and not any(finished(c) for c in cells.glob("*")) and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    process.wait()
    done = {c.name: (c / "manifest.json").stat().st_mtime_ns for c in cells.iterdir() if finished(c)}
    assert 0 < len(done) < 4
    again = warm.run(command, cwd=tmp_path, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "report.html" in again.stdout
    assert {name: (cells / name / "manifest.json").stat().st_mtime_ns for name in done} == done
    assert len([c for c in cells.iterdir() if finished(c)]) == 4
    assert (cells.parent / "leaderboard.csv").read_text().count(",finetuning,harmful_score,builtin") == 4
    assert all(runs_of(cells.parent)[name] == 1 for name in done)
    assert scores_of(cells.parent) == scores_of(undisturbed)


# Swept arguments


SWEPT = {"antidote.prune_ratio": (0.1, 0.2), "antidote.rounding": ("up", "down")}


def test_each_value_of_a_swept_argument_is_an_arm_of_every_combination_with_its_defense():
    grid = Grid(("none", "lisa", "lisa+antidote"), arguments={"antidote": {"group": "matrix"}}, sweeps=SWEPT)
    arms = {c.name: c.arm for c in grid.cells()}
    values = [(ratio, rounding) for ratio in ("0.1", "0.2") for rounding in ("up", "down")]
    assert arms == {
        "none-builtin-p0.1-s0": "none",
        "lisa-builtin-p0.1-s0": "lisa",
        **{
            f"lisa+antidote.prune_ratio={ratio}.rounding={rounding}-builtin-p0.1-s0": (
                f"lisa+antidote[prune_ratio={ratio},rounding={rounding}]"
            )
            for ratio, rounding in values
        },
    }
    turned = replace(grid, sweeps=dict(reversed(SWEPT.items())))
    assert {c.name for c in turned.cells()} == arms.keys()
    made = [grid.made(c.defenses, c.swept)[1].arguments() for c in grid.cells() if "antidote" in c.defenses]
    assert [(d["prune_ratio"], d["rounding"], d["group"]) for d in made] == [
        (float(ratio), rounding, "matrix") for ratio, rounding in values
    ]


def test_cells_with_other_values_share_an_aligned_model_only_if_the_value_is_of_a_later_stage():
    grid = Grid(("booster+antidote",), sweeps={"booster.lam": (1.0, 5.0), "antidote.prune_ratio": (0.1, 0.2)})
    assert len(grid.cells()) == 4
    assert len({grid.aligned(cell) for cell in grid.cells()}) == 2
    assert [dict(c.swept)["booster.lam"] for c in grid.cells()[:2]] == [1.0, 5.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.05, "0.05"), (5.0, "5"), (1e-5, "1e-05"), (0.12345678, "0.12345678"), (3, "3"), (None, "null"), (True, "true")],
)
def test_a_value_is_shown_as_it_is_written(value, text):
    assert grid.value_text(value) == text


@pytest.mark.parametrize(
    ("sweeps", "said"),
    [
        (
            {"antidote.prune_ratio": (0.1, 5)},
            r"^--antidote.prune_ratio: Antidote: prune_ratio must lie in .*write 0.05",
        ),
        ({"antidote.prune_ratio": (0.1, 0.1)}, "^--antidote.prune_ratio: 0.1 is listed twice"),
        ({"antidote.prune_ratio": ()}, "^--antidote.prune_ratio: name at least one"),
        ({"antidote.prun_ratio": (1, 2)}, "unexpected keyword argument 'prun_ratio'"),
        ({"lisa.proximal": (0.1, 0.2)}, "^--lisa.proximal: no combination of --defenses has 'lisa'"),
        ({"rewind.safety": ("a/b", "a b")}, r"--rewind.safety: the values of .*\[safety=a/b\] .* same folder name"),
    ],
)
def test_values_that_cannot_be_swept_are_refused_by_the_option(sweeps, said):
    with pytest.raises(InputError, match=said):
        Grid(("none", "antidote", "rewind"), sweeps=sweeps)


def test_a_sweep_gets_more_values_and_mixes_with_nothing_else(tmp_path, runs):
    folder = tmp_path / "c"

    def swept(*values, **arguments):
        own = {"arguments": {"antidote": arguments}, "sweeps": {"antidote.prune_ratio": values} if values else {}}
        return compare(config(tmp_path), Grid(("none", "antidote"), **own), folder)

    swept(0.1, 0.2)
    assert len(runs) == 3
    swept(0.1, 0.2, 0.3)
    assert len(runs) == 4
    swept(0.3, 0.2)  # fewer values remove no cell
    cells = {cell["name"]: cell for cell in json.loads((folder / GRID).read_text())["cells"]}
    assert len(cells) == len(runs) == 4
    assert cells["antidote.prune_ratio=0.3-builtin-p0.1-s0"]["swept"] == {"antidote.prune_ratio": 0.3}
    assert "swept" not in cells["none-builtin-p0.1-s0"]  # the entry is the same as before arguments could be swept
    for values, arguments in (((), {"prune_ratio": 0.1}), ((), {}), ((0.1, 0.2), {"group": "matrix"})):
        with pytest.raises(InputError, match="holds cells of antidote with other arguments"):
            swept(*values, **arguments)


def test_a_cell_runs_with_its_own_values(tmp_path, monkeypatch):
    seen = {}

    def run(config, defenses, attack):
        seen[config.name] = [d.arguments().get("prune_ratio") for d in defenses]
        (Path(config.output) / config.name / "manifest.json").write_text('{"finished": "now"}')

    monkeypatch.setattr("hftlight.runs.run.run", run)
    monkeypatch.setattr(sweep, "plan", lambda *_: {})
    grid = Grid(("lisa+antidote",), sweeps={"antidote.prune_ratio": (0.1, 0.2)})
    compare(config(tmp_path), grid, tmp_path / "c")
    assert seen == {f"lisa+antidote.prune_ratio={v}-builtin-p0.1-s0": [None, v] for v in (0.1, 0.2)}


@pytest.mark.slow
def test_a_sweep_trains_and_scores_once_and_is_read_back(tmp_path):
    """Real cells: both repairs take one fine-tuned model and one sweep of forward passes. The report shows a figure."""
    grid = Grid(("none", "antidote"), sweeps={"antidote.prune_ratio": (0.1, 0.5)})
    assert set(compare(config(tmp_path), grid, tmp_path / "c").values()) == {"done"}
    names = [f"antidote.prune_ratio={value}-builtin-p0.1-s0" for value in (0.1, 0.5)]
    scores, pruned = [], []
    for name in names:
        manifest = json.loads((tmp_path / "c" / CELLS / name / "manifest.json").read_text())
        entry = manifest["arms"]["antidote"]["stages"]["post_finetuning"]
        scores += entry["scores"].values()
        pruned += [report["requested_fraction"] for report in entry["defenses"].values()]
    assert [s["scores"] for s in scores] == ["computed", "reused"]
    assert scores[0]["key"] == scores[1]["key"]
    assert pruned == [0.1, 0.5]
    assert "scores: reused" in " ".join((tmp_path / "c" / CELLS / names[1] / LOG).read_text().split())
    comparison = read_comparison(tmp_path / "c")
    assert comparison.arms == ["none", "antidote[prune_ratio=0.1]", "antidote[prune_ratio=0.5]"]
    assert [name for name, *_ in figures(comparison) if name.startswith("sweep-")] == ["sweep-0-0-0"]
    labels = labels_of(tmp_path / "c" / CELLS / names[0], "antidote", "finetuning", config(tmp_path))
    assert labels["arm"] == "antidote[prune_ratio=0.1]"
    before = results(tmp_path / "c")
    compare(config(tmp_path), grid, tmp_path / "c")
    assert results(tmp_path / "c") == before
    assert set(runs_of(tmp_path / "c").values()) == {1}


def test_a_config_of_cells_is_that_of_a_run():
    cell = grid.cell_config(RunConfig(), Cell(("booster",), 0.3, "sst2", 4))
    assert (cell.defense, cell.harmful_ratio, cell.data.task, cell.seed) == (["booster"], 0.3, "sst2", 4)
    assert (cell.attack, cell.data.task_train) == ("harmful_mix", None)
    files = RunConfig(data=Data(task_train="sets/{task}/train.jsonl", task_test="test.jsonl"))
    cell = grid.cell_config(files, Cell((), 1.0, "agnews", 0, "explicit"))
    assert (cell.attack, cell.data.task_train, cell.data.task_test) == (
        "explicit", "sets/agnews/train.jsonl", "test.jsonl"
    )  # fmt: skip


def test_attacks_are_an_axis_and_one_without_p_has_one_cell():
    grid = Grid(
        ("none",), (0.0, 0.1), attacks=("harmful_mix", "explicit", "identity_shift"), arguments={"explicit": {"n": 10}}
    )
    assert [c.name for c in grid.cells()] == [
        "none-builtin-p0-s0", "none-builtin-p0.1-s0", "none-explicit-builtin-p1-s0",
        "none-identity_shift-builtin-p1-s0",
    ]  # fmt: skip
    assert grid.attack("explicit").n == 10


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"attacks": ("harmful_mx",)}, "did you mean 'harmful_mix'"),
        ({"attacks": ()}, "--attacks: name at least one"),
        ({"attacks": ("harmful_mix",), "arguments": {"harmful_mix": {"p": 0.2}}}, "--harmful_ratios decides p"),
        ({"attacks": ("explicit",), "arguments": {"explicit": {"n": 0}}}, "n must be a whole number >= 1"),
    ],
)
def test_attacks_that_cannot_be_compared_are_refused(values, said):
    with pytest.raises(InputError, match=said):
        Grid(**values)


def test_a_searching_attacker_on_several_attacks_ends_in_the_tables(tmp_path):
    """Real cells: every cell runs its own attack. The worst case of the search is a column."""
    grid = Grid(("none",), (0.1,), attacks=("harmful_mix", "explicit"), arguments={"explicit": {"n": 16}})
    settings = config(tmp_path, attacker="search:2", search=Search(lr=[1e-3], rank=[4], harmful_ratio=[0.1]))
    assert set(compare(settings, grid, tmp_path / "c").values()) == {"done"}
    comparison = read_comparison(tmp_path / "c")
    assert [str(scene) for scene in comparison.scenes] == ["builtin", "builtin, explicit"]
    assert comparison.metrics[-2:] == ("worst_case_harmful_score", "useful_harmful_score")
    rows = [dict(row) for row in csv.DictReader(StringIO(leaderboard_csv(comparison)))]
    assert {(r["attack"], r["harmful_ratio"]) for r in rows} == {("harmful_mix", "0.1"), ("explicit", "1.0")}
    worst = {r["attack"]: float(r["value"]) for r in rows if r["metric"] == "worst_case_harmful_score"}
    for place in comparison.cells:
        assert comparison.spread(place, "worst_case_harmful_score").mean == worst[place.attack]
        assert comparison.spread(place, "worst_case_harmful_score").low is not None
    assert "Worst case %, p=0.1" in leaderboard_markdown(comparison)
    manifest = json.loads((tmp_path / "c" / CELLS / "none-explicit-builtin-p1-s0" / "manifest.json").read_text())
    assert manifest["attack"]["rows"] == {"attack": 16}
