"""Weights & Biases (W&B): one W&B run per stage, and one for the summary of the whole run."""

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SUMMARY = "summary"  # the stage in the labels of the summary's W&B run
INIT_SECONDS, FINISH_SECONDS = 30.0, 60.0  # longest waits for W&B at the start and the end of a W&B run, in seconds
_lost = threading.Event()  # set once W&B has failed in this process; later W&B runs are offline from the start


def start_wandb(folder: Path, labels: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """Start and return a W&B run, online if there is an API key and W&B answers, else offline.

    Args:
        folder: the run's folder, or the comparison's.
        labels: labels with at least comparison and stage. They set group, job type, name, tags and columns in W&B.
        config: further values of the configuration that W&B shows.

    Returns:
        The W&B run, or None if it cannot be started offline either.
    """
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    words = [f"{key}={v:g}" if key in ("p", "seed") else str(v) for key, v in labels.items() if key != "comparison"]
    wait = float(os.environ.get("WANDB_INIT_TIMEOUT") or INIT_SECONDS)
    mode = os.environ.get("WANDB_MODE")
    # First in the mode of the environment and the key; after an error a second time, offline.
    for attempt in ("as asked", "offline"):
        try:
            if mode is None and (_lost.is_set() or not wandb.api.api_key):
                mode = "offline"
            experiment = wandb.init(
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
            experiment.define_metric("trainer/global_step")
            experiment.define_metric("*", step_metric="trainer/global_step")
            return experiment
        except Exception as error:  # no error of W&B may stop a run
            _lost.set()
            refused = isinstance(error, wandb.errors.AuthenticationError)
            what = "rejects the API key" if refused else "cannot be reached"
            if attempt == "offline" or mode == "offline":
                what = "cannot be started offline"
            warn(f"W&B {what} ({in_short(error)})", folder)
            if mode == "offline":
                break
    return None


def finish_wandb(experiment: Any, folder: Path, exit_code: int = 0) -> None:
    """End a W&B run and wait at most ``FINISH_SECONDS`` for its upload. Data that W&B has not received stay on disk.

    Args:
        experiment: the W&B run.
        folder: the run's folder, or the comparison's.
        exit_code: 0 if the stage has ended normally, 1 after an error.
    """
    errors: list[Exception] = []

    def finish() -> None:
        try:
            experiment.finish(exit_code=exit_code)
        except Exception as error:  # printed below; no error of W&B may stop a run
            errors.append(error)

    # A daemon thread, so that an upload that hangs cannot keep the process alive.
    thread = threading.Thread(target=finish, daemon=True)
    thread.start()
    thread.join(FINISH_SECONDS + 1)
    if thread.is_alive() or errors:
        _lost.set()
        said = in_short(errors[0]) if errors else f"no answer within {FINISH_SECONDS:g} seconds"
        warn(f"W&B did not receive all data ({said})", folder)


def wandb_summary(
    folder: Path,
    labels: Mapping[str, Any],
    config: Mapping[str, Any],
    values: Mapping[str, float],
    media: Callable[[], Mapping[str, Any]],
) -> None:
    """Write the results of a run or comparison as a separate W&B run.

    Args:
        folder: the run's folder, or the comparison's.
        labels: as for ``start_wandb``.
        config: further values of the configuration that W&B shows.
        values: numbers by name.
        media: returns tables and pictures by name.
    """
    experiment = start_wandb(folder, labels, config)
    if experiment is None:
        return
    try:
        experiment.summary.update(dict(values))
        experiment.log(dict(media()))
    except Exception as error:  # no error of W&B may stop a run
        warn(f"W&B failed while the summary was logged ({in_short(error)})", folder)
    finish_wandb(experiment, folder)


def warn(what: str, folder: Path) -> None:
    """Print a failure of W&B, and how to upload the data later, which stay in the folder."""
    print(f"hftlight: {what}. The run continues offline in {folder}. Upload its wandb folder later with `wandb sync`.")


def in_short(error: Exception) -> str:
    """Return an error's class and the first line of its message."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no message')}"
