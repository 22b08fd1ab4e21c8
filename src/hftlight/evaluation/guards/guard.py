"""The interface of a guard, which scores rows of an upload before a model trains on them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hftlight.data.records import Record
from hftlight.errors import InputError, RunError
from hftlight.files import digest

GuardScore = float | None  # None means that the guard is unsure


class Guard:
    """A model that tells how likely a row of an upload is harmful, from the texts of the row alone.

    A guard gets texts and nothing else: no role, no id, and no order of the upload.

    Attributes:
        name: name of the guard, such as ``"minilm"``.
        threshold: probability above which a row counts as harmful, in [0, 1].
        decides: whether the scores are decisions, 0 or 1, so that no other threshold makes sense.
        reads_prompts: whether ``score_prompts`` exists.
        streams: streams of the defender that the guard learns from.
    """

    name: str
    threshold: float = 0.5
    decides: bool = False
    reads_prompts: bool = False
    streams: tuple[str, ...] = ()

    def learn(self, records: Mapping[str, Sequence[Record]]) -> None:
        """Learn from the defender's own rows, once before the first score.

        Args:
            records: rows by stream, which hold at least the guard's streams.
        """

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[GuardScore]:
        """Return the probability in [0, 1] that each response is harmful, None if the guard cannot tell.

        Args:
            prompts: requests without a template.
            responses: the answers, one per prompt.
        """
        raise NotImplementedError(f"{type(self).__name__} is a guard and must implement score().")

    def score_prompts(self, prompts: Sequence[str]) -> list[GuardScore]:
        """Return the probability in [0, 1] that each request is harmful, None if the guard cannot tell."""
        raise NotImplementedError(f"{type(self).__name__} has no score_prompts(), so it cannot score requests.")

    def identity(self) -> dict[str, Any]:
        """Return the facts that determine the scores, except for the rows that the guard learns from.

        Such facts are the hash of a model's files, or the digest of the guard's code.
        """
        return {}

    @property
    def revision(self) -> str:
        """Short hash of what determines the scores."""
        return digest([self.name, self.identity()])[:12]


def scores_of(guard: Guard, prompts: Sequence[str], responses: Sequence[str] | None = None) -> list[GuardScore]:
    """Return a guard's score of each row. The guard sees each different row once, sorted by its text.

    So neither the order nor the number of equal rows changes a score.

    Args:
        guard: the guard.
        prompts: requests without a template.
        responses: the answers, one per prompt; None scores the requests.

    Raises:
        RunError: if the guard returns another number of scores, or a score outside [0, 1].
    """
    rows = list(zip(prompts, responses if responses is not None else [""] * len(prompts), strict=True))
    different = sorted(set(rows))
    if not different:
        return []
    asked = [prompt for prompt, _ in different]
    scores = guard.score_prompts(asked) if responses is None else guard.score(asked, [r for _, r in different])
    if len(scores) != len(different):
        raise RunError(
            f"Guard {guard.name!r}: each row needs one score, got {len(scores)} scores for {len(different)} rows. A row"
            " without a verdict scores None."
        )
    wrong = next((s for s in scores if s is not None and not (math.isfinite(s) and 0 <= s <= 1)), None)
    if wrong is not None:
        raise RunError(
            f"Guard {guard.name!r}: a score is a probability in [0, 1], got {wrong}. A row without a verdict scores"
            " None."
        )
    by_row = dict(zip(different, scores, strict=True))
    return [by_row[row] for row in rows]


def stream_rows(guard: str, records: Mapping[str, Sequence[Record]], name: str) -> Sequence[Record]:
    """Return the rows of a stream that a guard learns from.

    Raises:
        InputError: if the stream is missing or empty.
    """
    if not records.get(name):
        raise InputError(
            f"Guard {guard!r} learns from the stream {name!r}, which is missing or empty; there are {sorted(records)}."
            f" Give rows for {name}, or choose a judge as the guard."
        )
    return records[name]
