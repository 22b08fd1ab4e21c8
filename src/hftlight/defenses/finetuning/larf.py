"""LARF: drop the rows of an upload whose hidden states lie nearer to unsafe answers than to safe ones."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from hftlight.data.records import Record, prompt_key
from hftlight.data.streams import as_pairs
from hftlight.errors import InputError
from hftlight.models.row_filter import StateFilter, Verdict
from hftlight.models.row_reader import Pooling


def paired_scores(states: Tensor, unsafe: Tensor, safe: Tensor, top: int = 100) -> Tensor:
    r"""Return :math:`s_i = \frac1t \sum_{j \in T_i} [\cos(z_i, u_j) - \cos(z_i, a_j)]`, in float64 ``[rows]``.

    T_i holds the t pairs with the largest differences. With as many pairs as t, the score is the difference of two mean
    cosines, and the pairing has no effect.

    Args:
        states: hidden states z of the upload, ``[rows, hidden]``.
        unsafe: hidden states u of the unsafe anchors, ``[pairs, hidden]``.
        safe: hidden states a of the safe anchors, in the order of their pairs.
        top: t, >= 1; at most the number of pairs.
    """
    z, u, a = (F.normalize(s.double(), dim=1) for s in (states, unsafe, safe))
    differences = z @ (u - a).T
    return differences.topk(min(top, len(u)), dim=1).values.mean(1)


def paired(unsafe: Sequence[Record], safe: Sequence[Record], count: int) -> tuple[list[Record], list[Record], int]:
    """Return up to ``count`` unsafe and as many safe rows, pair by pair, and how many pairs have one prompt.

    Rows of one prompt are paired first. The remaining rows are paired in the order of a hash of their prompts, so that
    the order of the rows has no effect.
    """
    ours, theirs = _hashed(unsafe), _hashed(safe)
    waiting: dict[str, list[Record]] = {}
    for row in theirs:
        waiting.setdefault(prompt_key(row), []).append(row)
    # Each unsafe row takes the first safe row of its prompt that no other row has taken.
    shared = [(row, waiting[prompt_key(row)].pop(0)) for row in ours if waiting.get(prompt_key(row))][:count]
    taken = {id(row) for pair in shared for row in pair}
    left, right = ([row for row in rows if id(row) not in taken] for rows in (ours, theirs))
    pairs = [*shared, *zip(left, right, strict=False)][:count]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs], len(shared)


def _hashed(rows: Sequence[Record]) -> list[Record]:
    return sorted(rows, key=lambda r: (hashlib.sha256(f"larf/{prompt_key(r)}".encode()).hexdigest(), r.id))


class LARF(StateFilter):
    r"""Drop the rows of the upload that resemble unsafe answers more than safe ones, in one layer's hidden states.

    Let z_i be the hidden state of row i after the layer, at the last token of the response. Unsafe anchors u_j and safe
    anchors a_j are read in the same way and form pairs. With the t pairs T_i of largest difference

    .. math:: s_i = \frac1t \sum_{j \in T_i} [\cos(z_i, u_j) - \cos(z_i, a_j)]

    The rows with the highest scores are dropped, and the others train the model as usual.

    Args:
        remove: what is dropped: a fraction of the upload below 1, or a whole number of rows; 0 turns the filter off.
        layer: decoder layer whose output is read, counted from 1. By default 10/32 of the model's depth.
        anchors: largest number of pairs, >= 1.
        top: t, largest number of pairs that a score averages over, >= 1.
        source: where the anchors come from. ``"streams"`` pairs ``harmful`` rows with rows of ``safe``, by prompt where
            they share prompts. ``"pairs"`` takes the stream ``pairs``, whose answers share their prompts.
        safe: stream of the safe anchors for ``"streams"``. A run offers ``"refusals"``, the alignment rows that refuse,
            and ``"alignment"``.
        pooling: ``"last"`` reads the response's last token, ``"end"`` the end token, ``"mean"`` all response tokens.
        max_tokens: tokens of a row that are read, >= 1; None reads the whole row. If the run cuts long rows, give its
            limit.

    Raises:
        ValueError: if an argument is out of range, or there are no anchors.

    Cost: nothing in training. Before it, one forward pass over the upload and the anchors, and the states of all rows
        in memory.
    Source: Li et al., "Layer-Aware Representation Filtering" (LARF), 2025, arXiv:2507.18631, and its official code.
    Differs: the official code subtracts the columns of two matrices of anchors in the order of their files, so the
        pairing is an accident of the files. Here rows of one prompt form pairs, then the others by a hash. With at most
        ``top`` pairs, as published, the pairing has no effect. The search for the layer by scaling layers is not done.
        A fraction of the upload is an addition.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"remove": 1000, "layer": 10},
        "repo": {"remove": 1000, "layer": 14},
    }

    def __init__(
        self,
        remove: float = 0.1,
        layer: int | None = None,
        anchors: int = 100,
        top: int = 100,
        source: Literal["streams", "pairs"] = "streams",
        safe: str = "refusals",
        pooling: Literal["last", "end", "mean"] = "last",
        max_tokens: int | None = None,
    ) -> None:
        if not (0 <= remove < 1 or (remove >= 1 and remove % 1 == 0)):
            raise ValueError(
                f"LARF: remove must be a fraction in [0, 1) or a whole number of rows >= 1, got {remove}. A fraction of"
                " 10 % is 0.1."
            )
        for name, value in (("layer", layer), ("anchors", anchors), ("top", top), ("max_tokens", max_tokens)):
            optional = name in ("layer", "max_tokens")
            if not ((optional and value is None) or (isinstance(value, int) and value >= 1)):
                raise ValueError(f"LARF: {name} must be a whole number >= 1, got {value}.")
        if source not in ("streams", "pairs"):
            raise ValueError(f"LARF: source must be 'streams' or 'pairs', got {source!r}.")
        if safe in ("task", "harmful", "pairs", ""):
            raise ValueError(f"LARF: safe must name a stream of the defender's safe rows, got {safe!r}.")
        if pooling not in ("last", "end", "mean"):
            raise ValueError(f"LARF: pooling must be 'last', 'end' or 'mean', got {pooling!r}.")
        super().__init__()
        self.remove, self.layer, self.anchors, self.top = remove, layer, anchors, top
        self.source, self.safe, self.max_tokens = source, safe, max_tokens
        self.pooling: Pooling = pooling
        self.streams = ("harmful", safe) if source == "streams" else ("pairs",)
        self._shared = 0

    @property
    @override
    def off(self) -> bool:
        return self.remove == 0

    @override
    def groups(self, records: Mapping[str, Sequence[Record]]) -> dict[str, list[Record]]:
        count = len(records["task"])
        if self._count(count) >= count:
            self._refuse_all(count)
        if self.source == "pairs":
            both = as_pairs(records["pairs"])
            unsafe, safe = [pair[1] for pair in both], [pair[0] for pair in both]
        else:
            unsafe, safe = list(records["harmful"]), list(records[self.safe])
        if not (unsafe and safe):
            raise InputError(
                f"LARF: there are no anchors; the stream 'harmful' has {len(unsafe)} rows and {self.safe!r} has"
                f" {len(safe)}. Give rows of both kinds."
            )
        unsafe, safe, self._shared = paired(unsafe, safe, self.anchors)
        return {"unsafe": unsafe, "safe": safe}

    @override
    def layers(self, count: int) -> list[int]:
        return [max(1, round(count * 10 / 32))]

    @override
    def judged(self, states: Mapping[str, Tensor], layers: Sequence[int]) -> Verdict:
        scores = paired_scores(states["task"][0], states["unsafe"][0], states["safe"][0], self.top)
        facts = {"layer": layers[0], "pairs": states["unsafe"].shape[1], "shared_prompts": self._shared}
        return Verdict(scores, 1, self._count(len(scores)), facts=facts)

    def _count(self, rows: int) -> int:
        return int(self.remove) if self.remove >= 1 else round(self.remove * rows)
