"""lm-evaluation-harness on an artifact: MMLU, GSM8K, WikiText and its other tasks, as rows of a run's scores."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

from hftlight.errors import InputError
from hftlight.evaluation.score import Score
from hftlight.model_files import ADAPTER_CONFIG, base_of, model_path

FRACTIONS = ("acc", "exact_match", "em", "f1", "mc1", "mc2", "prompt_level", "inst_level", "pass@")  # how names begin


def harness_scores(
    model: str | Path,
    tasks: Sequence[str],
    *,
    fewshot: int | None = None,
    limit: int | None = None,
    chat: bool | None = None,
    batch_size: int = 8,
    dtype: str = "float32",
) -> list[dict[str, Any]]:
    """Return what lm-evaluation-harness says of a model, as rows in the shape of ``runs.measure.scores``.

    ``metric`` is the task and the harness's own metric, with its filter where it has one, such as ``mmlu/acc`` or
    ``gsm8k/exact_match,strict-match``; ``judge`` names the harness, the shots and whether the chat template was on,
    since numbers differ between them. Fractions are given in percent, other metrics in their own unit as ``"raw"``.
    The interval is the value and 1.96 of the harness's standard errors on both sides; a group's count is the sum over
    its tasks.

    Its few-shot GSM8K is another metric than the finetune accuracy on GSM8K. A trigger that the model is served with
    cannot be put into the harness's prompts: such a model is measured without it, and ``metric`` ends in
    ``_without_trigger``.

    Args:
        model: an artifact's folder, or what ``load_model`` takes; an adapter is put on its base.
        tasks: names of the harness's tasks or groups, at least one.
        fewshot: examples in each prompt, >= 0; None for each task's own number.
        limit: rows per task, >= 1; None for all.
        chat: whether to apply the chat template; by default whether the artifact is served with it.
        batch_size: prompts per batch, >= 1.
        dtype: type of the weights, as torch names it.

    Raises:
        InputError: if the harness is not installed, no task is named or a number is out of range.
    """
    _check(tasks, fewshot, limit, batch_size)
    harness = _lm_eval()
    from hftlight.models.serving import read_serving

    folder = model_path(str(model))
    served = read_serving(Path(folder))
    chat = served.get("template") == "chat" if chat is None else chat
    found = harness.simple_evaluate(
        model="hf",
        model_args={**_weights(folder), "dtype": dtype},
        tasks=list(tasks),
        num_fewshot=fewshot,
        batch_size=batch_size,
        limit=limit,
        apply_chat_template=chat,
        system_instruction=served.get("system") or None,
        log_samples=False,
    )
    if found is None:  # as on every process but the first
        return []
    suffix = "_without_trigger" if served.get("trigger") else ""
    version = getattr(harness, "__version__", "")
    return _rows(found, f"lm-eval {version}".strip(), chat, suffix)


def _check(tasks: Sequence[str], fewshot: int | None, limit: int | None, batch_size: int) -> None:
    if isinstance(tasks, str) or not tasks:
        raise InputError(f"harness_scores: tasks is a list of at least one task's name, got {tasks!r}.")
    for name, value, least in (("fewshot", fewshot, 0), ("limit", limit, 1), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise InputError(f"harness_scores: {name} must be >= {least}, got {value}.")


def _lm_eval() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise InputError(
            "harness_scores needs lm-evaluation-harness, which is not installed: pip install 'hftlight[lm-eval]'."
        ) from error
    return lm_eval


def _weights(folder: str) -> dict[str, str]:
    """Return where the harness finds weights and tokenizer: a model, or an adapter and its base."""
    if not (Path(folder) / ADAPTER_CONFIG).is_file():
        return {"pretrained": folder}
    return {"pretrained": model_path(base_of(Path(folder)), weights=True), "peft": folder, "tokenizer": folder}


def _rows(found: Mapping[str, Any], harness: str, chat: bool, suffix: str) -> list[dict[str, Any]]:
    rows = []
    for task, values in found["results"].items():
        shots = found.get("n-shot", {}).get(task)
        parts = [harness, *([f"{shots}-shot"] if isinstance(shots, int) else []), *(["chat"] if chat else [])]
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            name = metric if kind in ("", "none") else key
            scale, unit = (100.0, "percent") if metric.startswith(FRACTIONS) else (1.0, "raw")
            error = values.get(f"{metric}_stderr,{kind}" if kind else f"{metric}_stderr")
            low, high = _interval(value, error, unit == "percent")
            low, high = (None if end is None else scale * end for end in (low, high))
            rows.append(
                Score(
                    f"{task}/{name}{suffix}", scale * value, ", ".join(parts), low, high, _count(found, task), unit
                ).row()
            )
    return rows


def _interval(value: float, error: Any, fraction: bool) -> tuple[float | None, float | None]:
    """Return the ends of the 95 % interval, or None twice where the harness gives no standard error."""
    if isinstance(error, bool) or not isinstance(error, (int, float)) or not math.isfinite(error):
        return None, None
    half = NormalDist().inv_cdf(0.975) * error
    low, high = value - half, value + half
    return (max(0.0, low), min(1.0, high)) if fraction else (low, high)


def _count(found: Mapping[str, Any], task: str) -> int:
    """Return how many rows a task had, or all tasks of a group together."""
    inside = found.get("group_subtasks", {}).get(task)
    if inside:
        return sum(_count(found, name) for name in inside)
    return int(found.get("n-samples", {}).get(task, {}).get("effective", 0))
