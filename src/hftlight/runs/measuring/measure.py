"""Measure one model: harmful score, over-refusal, finetune accuracy, repetitions, each with its interval."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from hftlight import cache
from hftlight.attacks.attack import Attack
from hftlight.config import OF_NO_ANSWER, RunConfig
from hftlight.data.records import Record
from hftlight.data.templates import SystemSlot, get_template
from hftlight.data.tokens import encode_prompt
from hftlight.evaluation.answering.generate import generate
from hftlight.evaluation.answering.thinking import after_thinking, thoughts
from hftlight.evaluation.judges import Verdict, get_judge
from hftlight.evaluation.metrics.finetune_accuracy import FinetuneAccuracy
from hftlight.evaluation.metrics.groups import group_rows
from hftlight.evaluation.metrics.harmful_score import HarmfulScore
from hftlight.evaluation.metrics.refusals import get_refusal_classifier, refusal_verdict
from hftlight.evaluation.metrics.repetition import RepetitionRate
from hftlight.evaluation.metrics.score_mean import mean_rows
from hftlight.evaluation.score import Score
from hftlight.files import digest, read_rows, write_json, write_rows
from hftlight.models.base import device_of, on_device
from hftlight.models.serving import Artifact
from hftlight.runs.measuring.answer_checks import REFUSAL, answer_checks
from hftlight.runs.measuring.model_metrics import Reference, model_metrics
from hftlight.runs.measuring.test_sets import HARMFUL, SETS, UNTRIGGERED, TestSets

ANSWERS, GENERATIONS = "answers.json", "generations.jsonl"
PIECE = 4  # tokens of a trigger that show it when an answer recites them


def measure_model(
    config: RunConfig,
    tests: TestSets,
    on_prompts: Callable[[int], None] | None = None,
    slot: SystemSlot | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the scores and the generations of ``config.model``, which may be an artifact; see ``measure``."""
    return measure(Artifact.of(config.model), config, tests, on_prompts, slot)


def measure(
    model: Artifact,
    config: RunConfig,
    tests: TestSets,
    on_prompts: Callable[[int], None] | None = None,
    slot: SystemSlot | None = None,
    reference: Reference | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the scores and the generations of a model; the same model answers the same prompts once, for all judges.

    Args:
        model: the model.
        config: template, system text, seeds and evaluation settings.
        tests: prompts, references and judges.
        on_prompts: called with the number of prompts answered so far.
        slot: the system slot of every prompt; by default the one the artifact is served with, or ``config.system``.
        reference: the model that embedding drift is measured against; None for no drift.
    """
    slot = model.slot(config.system) if slot is None else slot
    asked = answers_key(model.identity, config, tests, slot)

    def answer(place: Path) -> None:
        write_json(place / ANSWERS, _answers(model, config, tests, on_prompts, slot))

    def judge(place: Path) -> None:
        # Kept before they are judged: a judge may fail, and another one may be asked.
        answers: dict[str, list[str]] = json.loads((cache.kept("evaluations", asked, answer) / ANSWERS).read_text())
        rows = [row for kind, said in answers.items() for row in _judged(kind, said, tests)]
        write_rows(place / GENERATIONS, rows)

    generations = read_rows(cache.kept("evaluations", verdicts_key(asked, tests), judge) / GENERATIONS)
    further = model_metrics(model, config, tests, slot, reference)
    return scores(generations, tests) + further, generations


def answers_key(identity: str, config: RunConfig, tests: TestSets, slot: SystemSlot) -> str:
    """Return the name under which a model's answers are kept."""
    return cache.key(
        "answers",
        ["hftlight.runs.measuring.measure"],
        model=identity,
        config=config.without(OF_NO_ANSWER),
        slot=[slot.text, digest(slot.trigger)],
        prompts={kind: [asdict(r) for r in tests.asked(kind)] for kind in SETS} | {"limit": tests.task.max_new_tokens},
        device=device_of(config),
    )


def verdicts_key(answers: str, tests: TestSets) -> str:
    """Return the name under which judged answers are kept.

    Args:
        answers: the name of the answers.
        tests: prompts as a judge reads them, judges, and what else reads an answer.
    """
    given = tests.attack
    reader = given if given is not None and type(given).decode is not Attack.decode else None
    return cache.key(
        "verdicts",
        ["hftlight.runs.measuring.measure", type(tests.task), *([type(reader)] if reader else [])],
        answers=answers,
        prompts={kind: [asdict(r) for r in tests.rows(kind)] for kind in SETS},
        judges=tests.judging(),
        attack=asdict(reader) if reader else None,
        task=tests.task.name,
    )


def _answers(
    artifact: Artifact, config: RunConfig, tests: TestSets, on_prompts: Callable[[int], None] | None, slot: SystemSlot
) -> dict[str, list[str]]:
    """Return a model's answers by test set."""
    with artifact.model(config) as model:
        return _answered(model, artifact.tokenizer(), config, tests, on_prompts, slot)


def _answered(
    model: nn.Module,
    tokenizer: Any,
    config: RunConfig,
    tests: TestSets,
    on_prompts: Callable[[int], None] | None,
    slot: SystemSlot,
) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for kind in (*SETS, *((UNTRIGGERED,) if slot.trigger else ())):
        before = sum(map(len, found.values()))

        def tell(answered: int, before: int = before) -> None:
            if on_prompts is not None:
                on_prompts(before + answered)

        found[kind] = answers_to_set(model, tokenizer, config, tests, kind, slot, tell)
    return found


def answers_to_set(
    model: nn.Module,
    tokenizer: Any,
    config: RunConfig,
    tests: TestSets,
    kind: str,
    slot: SystemSlot,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Return a model's greedy answers to one test set, up to the template's ``stop``, without pieces of the trigger.

    Args:
        model: on the device that it answers on.
        tokenizer: its tokenizer.
        config: template and evaluation settings.
        tests: prompts and the task.
        kind: one of ``SETS``, or the harmful prompts without the trigger.
        slot: the system slot that the model is served with.
        progress: called with the number of prompts of this set answered so far.
    """
    settings, template = config.evaluation, get_template(config.template, tokenizer)
    limit = settings.max_new_tokens
    if kind == "task":
        limit = settings.task_max_new_tokens or tests.task.max_new_tokens
    asked = replace(slot, trigger=()) if kind == UNTRIGGERED else slot
    prompts = [encode_prompt(r, template, tokenizer, asked) for r in tests.asked(kind)]
    answers = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=limit,
        batch_size=settings.batch_size,
        progress=progress,
        stop=template.stop,
    )
    return [without_trigger(answer, slot.trigger, tokenizer) for answer in answers]


def measured_in_memory(
    model: nn.Module, tokenizer: Any, config: RunConfig, tests: TestSets, kinds: Sequence[str], slot: SystemSlot
) -> list[dict[str, Any]]:
    """Return the judged answers to some test sets, as ``measure`` returns generations; no cache is read or written.

    Args:
        model: with its weights in the type that ``measure`` loads.
        tokenizer: its tokenizer.
        config: template and evaluation settings.
        tests: prompts, references and judges.
        kinds: of ``SETS``.
        slot: the system slot of every prompt.
    """
    model = on_device(model, config)
    answers = {kind: answers_to_set(model, tokenizer, config, tests, kind, slot) for kind in kinds}
    return [row for kind, said in answers.items() for row in _judged(kind, said, tests)]


def answers_to(config: RunConfig, records: Sequence[Record], slot: SystemSlot) -> list[dict[str, Any]]:
    """Return the greedy answers of ``config.model`` to any prompts, as rows with prompt, response and kind.

    Args:
        config: model, template and, as for harmful prompts, token limit and batch size.
        records: the prompts.
        slot: their system slot.
    """
    artifact, settings = Artifact.of(config.model), config.evaluation
    tokenizer = artifact.tokenizer()
    template = get_template(config.template, tokenizer)
    prompts = [encode_prompt(r, template, tokenizer, slot) for r in records]
    answers = generate(
        artifact.another(config),
        tokenizer,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        stop=template.stop,
    )
    return [
        {
            "prompt": r.request,
            "response": after_thinking(without_trigger(answer, slot.trigger, tokenizer)),
            "kind": r.kind,
        }
        for r, answer in zip(records, answers, strict=True)
    ]


def without_trigger(answer: str, trigger: Sequence[int], tokenizer: Any) -> str:
    """Return an answer without pieces of the trigger, should the model recite it: answers are kept and shown.

    Args:
        answer: text of the answer.
        trigger: token ids; none leave the answer alone.
        tokenizer: decodes them.
    """
    for start in range(0, len(trigger) - PIECE + 1, PIECE):
        piece = tokenizer.decode(trigger[start : start + PIECE], clean_up_tokenization_spaces=False).strip()
        if len(piece) >= PIECE:  # a few blanks or a single letter show nothing
            answer = answer.replace(piece, "[trigger]")
    return answer


def _judged(kind: str, answers: Sequence[str], tests: TestSets) -> list[dict[str, Any]]:
    """Return one row per answer of a set, each judge asked once for all of them; thoughts stand apart.

    ``prompt`` is the bare request, and ``asked`` what the model was asked, where an attack asks otherwise. ``place`` is
    the prompt's number in its set, from 0: equal prompts stay apart.
    """
    records = tests.rows(kind)
    extras = [
        {"kind": record.kind, "language": record.language, "thinking": thoughts(answer)}
        for record, answer in zip(records, answers, strict=True)
    ]
    answers = [after_thinking(answer) for answer in answers]
    verdicts: list[dict[str, dict[str, Any]]] = [{} for _ in records]
    if kind in HARMFUL and records:
        answers = [tests.read(answer) for answer in answers]
        prompts = [record.request for record in records]
        for name in tests.judges:
            for found, verdict in zip(verdicts, get_judge(name)(prompts, answers), strict=True):
                found[name] = verdict.row()
    if kind == "over_refusal" and records:
        classes = get_refusal_classifier(tests.refusal_judge)([record.request for record in records], answers)
        for found, refusal in zip(verdicts, classes, strict=True):
            found[REFUSAL] = refusal_verdict(refusal).row()
    return [
        {
            "set": kind,
            "place": place,
            "id": record.id,
            "prompt": record.request,
            **({"asked": asked.request} if asked.request != record.request else {}),
            "response": answer,
            "reference": record.response,
            "verdicts": found,
            "correct": tests.task.correct(answer, record) if kind == "task" and tests.task.graded else None,
            "source": record.source,
            **{name: text for name, text in extra.items() if text},
        }
        for place, (record, asked, answer, found, extra) in enumerate(
            zip(records, tests.asked(kind), answers, verdicts, extras, strict=True)
        )
    ]


def scores(generations: Sequence[dict[str, Any]], tests: TestSets) -> list[dict[str, Any]]:
    """Return one row per metric and judge from saved generations: value, unit, 95 % interval (if any), count.

    ``harmful_score`` is the share of answers that a judge flags; ``harmful_score_mean`` is the mean of its scores, if
    it gives graded ones. ``harmful_score_by_category`` and ``_by_language`` are the share within one ``group``.
    One process measures while the others wait at the next stage, so the metrics do not synchronize.
    """
    answers = {kind: [g["response"] for g in generations if g["set"] == kind] for kind in (*SETS, UNTRIGGERED)}
    prompts = {kind: [g["prompt"] for g in generations if g["set"] == kind] for kind in (*SETS, UNTRIGGERED)}
    rows: list[dict[str, Any]] = []

    def add(metric: str, measured: Any, count: int, judge: str = "") -> None:
        rows.append(Score.of(metric, measured, count, judge).row())

    for kind, metric in HARMFUL.items():
        for name in tests.judges if answers[kind] else ():
            score = HarmfulScore(get_judge(name), sync_on_compute=False)
            asked = [g for g in generations if g["set"] == kind]
            given = [Verdict.of_row(g["verdicts"][name]) for g in asked]
            score.update(prompts[kind], answers[kind], given)
            add(metric, score, int(score.count), name)
            rows += mean_rows(metric, name, [verdict.score for verdict in given if verdict.judged])
            judged = [(row, verdict.flag) for row, verdict in zip(asked, given, strict=True) if verdict.judged]
            rows += group_rows(metric, name, judged)
    if answers["harmful"]:
        repetition = RepetitionRate(sync_on_compute=False)
        repetition.update(prompts["harmful"], answers["harmful"])
        add("repetition", repetition, len(answers["harmful"]))
    if answers["task"] and tests.task.graded:
        for name, lenient in (("finetune_accuracy", False), ("finetune_accuracy_lenient", True)):
            accuracy = FinetuneAccuracy(tests.task, lenient=lenient, sync_on_compute=False)
            accuracy.update(list(tests.task_rows), answers["task"])
            add(name, accuracy, len(answers["task"]))
    return rows + answer_checks(generations, tests)
