"""Weights & Biases: a run per stage, and a summary of the whole run."""

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SUMMARY = "summary"  # stage of the W&B run that says what came out
INIT_SECONDS, FINISH_SECONDS = 30.0, 60.0  # how long W&B is waited for
_lost = threading.Event()  # W&B did not answer this process: what follows is written offline at once


def start_wandb(folder: Path, labels: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """Return a started W&B run: online with a key, offline without one or where W&B fails; None if that fails too.

    Args:
        folder: the run's folder, or the comparison's.
        labels: comparison, stage and what else it is found by: group, job type, name, tags and columns in W&B.
        config: what W&B shows as the configuration besides.
    """
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    words = [f"{key}={v:g}" if key in ("p", "seed") else str(v) for key, v in labels.items() if key != "comparison"]
    wait = float(os.environ.get("WANDB_INIT_TIMEOUT") or INIT_SECONDS)
    mode = os.environ.get("WANDB_MODE")
    for attempt in ("as asked", "offline"):
        try:
            if mode is None and (_lost.is_set() or not wandb.api.api_key):
                mode = "offline"
            made = wandb.init(
                mode=mode if attempt == "as asked" else "offline",  # type: ignore[arg-type]
                project=os.environ.get("WANDB_PROJECT", "hftlight"),
                group=str(labels["comparison"])[:128],
                job_type=str(labels["stage"]),
                name="/".join(words)[:128],
                tags=list(dict.fromkeys(word[:64] for word in (str(labels["comparison"]), *words))),
                dir=str(folder),
                config={**config, **labels},
                reinit="create_new",
                settings=wandb.Settings(console="off", silent=True, init_timeout=wait, finish_timeout=FINISH_SECONDS),
            )
            made.define_metric("trainer/global_step")
            made.define_metric("*", step_metric="trainer/global_step")
            return made
        except Exception as error:  # whatever it is, a run does not depend on W&B
            _lost.set()
            refused = isinstance(error, wandb.errors.AuthenticationError)
            what = "refuses the key" if refused else "cannot be reached"
            if attempt == "offline" or mode == "offline":
                what = "cannot be started offline"
            warn(f"W&B {what} ({in_short(error)})", folder)
            if mode == "offline":
                break
    return None


def finish_wandb(experiment: Any, folder: Path, exit_code: int = 0) -> None:
    """End a W&B run; what it does not take within ``FINISH_SECONDS`` stays on the disk, and nothing waits for it."""
    errors: list[Exception] = []

    def finish() -> None:
        try:
            experiment.finish(exit_code=exit_code)
        except Exception as error:  # said below; a run does not depend on W&B
            errors.append(error)

    thread = threading.Thread(target=finish, daemon=True)
    thread.start()
    thread.join(FINISH_SECONDS + 1)
    if thread.is_alive() or errors:
        _lost.set()
        said = in_short(errors[0]) if errors else f"no answer within {FINISH_SECONDS:g} seconds"
        warn(f"W&B did not take everything ({said})", folder)


def wandb_summary(
    folder: Path,
    labels: Mapping[str, Any],
    config: Mapping[str, Any],
    values: Mapping[str, float],
    media: Callable[[], Mapping[str, Any]],
) -> None:
    """Write what came out as a W&B run of its own.

    Args:
        folder: the run's folder, or the comparison's.
        labels: as for ``start_wandb``.
        config: what W&B shows as the configuration besides.
        values: numbers by name.
        media: makes tables and pictures by name.
    """
    experiment = start_wandb(folder, labels, config)
    if experiment is None:
        return
    try:
        experiment.summary.update(dict(values))
        experiment.log(dict(media()))
    except Exception as error:  # whatever it is, a run does not depend on W&B
        warn(f"W&B failed while the summary was logged ({in_short(error)})", folder)
    finish_wandb(experiment, folder)


def warn(what: str, folder: Path) -> None:
    """Say what W&B did not take. What was logged stays in the folder."""
    print(f"hftlight: {what}; the run goes on offline in {folder}, `wandb sync` sends what lies in its wandb folder.")


def in_short(error: Exception) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no message')}"
