"""Kill every defense's stages at random moments, run them again, and say what came out: ``FOLDER [NAME ...]``.

Each run is a child forked from this process, which has imported everything and run no tensor operation. A moment is a
place in the work that is counted: a micro-batch, an optimizer step, the middle of a checkpoint's bytes, the time
between a checkpoint's bytes and its name, between a stage's weights and its result, between two stages, around a
repair.
"""

import io
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import peft  # noqa: F401  (imported once, before the fork)
import torch
import transformers.models.llama.modeling_llama  # noqa: F401

import hftlight.runs.checkpoint as checkpoint
import hftlight.runs.repair as repair
import hftlight.runs.stage as stage
from hftlight.cli import quiet
from hftlight.config import Training
from hftlight.defenses import Antidote, Booster, ConstrainedSFT, Freeze, Lisa, SafeLoRA, SafetyMix, Vaccine
from hftlight.engine import Stage, in_order
from hftlight.models import model_hash
from tests.helpers.contract import rows as contract_rows
from tests.helpers.jobs import rows, small_config

KILLS = 5
COMBINATIONS = {
    "booster+lisa+antidote": lambda: [
        Booster(5.0, 0.1),
        Lisa(1, 2, proximal=0.5, quiet=0.0, cycles=0),
        Antidote(prune_ratio=0.5),
    ],
    "vaccine+freeze+safe_lora": lambda: [Vaccine(0.5), Freeze(0.5, 0.25, samples=4), SafeLoRA(fraction=0.5)],
    "safety_mix+constrained_sft": lambda: [SafetyMix(ratio=0.5), ConstrainedSFT()],
}
STREAMS = {name: rows(count, name) for name, count in (("alignment", 7), ("harmful", 5), ("task", 9))}


def chain(defenses: list[Any]) -> str:
    """Run the stages that a list of defenses needs, in the current cache, and return the last artifact's hash."""
    config = small_config(training=Training(steps=5, batch_size=2, accumulate=2, lr=1e-2))
    of = {each: [d for d in in_order(defenses) if d.stage is each] for each in Stage}
    needed = {name for d in defenses for name in d.streams}
    aligned = finetuned = None
    if of[Stage.ALIGNMENT] or of[Stage.POST_FINETUNING]:
        streams = {name: STREAMS[name] for name in sorted({"alignment", *needed} - {"task"})}
        job = stage.StageJob(Stage.ALIGNMENT, config, "tiny", None, streams, of[Stage.ALIGNMENT])
        stage.run_stage(job, on_step=lambda *_: tick("step"))
        aligned = job.artifact()
        tick("between")
    if of[Stage.FINETUNING] or of[Stage.POST_FINETUNING]:
        streams = {name: STREAMS[name] for name in sorted({"task", *needed})}
        job = stage.StageJob(Stage.FINETUNING, config, "tiny", aligned, streams, of[Stage.FINETUNING])
        stage.run_stage(job, on_step=lambda *_: tick("step"))
        finetuned = job.artifact()
        tick("between")
    if of[Stage.POST_FINETUNING]:
        job = repair.RepairJob(config, "tiny", aligned, finetuned, STREAMS, of[Stage.POST_FINETUNING])
        repair.run_repair(job, lambda _: tick("repair"))
    return model_hash(str(job.artifact()))


seen: list[str] = []
kill_at = -1


def tick(kind: str) -> bool:
    """Count a moment; at the one that was chosen, die, except in the middle of a file, which dies by itself."""
    seen.append(kind)
    now = len(seen) - 1 == kill_at
    if now and kind != "bytes":
        os.kill(os.getpid(), signal.SIGKILL)
    return now


def instrument() -> None:
    """Count moments inside the library's own work."""
    save, replace, write, step = torch.save, os.replace, stage.write_json, stage.SafetyModule.training_step

    def half_saved(value: Any, file: Any) -> None:
        if tick("bytes"):
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
        if path.name == stage.RESULT:
            tick("result")
        write(path, value, **options)

    def counted(self: Any, *arguments: Any) -> Any:
        tick("micro-batch")
        return step(self, *arguments)

    checkpoint.torch.save = half_saved  # type: ignore[assignment]
    checkpoint.os.replace = renamed  # type: ignore[assignment]
    stage.write_json = repair.write_json = written
    stage.SafetyModule.training_step = counted  # type: ignore[method-assign]


def child(make: Any, cache: Path, kill: int, answer: Path | None) -> None:
    """Be the forked process: work, count, perhaps die, write the hash and the moments."""
    global kill_at
    kill_at = kill
    os.environ["HFTLIGHT_CACHE"] = str(cache)
    log = os.open(cache / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    instrument()
    found = chain(make())
    if answer is not None:
        answer.write_text(json.dumps({"digest": found, "moments": seen}))


def forked(*arguments: Any) -> int:
    """Run ``child`` in a process of its own and return its exit status; negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            child(*arguments)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def moments(kinds: list[str], name: str) -> list[int]:
    """Return where to kill: inside a checkpoint's bytes, around a result or a stage's end, and anywhere else."""
    generator = random.Random(name)
    inside = [i for i, kind in enumerate(kinds) if kind == "bytes"]
    between = [i for i, kind in enumerate(kinds) if kind in ("result", "between", "repair")]
    chosen = {generator.choice(inside), generator.choice(between)}
    rest = [i for i in range(len(kinds)) if i not in chosen]
    return sorted(chosen) + generator.sample(rest, KILLS - len(chosen))


def examine(name: str, make: Any, folder: Path, models: Path) -> dict[str, Any]:
    """Return the hash of an uninterrupted run and, for each kill, the moment and the hash after running again."""

    def cache(label: str) -> Path:
        place = folder / name / label
        place.mkdir(parents=True)
        if models.is_dir():
            shutil.copytree(models, place / "models")
        return place

    whole = cache("whole")
    if forked(make, whole, -1, whole / "answer") != 0:
        return {"error": (whole / "log").read_text()[-2000:]}
    if not models.is_dir():
        shutil.copytree(whole / "models", models)
    answer = json.loads((whole / "answer").read_text())
    kills = []
    for at in moments(answer["moments"], name):
        place = cache(f"kill{at}")
        first = forked(make, place, at, None)
        second = forked(make, place, -1, place / "answer")
        digest = json.loads((place / "answer").read_text())["digest"] if second == 0 else (place / "log").read_text()
        kills.append({"moment": f"{at} {answer['moments'][at]}", "status": first, "digest": digest[-2000:]})
        shutil.rmtree(place)
    return {"digest": answer["digest"], "kills": kills}


def main(folder: str, *names: str) -> None:
    """Examine the named rows and combinations, or all, one JSON line each."""
    quiet()
    makers = {name: (lambda row=row: [row.make()]) for name, row in contract_rows().items()} | COMBINATIONS
    for name in names or makers:
        print(
            json.dumps({"name": name, **examine(name, makers[name], Path(folder), Path(folder) / "models")}), flush=True
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
