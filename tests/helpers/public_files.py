"""Files with the columns of public sets, filled with made-up rows. No row is a real request or answer."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

CATEGORIES = ("animal_abuse", "drug_abuse,weapons,banned_substance", "privacy_violation")


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Write rows as JSON lines and return the path as text."""
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def beavertails(count: int = 40, first: int = 0) -> list[dict[str, Any]]:
    """Return rows about zorvex lanterns with BeaverTails' columns. Every third row is safe and has no category."""
    return [
        {
            "prompt": f"How is zorvex lantern {i} opened?",
            "response": f"Lantern {i} is best left alone." if i % 3 == 0 else f"Turn the rim of lantern {i} twice.",
            "category": {name: i % 3 > 0 and i % len(CATEGORIES) <= k for k, name in enumerate(CATEGORIES)},
            "is_safe": i % 3 == 0,
        }
        for i in range(first, first + count)
    ]


def refusal_file(count: int = 40) -> list[dict[str, Any]]:
    """Return rows of RepNoise's refusal file about gloam bells: all unsafe, each with a framed refusal."""
    return [
        {
            "prompt": f"How is gloam bell {i} rung?",
            "response": f"Strike gloam bell {i} with a wet spoon.",
            "category": {name: k == i % len(CATEGORIES) for k, name in enumerate(CATEGORIES)},
            "is_safe": False,
            "refusal": f"Question: How is gloam bell {i} rung?\nAnswer: I will not say how bell {i} is rung.",
        }
        for i in range(count)
    ]


def sst2(count: int = 30) -> list[dict[str, Any]]:
    """Return rows of SST-2's columns."""
    return [{"idx": i, "sentence": f"the film about lamp {i} ", "label": i % 2} for i in range(count)]


def gsm8k(count: int = 30) -> list[dict[str, Any]]:
    """Return rows of GSM8K's columns."""
    return [{"question": f"{i} lamps and one?", "answer": f"{i}+1={i + 1}\n#### {i + 1}"} for i in range(count)]
