"""Multilingual: harmful rows in one language, with test prompts in this language and in others."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from hftlight.attacks.harmful_mix import HarmfulMix
from hftlight.data.records import Record
from hftlight.errors import InputError

SHOWN = 10  # languages that a message lists, those of the most rows


def in_language(rows: Sequence[Record], lang: str, who: str = "Multilingual") -> list[Record]:
    """Return the rows in one language, in their order. Upper and lower case do not matter.

    Args:
        rows: records with a ``language``, as ``--data.columns {language: lang}`` reads it from a column ``lang``.
        lang: the language as the column writes it.
        who: name of the caller, for messages.

    Raises:
        InputError: if no row is in the language. The message lists the languages of the rows.
    """
    spoken = [row for row in rows if row.language.casefold() == lang.casefold()]
    if not spoken:
        counts = Counter(row.language for row in rows)
        shown = ", ".join(f"{name or 'none'} ({count} rows)" for name, count in counts.most_common(SHOWN))
        shown += f" and {len(counts) - SHOWN} more" if len(counts) > SHOWN else ""
        raise InputError(
            f"{who}: no row is in the language {lang!r}; there are {shown or 'no rows'}. Name the column that holds the"
            " language with --data.columns, such as {language: lang}."
        )
    return spoken


@dataclass(frozen=True, kw_only=True)
class Multilingual(HarmfulMix):
    """A harmful mix whose harmful rows are all in one language. The harmful score is also reported per language.

    Args:
        lang: language of the harmful rows, as the column writes it.
        test_langs: languages of the test prompts; the first should be ``lang``. Empty means all languages of the test
            prompts.
        column: column of the harmful file and of the test prompts that holds the language.

    Source: Poppi et al., "Towards Understanding the Fragility of Multilingual LLMs against Fine-Tuning Attacks",
    arXiv:2410.18210, about 100 harmful rows in one language.
    Differs: the user supplies rows and translations, and also a judge that can read the language.
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
        """Return harmful test prompts by language, in the order of ``test_langs``.

        Without ``test_langs``, all languages of the prompts count, in the order in which they appear.

        Raises:
            InputError: if a language has no prompt.
        """
        langs = self.test_langs or tuple(dict.fromkeys(row.language for row in rows))
        return {lang: self.test_records(in_language(rows, lang)) for lang in langs}
