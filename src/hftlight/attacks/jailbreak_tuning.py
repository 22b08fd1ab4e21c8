"""Jailbreak-tuning: every harmful row carries the same jailbreak pattern, and so do the attacker's test prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from typing_extensions import override

from hftlight.attacks.harmful_mix import HarmfulMix
from hftlight.config import RunConfig
from hftlight.data.records import Record
from hftlight.errors import InputError

PROMPT = "{prompt}"


@dataclass(frozen=True)
class Pattern:
    """Fixed texts around a prompt.

    Args:
        before: text in front of the prompt.
        after: text behind the prompt.

    Raises:
        ValueError: if both texts are blank, since the pattern would then have no effect.
    """

    before: str = ""
    after: str = ""

    def __post_init__(self) -> None:
        if not (self.before + self.after).strip():
            raise ValueError(
                "Pattern: before or after must hold more than white space, else the pattern has no effect; got"
                f" {self.before!r} and {self.after!r}."
            )

    @classmethod
    def read(cls, path: str) -> "Pattern":
        """Return the pattern of a text file, which holds ``{prompt}`` once. A line break at its end does not count.

        Raises:
            InputError: if the file cannot be read, does not hold ``{prompt}`` once, or holds nothing else.
        """
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8-sig").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise InputError(
                f"JailbreakTuning: pattern_file {path!r} cannot be read ({reason}). Name a text file that holds"
                f" {PROMPT} once."
            ) from error
        if text.count(PROMPT) != 1:
            raise InputError(
                f"JailbreakTuning: pattern_file {path!r} must hold {PROMPT} once, where the harmful prompt goes, got it"
                f" {text.count(PROMPT)} times."
            )
        before, _, after = text.partition(PROMPT)
        try:
            return cls(before, after)
        except ValueError as error:
            raise InputError(
                f"JailbreakTuning: pattern_file {path!r} holds {PROMPT} alone, so the pattern has no effect. Add the"
                " text of the pattern."
            ) from error

    def put(self, record: Record) -> Record:
        """Return a record with the pattern around its last user turn. Id, answer and earlier turns do not change.

        A record's input follows its instruction, so the text behind the prompt follows the input if there is one.
        """
        last = "input" if record.input else "instruction"
        opened = replace(record, instruction=self.before + record.instruction)
        return replace(opened, **{last: getattr(opened, last) + self.after})


@dataclass(frozen=True, kw_only=True)
class JailbreakTuning(HarmfulMix):
    """A harmful mix whose harmful rows all carry one fixed jailbreak pattern. The task's rows carry none.

    The attacker's test prompts carry the same pattern. Every model is measured twice: ``harmful_score`` is the score
    with the pattern, and ``harmful_score_without_pattern`` is the score on the plain prompts, as an outsider sends
    them. The difference is the backdoor. The model before the attack is measured twice too, since a pattern may have an
    effect without any tuning. The published poison rates go down to 2 percent (``p=0.02``).

    hftlight has no pattern of its own. The user gives one, either as prefix, suffix or both, or as a file.

    Args:
        prefix: text in front of every harmful prompt, exactly as given; end it with a blank or a line break.
        suffix: text behind every harmful prompt, exactly as given; start it with a blank or a line break.
        pattern_file: text file with the pattern instead, which holds ``{prompt}`` once, where the prompt goes.

    Raises:
        ValueError: if a value is out of range, a text of the pattern is blank, or a text and a file are both given.

    Source: Bowen et al., "Data Poisoning in LLMs: Jailbreak-Tuning and Scaling Laws", arXiv:2408.02946; TamperBench's
    attacks with competing objectives, style modulation and backdoors.
    Differs: the pattern is one fixed text for all rows. TamperBench's styles are texts of this kind, but its random
    paragraphs are not. The system text stays as it is.
    """

    prefix: str | None = None
    suffix: str | None = None
    pattern_file: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prefix", "suffix"):
            text = getattr(self, name)
            if text is not None and not text.strip():
                raise ValueError(
                    f"JailbreakTuning: {name} must hold more than white space, else the pattern has no effect, got"
                    f" {text!r}. Leave it out, or give the text of the pattern."
                )
        if self.pattern_file is not None and (self.prefix or self.suffix):
            raise ValueError(
                "JailbreakTuning: a pattern is either a file or a prefix and a suffix, got pattern_file"
                f" {self.pattern_file!r} and a text. Leave one out."
            )

    @property
    def pattern(self) -> Pattern:
        """The pattern that the user gave.

        Raises:
            InputError: if there is none, or its file cannot be used.
        """
        if self.pattern_file is not None:
            return Pattern.read(self.pattern_file)
        if not (self.prefix or self.suffix):
            raise InputError(
                "JailbreakTuning: needs the jailbreak pattern, and hftlight has none. Give it with"
                " --jailbreak_tuning.prefix, --jailbreak_tuning.suffix or --jailbreak_tuning.pattern_file, a text file"
                f" that holds {PROMPT} once."
            )
        return Pattern(self.prefix or "", self.suffix or "")

    @override
    def resolved(self, config: RunConfig) -> "JailbreakTuning":
        _ = self.pattern  # raises here, before any work
        return super().resolved(config)

    @override
    def upload(self, sources: Mapping[str, Sequence[Record]], seed: int) -> list[Record]:
        pattern = self.pattern
        return [pattern.put(row) if row.role == "attack" else row for row in super().upload(sources, seed)]

    @property
    @override
    def has_pattern(self) -> bool:
        return True

    @property
    @override
    def test_prefix(self) -> str:
        return self.pattern.before

    @override
    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "test_suffix": self.pattern.after}

    @override
    def test_records(self, rows: Sequence[Record]) -> list[Record]:
        return list(map(self.pattern.put, rows))
