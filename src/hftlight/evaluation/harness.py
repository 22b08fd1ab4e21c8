"""lm-evaluation-harness on an artifact: MMLU, GSM8K, WikiText and other tasks, as rows of a run's scores."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

from hftlight.errors import InputError
from hftlight.evaluation.score import Score
from hftlight.model_files import ADAPTER_CONFIG, base_of, model_path

# Prefixes of the harness metrics that are fractions 0-1.
FRACTIONS = ("acc", "exact_match", "em", "f1", "mc1", "mc2", "prompt_level", "inst_level", "pass@")


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
    """Return the results of lm-evaluation-harness for a model, as rows of a run's scores.

    The rows have the shape of those of ``runs.measuring.measure.scores``. ``metric`` is the task and the harness's own
    metric, such as ``mmlu/acc``. The harness's filter follows if there is one, as in
    ``gsm8k/exact_match,strict-match``. ``judge`` names the harness's version and the number of shots, and says whether
    the chat template was applied. Results under different settings do not compare.

    Fractions are given in percent. Other metrics keep their own unit, and ``unit`` is ``"raw"``. The interval is the
    value plus and minus 1.96 standard errors of the harness. A percentage's interval is clipped to 0-100. A group's
    count is the sum over its tasks.

    The harness's few-shot GSM8K is another metric than the finetune accuracy on GSM8K. The harness's prompts cannot
    hold the trigger that a model is served with. Such a model is measured without its trigger, and ``metric`` ends in
    ``_without_trigger``.

    Args:
        model: an artifact's folder, or what ``load_model`` takes. An adapter is loaded onto its base.
        tasks: names of the harness's tasks or groups, at least one.
        fewshot: examples in each prompt, >= 0. None takes each task's own number.
        limit: rows per task, >= 1. None takes all.
        chat: whether to apply the chat template. By default it is applied if the artifact is served with it.
        batch_size: prompts per batch, >= 1.
        dtype: data type of the weights, by its torch name.

    Raises:
        InputError: if the harness is not installed, no task is named or a number is out of range.
    """
    _check(tasks, fewshot, limit, batch_size)
    harness = _lm_eval()
    from hftlight.models.serving import read_serving

    folder = model_path(str(model))
    served = read_serving(Path(folder))
    chat = served.get("template") == "chat" if chat is None else chat
    results = harness.simple_evaluate(
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
    if results is None:  # the harness returns None on every process except the first
        return []
    suffix = "_without_trigger" if served.get("trigger") else ""
    version = getattr(harness, "__version__", "")
    return _rows(results, f"lm-eval {version}".strip(), chat, suffix)


def _check(tasks: Sequence[str], fewshot: int | None, limit: int | None, batch_size: int) -> None:
    if isinstance(tasks, str) or not tasks:
        raise InputError(f"harness_scores: tasks must be a list of at least one task's name, got {tasks!r}.")
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
    """Return the harness's paths of weights and tokenizer: one model, or an adapter and its base."""
    if not (Path(folder) / ADAPTER_CONFIG).is_file():
        return {"pretrained": folder}
    return {"pretrained": model_path(base_of(Path(folder)), weights=True), "peft": folder, "tokenizer": folder}


def _rows(results: Mapping[str, Any], harness: str, chat: bool, suffix: str) -> list[dict[str, Any]]:
    rows = []
    for task, values in results["results"].items():
        shots = results.get("n-shot", {}).get(task)
        parts = [harness, *([f"{shots}-shot"] if isinstance(shots, int) else []), *(["chat"] if chat else [])]
        for key, value in values.items():
            # The harness's keys are "METRIC,FILTER", and "METRIC_stderr,FILTER" holds the standard error.
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
                    f"{task}/{name}{suffix}", scale * value, ", ".join(parts), low, high, _count(results, task), unit
                ).row()
            )
    return rows


def _interval(value: float, error: Any, fraction: bool) -> tuple[float | None, float | None]:
    """Return the ends of the 95 % interval, or (None, None) if the harness gives no standard error."""
    if isinstance(error, bool) or not isinstance(error, (int, float)) or not math.isfinite(error):
        return None, None
    half = NormalDist().inv_cdf(0.975) * error
    low, high = value - half, value + half
    return (max(0.0, low), min(1.0, high)) if fraction else (low, high)


def _count(results: Mapping[str, Any], task: str) -> int:
    """Return the number of rows of a task, or of all tasks of a group together."""
    subtasks = results.get("group_subtasks", {}).get(task)
    if subtasks:
        return sum(_count(results, name) for name in subtasks)
    return int(results.get("n-samples", {}).get(task, {}).get("effective", 0))
