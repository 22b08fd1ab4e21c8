"""Export of answers to AlpacaEval, whose annotator compares the answers of two models."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hftlight.errors import InputError
from hftlight.files import write_json


def export_alpaca_eval(generations: Sequence[Mapping[str, Any]], path: str | Path, generator: str) -> None:
    """Write answers as the JSON array that ``alpaca_eval --model_outputs`` reads.

    Each row holds ``instruction``, ``output``, ``generator`` and, if it is known, ``dataset``. AlpacaEval pairs the
    rows of two models by their instructions. The instructions must therefore be those of the set, without template.
    AlpacaEval 2's length-controlled win rate is another metric than the win rate of the retired 2023 annotator.

    Args:
        generations: rows of a run's ``generations.jsonl`` with ``prompt`` and ``response``. ``dataset`` or ``kind``
            names the part of AlpacaEval, if any.
        path: the output file. An existing file is replaced.
        generator: the model's name in AlpacaEval's tables.

    Raises:
        InputError: if there is no row, a row lacks a text, two rows have the same instruction, or the name is empty.
    """
    if not generator.strip():
        raise InputError("export_alpaca_eval: generator names the model in AlpacaEval's tables and must not be empty.")
    if not generations:
        raise InputError("export_alpaca_eval: at least one answer is needed, got none.")
    rows, seen = [], dict[str, int]()  # instruction -> number of its row
    for number, row in enumerate(generations, start=1):
        prompt, response = row.get("prompt"), row.get("response")
        if not isinstance(prompt, str) or not prompt or not isinstance(response, str):
            raise InputError(
                f"export_alpaca_eval: row {number} needs the texts prompt and response, got {prompt!r:.60} and"
                f" {response!r:.60}. Pass rows of generations.jsonl."
            )
        if prompt in seen:
            raise InputError(
                f"export_alpaca_eval: each instruction may occur once, but rows {seen[prompt]} and {number} have"
                f" the same ({prompt!r:.60}). Pass the rows of one arm, stage and set."
            )
        seen[prompt] = number
        part = row.get("dataset") or row.get("kind")
        start = {"dataset": str(part)} if part else {}
        rows.append({**start, "instruction": prompt, "output": response, "generator": generator})
    target = Path(path).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, rows)
