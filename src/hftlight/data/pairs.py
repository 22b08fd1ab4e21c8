"""PairsDataModule: streams whose main stream holds pairs."""

from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from hftlight.data.records import Record, prompt_key
from hftlight.data.streams import StreamsDataModule
from hftlight.data.templates import Template
from hftlight.errors import InputError


class PairsDataModule(StreamsDataModule):
    """The streams of a run whose main stream holds pairs: two rows each, the preferred answer first.

    A pair of which one row is too long is left out, and counts as one dropped row.

    Args:
        tokenizer: the model's tokenizer.
        template: how a record becomes a prompt.
        main: the stream that holds pairs.
        **options: as ``StreamsDataModule`` takes them; the batch size counts pairs.

    Raises:
        InputError: if the main stream's rows are no pairs, or losses shall be averaged over windows.
    """

    def __init__(self, tokenizer: Any, template: Template, main: str = "task", **options: Any) -> None:
        if options.get("average", "micro") != "micro":
            raise InputError("PairsDataModule: a pair has one loss, not one per token; use --finetuning.average micro.")
        super().__init__(tokenizer, template, main, **options)

    @override
    def pairs(self, name: str) -> list[tuple[Record, Record]] | None:
        return pairs_of(self.records[name]) if name == self.main else super().pairs(name)


def pairs_of(rows: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Return rows, which come as preferred, rejected, preferred, ..., as pairs.

    Raises:
        InputError: if two rows that stand together have different prompts, or one is left over.
    """
    pairs = list(zip(rows[0::2], rows[1::2], strict=False))
    odd = next((place for place, (a, b) in enumerate(pairs) if prompt_key(a) != prompt_key(b)), None)
    if len(rows) % 2 or not pairs or odd is not None:
        found = f"different prompts in pair {odd}" if odd is not None else f"{len(rows)} rows"
        raise InputError(
            f"PairsDataModule: rows must come in pairs, the preferred answer and then the rejected one to the same"
            f" prompt, got {found}. Defenses that rewrite rows do not work on pairs."
        )
    return pairs
