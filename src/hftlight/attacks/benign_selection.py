"""Benign selection: the harmless rows that undo alignment most, by a model's own states or gradients."""

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
    """Return the indices of ``count`` selected rows. Of two rows with equal scores, the earlier one comes first.

    A row whose score is NaN has no score and is never selected.

    Args:
        scores: score of each row.
        count: number of rows to select, >= 1.
        control: top (highest scores first), bottom (lowest first) or random (rows with a score, drawn by seed).
        seed: seed of the draw.

    Raises:
        InputError: if too few rows have a score.
    """
    valid = [place for place, score in enumerate(scores) if not math.isnan(score)]
    if len(valid) < count:
        raise InputError(f"BenignSelection: n={count} rows are needed, but only {len(valid)} have a score. Lower n.")
    if control == "random":
        random.Random(f"{seed}/selection").shuffle(valid)
        return valid[:count]
    sign = -1 if control == "top" else 1
    return sorted(valid, key=lambda place: sign * scores[place])[:count]


def write_scores(path: str | Path, rows: Sequence[Record], scores: Sequence[float]) -> None:
    """Write the id and the score of each row, one JSON object per line. A row without a score gets null."""
    pairs = zip(rows, scores, strict=True)
    write_rows(Path(path), [{"id": row.id, "score": None if math.isnan(score) else score} for row, score in pairs])


def read_scores(path: str | Path) -> dict[str, float]:
    """Return the scores that ``write_scores`` wrote, by row id. A row without a score gets NaN.

    Raises:
        InputError: if a line holds no id or no score.
    """
    scores: dict[str, float] = {}
    for place, row in read_rows(path):
        score = row.get("score", "")
        if not isinstance(row.get("id"), str) or not (score is None or isinstance(score, int | float)):
            raise InputError(f"BenignSelection: {place} of {path} needs an id and a score, got the keys {list(row)}.")
        scores[row["id"]] = math.nan if score is None else float(score)
    return scores


@dataclass(frozen=True, kw_only=True)
class BenignSelection(Attack):
    """The n rows of a harmless set that lie nearest to harmful rows in the aligned model: bi-directional anchoring.

    ``score`` computes the scores with the aligned model, ``write_scores`` writes them to a file, and ``upload`` reads
    them from ``scores``. A run without ``scores`` computes the scores itself. It always uses the model that was aligned
    without a defense, so that every arm gets the same upload. Compare the result with the controls bottom and random;
    without them it means little.

    Args:
        n: rows to select, >= 1; 100 in the paper.
        kind: representation or gradient. A representation score is the cosine between the last token's hidden states of
            the row and of its nearest harmful rows. A gradient score is the cosine of the loss gradient with that of
            harmful rows, minus the cosine with safe rows.
        variant: ours, or official, the scores of the released code. Ours scales each mean of unit gradients to unit
            length, and reads the state of the answer's last token. Official does not scale the means, and reads the
            state of the end token.
        control: top, or for comparison bottom or random.
        scores: JSONL file that ``write_scores`` wrote.
        nearest: number of nearest harmful rows that a representation score averages over, >= 1.
        parameters: parameters of the gradients: last_layer, trainable (the adapter) or all.
        dimension: entries of a sparse random projection of each gradient, >= 1; 0 for no projection.
        first_tokens: number of response tokens of an anchor, harmful or safe, in its gradient's loss; 0 for all.
        max_tokens: longest row in tokens; a longer row has no score.
        anchors: number of harmful anchors of a run, the first rows of ``--data.attack``. By gradient, a run also takes
            as many refusals of the alignment set. 0 means the paper's 100 by representation and 10 by gradient.
        anchor_system: system text of the harmful anchors by representation, as in the released code. None means the
            system text of the rows.

    Source: He et al., "What is in Your Safe Data? Identifying Benign Data that Breaks Safety", COLM 2024,
    arXiv:2404.01099. The paper has 100 harmful anchors for representations. For gradients it has 10 harmful anchors and
    two sets of safe answers.
    Differs: the variants can rank rows in opposite order, and ours is the default. In a run, the safe anchors are
    refusals of the alignment set, not safe answers to the harmful anchors' prompts. Gradients are those of the last
    layer by default; the paper takes all parameters (``parameters="all"``). A sparse projection is optional. The
    released collection of whole gradients adds up over anchors, since it never resets them to zero in between. No
    variant does so.
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
            raise ValueError("BenignSelection: anchor_system needs kind representation; leave it out for gradient.")

    @property
    def p(self) -> float:
        """Harmful fraction of the upload: 0."""
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
        """Number of harmful anchors of a run."""
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
        """Return the score of each row.

        A row that is too long gets NaN. By gradient, a row with the score 0 gets NaN too.

        Args:
            model: the aligned causal LM; the call leaves it unchanged.
            tokenizer: the model's tokenizer.
            template: turns a record into a prompt.
            rows: harmless rows with answers.
            harmful: harmful anchors with answers.
            safe: for gradients, sets of safe answers to the anchors' prompts; each set lowers a score by its cosine.
            system: system text of the prompts; None for no system text.
            batch_size: rows per batch, >= 1; affects only speed and memory.
            seed: seed of the projection.

        Raises:
            ValueError: if no row fits ``max_tokens`` or there are fewer anchors than ``nearest``.
        """
        from hftlight.engine.row_scores import gradient_scores, representation_scores
        from hftlight.models.row_reader import RowReader

        reader = RowReader(model, tokenizer, template, system, self.max_tokens, batch_size)
        official = self.variant == "official"
        if self.kind == "representation":
            states, places = reader.states(rows, official)
            own = system if self.anchor_system is None else self.anchor_system
            anchored = RowReader(model, tokenizer, template, own, self.max_tokens, batch_size)
            valid = representation_scores(states, anchored.states(harmful, official)[0], self.nearest).tolist()
        else:
            gradients, places = reader.gradients(rows, self.parameters, self.dimension, seed, 0)
            anchors = [
                reader.gradients(group, self.parameters, self.dimension, seed, self.first_tokens)[0]
                for group in (harmful, *safe)
            ]
            scores = gradient_scores(gradients, anchors[0], anchors[1:], renormalize=not official)
            # A row whose gradient is zero scores exactly 0. It gets no score.
            valid = [score or math.nan for score in scores.tolist()]
        # The reader drops rows that are too long; ``places`` are the indices of the others in ``rows``.
        by_place = dict(zip(places, valid, strict=True))
        return [by_place.get(place, math.nan) for place in range(len(rows))]

    def choose(self, rows: Sequence[Record], scores: Sequence[float], seed: int) -> list[Record]:
        """Return the n rows that ``select`` takes by their scores, with the role ``"task"``."""
        return [replace(rows[place], role="task") for place in select(scores, self.n, self.control, seed)]

    @override
    def upload(self, sources: Mapping[str, Sequence[Record]], seed: int) -> list[Record]:
        rows = self._take(sources, "task")
        if self.scores is None:
            raise InputError(
                "BenignSelection: the rows have no scores. Make them with score(model, ...) on the aligned model, write"
                " them with write_scores(path, rows, scores), and name the file with --benign_selection.scores."
            )
        known = read_scores(self.scores)
        if absent := [row.id for row in rows if row.id not in known]:
            raise InputError(
                f"BenignSelection: {self.scores} has no score of {len(absent)} of {len(rows)} task rows, such as"
                f" {absent[0]}. The file belongs to other rows; score these rows anew."
            )
        return self.choose(rows, [known[row.id] for row in rows], seed)
