"""Processes that start at the same moment on a fresh cache, forked from this one: ``FOLDER ROUNDS COUNT WHAT``.

The script prints one JSON line for each round: the exit statuses, and the end of the first failed process's log.
``WHAT`` is ``load`` (the model, its hash and tokenizer) or ``run`` (a whole run, identical except for its folder).
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import peft  # noqa: F401  (imported once, before the fork)
import torch
import transformers.models.llama.modeling_llama  # noqa: F401

from hftlight import run
from hftlight.config import Evaluation, Lora, RunConfig, Training
from hftlight.console import quiet
from hftlight.defenses import BEA
from hftlight.files import write_json
from hftlight.model_files import model_hash
from hftlight.models.load import load_model, load_tokenizer


def load(number: int, folder: Path) -> None:
    """Load the tiny model, and write the model's hash to the file that all processes write."""
    load_tokenizer("tiny")
    load_model("tiny")
    write_json(folder / "hash.json", model_hash("tiny"))


def whole_run(number: int, folder: Path) -> None:
    """Run a configuration whose stages and measurements all processes share."""
    training = Training(steps=1, batch_size=2, lr=1e-2)
    evaluation = Evaluation(
        prompts=2, over_refusal_prompts=1, task_rows=1, max_new_tokens=1, task_max_new_tokens=1, loss_rows=2
    )
    config = RunConfig(
        model="tiny",
        alignment=training,
        finetuning=training,
        evaluation=evaluation,
        lora=Lora(r=2, alpha=4),
        num_samples=20,
        harmful_ratio=0.2,
        accelerator="cpu",
        output=str(folder / "runs"),
        name=f"run{number}",
    )
    run(config, [BEA(length=16)])


WHAT = {"load": load, "run": whole_run}


def child(number: int, folder: Path, barrier: Any, what: str) -> None:
    """Act as one of the processes."""
    log = os.open(folder / f"{number}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["HFTLIGHT_CACHE"] = str(folder / "cache")
    torch.set_num_threads(1)
    barrier.wait()
    WHAT[what](number, folder)


def main(folder: str, rounds: str, count: str, what: str) -> None:
    """Run the rounds."""
    quiet()
    context = multiprocessing.get_context("fork")
    for number in range(int(rounds)):
        place = Path(folder) / f"round{number}"
        place.mkdir(parents=True)
        barrier = context.Barrier(int(count))
        processes = [context.Process(target=child, args=(i, place, barrier, what)) for i in range(int(count))]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        failed = [i for i, process in enumerate(processes) if process.exitcode]
        log = (place / f"{failed[0]}.log").read_text()[-2000:] if failed else ""
        print(json.dumps({"statuses": [p.exitcode for p in processes], "log": log}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
