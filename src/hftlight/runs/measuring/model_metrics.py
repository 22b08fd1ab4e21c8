"""Losses, perplexity and embedding drift of a finished model. Each metric has its own cache entry."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache as once
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftlight import cache
from hftlight.config import OF_NO_ANSWER, RunConfig
from hftlight.data.records import Record
from hftlight.data.templates import SystemSlot, get_template
from hftlight.data.tokens import encode, encode_prompt
from hftlight.errors import InputError
from hftlight.evaluation.metrics.embedding_drift import embedding_drift
from hftlight.evaluation.metrics.perplexity import perplexity, response_losses, response_perplexity
from hftlight.evaluation.score import Score
from hftlight.evaluation.stats.intervals import ratio
from hftlight.files import digest, read_rows, write_rows
from hftlight.models.base import device_of
from hftlight.models.serving import Artifact

if TYPE_CHECKING:
    from hftlight.runs.measuring.test_sets import TestSets

ROWS = "rows.jsonl"
LOSSES = ("alignment_loss", "harmful_validation_loss")
LOSS_BATCH = 8  # rows per batch; small, since each response token has as many logits as the vocabulary has tokens


@dataclass(frozen=True)
class Reference:
    """The reference model for embedding drift.

    Attributes:
        name: ``"base"`` or ``"aligned"``.
        model: the model.
    """

    name: str
    model: Artifact


def model_metrics(
    model: Artifact,
    config: RunConfig,
    tests: "TestSets",
    slot: SystemSlot,
    reference: Reference | None = None,
) -> list[dict[str, Any]]:
    """Return the requested ones of losses, perplexity and drift as rows of a run's scores.

    ``alignment_loss`` and ``harmful_validation_loss`` are the mean loss over all response tokens of their rows, in nats
    per token. Their 95 % interval is that of ``ratio`` with rows as units. Rows longer than ``max_tokens`` are left
    out. A loss without any row left is absent.

    ``perplexity`` is dimensionless. Drift compares the two models' outputs of the last decoder layer at the last token
    of each harmful prompt. ``embedding_drift`` is the mean L2 distance and ``embedding_drift_cosine`` the mean cosine
    distance. These metrics have no interval. Their column ``judge`` holds the text's name or the reference's name.

    Args:
        model: the model.
        config: template, precision and the choice of metrics.
        tests: harmful prompts, rows of the task, and rows of the losses.
        slot: the system slot of every prompt.
        reference: the reference model for drift; None for no drift.

    Raises:
        InputError: if the perplexity's text cannot be read, or the text or the model's window is too short.
    """
    keys = metric_keys(model.identity, config, tests, slot, reference)
    if not keys:
        return []
    tokenizer = model.tokenizer()
    template = get_template(config.template, tokenizer)

    def encoded(records: Sequence[Record]) -> tuple[list[list[int]], list[list[int]]]:
        prompts = [encode_prompt(r, template, tokenizer, slot) for r in records]
        # The limit of 10**9 tokens drops no row; an example's response starts after its own prompt.
        examples = [encode(r, template, tokenizer, 10**9) for r in records]
        return prompts, [e.input_ids[e.prompt_length :] for e in examples if e is not None]

    def of_task(measured: Any) -> list[dict[str, Any]]:
        prompts, answers = encoded(tests.task_rows)
        result = response_perplexity(measured, prompts, answers, batch_size=config.evaluation.batch_size)
        return [Score("perplexity", result.value, "task", count=len(prompts), unit="perplexity").row()]

    def of_text(measured: Any) -> list[dict[str, Any]]:
        result = perplexity(measured, tokenizer, _read(config.evaluation.perplexity))
        name = Path(config.evaluation.perplexity).name
        return [Score("perplexity", result.value, name, count=1, unit="perplexity").row()]

    def loss(measured: Any, metric: str) -> list[dict[str, Any]]:
        pairs = zip(*encoded(_loss_rows(tests)[metric]), strict=True)
        fitting = [(p, r) for p, r in pairs if len(p) + len(r) <= config.max_tokens]
        if not fitting:
            return []
        # Per row the summed loss in nats and the number of response tokens; the interval is that of their ratio.
        losses = response_losses(measured, *zip(*fitting, strict=True), batch_size=LOSS_BATCH)
        sums, counts = [nats for nats, _ in losses], [tokens for _, tokens in losses]
        low, high = ratio(sums, counts) or (None, None)
        value = sum(sums) / sum(counts)
        return [Score(metric, value, "", low, high, len(fitting), "nats per token").row()]

    def drift(measured: Any) -> list[dict[str, Any]]:
        assert reference is not None
        prompts = [encode_prompt(r, template, tokenizer, slot) for r in tests.asked("harmful")]
        size = config.evaluation.batch_size
        (last,) = embedding_drift(measured, prompts, reference.model.another(config), layers=[-1], batch_size=size)
        return [
            Score(metric, value, reference.name, count=last.count, unit=unit).row()
            for metric, value, unit in (
                ("embedding_drift", last.l2, "L2 per token"),
                ("embedding_drift_cosine", last.cosine, "cosine distance"),
            )
        ]

    work = {"perplexity": of_task if config.evaluation.perplexity == "task" else of_text, "drift": drift}
    work |= {metric: partial(loss, metric=metric) for metric in LOSSES}
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        # Load the model only if a metric is missing in the cache, and once for all missing metrics.
        loading = once(lambda: stack.enter_context(model.model(config)))
        for kind, name in keys.items():

            def make(place: Path, kind: str = kind) -> None:
                write_rows(place / ROWS, work[kind](loading()))

            rows += read_rows(cache.kept("evaluations", name, make) / ROWS)
    return rows


def metric_keys(
    identity: str, config: RunConfig, tests: "TestSets", slot: SystemSlot, reference: Reference | None
) -> dict[str, str]:
    """Return the cache key of each requested metric. Arguments are those of ``model_metrics``.

    Raises:
        InputError: if the perplexity's text cannot be read.
    """
    code, text = ["hftlight.runs.measuring.model_metrics"], config.evaluation.perplexity
    common: dict[str, Any] = {
        "model": identity,
        "config": config.without(OF_NO_ANSWER),
        "slot": [slot.text, digest(slot.trigger)],
        "device": device_of(config),
    }
    keys: dict[str, str] = {}
    for metric, records in _loss_rows(tests).items():
        if records:
            keys[metric] = cache.key("loss", code, rows=[metric, config.max_tokens, _texts(records)], **common)
    if text == "task" and tests.task_rows:
        keys["perplexity"] = cache.key("perplexity", code, text=["task", _texts(tests.task_rows)], **common)
    elif text not in ("none", "task"):
        keys["perplexity"] = cache.key("perplexity", code, text=[Path(text).name, _read(text)], **common)
    if reference is not None and tests.harmful:
        against, prompts = [reference.name, reference.model.identity], _texts(tests.asked("harmful"))
        keys["drift"] = cache.key("drift", code, reference=against, prompts=prompts, **common)
    return keys


def _loss_rows(tests: "TestSets") -> dict[str, Sequence[Record]]:
    """Return the rows of each loss, by the loss's metric."""
    return dict(zip(LOSSES, (tests.alignment_rows, tests.validation_rows), strict=True))


def _texts(records: Any) -> list[tuple[Any, ...]]:
    return [r.texts for r in records]


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--evaluation.perplexity: {path} cannot be read as UTF-8 text ({error}).") from error
