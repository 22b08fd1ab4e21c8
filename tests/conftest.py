"""How the suite runs: longest files first, some files spread over the workers, each test as if it ran alone."""

import gc
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

# Files whose tests form independent groups, one per row or pair. Their groups start after all other files.
SPREAD = (
    "tests/defenses/test_contract.py",
    "tests/runs/stages/test_killed.py",
    "tests/runs/stages/test_killed_command.py",
    "tests/defenses/test_pairs.py",
)
# Seconds that a file takes; the longest is started first. A file that is not listed takes a few seconds.
SECONDS = {
    "tests/comparison/test_sweep.py": 280.0,
    "tests/comparison/test_ray.py": 190.0,
    "tests/runs/test_run.py": 115.0,
    "tests/runs/stages/test_repair.py": 90.0,
    "tests/runs/test_ranks.py": 70.0,
    "tests/runs/stages/test_trials.py": 65.0,
    "tests/cli/test_cli.py": 55.0,
    "tests/engine/step/test_distributed.py": 45.0,
    "tests/defenses/test_lightning.py": 40.0,
    "tests/runs/stages/test_hardening.py": 40.0,
    "tests/defenses/alignment/test_t_vaccine.py": 35.0,
    "tests/runs/stages/test_resume.py": 35.0,
    "tests/models/test_foreign.py": 30.0,
    "tests/runs/stages/test_own_stages.py": 30.0,
    "tests/runs/measuring/test_curve.py": 30.0,
    "tests/comparison/test_dashboard.py": 30.0,
    "tests/defenses/finetuning/test_lisa.py": 25.0,
    "tests/runs/stages/test_guards.py": 25.0,
    "tests/runs/stages/test_phases.py": 20.0,
    "tests/models/test_base.py": 20.0,
    "tests/models/test_families.py": 20.0,
    "tests/runs/measuring/test_prompts.py": 20.0,
}
SLOWEST = 10
# Files whose runs and comparisons leave the figures of their reports undrawn, and files among them that read figures.
UNDRAWN = ("tests/runs/", "tests/comparison/", "tests/models/", "tests/defenses/finetuning/test_bea.py")
DRAWN = ("tests/comparison/test_comparison.py",)
KEPT = ("HFTLIGHT_", "OMP_NUM_THREADS", "OPENAI_", "WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "RAY_ADDRESS")


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    """Restore what a test changes in its process: torch's thread count and the variables that hftlight reads."""
    threads = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    before = _variables()
    yield
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        wanted = threads or int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads())
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)
    for name in _variables().keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True, scope="module")
def undrawn(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave the figures of reports undrawn in files that read none. ``tests/report`` draws them."""
    file = _file(request.node.nodeid)
    with pytest.MonkeyPatch.context() as patch:
        if file.startswith(UNDRAWN) and file not in DRAWN:
            patch.setattr("hftlight.report.figure.svg", lambda *_: "<svg></svg>")
        yield


_frozen = 0


@pytest.fixture(autouse=True, scope="module")
def modules_are_no_garbage() -> None:
    """Freeze imported modules. A library that often collects garbage would otherwise scan them all."""
    global _frozen
    if len(sys.modules) > _frozen + 50:
        gc.collect()
        gc.freeze()
        _frozen = len(sys.modules)


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(KEPT)}


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def _group(nodeid: str) -> str:
    """Return the group that one worker runs: a file, or the tests of one row in a spread file."""
    file = _file(nodeid)
    # The row is the first part of the test's id: "row" in "test_name[row-other]".
    return f"{file} {nodeid.partition('[')[2].rstrip(']').partition('-')[0]}" if file in SPREAD else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files, longest first. Spread files come last and fill the idle workers."""

    def place(item: pytest.Item) -> tuple[int, float]:
        file = _file(item.nodeid)
        return SPREAD.index(file) if file in SPREAD else -1, -SECONDS.get(file, 3.0)

    items.sort(key=place)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return a scheduler that keeps the order of files and deals out a spread file group by group."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    config.option.loadscopereorder = False
    return Files(config, log)


_seconds: dict[str, float] = defaultdict(float)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Sum the seconds of each file. With several workers, their reports arrive here too."""
    _seconds[_file(report.nodeid)] += report.duration


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the slowest files."""
    if len(_seconds) > 1:
        terminalreporter.section(f"slowest {SLOWEST} files")
        for file, seconds in sorted(_seconds.items(), key=lambda pair: -pair[1])[:SLOWEST]:
            terminalreporter.write_line(f"{seconds:8.1f} s  {file}")
