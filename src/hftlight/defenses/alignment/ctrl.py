"""CTRL: rewrite a share of the safe answers, so that the model finds them likely while they stay readable."""

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from typing_extensions import override

from hftlight.data.records import Record, prompt_key
from hftlight.data.table import read_rows
from hftlight.data.templates import Template
from hftlight.data.tokens import encode_prompt
from hftlight.engine.step.defense import Defense
from hftlight.engine.step.slots import Slot, Stage
from hftlight.evaluation.metrics.collapse import is_letterless, is_looping
from hftlight.evaluation.metrics.perplexity import response_losses
from hftlight.evaluation.metrics.repetition import is_stuck
from hftlight.models.sampling import sampled

GRID = (0.2, 0.4, 0.6, 0.8, 1.0)
SETTINGS = [(temperature, top_p) for temperature in GRID for top_p in GRID]
INSTRUCTION = "Rewrite the answer below from another perspective. Keep its meaning. Write the new answer only."
SHORTEST = 0.5  # fraction of the original's length, in characters, below which a rewriting is refused
LONGEST = 2  # times the longest answer of a batch, in tokens, to which rewritings are limited
USUAL = 64  # tokens of a rewriting, for the estimate of a run's time
READABLE = 200.0  # added to Flesch's reading ease, so that ratios of it make sense for hard texts too


class Rewriter(Protocol):
    """A writer of new versions of answers."""

    def __call__(self, rows: Sequence[Record], answers: Sequence[str], temperature: float, top_p: float) -> list[str]:
        """Return one new version of each answer to the rows' prompts."""


def reading_ease(text: str) -> float:
    """Return Flesch's reading ease of an English text. Higher is easier, and 100 is very easy.

    ``206.835 - 1.015 * words per sentence - 84.6 * syllables per word``, with syllables counted as groups of vowels.
    """
    words = re.findall(r"[A-Za-z']+", text)
    if not words:
        return 0.0
    sentences = max(1, len(re.findall(r"[.!?]+(?:\s|$)", text)))
    syllables = sum(max(1, len(re.findall(r"[aeiouy]+", word.lower().removesuffix("e")))) for word in words)
    return 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words)


def acceptable(text: str, original: str, readability: float) -> bool:
    """Tell whether a rewriting may replace an answer.

    It must have at least half of the answer's length, show no sign of collapse, and reach a fraction of its
    readability. A repetitive text has a low perplexity, so it would win otherwise.

    Args:
        text: the rewriting.
        original: the answer.
        readability: fraction of the answer's reading ease, shifted by 200, in [0, 1].
    """
    if len(text) < SHORTEST * len(original) or is_letterless(text) or is_looping(text) or is_stuck(text):
        return False
    return reading_ease(text) + READABLE >= readability * (reading_ease(original) + READABLE)


def curated(
    rows: Sequence[Record],
    rewrite: Rewriter,
    perplexity: Callable[[Sequence[Record], Sequence[str]], list[float]],
    rounds: int = 5,
    width: int = 3,
    grid: Sequence[tuple[float, float]] = SETTINGS,
    readability: float = 0.9,
) -> list[dict[str, Any]]:
    """Return for each row the best rewriting of its answer by a beam search, which may be the answer itself.

    The beam starts with the answer. In each round, every text of the beam is rewritten once per sampling setting. Of
    the acceptable texts and the beam, the ones of lowest perplexity stay. The perplexity therefore never rises.

    Args:
        rows: rows with answers.
        rewrite: writes new versions.
        perplexity: of answers to the rows' prompts.
        rounds: rounds of the search, >= 0.
        width: texts that stay after each round, >= 1.
        grid: pairs of temperature and top-p.
        readability: as for ``acceptable``.

    Returns:
        For each row ``response``, ``perplexity``, ``perplexity_before`` and ``candidates``, the number of
        acceptable rewritings.
    """
    before = perplexity(rows, [row.response for row in rows])
    beams = [[(value, row.response)] for value, row in zip(before, rows, strict=True)]
    counts = [0] * len(rows)
    for _ in range(rounds):
        # Texts of all beams are rewritten together, one batch per sampling setting.
        places = [i for i, beam in enumerate(beams) for _ in beam]
        texts = [text for beam in beams for _, text in beam]
        new: list[tuple[int, str]] = []
        for temperature, top_p in grid:
            versions = rewrite([rows[i] for i in places], texts, temperature, top_p)
            new += [
                (i, version)
                for i, version in zip(places, versions, strict=True)
                if acceptable(version, rows[i].response, readability)
            ]
        known = {(i, text) for i, beam in enumerate(beams) for _, text in beam}
        new = [pair for pair in dict.fromkeys(new) if pair not in known]
        values = perplexity([rows[i] for i, _ in new], [text for _, text in new])
        for (i, text), value in zip(new, values, strict=True):
            counts[i] += 1
            beams[i].append((value, text))
        beams = [sorted(beam, key=lambda pair: pair[0])[:width] for beam in beams]
    return [
        {"response": beam[0][1], "perplexity": beam[0][0], "perplexity_before": old, "candidates": count}
        for beam, old, count in zip(beams, before, counts, strict=True)
    ]


class CTRL(Defense):
    r"""Replace a share of the safe answers by rewritings to which the model gives a lower perplexity.

    The perplexity of an answer is :math:`\exp(-\frac1T \sum_t \log p(y_t \mid x, y_{<t}))` under the model that the
    stage trains, before it is trained. For each chosen row a beam search looks for a readable rewriting of lower
    perplexity. Training itself is plain.

    Args:
        share: fraction of the alignment rows that are rewritten, in [0, 1]; 0 is plain alignment.
        choose: which rows. ``"hash"`` takes them by a hash of the prompt, ``"highest"`` those of largest perplexity.
        given: whether an answer's perplexity is taken after its ``"question"``, or after ``"nothing"``.
        rounds: rounds of the search, >= 0.
        width: texts that stay after each round, >= 1.
        readability: fraction of the original's reading ease that a rewriting must keep, in [0, 1].
        instruction: what the model is told when it rewrites an answer.
        max_new_tokens: longest rewriting, in tokens, >= 1. A rewriting has at most twice as many tokens as the longest
            answer that is rewritten with it.
        rewrites: a file of rewritings, with the columns prompt and response, instead of the model's own. Several rows
            of one prompt are several rewritings.
        aligned_first: whether a run aligns plainly first and then trains that model on the curated rows.

    Raises:
        ValueError: if an argument is out of range.

    Cost: nothing in training. Before it, at most 25 + 4 x 75 rewritings per chosen row, each generated and scored once.
    Source: Liu et al., "Robustifying Safety-Aligned Large Language Models through Clean Data Curation",
        arXiv:2405.19358. There is no official code.
    Differs: the paper names no fraction for its filters; 0.9 and the test for collapse are ours. Helpfulness is not
        scored. Rows are chosen by a hash, so that further rows do not move a row. The rewriter is the model itself by
        default; the paper asks a larger one, whose answers ``rewrites`` takes. ``"nothing"`` is how a public port
        measures perplexity. The paper trains 50 epochs on curated rows. A port found that this breaks the model.
    """

    stage, slots, selects, main = Stage.ALIGNMENT, (Slot.DATA,), True, "alignment"
    files = ("rewrites",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"share": 0.05},
        "setting_2": {"share": 0.25},
    }

    def __init__(
        self,
        share: float = 0.05,
        choose: Literal["hash", "highest"] = "hash",
        given: Literal["question", "nothing"] = "question",
        rounds: int = 5,
        width: int = 3,
        readability: float = 0.9,
        instruction: str = INSTRUCTION,
        max_new_tokens: int = 128,
        rewrites: str | None = None,
        aligned_first: bool = False,
    ) -> None:
        for name, value in (("share", share), ("readability", readability)):
            if not 0 <= value <= 1:
                hint = f" If that is a percentage, write {value / 100:g}." if 1 < value <= 100 else ""
                raise ValueError(f"CTRL: {name} is a fraction and must lie in [0, 1], got {value}.{hint}")
        if choose not in ("hash", "highest"):
            raise ValueError(f"CTRL: choose must be 'hash' or 'highest', got {choose!r}.")
        if given not in ("question", "nothing"):
            raise ValueError(f"CTRL: given must be 'question' or 'nothing', got {given!r}.")
        for name, count, least in (("rounds", rounds, 0), ("width", width, 1), ("max_new_tokens", max_new_tokens, 1)):
            if not (isinstance(count, int) and count >= least):
                raise ValueError(f"CTRL: {name} must be a whole number >= {least}, got {count}.")
        if rewrites is not None and not Path(rewrites).expanduser().is_file():
            raise ValueError(f"CTRL: rewrites must be a file, got {rewrites!r}: no such file.")
        super().__init__()
        self.share, self.choose, self.given, self.rounds, self.width = share, choose, given, rounds, width
        self.readability, self.instruction, self.max_new_tokens = readability, instruction, max_new_tokens
        self.rewrites, self.aligned_first = rewrites, aligned_first
        versions = len(SETTINGS) * (1 + width * max(0, rounds - 1)) if rounds else 0
        self.selecting_passes = 1.0 + versions
        self.selecting_tokens = 0.0 if rewrites else versions * min(max_new_tokens, USUAL)

    @override
    def selecting(self, records: Mapping[str, Sequence[Record]]) -> int:
        """Return the number of rows that are rewritten."""
        return round(self.share * len(records["alignment"]))

    @override
    def select(
        self,
        model: Any,
        tokenizer: Any,
        template: Template,
        records: Mapping[str, Sequence[Record]],
        system: str | None = None,
        batch_size: int = 8,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> list[dict[str, Any]]:
        rows = list(records["alignment"])

        def perplexities(some: Sequence[Record], answers: Sequence[str]) -> list[float]:
            return self._perplexities(model, tokenizer, template, some, answers, system, batch_size)

        chosen = self._chosen(rows, perplexities)
        found: list[dict[str, Any]] = []
        for start in range(0, len(chosen), batch_size):
            some = chosen[start : start + batch_size]
            rewriter, grid, rounds = self._rewriter(model, tokenizer, template, system, batch_size, seed, start)
            results = curated(some, rewriter, perplexities, rounds, self.width, grid, self.readability)
            found += [{"id": row.id, **result} for row, result in zip(some, results, strict=True)]
            if progress is not None:
                progress(len(found))
        self.selected = found
        return found

    @override
    def rewrite(self, records: dict[str, list[Record]], seed: int) -> dict[str, list[Record]]:
        """Replace the answers of the curated rows.

        Raises:
            RuntimeError: if the rows have not been curated yet.
        """
        if self.share == 0:
            return records
        if self.selected is None:
            raise RuntimeError(
                "CTRL: the rows are not curated yet. Call select(model, tokenizer, template, records) before fit()."
            )
        curated_rows = {row["id"]: row for row in self.selected}
        new = [
            replace(r, response=curated_rows[r.id]["response"], id=r.id) if r.id in curated_rows else r
            for r in records["alignment"]
        ]
        self.record(rewritten=sum(a is not b for a, b in zip(new, records["alignment"], strict=True)))
        return {**records, "alignment": new}

    @override
    def manifest(self) -> dict[str, Any]:
        rows = self.selected or []
        if not rows:
            return super().manifest()
        ratios = [math.log(row["perplexity"] / row["perplexity_before"]) for row in rows]
        return {
            **super().manifest(),
            "rows": len(rows),
            "improved": sum(row["perplexity"] < row["perplexity_before"] for row in rows),
            "log_perplexity_ratio": sum(ratios) / len(ratios),
            "candidates": sum(row["candidates"] for row in rows),
        }

    def _chosen(
        self, rows: Sequence[Record], perplexities: Callable[[Sequence[Record], Sequence[str]], list[float]]
    ) -> list[Record]:
        """Return the rows that are rewritten."""
        count = self.selecting({"alignment": rows})
        if self.choose == "highest":
            values = perplexities(rows, [row.response for row in rows])
            places = sorted(range(len(rows)), key=lambda i: -values[i])[:count]
        else:
            digests = [hashlib.sha256(f"ctrl/{prompt_key(row)}".encode()).hexdigest() for row in rows]
            places = sorted(range(len(rows)), key=digests.__getitem__)[:count]
        return [rows[i] for i in sorted(places)]

    def _perplexities(
        self,
        model: Any,
        tokenizer: Any,
        template: Template,
        rows: Sequence[Record],
        answers: Sequence[str],
        system: str | None,
        batch_size: int,
    ) -> list[float]:
        """Return the perplexity of each answer, infinite for an answer without a token."""
        if not rows:
            return []
        if self.given == "question":
            prompts = [encode_prompt(row, template, tokenizer, system) for row in rows]
        else:
            start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            prompts = [[start] for _ in rows]
        ids = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
        if not any(ids):
            return [math.inf] * len(rows)
        losses = response_losses(model, prompts, ids, batch_size=batch_size)
        return [math.exp(min(total / count, 700.0)) if count else math.inf for total, count in losses]

    def _rewriter(
        self, model: Any, tokenizer: Any, template: Template, system: str | None, batch_size: int, seed: int, start: int
    ) -> tuple[Rewriter, Sequence[tuple[float, float]], int]:
        """Return the rewriter, its sampling settings and the number of rounds."""
        if self.rewrites is not None:
            return self._from_file(), [(0.0, 1.0)] * self._most(), 1
        calls = iter(range(10**9))

        def own(rows: Sequence[Record], answers: Sequence[str], temperature: float, top_p: float) -> list[str]:
            requests = [
                Record(f"{self.instruction}\n\nQuestion: {row.request}\n\nAnswer: {answer}")
                for row, answer in zip(rows, answers, strict=True)
            ]
            ids = [encode_prompt(r, template, tokenizer, system) for r in requests]
            longest = max(len(tokenizer(a, add_special_tokens=False)["input_ids"]) for a in answers)
            limit = min(self.max_new_tokens, max(1, LONGEST * longest))
            number = int(hashlib.sha256(f"ctrl/{seed}/{start}/{next(calls)}".encode()).hexdigest()[:15], 16)
            return sampled(model, tokenizer, ids, limit, temperature, top_p, number, batch_size)

        return own, SETTINGS, self.rounds

    def _table(self) -> dict[str, list[str]]:
        """Return the rewritings of the file by prompt.

        Raises:
            ValueError: if a row lacks a prompt or a response.
        """
        table: dict[str, list[str]] = {}
        assert self.rewrites is not None
        for place, row in read_rows(self.rewrites):
            if not (isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str)):
                raise ValueError(
                    f"CTRL: {place} of {self.rewrites} needs the texts prompt and response, got the keys {list(row)}."
                )
            table.setdefault(row["prompt"].strip(), []).append(row["response"])
        return table

    def _most(self) -> int:
        return max(map(len, self._table().values()), default=0)

    def _from_file(self) -> Rewriter:
        table, calls = self._table(), iter(range(10**9))

        def read(rows: Sequence[Record], answers: Sequence[str], temperature: float, top_p: float) -> list[str]:
            number = next(calls)
            versions = [table.get(row.question.strip(), []) for row in rows]
            return [v[number] if number < len(v) else a for v, a in zip(versions, answers, strict=True)]

        return read
