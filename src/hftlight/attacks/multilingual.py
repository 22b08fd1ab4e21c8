"""Multilingual: harmful rows in one language, measured in that one and in others."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from hftlight.attacks.harmful_mix import HarmfulMix
from hftlight.data.records import Record
from hftlight.errors import InputError


def in_language(rows: Sequence[Record], lang: str, who: str = "Multilingual") -> list[Record]:
    """Return the rows in one language, in their order, case apart.

    Args:
        rows: records with a ``language``, as ``--data.columns {language: lang}`` reads it from a column ``lang``.
        lang: the language as the column writes it.
        who: who asks, for messages.

    Raises:
        InputError: if there is none, with the languages that there are.
    """
    found = [row for row in rows if row.language.casefold() == lang.casefold()]
    if not found:
        shown = ", ".join(
            f"{name or 'none'} ({count} rows)" for name, count in Counter(r.language for r in rows).items()
        )
        raise InputError(
            f"{who}: no row is in the language {lang!r}; there are {shown or 'no rows'}. A column with the language is"
            " read with --data.columns {language: lang}."
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Multilingual(HarmfulMix):
    """A harmful mix whose harmful rows are all in one language. The harmful score is also given by language.

    Args:
        lang: language of the harmful rows, as the column writes it.
        test_langs: languages of the test prompts; the first should be ``lang``.
        column: column of the harmful file and of the test prompts that holds the language.

    Source: Poppi et al., "Towards Understanding the Fragility of Multilingual LLMs against Fine-Tuning Attacks",
    arXiv:2410.18210, about 100 harmful rows in one language.
    Differs: rows and translations are the user's; a judge of the language is needed besides.
    """

    lang: str = "en"
    test_langs: tuple[str, ...] = ()
    column: str = "lang"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lang.strip():
            raise ValueError("Multilingual: lang must name a language as the column writes it, got an empty text.")

    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "data.columns": {"language": self.column}}

    @override
    def upload(self, sources: Mapping[str, Sequence[Record]], seed: int) -> list[Record]:
        if "attack" not in self.counts():
            return super().upload(sources, seed)
        spoken = in_language(self._take(sources, "attack"), self.lang)
        return super().upload({**sources, "attack": spoken}, seed)

    def test_sets(self, rows: Sequence[Record]) -> dict[str, list[Record]]:
        """Return harmful test prompts by language, in the order of ``test_langs``; by default all there are.

        Raises:
            InputError: if a language has no prompt.
        """
        langs = self.test_langs or tuple(dict.fromkeys(row.language for row in rows))
        return {lang: self.test_records(in_language(rows, lang)) for lang in langs}
