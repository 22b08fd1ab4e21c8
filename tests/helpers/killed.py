"""Run the stages of one row in a process that may kill itself: ``ANSWER NAME [STAGE MOMENT KIND]``.

A moment is a counted place in the work. Four kinds lie inside a stage: a micro-batch, an optimizer step, the middle of
a checkpoint's bytes, and the time before the checkpoint's rename. Four kinds lie at a stage's end: before the result,
before the result's seal, between two stages, and after a repair.
"""

import io
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import hftlight.runs.stages.checkpoint as checkpoint
import hftlight.runs.stages.job as job_module
import hftlight.runs.stages.repair as repair
import hftlight.runs.stages.train as stage
from hftlight import cache
from hftlight.config import Training
from hftlight.console import quiet
from hftlight.defenses import Antidote, Booster, ConstrainedSFT, Freeze, Lisa, SafeLoRA, SafetyMix, Vaccine
from hftlight.engine import Slot, Stage, in_order, main_stream
from hftlight.files import read_rows
from hftlight.model_files import model_hash
from hftlight.models.module import SafetyModule
from hftlight.models.row_filter import RowFilter
from hftlight.models.serving import Artifact
from hftlight.runs.stages.choice import ChoiceJob, run_choice
from tests.helpers.contract import rows as contract_rows
from tests.helpers.filters import filtered
from tests.helpers.jobs import rows, small_config

INSIDE = ("bytes", "rename", "micro-batch", "step")
ENDS = ("result", "seal", "between", "repair")
COMBINATIONS = {
    "booster+lisa+antidote": lambda: [
        Booster(5.0, 0.1),
        Lisa(1, 2, proximal=0.5, quiet=0.0, cycles=0),
        Antidote(prune_ratio=0.5),
    ],
    "vaccine+freeze+safe_lora": lambda: [Vaccine(0.5), Freeze(0.5, 0.25, samples=4), SafeLoRA(fraction=0.5)],
    "safety_mix+constrained_sft": lambda: [SafetyMix(ratio=0.5), ConstrainedSFT()],
}
STREAMS = {
    name: rows(count, name)
    for name, count in (("alignment", 7), ("harmful", 5), ("pairs", 5), ("retain", 6), ("task", 9))
}
STREAMS["refusals"] = STREAMS["alignment"]


def makers() -> dict[str, Any]:
    """Return name -> function that makes the defenses, for each row and each combination."""
    return {name: (lambda row=row: [row.make()]) for name, row in contract_rows().items()} | COMBINATIONS


def plan(name: str) -> tuple[str, ...]:
    """Return the kinds of moment at which a row is killed.

    A combination is killed at all four kinds inside a stage, and at one kind at a stage's end. A single defense is
    killed at a micro-batch or an optimizer step, where its own state counts, and at one other kind. Defenses take
    turns through the kinds.
    """
    repairs = any(d.stage is Stage.POST_FINETUNING for d in makers()[name]())
    ends = ENDS if repairs else ENDS[:3]
    like = [n for n in makers() if repairs == any(d.stage is Stage.POST_FINETUNING for d in makers()[n]())]
    turn = like.index(name)
    if name in COMBINATIONS:
        return (*INSIDE, ends[turn % len(ends)])
    others = (*INSIDE[:2], *ends)
    return INSIDE[2 + turn % 2], others[turn % len(others)]


def moments(kinds: list[list[str]], name: str) -> list[tuple[int, int, str]]:
    """Return the kill points (stage, moment, kind), chosen from the kinds of all moments by stage."""
    chosen = []
    for kind in plan(name):
        # Every moment of this kind in every stage.
        places = [
            (s, i, kind) for s, stage_kinds in enumerate(kinds) for i, each in enumerate(stage_kinds) if each == kind
        ]
        chosen.append(random.Random(f"{name} {kind}").choice(places))
    return chosen


def chain(defenses: list[Any]) -> str:
    """Run the stages that a list of defenses needs, in the current cache, and return the last artifact's hash."""
    config = small_config(training=Training(steps=5, batch_size=2, accumulate=2, lr=1e-2))
    of = {each: [d for d in in_order(defenses) if d.stage is each] for each in Stage}
    needed = {name for d in defenses for name in d.streams}
    aligned = finetuned = None
    if of[Stage.ALIGNMENT] or of[Stage.POST_FINETUNING]:
        main = main_stream(of[Stage.ALIGNMENT], "alignment")
        streams = {name: STREAMS[name] for name in sorted({main, *needed} - {"task"})}
        job = stage.StageJob(Stage.ALIGNMENT, config, "tiny", None, streams, of[Stage.ALIGNMENT])
        begin(job)
        stage.run_stage(job, on_step=lambda *_: tick("step"))
        aligned = job.artifact()
        tick("between")
    if of[Stage.FINETUNING] or of[Stage.POST_FINETUNING]:
        streams = {name: STREAMS[name] for name in sorted({"task", *needed})}
        for d in of[Stage.FINETUNING]:
            if isinstance(d, RowFilter):
                filtered(d, STREAMS["task"])
            elif d.selects and Slot.ADAPTER in d.slots:  # its selection fits this adapter only
                choice = ChoiceJob(config, aligned or Artifact.of("tiny"), streams, d)
                d.selected = read_rows(run_choice(choice))
        job = stage.StageJob(Stage.FINETUNING, config, "tiny", aligned, streams, of[Stage.FINETUNING])
        begin(job)
        stage.run_stage(job, on_step=lambda *_: tick("step"))
        finetuned = job.artifact()
        tick("between")
    if of[Stage.POST_FINETUNING]:
        for d in of[Stage.POST_FINETUNING]:
            d.unaligned = "tiny" if "unaligned" in d.needs else None
        job = repair.RepairJob(config, "tiny", aligned, finetuned, STREAMS, of[Stage.POST_FINETUNING])
        begin(job)
        repair.run_repair(job, lambda _: tick("repair"))
    return model_hash(str(job.place()))


seen: list[list[str]] = []  # kinds of moments, by stage
folders: list[str] = []  # names of the stages' folders in the cache
kill_at: tuple[int, int, str] | None = None


def begin(job: Any) -> None:
    """Count a stage."""
    seen.append([])
    folders.append(job.folder().name)


def tick(kind: str) -> bool:
    """Count a moment. Kill the process at the chosen one, but leave the kill to the caller for ``bytes``."""
    seen[-1].append(kind)
    now = kill_at == (len(seen) - 1, len(seen[-1]) - 1, kind)
    if now and kind != "bytes":
        os.kill(os.getpid(), signal.SIGKILL)
    return now


def instrument() -> None:
    """Count moments inside the library's own work."""
    save, replace, write, seal = torch.save, os.replace, job_module.write_json, cache.seal
    step = SafetyModule.training_step

    def half_saved(value: Any, file: Any) -> None:
        if tick("bytes"):  # write half of the bytes, then die
            whole = io.BytesIO()
            save(value, whole)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(value, file)

    def renamed(source: Any, target: Any) -> None:
        if str(target).endswith(".ckpt"):
            tick("rename")
        replace(source, target)

    def written(path: Path, value: Any, **options: Any) -> None:
        if path.name == job_module.RESULT:
            tick("result")
        write(path, value, **options)

    def sealed(folder: Path, *parts: str) -> None:
        if folder.parent.name == "stages":
            tick("seal")
        seal(folder, *parts)

    def counted(self: Any, *arguments: Any) -> Any:
        tick("micro-batch")
        return step(self, *arguments)

    checkpoint.torch.save = half_saved  # type: ignore[assignment]
    checkpoint.os.replace = renamed  # type: ignore[assignment]
    job_module.write_json = written
    cache.seal = sealed  # type: ignore[assignment]
    SafetyModule.training_step = counted  # type: ignore[method-assign]


def main(answer: str, name: str, *kill: str) -> None:
    """Run the chain in the cache that the environment names and write hash, moments and folders, unless killed."""
    global kill_at
    kill_at = (int(kill[0]), int(kill[1]), kill[2]) if kill else None
    quiet()
    instrument()
    artifact_hash = chain(makers()[name]())
    Path(answer).write_text(json.dumps({"digest": artifact_hash, "moments": seen, "folders": folders}))
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
