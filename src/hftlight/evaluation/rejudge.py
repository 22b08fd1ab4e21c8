"""Rejudge: verdicts of further judges on the saved answers of a run. No model answers again."""

import json
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from hftlight.errors import InputError
from hftlight.evaluation.judges import get_judge
from hftlight.evaluation.judges.judge import Judge, Verdict
from hftlight.evaluation.judges.llm import LLMJudge
from hftlight.evaluation.metrics.groups import group_rows
from hftlight.evaluation.metrics.refusals import (
    HEADS,
    JudgedRefusals,
    RefusalClassifier,
    get_refusal_classifier,
    refusal_verdict,
)
from hftlight.evaluation.metrics.score_mean import mean_rows
from hftlight.evaluation.score import Score
from hftlight.evaluation.stats.agreement import Agreement, cohens_kappa
from hftlight.files import ensure_writable, write_json, write_rows
from hftlight.folders import HARMFUL_SETS, WITHOUT_PATTERN, WITHOUT_TRIGGER

REFUSAL_SETS = {"over_refusal": "over_refusal"}
SCORED_SETS = HARMFUL_SETS | REFUSAL_SETS
SAID = {  # words for a flagged answer or a score, by metric
    "harmful_score": "harmful",
    WITHOUT_TRIGGER: "harmful, without its trigger",
    WITHOUT_PATTERN: "harmful, without the pattern",
    "over_refusal": "refused",
    "harmful_score_mean": "mean score",
    f"{WITHOUT_TRIGGER}_mean": "mean score, without its trigger",
    f"{WITHOUT_PATTERN}_mean": "mean score, without the pattern",
}
PROMPTS = {"harmful prompts": HARMFUL_SETS, "ordinary prompts": REFUSAL_SETS}
COLUMNS = ("set", "prompt", "response", "verdicts")
GENERATIONS, SCORES, AGREEMENT = "generations.jsonl", "scores.json", "agreement.json"
Row = Mapping[str, Any]


def rejudge_file(
    path: Path, judges: Sequence[str], save: Path | None = None, prices: tuple[float, float] | None = None
) -> None:
    """Judge a run's saved answers again, and print scores and agreement of all judges.

    Args:
        path: a run's folder, or its generations.jsonl. The file does not change.
        judges: names that ``find_judge`` takes.
        save: folder for the rows with the added verdicts, and for scores and agreement. It must not hold a
            generations.jsonl yet. None saves nothing.
        prices: price of a million tokens read and of a million written by a language model, in any currency. None
            counts no cost.

    Raises:
        InputError: if the file cannot be read, there is nothing to judge, or a judge is unknown or unavailable.
        RunError: if a judge stops. The replies of a language model stay in the cache.
    """
    from rich.console import Console

    if prices is not None and min(prices) < 0:
        raise InputError(f"--prices must be two numbers >= 0 per million tokens, got {prices[0]:g} and {prices[1]:g}.")
    chosen = [find_judge(name) for name in judges]
    # A refusal classifier may wrap a language model, whose usage and cost are counted too.
    unwrapped = [judge.judge if isinstance(judge, JudgedRefusals) else judge for judge in chosen]
    models = [judge for judge in unwrapped if isinstance(judge, LLMJudge)]
    for judge in models:
        judge.endpoint.set_prices(prices)
    before = read_generations(path)
    if save is not None:
        if (save / GENERATIONS).exists():
            raise InputError(f"--save: {save / GENERATIONS} exists already. Choose another folder.")
        ensure_writable(save, "--save")
    after, console = rejudge(before, chosen), Console(markup=False)
    console.print(scores_table(after))
    agreed = {prompts: agreements(after, sets) for prompts, sets in PROMPTS.items()}
    for prompts, pairs in agreed.items():
        for line in agreement_lines(pairs, prompts):
            console.print(line, soft_wrap=True)
    for judge in models:
        console.print(judge.endpoint.line(), soft_wrap=True)
    if save is not None:
        write_json(save / SCORES, judged_scores(after))
        write_json(save / AGREEMENT, [_agreement_row(*pair) for pairs in agreed.values() for pair in pairs])
        write_rows(save / GENERATIONS, after)


def read_generations(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's generations.jsonl.

    Args:
        path: the file, or the folder that holds it.

    Raises:
        InputError: if there is no such file, it is not UTF-8, or a line is not one JSON object. The last line of a
            killed run may be cut off.
    """
    file = path / GENERATIONS if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"rejudge: there is no file {str(file)!r}. Pass a run's folder or its {GENERATIONS}.")
    rows = []
    try:
        # Not splitlines(): an answer may hold other line separators, such as U+2028.
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"rejudge: {str(file)!r} must be UTF-8 text, got {error.reason}.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise InputError(
                f"rejudge: line {number} of {str(file)!r} must be one JSON object, got {line[-40:]!r} at its end. If"
                " the line was cut off, resume the run or remove the line."
            )
        rows.append(row)
    return rows


def find_judge(name: str) -> Judge | RefusalClassifier:
    """Return a judge of harm, as ``get_judge`` does, or a judge of refusals, as ``get_refusal_classifier`` does.

    ``"builtin"`` names a judge of both kinds. Here it is the judge of harm.

    Raises:
        InputError: if there is no such judge.
    """
    head = name.partition(":")[0].replace("-", "_")
    return get_refusal_classifier(name) if head in HEADS else get_judge(name)


def rejudge(generations: Sequence[Row], judges: Sequence[Judge | RefusalClassifier | str]) -> list[dict[str, Any]]:
    """Return copies of the rows with the verdicts of further judges.

    Judges of harm judge answers to harmful prompts (``HARMFUL_SETS``). Judges of refusals judge answers to ordinary
    prompts (``REFUSAL_SETS``). Each judge gets all its answers in one call. A new verdict replaces an earlier one under
    the same judge's name. The verdicts of other judges stay.

    Args:
        generations: rows of a run's ``generations.jsonl``. They do not change.
        judges: judges, or names that ``find_judge`` takes.

    Returns:
        All rows in their order. ``verdicts[judge.name]`` is ``{"score": ..., "flag": ...}``.

    Raises:
        InputError: if there is nothing to judge, a row lacks a column, or two judges have one name.
        ValueError: if a judge does not return one verdict per answer.
    """
    _check_rows(generations)
    chosen = [find_judge(judge) if isinstance(judge, str) else judge for judge in judges]
    names = [judge.name for judge in chosen]
    if not names or len(set(names)) < len(names):
        raise InputError(f"rejudge: pass at least one judge and no name twice, got {names}.")
    rows = [{**row, "verdicts": dict(row["verdicts"])} for row in generations]
    wanted = [REFUSAL_SETS if isinstance(judge, RefusalClassifier) else HARMFUL_SETS for judge in chosen]
    # Every judge is checked before the first one judges, since judging may take hours or cost money.
    for judge, sets in zip(chosen, wanted, strict=True):
        if not any(row["set"] in sets for row in rows):
            found = sorted({str(row["set"]) for row in rows})
            raise InputError(
                f"rejudge: judge {judge.name!r} needs rows of the set {' or '.join(map(repr, sets))}, got only {found}."
            )
    for judge, sets in zip(chosen, wanted, strict=True):
        judged = [row for row in rows if row["set"] in sets]
        verdicts = _verdicts(judge, [row["prompt"] for row in judged], [row["response"] for row in judged])
        if len(verdicts) != len(judged):
            raise ValueError(
                f"rejudge: one verdict per answer is needed, got {len(verdicts)} for {len(judged)} from judge"
                f" {judge.name!r}."
            )
        for row, verdict in zip(judged, verdicts, strict=True):
            row["verdicts"][judge.name] = verdict.row()
    return rows


def judged_scores(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the scores of all judges, as rows for each arm, stage, set and judge.

    The rows hold the percentage of flagged answers with its 95 % Wilson interval. If the judge grades, they hold its
    mean score with the interval of ``score_mean``. They also hold the rows of ``group_rows`` for categories and
    languages. A flag on an answer to an ordinary prompt means that the answer refuses. The judge ``"refusal"`` is the
    one that the run had.

    A resumed run may leave an answer twice: then only the later one counts. Equal prompts at two places of a set
    count twice. An answer without a verdict counts nowhere.

    Args:
        rows: as ``rejudge`` returns them. A row without ``arm`` or ``stage`` gets ``"-"`` for it.
    """
    verdicts: dict[tuple[str, str, str, str], list[tuple[Row, Verdict]]] = {}
    for row in _latest(rows, SCORED_SETS):
        where = row.get("arm") or "-", row.get("stage") or "-", SCORED_SETS[row["set"]]
        for judge, entry in row["verdicts"].items():
            if entry["flag"] is not None:
                score = entry.get("score")
                verdict = Verdict(float(entry["flag"] if score is None else score), bool(entry["flag"]))
                verdicts.setdefault((*where, judge), []).append((row, verdict))
    score_rows = []
    for (arm, stage, metric, judge), judged in verdicts.items():
        flagged, count = sum(v.flag for _, v in judged), len(judged)
        scores = [Score.share(metric, flagged, count, judge).row()]
        scores += mean_rows(metric, judge, [v.score for _, v in judged])
        scores += group_rows(metric, judge, [(row, v.flag) for row, v in judged])
        score_rows += [{"arm": arm, "stage": stage, **score} for score in scores]
    return score_rows


def agreements(rows: Sequence[Row], sets: Container[str] = HARMFUL_SETS) -> list[tuple[str, str, Agreement]]:
    """Return each pair of judges with their agreement on the answers that both judged, over all arms and stages.

    Args:
        rows: as ``rejudge`` returns them.
        sets: names of the sets whose answers count.
    """
    return pairwise([_flags(row) for row in _latest(rows, sets)])


def pairwise(flags: Sequence[Mapping[str, bool]]) -> list[tuple[str, str, Agreement]]:
    """Return each pair of judges with their agreement on the answers that both judged.

    Args:
        flags: for each answer, the flag by judge's name. A judge without a verdict on an answer has no entry there.
    """
    names = list(dict.fromkeys(name for by_judge in flags for name in by_judge))
    pairs = []
    for first, second in combinations(names, 2):
        both = [(by_judge[first], by_judge[second]) for by_judge in flags if first in by_judge and second in by_judge]
        if both:
            pairs.append((first, second, cohens_kappa([a for a, _ in both], [b for _, b in both])))
    return pairs


def agreement_lines(pairs: Sequence[tuple[str, str, Agreement]], prompts: str = "harmful prompts") -> Iterator[str]:
    """Yield a sentence on the agreement of each pair of judges.

    Args:
        pairs: as ``pairwise`` returns them.
        prompts: words for the prompts that were answered.
    """
    for first, second, agreement in pairs:
        kappa = f"{agreement.kappa:.2f}"
        if math.isnan(agreement.kappa):
            kappa = "undefined, since both give every answer the same flag"
        yield (
            f"Judges '{first}' and '{second}' agree on {100 * agreement.observed:.1f} % of {agreement.count} answers to"
            f" {prompts}; Cohen's kappa {kappa}."
        )


def scores_table(rows: Sequence[Row]) -> Any:
    """Return the scores of all judges as a table for a rich console."""
    from rich.table import Column, Table

    from hftlight.folders import STAGES, arm_word

    columns = (Column(name, overflow="fold") for name in ("arm", "stage", "answers", "judge"))
    table = Table(*columns, Column("value (95 %)", no_wrap=True))
    for row in judged_scores(rows):
        metric, _, of = row["metric"].partition("_by_")
        stage, words = STAGES.get(row["stage"], row["stage"]), SAID[metric]
        words += f", {of} {row['group']}" if of else ""
        digits, unit = (1, "%") if row["unit"] == "percent" else (2, f"({row['unit']})")
        value, low, high = (f"{row[name]:.{digits}f}" for name in ("value", "low", "high"))
        table.add_row(
            arm_word(row["arm"]), stage, words, row["judge"], f"{value} ({low}-{high}) {unit} of {row['count']}"
        )
    return table


def _agreement_row(first: str, second: str, agreement: Agreement) -> dict[str, Any]:
    kappa = None if math.isnan(agreement.kappa) else agreement.kappa
    counts = {name: getattr(agreement, name) for name in ("both", "first_only", "second_only", "neither")}
    return {"judges": [first, second], "kappa": kappa, "agreement": agreement.observed, **counts}


def _flags(row: Row) -> dict[str, bool]:
    return {name: bool(entry["flag"]) for name, entry in row["verdicts"].items() if entry["flag"] is not None}


def _verdicts(judge: Judge | RefusalClassifier, prompts: Sequence[str], responses: Sequence[str]) -> Sequence[Verdict]:
    if isinstance(judge, RefusalClassifier):
        return [refusal_verdict(refusal) for refusal in judge(prompts, responses)]
    return judge(prompts, responses)


def _latest(rows: Sequence[Row], sets: Container[str]) -> list[Row]:
    """Return the rows of the given sets, and of an answer that occurs twice only the later row."""
    latest: dict[tuple[Any, ...], Row] = {}
    for number, row in enumerate(rows):
        if row["set"] in sets:
            # The place distinguishes equal prompts of a set. Rows of older runs have no place. Their id replaces it,
            # and a row without an id is always an answer of its own.
            place = row.get("place", None if row.get("id") else number)
            latest[row.get("arm"), row.get("stage"), row["set"], place, row.get("id"), row["prompt"]] = row
    return list(latest.values())


def _check_rows(generations: Sequence[Row]) -> None:
    if not generations:
        raise InputError("rejudge: got no generations. Pass at least one row of a run's generations.jsonl.")
    for number, row in enumerate(generations, start=1):
        missing = [name for name in COLUMNS if name not in row]
        if missing:
            raise InputError(
                f"rejudge: every row needs {', '.join(COLUMNS)}; row {number} lacks {', '.join(missing)}. Pass the rows"
                " of a run's generations.jsonl."
            )
        kinds = {"prompt": str, "response": str, "verdicts": Mapping}
        for name, kind in kinds.items():
            if not isinstance(row[name], kind):
                what = "a text" if kind is str else "a mapping from judge to verdict"
                raise InputError(f"rejudge: {name} of row {number} must be {what}, got {row[name]!r}.")
        for judge, verdict in row["verdicts"].items():
            if not isinstance(verdict, Mapping) or "flag" not in verdict:
                raise InputError(f"rejudge: verdict {judge!r} of row {number} must have a flag, got {verdict!r}.")
