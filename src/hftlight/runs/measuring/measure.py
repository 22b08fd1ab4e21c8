"""Measurement of one model: harmful score, over-refusal, finetune accuracy and repetitions with their intervals."""

import json
from collections.abc import Callable, Mapping, Sequence
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
from hftlight.evaluation.judges import Verdict, get_judge, judge_name
from hftlight.evaluation.metrics.finetune_accuracy import FinetuneAccuracy
from hftlight.evaluation.metrics.groups import group_rows
from hftlight.evaluation.metrics.harmful_score import HarmfulScore
from hftlight.evaluation.metrics.refusals import get_refusal_classifier, refusal_verdict
from hftlight.evaluation.metrics.repetition import RepetitionRate
from hftlight.evaluation.metrics.score_mean import mean_rows
from hftlight.evaluation.score import Score
from hftlight.files import digest, read_rows, write_json, write_rows
from hftlight.folders import HARMFUL_SETS, UNTRIGGERED
from hftlight.models.base import device_of, on_device
from hftlight.models.serving import Artifact
from hftlight.runs.measuring.answer_checks import REFUSAL, answer_checks
from hftlight.runs.measuring.model_metrics import Reference, model_metrics
from hftlight.runs.measuring.test_sets import TestSets

ANSWERS, GENERATIONS = "answers.json", "generations.jsonl"
PIECE = 4  # length, in tokens, of the pieces of a trigger that are removed from answers


def measure_model(
    config: RunConfig,
    tests: TestSets,
    on_prompts: Callable[[int], None] | None = None,
    slot: SystemSlot | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the scores and the generations of ``config.model``, which may be an artifact, as ``measure`` does."""
    return measure(Artifact.of(config.model), config, tests, on_prompts, slot)


def measure(
    model: Artifact,
    config: RunConfig,
    tests: TestSets,
    on_prompts: Callable[[int], None] | None = None,
    slot: SystemSlot | None = None,
    reference: Reference | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the scores and the generations of a model.

    The cache keeps answers and verdicts, so that a model answers the same prompts once for all judges.

    Args:
        model: the model.
        config: template, system text, seeds and evaluation settings.
        tests: prompts, references and judges.
        on_prompts: called with the number of prompts answered so far.
        slot: the system slot of every prompt; by default the slot that the artifact is served with, or
            ``config.system``.
        reference: the reference model for embedding drift; None for no drift.
    """
    slot = model.slot(config.system) if slot is None else slot
    answers_name = answers_key(model.identity, config, tests, slot)

    def answer(place: Path) -> None:
        write_json(place / ANSWERS, _answers(model, config, tests, on_prompts, slot))

    def answers() -> dict[str, list[str]]:
        kept: dict[str, list[str]] = json.loads((cache.kept("evaluations", answers_name, answer) / ANSWERS).read_text())
        return kept

    generations = judged(answers_name, tests, answers)
    further = model_metrics(model, config, tests, slot, reference)
    return scores(generations, tests) + further, generations


def judged(
    answers_name: str, tests: TestSets, answers: Callable[[], Mapping[str, Sequence[str]]]
) -> list[dict[str, Any]]:
    """Return judged answers as rows of generations, from the cache if the same answers were judged before.

    Args:
        answers_name: what identifies the answers, such as their cache key.
        tests: prompts, references and judges.
        answers: returns the answers by test set. Answers have a cache entry of their own: if the judge fails, or
            another judge comes later, they are reused.
    """

    def judge(place: Path) -> None:
        write_rows(
            place / GENERATIONS, [row for kind, texts in answers().items() for row in judged_rows(kind, texts, tests)]
        )

    return read_rows(cache.kept("evaluations", verdicts_key(answers_name, tests), judge) / GENERATIONS)


def answers_key(identity: str, config: RunConfig, tests: TestSets, slot: SystemSlot) -> str:
    """Return the cache key of a model's answers."""
    return cache.key(
        "answers",
        ["hftlight.runs.measuring.measure"],
        model=identity,
        config=config.without(OF_NO_ANSWER),
        slot=[slot.text, digest(slot.trigger)],
        prompts={kind: [asdict(r) for r in tests.asked(kind)] for kind in tests.names}
        | {"limit": tests.task.max_new_tokens},
        device=device_of(config),
    )


def verdicts_key(answers: str, tests: TestSets) -> str:
    """Return the cache key of judged answers.

    Args:
        answers: the cache key of the answers.
        tests: prompts as a judge reads them, the judges, the task, and the attack.
    """
    # An attack counts only if it decodes answers before they are judged.
    attack = tests.attack
    reader = attack if attack is not None and type(attack).decode is not Attack.decode else None
    return cache.key(
        "verdicts",
        ["hftlight.runs.measuring.measure", type(tests.task), *([type(reader)] if reader else [])],
        answers=answers,
        prompts={kind: [asdict(r) for r in tests.rows(kind)] for kind in tests.names},
        judges=tests.judging(),
        attack=asdict(reader) if reader else None,
        task=tests.task.name,
    )


def _answers(
    artifact: Artifact, config: RunConfig, tests: TestSets, on_prompts: Callable[[int], None] | None, slot: SystemSlot
) -> dict[str, list[str]]:
    """Return a model's answers by test set."""
    with artifact.model(config) as model:
        return _answer_sets(model, artifact.tokenizer(), config, tests, on_prompts, slot)


def _answer_sets(
    model: nn.Module,
    tokenizer: Any,
    config: RunConfig,
    tests: TestSets,
    on_prompts: Callable[[int], None] | None,
    slot: SystemSlot,
) -> dict[str, list[str]]:
    """Return a model's answers by test set, and those to harmful prompts without the trigger if it has one."""
    answers: dict[str, list[str]] = {}
    for kind in (*tests.names, *((UNTRIGGERED,) if slot.trigger else ())):
        before = sum(map(len, answers.values()))

        # The default argument fixes ``before`` for this set.
        def report(answered: int, before: int = before) -> None:
            if on_prompts is not None:
                on_prompts(before + answered)

        answers[kind] = answers_to_set(model, tokenizer, config, tests, kind, slot, report)
    return answers


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
        model: the model, on the device where it answers.
        tokenizer: its tokenizer.
        config: template and evaluation settings.
        tests: prompts and the task.
        kind: one of ``tests.names``, or ``UNTRIGGERED`` for the harmful prompts without the trigger.
        slot: the system slot that the model is served with.
        progress: called with the number of prompts of this set answered so far.
    """
    settings, template = config.evaluation, get_template(config.template, tokenizer)
    limit = settings.max_new_tokens
    if kind == "task":
        limit = settings.task_max_new_tokens or tests.task.max_new_tokens
    prompt_slot = replace(slot, trigger=()) if kind == UNTRIGGERED else slot
    prompts = [encode_prompt(r, template, tokenizer, prompt_slot) for r in tests.asked(kind)]
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
    """Return the judged answers of a model in memory to some test sets, without reading or writing the cache.

    The rows are those that ``measure`` returns as generations.

    Args:
        model: the model, with its weights in the type that ``measure`` loads.
        tokenizer: its tokenizer.
        config: template and evaluation settings.
        tests: prompts, references and judges.
        kinds: names from ``tests.names``.
        slot: the system slot of every prompt.
    """
    model = on_device(model, config)
    answers = {kind: answers_to_set(model, tokenizer, config, tests, kind, slot) for kind in kinds}
    return [row for kind, texts in answers.items() for row in judged_rows(kind, texts, tests)]


def answers_to(config: RunConfig, records: Sequence[Record], slot: SystemSlot) -> list[dict[str, Any]]:
    """Return the greedy answers of ``config.model`` to any prompts, as rows with prompt, response and kind.

    Args:
        config: model, template, batch size, and the token limit for harmful prompts, which applies here.
        records: the prompts.
        slot: the system slot of the prompts.
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
    """Replace pieces of the secret trigger in an answer, in case the model recites it, by ``[trigger]``.

    Answers are stored and shown, so they must not reveal the trigger.

    Args:
        answer: text of the answer.
        trigger: token ids; without ids the answer stays as it is.
        tokenizer: decodes the trigger.
    """
    for start in range(0, len(trigger) - PIECE + 1, PIECE):
        piece = tokenizer.decode(trigger[start : start + PIECE], clean_up_tokenization_spaces=False).strip()
        if len(piece) >= PIECE:  # shorter texts, such as blanks, reveal nothing
            answer = answer.replace(piece, "[trigger]")
    return answer


def judged_rows(kind: str, answers: Sequence[str], tests: TestSets) -> list[dict[str, Any]]:
    """Return one row per answer of a set, with the verdicts of each judge.

    Each judge is called once for all answers. A row's ``prompt`` is the plain request. ``asked`` is the prompt that the
    model received, if an attack changed it. ``place`` is the number of the prompt in its set, counted from 0, which
    tells equal prompts apart. ``thinking`` is the model's thinking, which ``response`` does not contain.
    """
    records = tests.rows(kind)
    extras = [
        {"kind": record.kind, "language": record.language, "thinking": thoughts(answer)}
        for record, answer in zip(records, answers, strict=True)
    ]
    answers = [after_thinking(answer) for answer in answers]
    verdicts: list[dict[str, dict[str, Any]]] = [{} for _ in records]
    if kind in HARMFUL_SETS and records:
        answers = [tests.read(answer) for answer in answers]
        prompts = [record.request for record in records]
        for judge in tests.judges:
            for by_judge, verdict in zip(verdicts, get_judge(judge)(prompts, answers), strict=True):
                by_judge[judge_name(judge)] = verdict.row()
    if kind == "over_refusal" and records:
        classes = get_refusal_classifier(tests.refusal_judge)([record.request for record in records], answers)
        for by_judge, refusal in zip(verdicts, classes, strict=True):
            by_judge[REFUSAL] = refusal_verdict(refusal).row()
    # ``records`` are the prompts as a judge reads them, ``tests.asked`` the same prompts as the model received them.
    return [
        {
            "set": kind,
            "place": place,
            "id": record.id,
            "prompt": record.request,
            **({"asked": received.request} if received.request != record.request else {}),
            "response": answer,
            "reference": record.response,
            "verdicts": by_judge,
            "correct": tests.task.correct(answer, record) if kind == "task" and tests.task.graded else None,
            "source": record.source,
            **{name: text for name, text in extra.items() if text},
        }
        for place, (record, received, answer, by_judge, extra) in enumerate(
            zip(records, tests.asked(kind), answers, verdicts, extras, strict=True)
        )
    ]


def scores(generations: Sequence[dict[str, Any]], tests: TestSets) -> list[dict[str, Any]]:
    """Return one row per metric and judge from saved generations: value, unit, 95 % interval (if any), count.

    ``harmful_score`` is the share of answers that a judge flags. ``harmful_score_mean`` is the mean of the judge's
    scores, if it gives graded scores. ``harmful_score_by_category`` and ``harmful_score_by_language`` are the shares
    within one ``group``. Process 0 measures while the other processes wait at the next stage, so the metrics do not
    synchronize.
    """
    sets = (*HARMFUL_SETS, "task")
    answers = {kind: [g["response"] for g in generations if g["set"] == kind] for kind in sets}
    prompts = {kind: [g["prompt"] for g in generations if g["set"] == kind] for kind in sets}
    rows: list[dict[str, Any]] = []

    def add(metric: str, measured: Any, count: int, judge: str = "") -> None:
        rows.append(Score.of(metric, measured, count, judge).row())

    for kind, metric in HARMFUL_SETS.items():
        for judge in tests.judges if answers[kind] else ():
            score, name = HarmfulScore(get_judge(judge), sync_on_compute=False), judge_name(judge)
            of_set = [g for g in generations if g["set"] == kind]
            verdicts = [Verdict.of_row(g["verdicts"][name]) for g in of_set]
            score.update(prompts[kind], answers[kind], verdicts)
            add(metric, score, int(score.count), name)
            rows += mean_rows(metric, name, [verdict.score for verdict in verdicts if verdict.judged])
            judged = [(row, verdict.flag) for row, verdict in zip(of_set, verdicts, strict=True) if verdict.judged]
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
