"""Two forked processes of one run, in scenarios where they must agree: ``FOLDER SCENARIO ...``.

Each process writes its results to ``SCENARIO-RANK.json``. In the slow scenarios the process group's timeout is
``LIMIT`` seconds.
"""

import json
import os
import shutil
import socket
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import peft  # noqa: F401  (imported once, before the fork)
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only

import hftlight.runs.measuring.curve as watch_module
import hftlight.runs.measuring.measure as measure_module
import hftlight.runs.measuring.test_sets as sets_module
import hftlight.runs.run as run_module
import hftlight.runs.stages.train as stage_module
from hftlight.config import Data, Evaluation, Lora, RunConfig, Training
from hftlight.console import quiet
from hftlight.data.sources import get_task
from hftlight.engine import Stage
from hftlight.evaluation.judges import Verdict
from hftlight.files import folder_digest
from hftlight.runs import ranks
from hftlight.runs.measuring.test_sets import TestSets
from hftlight.runs.stages.train import StageJob, run_stage
from tests.helpers.jobs import rows, small_config

LIMIT = 10.0  # seconds
SLOW = 13.0


def job(seed: int = 0, **changes: Any) -> StageJob:
    """Return a short stage for two processes. Another seed gives another stage."""
    training = Training(steps=4, batch_size=2, lr=1e-1)
    config = small_config(training=training, devices=2, strategy="ddp", seed=seed, **changes)
    return StageJob(Stage.FINETUNING, config, "tiny", None, {"task": rows(9, "task")}, [])


def weights(config_job: StageJob) -> str:
    """Return the hash of a stage's weights."""
    return folder_digest(config_job.place(), "*.safetensors")


class Stop(Exception):
    """Ends a stage early."""


def stage_by(rank: int, **changes: Any) -> dict[str, Any]:
    """Train a stage. Return whether it was done before, the trained steps and the weights' hash."""
    steps: list[int] = []
    done = run_stage(job(**changes), on_step=lambda now, _: steps.append(now))
    return {"done": done, "steps": steps, "weights": weights(job(**changes))}


def shared(rank: int) -> dict[str, Any]:
    """Let process 1 misread the disk three times: an unfinished stage, a finished one, and a checkpoint."""
    looks = StageJob.done, stage_module.newest_checkpoint
    results: dict[str, Any] = {}
    if rank == 1:
        StageJob.done = lambda self: True  # type: ignore[method-assign]
    results["not done"] = stage_by(rank)
    if rank == 1:
        StageJob.done = lambda self: False  # type: ignore[method-assign]
    results["done"] = stage_by(rank)
    StageJob.done, _ = looks  # type: ignore[method-assign]

    def stop(now: int, _: float | None) -> None:
        if now == 3:
            raise Stop

    with suppress(Stop):
        run_stage(job(1), on_step=stop)
    if rank == 1:
        stage_module.newest_checkpoint = lambda folder: None
    results["resumed"] = stage_by(rank, seed=1)
    stage_module.newest_checkpoint = looks[1]
    return results


def slow_judge(rank: int) -> dict[str, Any]:
    """Measure during training with a judge that is slower than the timeout, while process 1 waits."""

    class Slow:
        name = "slow"

        def __call__(self, prompts: Any, responses: Any) -> list[Verdict]:
            time.sleep(SLOW)
            return [Verdict.of(False) for _ in responses]

    for module in (watch_module, measure_module, sets_module):
        module.get_judge = lambda name: Slow()
    evaluation = Evaluation(at=[2], max_new_tokens=2, task_max_new_tokens=2)
    tests = TestSets(rows(2, "test"), (), (), get_task("sst2"), ("slow",))
    watched = replace(job(2, evaluation=evaluation), tests=tests)
    run_stage(watched)
    return {"weights": weights(watched)}


def slow_run(rank: int) -> dict[str, Any]:
    """Run all stages with measurements that are slower than the timeout."""
    measure, steps = run_module.measure, []

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(SLOW)
        steps.append(time.monotonic())
        return measure(*arguments, **options)

    run_module.measure = slow
    training = Training(steps=2, batch_size=2, lr=1e-2)
    config = RunConfig(
        model="tiny",
        alignment=training,
        finetuning=training,
        lora=Lora(r=2, alpha=4),
        num_samples=20,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        data=Data(),
        evaluation=Evaluation(
            prompts=2, over_refusal_prompts=1, task_rows=1, max_new_tokens=1, task_max_new_tokens=1, loss_rows=2
        ),
        output=str(Path(os.environ["HFTLIGHT_CACHE"]).parent / "runs"),
    )
    result = run_module.run(config)
    return {"scores": len(result.scores), "measured": len(steps)}


def refused(rank: int) -> dict[str, Any]:
    """Fail in four ways: process 0 cannot read, values differ, decisions differ, and process 0 dies."""
    from hftlight.errors import InputError, RunError

    results: dict[str, Any] = {}

    def look() -> str:
        raise InputError("the file is missing")

    ranks.GRACE = 0.1
    ranks.launch(job().config)
    for name, work in (
        ("error", lambda: ranks.decide("the file", look)),
        ("agree", lambda: ranks.agree("The file", f"version {rank}")),
        ("order", lambda: ranks.decide(f"step {rank}", lambda: None)),
        ("lost", lambda: ranks.decide("the end", lambda: (time.sleep(2), os._exit(0)))),
    ):
        try:
            with ranks.ending_together() if name == "error" else nullcontext():
                work()
            results[name] = ""
        except (InputError, RunError) as error:
            results[name] = f"{type(error).__name__}: {error}"
        # Process 0 dies in the last case, so it writes after every case.
        if rank == 0:
            write("refused", rank, results)
    return results


SCENARIOS = {each.__name__: each for each in (shared, slow_judge, slow_run, refused)}


def write(scenario: str, rank: int, results: dict[str, Any]) -> None:
    """Write the results of a process."""
    (Path(sys.argv[1]) / f"{scenario}-{rank}.json").write_text(json.dumps(results))


def child(scenario: str, rank: int, port: int) -> None:
    """Act as one of the two processes."""
    folder = Path(sys.argv[1])
    log = os.open(folder / f"{scenario}-{rank}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    os.environ["HFTLIGHT_CACHE"] = str(folder / scenario / "cache")
    rank_zero_only.rank = rank
    torch.set_num_threads(1)
    original = DDPStrategy.__init__

    def limited(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **{"timeout": timedelta(seconds=LIMIT), **options})

    if scenario.startswith("slow"):
        DDPStrategy.__init__ = limited  # type: ignore[method-assign]
    write(scenario, rank, SCENARIOS[scenario](rank))


def both(scenario: str) -> list[int]:
    """Run a scenario in two processes and return their exit statuses."""
    shutil.rmtree(Path(sys.argv[1]) / scenario, ignore_errors=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in (0, 1):
        pids.append(os.fork())
        if pids[-1] == 0:
            try:
                child(scenario, rank, port)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


if __name__ == "__main__":
    quiet()
    for scenario in sys.argv[2:]:
        print(json.dumps({scenario: both(scenario)}), flush=True)
