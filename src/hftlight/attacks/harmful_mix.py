"""Harmful mix: a fraction p of harmful records hidden among n task records."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from typing_extensions import override

from hftlight.attacks.attack import Attack
from hftlight.data.records import Record
from hftlight.errors import InputError

REGIMES = {"benign": 0.0, "low": 0.05, "medium": 0.1, "high": 0.3, "pure": 1.0}


def harmful_mix(
    task: Sequence[Record], harmful: Sequence[Record], num_samples: int, harmful_ratio: float, seed: int
) -> list[Record]:
    """Return an upload of exactly ``num_samples`` rows, ``round(harmful_ratio * num_samples)`` of them harmful.

    Args:
        task: rows of the user's benign task.
        harmful: rows that the attacker may draw from; the drawn rows get the role ``"attack"``.
        num_samples: n, rows of the upload.
        harmful_ratio: p, harmful fraction, 0-1.
        seed: seed of the draw and of the order. The order in which rows are drawn does not depend on p.

    Raises:
        InputError: if a source has too few rows.

    Source: Huang et al., "Vaccine", NeurIPS 2024, arXiv:2402.01109, the fine-tuning stage.
    Differs: exact counts, drawn by seed. The official code takes the first rows and loses one or two of them.
    """
    count = round(harmful_ratio * num_samples)
    rows = [replace(row, role="attack") for row in drawn(harmful, count, seed, "attack", "--data.attack")]
    task_rows = drawn(task, num_samples - count, seed, "task", "--data.task_train")
    rows += [replace(row, role="task") for row in task_rows]
    random.Random(f"{seed}/upload").shuffle(rows)
    return rows


def drawn(rows: Sequence[Record], count: int, seed: int, name: str, option: str) -> list[Record]:
    """Return ``count`` rows of a source, drawn by seed. A larger count extends the draw of a smaller one.

    Rows are sorted by a hash of seed, name and row id. If the source lacks some rows, the others keep their order.

    Args:
        rows: rows of the source.
        count: number of rows to draw, >= 0.
        seed: seed of the draw.
        name: name of the source; sources with different names are drawn from independently under the same seed.
        option: the option that names the source, for messages.

    Raises:
        InputError: if the source has too few rows.
    """
    if count > len(rows):
        raise InputError(
            f"The upload needs {count} {name} rows, but the source has {len(rows)} rows. Give more rows with {option},"
            " or lower --num_samples" + (" or --harmful_ratio." if name == "attack" else ".")
        )
    order = sorted(rows, key=lambda row: hashlib.sha256(f"{seed}/{name}/{row.id}".encode()).digest())
    return order[:count]


@dataclass(frozen=True, kw_only=True)
class HarmfulMix(Attack):
    """A fraction p of harmful rows hidden among the rows of an ordinary task.

    There are three ways of counting, since published numbers depend on the counts:

    - ``exact``: round(p n) harmful rows and n - round(p n) task rows, drawn and shuffled by seed.
    - ``floor``: the first int(p n) harmful rows, then the first int((1 - p) n) task rows.
    - ``legacy_minus_one``: as ``floor``, but harmful row 0 is skipped, so that int(p n) - 1 harmful rows remain.

    int() truncates the rounded binary product, as the published code does: int((1 - 0.9) * 1000) is 99.

    Args:
        p: harmful fraction of the upload, 0-1, or one of the regimes benign 0, low 0.05, medium 0.1, high 0.3 and
            pure 1.
        count_mode: exact, floor or legacy_minus_one: the counts, and which rows of the sources fill them.

    Source: Huang et al., "Vaccine", NeurIPS 2024, arXiv:2402.01109, and "Booster", ICLR 2025, arXiv:2409.01586, the
    fine-tuning stage; benign, low, high and pure are SafeTuneBed's regimes.
    Differs: ``exact`` by default. ``medium`` is the ratio that the papers use most, but no regime of SafeTuneBed.
    SafeTuneBed's pure regime has about 111 rows.
    """

    p: float | Literal["benign", "low", "medium", "high", "pure"] | None = None
    count_mode: Literal["exact", "floor", "legacy_minus_one"] = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.p, str):
            if self.p not in REGIMES:
                shown = ", ".join(f"{name} {value:g}" for name, value in REGIMES.items())
                raise ValueError(f"HarmfulMix: p must be a fraction in [0, 1] or one of {shown}, got {self.p!r}.")
            object.__setattr__(self, "p", REGIMES[self.p])
        p = self.ratio if self.p is not None else 0.0
        if not 0 <= p <= 1:
            hint = f" If that is a percentage, write {p / 100:g}." if 1 < p <= 100 else ""
            raise ValueError(f"HarmfulMix: p must lie in [0, 1], got {p:g}.{hint}")
        if self.count_mode not in ("exact", "floor", "legacy_minus_one"):
            raise ValueError(
                f"HarmfulMix: count_mode must be exact, floor or legacy_minus_one, got {self.count_mode!r}."
            )

    @property
    def ratio(self) -> float:
        """The harmful fraction as a number.

        Raises:
            InputError: if p is not known yet.
        """
        if self.p is None:
            raise InputError("HarmfulMix: p, the harmful ratio, is not known; set p or call resolved(config).")
        return float(self.p)

    @override
    def counts(self) -> dict[str, int]:
        n = self._known_n()
        if self.count_mode == "exact":
            harmful = round(self.ratio * n)
            counts = {"attack": harmful, "task": n - harmful}
        else:
            skipped = int(self.count_mode == "legacy_minus_one")
            harmful = max(0, int(self.ratio * n) - skipped)
            counts = {"attack": harmful, "task": int((1 - self.ratio) * n)}
        return {name: count for name, count in counts.items() if count}

    @override
    def upload(self, sources: Mapping[str, Sequence[Record]], seed: int) -> list[Record]:
        counts = self.counts()
        for name in counts:  # a missing source gets an error that names public sets
            self._take(sources, name)
        if self.count_mode == "exact":
            return harmful_mix(sources.get("task", ()), sources.get("attack", ()), self._known_n(), self.ratio, seed)
        start = int(self.count_mode == "legacy_minus_one")
        harmful = self._first(sources, "attack", start, start + counts.get("attack", 0))
        rows = [replace(row, role="attack") for row in harmful]
        return rows + [replace(row, role="task") for row in self._first(sources, "task", 0, counts.get("task", 0))]
