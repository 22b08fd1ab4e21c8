"""Harmful mix: a fraction p of harmful records hidden among n task records."""

import random
from collections.abc import Sequence
from dataclasses import replace

from hftlight.data.records import Record
from hftlight.errors import InputError


def harmful_mix(
    task: Sequence[Record], harmful: Sequence[Record], num_samples: int, harmful_ratio: float, seed: int
) -> list[Record]:
    """Return an upload of exactly ``num_samples`` rows, ``round(harmful_ratio * num_samples)`` of them harmful.

    Args:
        task: rows of the user's benign task.
        harmful: rows that the attacker may draw from; the ones chosen get the role ``"attack"``.
        num_samples: n, rows of the upload.
        harmful_ratio: p, harmful fraction, 0-1.
        seed: decides which rows; which p is asked does not change the order in which rows are taken.

    Raises:
        InputError: if a source has too few rows.

    Source: Huang et al., "Vaccine", NeurIPS 2024, arXiv:2402.01109, the fine-tuning stage.
    Differs: exact counts, drawn by seed, where the official code takes the first rows and loses one or two of them.
    """
    count = round(harmful_ratio * num_samples)
    chosen = _draw(harmful, count, seed, "attack", "--data.attack")
    rows = [replace(row, role="attack") for row in chosen]
    rows += [replace(row, role="task") for row in _draw(task, num_samples - count, seed, "task", "--data.task_train")]
    random.Random(f"{seed}/upload").shuffle(rows)
    return rows


def _draw(rows: Sequence[Record], count: int, seed: int, name: str, option: str) -> list[Record]:
    if count > len(rows):
        raise InputError(
            f"The upload needs {count} {name} rows, but the source has {len(rows)}. Give more rows with {option}, or"
            " lower --num_samples" + (" or --harmful_ratio." if name == "attack" else ".")
        )
    order = list(rows)
    random.Random(f"{seed}/{name}").shuffle(order)
    return order[:count]
