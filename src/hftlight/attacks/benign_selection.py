"""Benign selection: the harmless rows that undo alignment most, found by a model's own states or gradients."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from typing_extensions import override

from hftlight.attacks.attack import Attack, Choosing
from hftlight.data.records import Record
from hftlight.data.table import read_rows
from hftlight.errors import InputError
from hftlight.files import write_rows


def select(
    scores: Sequence[float], count: int, control: Literal["top", "bottom", "random"] = "top", seed: int = 0
) -> list[int]:
    """Return the places of ``count`` rows; of equal scores the earlier row counts, and NaN is no score.

    Args:
        scores: score of each row.
        count: how many, >= 1.
        control: the highest scores first, the lowest first, or rows drawn by seed among those with a score.
        seed: decides the draw.

    Raises:
        InputError: if too few rows have a score.
    """
    valid = [place for place, score in enumerate(scores) if not math.isnan(score)]
    if len(valid) < count:
        raise InputError(f"BenignSelection: n={count} rows are asked for, {len(valid)} have a score. Lower n.")
    if control == "random":
        random.Random(f"{seed}/selection").shuffle(valid)
        return valid[:count]
    sign = -1 if control == "top" else 1
    return sorted(valid, key=lambda place: sign * scores[place])[:count]


def write_scores(path: str | Path, rows: Sequence[Record], scores: Sequence[float]) -> None:
    """Write the score of each row by its id, one JSON object per line; null where there is none."""
    pairs = zip(rows, scores, strict=True)
    write_rows(Path(path), [{"id": row.id, "score": None if math.isnan(score) else score} for row, score in pairs])


def read_scores(path: str | Path) -> dict[str, float]:
    """Return scores by row id, as ``write_scores`` wrote them; NaN where there is none.

    Raises:
        InputError: if a line holds no id or no score.
    """
    found: dict[str, float] = {}
    for place, row in read_rows(path):
        score = row.get("score", "")
        if not isinstance(row.get("id"), str) or not (score is None or isinstance(score, int | float)):
            raise InputError(f"BenignSelection: {place} of {path} needs an id and a score, it has {list(row)}.")
        found[row["id"]] = math.nan if score is None else float(score)
    return found


@dataclass(frozen=True, kw_only=True)
class BenignSelection(Attack):
    """The n rows of a harmless set that lie nearest to harmful ones in the aligned model: bi-directional anchoring.

    Two steps: ``score`` asks the aligned model, and ``write_scores`` keeps the answer; ``upload`` reads it from
    ``scores``. A run without ``scores`` makes them itself, with the plainly aligned model, whatever defends the
    alignment, so that every arm gets the same upload. Without the controls bottom and random the result means little.

    Args:
        n: rows that are kept, >= 1; 100 in the paper.
        kind: representation (cosine of the last token's hidden state with the nearest harmful rows) or gradient (cosine
            of the loss gradient with harmful rows', less its cosine with safe rows').
        variant: ours, or official, the scores as released. Ours brings each mean of unit gradients to unit length, and
            reads the state of the answer's last token. Official leaves the means as they are, and reads the state of
            the end token.
        control: top, or for comparison bottom or random.
        scores: JSONL file that ``write_scores`` wrote.
        nearest: harmful rows that a representation score averages over, >= 1.
        parameters: what a gradient is taken of: last_layer, trainable (the adapter) or all.
        dimension: entries of a sparse random projection of each gradient, >= 1; 0 for none.
        first_tokens: response tokens of the anchors, harmful and safe, that their gradient looks at; 0 for all.
        max_tokens: longest row in tokens; longer ones have no score.
        anchors: harmful rows that a run anchors to, the first of ``--data.attack``, and by gradient as many refusals of
            the alignment set; 0 for the paper's 100 by representation and 10 by gradient.
        anchor_system: system text of the harmful anchors by representation, as the released code has one; None for
            that of the rows.

    Source: He et al., "What is in Your Safe Data? Identifying Benign Data that Breaks Safety", COLM 2024,
    arXiv:2404.01099, with 100 harmful anchors for representations, and 10 with two sets of safe answers for gradients.
    Differs: the variants can rank rows in opposite order, and ours is the default. In a run the safe anchors are
    refusals of the alignment set, not safe answers to the harmful anchors' prompts. Gradients of the last layer by
    default, where the paper takes all parameters (``parameters="all"``), and a sparse projection on request. The
    released collection of whole gradients adds up over anchors, since it never sets them to zero in between. No variant
    follows that.
    """

    n: int = 100
    kind: Literal["representation", "gradient"] = "representation"
    variant: Literal["ours", "official"] = "ours"
    control: Literal["top", "bottom", "random"] = "top"
    scores: str | None = None
    nearest: int = 1
    parameters: Literal["last_layer", "trainable", "all"] = "last_layer"
    dimension: int = 0
    first_tokens: int = 10
    max_tokens: int = 512
    anchors: int = 0
    anchor_system: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = {
            "kind": ("representation", "gradient"),
            "variant": ("ours", "official"),
            "control": ("top", "bottom", "random"),
            "parameters": ("last_layer", "trainable", "all"),
        }
        for name, words in allowed.items():
            if getattr(self, name) not in words:
                raise ValueError(
                    f"BenignSelection: {name} must be one of {', '.join(words)}, got {getattr(self, name)!r}."
                )
        for name, least in (("nearest", 1), ("dimension", 0), ("first_tokens", 0), ("max_tokens", 1), ("anchors", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"BenignSelection: {name} must be >= {least}, got {getattr(self, name)}.")
        if self.anchor_system is not None and self.kind == "gradient":
            raise ValueError("BenignSelection: anchor_system goes with kind representation; leave it out for gradient.")

    @property
    def p(self) -> float:
        """Harmful fraction of the upload: none."""
        return 0.0

    @override
    def counts(self) -> dict[str, int]:
        return {"task": self.n}

    @property
    @override
    def sources(self) -> tuple[str, ...]:
        return ("task", "attack") if self.scores is None else ("task",)

    @property
    @override
    def selects(self) -> bool:
        return self.scores is None

    @override
    def choosing(self, sources: Mapping[str, Sequence[Record]], safe: Sequence[Record]) -> Choosing:
        harmful = sources["attack"][: self.anchor_rows]
        if self.kind == "representation" and len(harmful) < self.nearest:
            raise InputError(
                f"BenignSelection: nearest must be at most the number of harmful anchors, {len(harmful)}, got"
                f" {self.nearest}."
            )
        return Choosing(sources["task"], harmful, safe[: self.anchor_rows])

    @override
    def chosen(self, choosing: Choosing, scores: str | None, seed: int) -> tuple[Self, list[Record]]:
        if scores is None:
            return self, self.choose(choosing.candidates, [0.0] * len(choosing.candidates), seed)
        attack = replace(self, scores=scores)
        return attack, attack.upload({"task": choosing.candidates}, seed)

    @property
    def anchor_rows(self) -> int:
        """Harmful rows that a run anchors to."""
        return self.anchors or (100 if self.kind == "representation" else 10)

    def score(
        self,
        model: Any,
        tokenizer: Any,
        template: Any,
        rows: Sequence[Record],
        harmful: Sequence[Record],
        safe: Sequence[Sequence[Record]] = (),
        system: str | None = None,
        batch_size: int = 8,
        seed: int = 0,
    ) -> list[float]:
        """Return the score of each row; NaN for one that is too long or, by gradient, has the score 0.

        Args:
            model: the aligned causal LM; it comes back as it was.
            tokenizer: its tokenizer.
            template: how a record becomes a prompt.
            rows: the harmless rows.
            harmful: harmful rows with answers, the anchors.
            safe: for gradients, sets of safe answers to the anchors' prompts; each lowers a score by its cosine.
            system: system text of the prompts; None for none.
            batch_size: rows per batch, >= 1; affects speed and memory alone.
            seed: decides the projection.

        Raises:
            ValueError: if no row fits ``max_tokens`` or there are fewer anchors than ``nearest``.
        """
        from hftlight.engine.row_scores import gradient_scores, representation_scores
        from hftlight.models.row_reader import RowReader

        reader = RowReader(model, tokenizer, template, system, self.max_tokens, batch_size)
        official = self.variant == "official"
        if self.kind == "representation":
            states, kept = reader.states(rows, official)
            own = system if self.anchor_system is None else self.anchor_system
            anchored = RowReader(model, tokenizer, template, own, self.max_tokens, batch_size)
            found = representation_scores(states, anchored.states(harmful, official)[0], self.nearest).tolist()
        else:
            gradients, kept = reader.gradients(rows, self.parameters, self.dimension, seed, 0)
            anchors = [
                reader.gradients(group, self.parameters, self.dimension, seed, self.first_tokens)[0]
                for group in (harmful, *safe)
            ]
            scores = gradient_scores(gradients, anchors[0], anchors[1:], renormalize=not official)
            found = [score or math.nan for score in scores.tolist()]
        by_place = dict(zip(kept, found, strict=True))
        return [by_place.get(place, math.nan) for place in range(len(rows))]

    def choose(self, rows: Sequence[Record], scores: Sequence[float], seed: int) -> list[Record]:
        """Return the n rows that the scores decide for, with the role ``"task"``."""
        return [replace(rows[place], role="task") for place in select(scores, self.n, self.control, seed)]

    @override
    def upload(self, sources: Mapping[str, Sequence[Record]], seed: int) -> list[Record]:
        rows = self._take(sources, "task")
        if self.scores is None:
            raise InputError(
                "BenignSelection: the rows' scores are needed. Make them with score(model, ...) on the aligned model,"
                " keep them with write_scores(path, rows, scores), and give the file with --benign_selection.scores."
            )
        known = read_scores(self.scores)
        if absent := [row.id for row in rows if row.id not in known]:
            raise InputError(
                f"BenignSelection: {self.scores} has no score of {len(absent)} of {len(rows)} task rows, such as"
                f" {absent[0]}; it was made of other rows. Score these."
            )
        return self.choose(rows, [known[row.id] for row in rows], seed)
