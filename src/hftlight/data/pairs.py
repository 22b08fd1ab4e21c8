"""PairsDataModule: streams whose main stream holds pairs."""

from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from hftlight.data.records import Record, prompt_key
from hftlight.data.streams import StreamsDataModule
from hftlight.data.templates import Template
from hftlight.errors import InputError


class PairsDataModule(StreamsDataModule):
    """Data module whose main stream holds pairs: two rows each, the preferred answer first.

    If one row of a pair is too long, the pair is left out and counts as one dropped row.

    Args:
        tokenizer: the model's tokenizer.
        template: how a record becomes a prompt.
        main: the stream that holds pairs.
        **options: further arguments of ``StreamsDataModule``; the batch size counts pairs.

    Raises:
        InputError: if the main stream's rows are no pairs, or ``average`` is not ``"micro"``.
    """

    def __init__(self, tokenizer: Any, template: Template, main: str = "task", **options: Any) -> None:
        if options.get("average", "micro") != "micro":
            raise InputError("PairsDataModule: a pair has one loss, not one per token; use --finetuning.average micro.")
        super().__init__(tokenizer, template, main, **options)

    @override
    def pairs(self, name: str) -> list[tuple[Record, Record]] | None:
        return pairs_of(self.records[name]) if name == self.main else super().pairs(name)


def pairs_of(rows: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Group rows in the order preferred, rejected, preferred, ... into pairs.

    Raises:
        InputError: if the two rows of a pair have different prompts, or the number of rows is odd or 0.
    """
    pairs = list(zip(rows[0::2], rows[1::2], strict=False))
    odd = next((place for place, (a, b) in enumerate(pairs) if prompt_key(a) != prompt_key(b)), None)
    if len(rows) % 2 or not pairs or odd is not None:
        found = f"different prompts in pair {odd}" if odd is not None else f"{len(rows)} rows"
        raise InputError(
            f"PairsDataModule: rows must come in pairs, the preferred and then the rejected answer to the same prompt,"
            f" got {found}. Defenses that rewrite rows do not work on pairs."
        )
    return pairs
