"""SAFT: drop the rows of an upload that stand out along its leading directions in a model's hidden states."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from hftlight.data.records import Record, split_by_hash
from hftlight.data.table import read_rows
from hftlight.errors import InputError
from hftlight.models.row_filter import StateFilter, Verdict, check_fraction
from hftlight.models.row_reader import Pooling
from hftlight.take import truth

LEAST = 20  # safe rows, and harmful rows, that a choice may rest on
MOST = 100  # rows of a stream of the defender that are read
UNCHECKED = 0.3  # largest rate without trusted rows
BLOCK = 1024  # rows that enter the Gram matrix at one time


@dataclass(frozen=True)
class Directions:
    """Leading directions of a set of hidden states, in float64.

    Attributes:
        center: the mean of the states, or zero, ``[hidden]``.
        vectors: unit vectors, the leading one first, ``[hidden, k]``.
        sigmas: their singular values, ``[k]``.
    """

    center: Tensor
    vectors: Tensor
    sigmas: Tensor


def leading_directions(states: Tensor, k: int = 1, centered: bool = True) -> Directions:
    r"""Return the k leading right singular vectors of Z, from its Gram matrix :math:`Z^T Z = V \Sigma^2 V^T`.

    The rows of Z are the states, minus their mean if ``centered``. The Gram matrix ``[hidden, hidden]`` is summed up
    in float64, block by block.

    Args:
        states: ``[rows, hidden]``.
        k: number of directions, >= 1; at most ``hidden`` are returned.
        centered: subtract the mean first.
    """
    center = states.double().mean(0) if centered else states.new_zeros(states.shape[1], dtype=torch.float64)
    gram = torch.zeros(len(center), len(center), dtype=torch.float64, device=states.device)
    for block in states.split(BLOCK):
        z = block.double() - center
        gram += z.T @ z
    values, vectors = torch.linalg.eigh(gram)
    return Directions(center, vectors[:, -k:].flip(1), values[-k:].flip(0).clamp(min=0).sqrt())


def spectral_scores(states: Tensor, directions: Directions) -> Tensor:
    r"""Return :math:`s_i = \sum_j \sigma_j \langle z_i, v_j \rangle^2 / \sum_j \sigma_j`, in float64 ``[rows]``.

    With one direction this is :math:`\langle z_i, v_1 \rangle^2`.

    Args:
        states: hidden states, ``[rows, hidden]``.
        directions: center, v and sigma.
    """
    projections = (states.double() - directions.center) @ directions.vectors
    total = directions.sigmas.sum()
    if total == 0:
        return projections.new_zeros(len(projections))  # all states are equal
    return projections.square() @ (directions.sigmas / total)


def auroc(high: Tensor, low: Tensor) -> float:
    """Return the probability that an entry of ``high`` exceeds one of ``low``. Equal entries count one half."""
    ordered = low.sort().values
    below = torch.searchsorted(ordered, high) + torch.searchsorted(ordered, high, right=True)
    return float(below.double().mean() / (2 * len(low)))


def best_threshold(harmful: Tensor, safe: Tensor) -> float:
    """Return the score above which the mean of harmful rows dropped and safe rows left is largest.

    Of equally good thresholds, the largest is returned.

    Args:
        harmful: scores of harmful rows.
        safe: scores of safe rows.
    """
    candidates = torch.cat([harmful, safe]).unique()
    dropped = (harmful[None] > candidates[:, None]).double().mean(1)
    left = (safe[None] <= candidates[:, None]).double().mean(1)
    balanced = (dropped + left) / 2
    return float(candidates[balanced >= balanced.max() - 1e-12][-1])


def _some(rows: Sequence[Record]) -> list[Record]:
    return split_by_hash(rows, min(MOST, len(rows)), "saft")[0]


class SAFT(StateFilter):
    r"""Drop the rows of the upload that stand out in hidden states. Layer and threshold are choices of ours.

    Let z_i be the hidden state of row i after a middle layer, at the last token of the response, minus the mean over
    the upload. With the k leading right singular vectors v_j of these states and their singular values :math:`\sigma_j`

    .. math:: s_i = \frac{\sum_j \sigma_j \langle z_i, v_j \rangle^2}{\sum_j \sigma_j}

    Rows with a high score are dropped, and the others train the model as usual. The score has no sign: if most of the
    upload is harmful, the ordinary rows score high. Trusted safe rows decide which side is dropped.

    Args:
        rate: fraction of the upload that is dropped, in [0, 1); 0 turns the filter off. None leaves the number of rows
            to a threshold, which ``validation`` or ``calibrate`` chooses. One of the three is needed.
        layer: decoder layer whose output is read, counted from 1. By default the middle layer. With labelled rows, by
            default the layer of the middle third that tells them apart best.
        k: number of directions, >= 1.
        centered: subtract the mean first. Without this, the leading direction may be the mean itself.
        pooling: ``"last"`` reads the response's last token, ``"end"`` the end token, ``"mean"`` all response tokens.
        trusted: stream of at least 20 safe rows of the defender. A run offers ``"alignment"`` and two parts of it,
            ``"refusals"`` and ``"ordinary"``. At most 100 rows are read, chosen by a hash. With ``"none"``, high scores
            are dropped, and ``rate`` is at most 0.3.
        validation: file of labelled rows with the columns prompt, response and is_safe, at least 20 rows of each kind.
        calibrate: take the trusted rows and at most 100 harmful rows of the defender as labelled rows.
        max_tokens: tokens of a row that are read, >= 1; None reads the whole row. If the run cuts long rows, give its
            limit.

    Raises:
        ValueError: if an argument is out of range or conflicts with another one, or there are too few rows.

    Cost: nothing in training. Before it, one forward pass over the upload and the defender's rows, a float64 matrix
        ``[hidden, hidden]``, and the states of all rows in memory.
    Source: Choi et al., "Safety-Aware Fine-Tuning of Large Language Models", 2024, arXiv:2410.10014. No official
        code is known.
    Differs: the paper's layer and threshold are not known to us. The middle layer, the middle third and the threshold
        of best balanced accuracy are ours. The check of the side that is dropped is ours too. It compares both ends of
        the upload's scores, and drops the end that holds fewer trusted rows. Weights of the k directions are scaled to
        sum to 1, which ranks rows alike.
    """

    files = ("validation",)

    def __init__(
        self,
        rate: float | None = None,
        layer: int | None = None,
        k: int = 1,
        centered: bool = True,
        pooling: Literal["last", "end", "mean"] = "last",
        trusted: str = "alignment",
        validation: str | None = None,
        calibrate: bool = False,
        max_tokens: int | None = None,
    ) -> None:
        if rate is not None:
            check_fraction("SAFT", "rate", rate, below_one=True)
        for name, value in (("layer", layer), ("k", k), ("max_tokens", max_tokens)):
            if not (value is None or (isinstance(value, int) and value >= 1)):
                raise ValueError(f"SAFT: {name} must be a whole number >= 1, got {value}.")
        if pooling not in ("last", "end", "mean"):
            raise ValueError(f"SAFT: pooling must be 'last', 'end' or 'mean', got {pooling!r}.")
        if trusted == "none" and calibrate:
            raise ValueError(
                "SAFT: calibrate needs trusted rows, got trusted='none'. Name a stream such as 'alignment'."
            )
        if trusted in ("task", "harmful", ""):
            raise ValueError(
                f"SAFT: trusted must name a stream of the defender's safe rows, or 'none', got {trusted!r}."
            )
        if calibrate and validation is not None:
            raise ValueError("SAFT: calibrate and validation both give labelled rows; keep one of them.")
        if validation is not None and not Path(validation).expanduser().is_file():
            raise ValueError(f"SAFT: validation must be a file, got {validation!r}: no such file.")
        if trusted == "none" and validation is None and rate is not None and rate > UNCHECKED:
            raise ValueError(
                f"SAFT: without trusted or labelled rows, rate must be at most {UNCHECKED}, got {rate}. In an upload"
                " that is mostly harmful the ordinary rows would be dropped. Name a stream with trusted."
            )
        super().__init__()
        self.rate, self.layer, self.k, self.centered = rate, layer, k, centered
        self.pooling: Pooling = pooling
        self.trusted, self.validation, self.calibrate, self.max_tokens = trusted, validation, calibrate, max_tokens
        self.streams = (*([trusted] if trusted != "none" else []), *(["harmful"] if calibrate else []))

    @property
    @override
    def off(self) -> bool:
        return self.rate == 0

    @override
    def groups(self, records: Mapping[str, Sequence[Record]]) -> dict[str, list[Record]]:
        if self.rate is None and self.validation is None and not self.calibrate:
            raise InputError(
                "SAFT: rate is missing, the fraction of the upload to drop. Give --saft.rate, such as 0.1, or labelled"
                " rows with --saft.validation FILE or --saft.calibrate true."
            )
        if self.rate is not None and self._count(len(records["task"])) == len(records["task"]):
            self._refuse_all(len(records["task"]))
        if self.validation is not None:
            return self._enough(self._labelled(self.validation), f"{self.validation} has")
        rows = {} if self.trusted == "none" else {"safe": _some(records[self.trusted])}
        if self.calibrate:
            return self._enough({**rows, "harmful": _some(records["harmful"])}, "the defender's streams have")
        if rows and len(rows["safe"]) < LEAST:
            if self.rate is not None and self.rate > UNCHECKED:
                raise InputError(
                    f"SAFT: a rate above {UNCHECKED} needs at least {LEAST} trusted rows, but stream {self.trusted!r}"
                    f" has {len(rows['safe'])}. Give more rows, or lower rate."
                )
            return {}  # too few rows to decide by
        return rows

    @override
    def layers(self, count: int) -> list[int]:
        if self.validation is None and not self.calibrate:
            return [max(1, count // 2)]
        first, last = -(-count // 3), 2 * count // 3
        return list(range(first, max(first, last) + 1))

    @override
    def judged(self, states: Mapping[str, Tensor], layers: Sequence[int]) -> Verdict:
        per_layer = [self._scores({name: s[place] for name, s in states.items()}) for place in range(len(layers))]
        if "harmful" not in states:
            return self._by_rate(per_layer[0], layers[0])
        areas = [auroc(scores["harmful"], scores["safe"]) for scores in per_layer]
        best = max(range(len(layers)), key=lambda place: abs(areas[place] - 0.5))
        scores, sign = per_layer[best], 1 if areas[best] >= 0.5 else -1
        threshold = sign * best_threshold(sign * scores["harmful"], sign * scores["safe"])
        facts = {"layer": layers[best], "auroc": max(areas[best], 1 - areas[best])}
        return Verdict(scores["task"], sign, self._count(len(scores["task"])), threshold, facts)

    def _scores(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the scores of each group of rows along the directions of the upload."""
        directions = leading_directions(states["task"], self.k, self.centered)
        return {name: spectral_scores(some, directions) for name, some in states.items()}

    def _by_rate(self, scores: Mapping[str, Tensor], layer: int) -> Verdict:
        """Return the rule that drops the end of the scores with fewer trusted rows."""
        count = self._count(len(scores["task"]))
        if "safe" not in scores or not count:
            return Verdict(scores["task"], 1, count, facts={"layer": layer, "trusted_dropped": None})
        ordered = scores["task"].sort().values
        high = float((scores["safe"] >= ordered[-count]).double().mean())
        low = float((scores["safe"] <= ordered[count - 1]).double().mean())
        facts = {"layer": layer, "trusted_dropped": min(high, low)}
        return Verdict(scores["task"], 1 if high <= low else -1, count, facts=facts)

    def _count(self, rows: int) -> int | None:
        return None if self.rate is None else round(self.rate * rows)

    def _enough(self, rows: dict[str, list[Record]], who: str) -> dict[str, list[Record]]:
        few = {name: len(some) for name, some in rows.items() if len(some) < LEAST}
        if few:
            raise InputError(
                f"SAFT: at least {LEAST} safe and {LEAST} harmful labelled rows are needed, but {who}"
                f" {' and '.join(f'{count} {name}' for name, count in few.items())}. Give more rows."
            )
        return rows

    def _labelled(self, path: str) -> dict[str, list[Record]]:
        """Return the rows of a file by kind.

        Raises:
            InputError: if a row lacks a text or its label.
        """
        rows: dict[str, list[Record]] = {"safe": [], "harmful": []}
        for place, row in read_rows(path):
            prompt, response, safe = row.get("prompt"), row.get("response"), truth(row.get("is_safe"))
            if not (isinstance(prompt, str) and isinstance(response, str) and response) or safe is None:
                raise InputError(
                    f"SAFT: {place} of {path} needs the texts prompt and response, and is_safe with true or false, got"
                    f" the keys {list(row)}."
                )
            rows["safe" if safe else "harmful"].append(Record(prompt, response))
        return rows
