"""Facts of a published protocol beside its settings: its code, its judge, its files, and what a run does otherwise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Self

from hftlight.attacks.sources import SOURCES
from hftlight.errors import InputError

TEXT, NUMBER, NOTHING = (str,), (int, float), (type(None),)
VALUE = (*TEXT, *NUMBER, bool)
LIST = (list,)  # of texts
KINDS = {str: "text", int: "number", float: "number", bool: "true or false", type(None): "null", list: "list of texts"}
SET_KEYS = ("columns", "licence", "from")  # what ``set`` supplies in an entry of ``files``


@dataclass(frozen=True)
class Code:
    """The code behind a protocol's numbers.

    Attributes:
        repository: GitHub repository as ``owner/name``.
        commit: commit at which the files were read; None if no commit is known.
        files: files from which the protocol's settings were read.
    """

    repository: str
    commit: str | None
    files: tuple[str, ...]

    @classmethod
    def read(cls, where: str, values: Any) -> Self:
        """Return the code that a protocol's file describes, or raise ``InputError``."""
        check_types(where, values, {"repository": TEXT, "commit": TEXT + NOTHING, "files": LIST})
        return cls(values["repository"], values["commit"], tuple(values["files"]))

    def link(self, file: str = "") -> str:
        """Return the address of a file at the commit, or of the repository."""
        home = f"https://github.com/{self.repository}"
        return f"{home}/blob/{self.commit or 'HEAD'}/{file}" if file else home


@dataclass(frozen=True)
class PublishedJudge:
    """The judge behind a protocol's numbers.

    Attributes:
        published: the judge in the paper's words.
        name: value of ``--evaluation.judge`` for this judge; None if hftlight has no such judge.
        threshold: score above which an answer counts as harmful; None if there is no threshold.
        max_tokens: tokens of question and answer that the judge reads; None if there is no limit.
        columns: columns of the paper's tables that the judge decides.
        rule: how the judge decides, as a sentence without its full stop.
    """

    published: str
    name: str | None
    threshold: float | None
    max_tokens: int | None
    columns: tuple[str, ...]
    rule: str

    @classmethod
    def read(cls, where: str, values: Any) -> Self:
        """Return the judge that a protocol's file describes, or raise ``InputError``."""
        from hftlight.evaluation.judges import get_judge  # only here, since --help reads no protocol

        kinds = {
            "published": TEXT,
            "name": TEXT + NOTHING,
            "threshold": NUMBER + NOTHING,
            "max_tokens": (int, *NOTHING),
        }
        check_types(where, values, {**kinds, "columns": LIST, "rule": TEXT})
        if values["name"] is not None:
            try:
                get_judge(values["name"])
            except InputError as error:
                raise InputError(f"{where}, name: {error}") from error
        return cls(**{**values, "columns": tuple(values["columns"])})

    def asks(self) -> str:
        """Return which judge the protocol asks for, as a sentence without its full stop."""
        limits = [f"threshold {self.threshold:g}"] if self.threshold is not None else []
        limits += [f"the first {self.max_tokens} tokens"] if self.max_tokens is not None else []
        option = f"--evaluation.judge {self.name}" if self.name else "hftlight has no such judge"
        return f"The protocol's judge is {self.published} ({', '.join([option, *limits])})"

    def compared(self, own: str) -> str:
        """Return which published columns a run with another judge cannot be compared with.

        Args:
            own: the run's judge, a value of ``--evaluation.judge``.
        """
        if self.name is not None and (own == self.name or own.startswith(f"{self.name}:")):
            return "This run has the protocol's judge."
        columns = ", ".join(self.columns)
        return f"This run's judge is {own}, so these published columns cannot be compared with its scores: {columns}."


@dataclass(frozen=True)
class NeededFile:
    """A file that the user brings.

    Attributes:
        option: option of the command line that takes the file, such as ``data.alignment``.
        used: rows that the paper used.
        columns: columns of the public file.
        licence: licence of the public file.
        origin: where the public file comes from.
    """

    option: str
    used: str
    columns: tuple[str, ...]
    licence: str
    origin: str

    @classmethod
    def read(cls, where: str, values: Any, options: Sequence[str]) -> Self:
        """Return the file that an entry describes, or raise ``InputError``.

        An entry has the keys ``option`` and ``used``. It also has either ``set``, a name of ``SOURCES``, or the keys
        ``columns``, ``licence`` and ``from``.

        Args:
            where: place of the entry, for messages.
            values: the entry.
            options: options of the command line that take a file.
        """
        named = isinstance(values, Mapping) and "set" in values
        about = {"set": TEXT} if named else dict(zip(SET_KEYS, (LIST, TEXT, TEXT), strict=True))
        check_types(where, values, {"option": TEXT, "used": TEXT, **about})
        for key, known in (("option", options), ("set", tuple(SOURCES))):
            if key in values and values[key] not in known:
                hint = nearest(values[key], known)
                raise InputError(f"{where}: {key} must be one of {', '.join(known)}, got {values[key]!r}.{hint}")
        if named:
            public = SOURCES[values["set"]]
            licence = f"{public.licence}{' (unchecked)' if public.recalled else ''}"
            licence += f"; {public.gate}" if public.gate else ""
            return cls(values["option"], values["used"], public.columns, licence, public.hub)
        return cls(values["option"], values["used"], tuple(values["columns"]), values["licence"], values["from"])


@dataclass(frozen=True)
class Difference:
    """A number that a run has otherwise than the paper.

    Attributes:
        setting: the option of the run, or the setting in words.
        published: the paper's value.
        run: the run's value.
        why: why the run does not have the paper's value, as a sentence without its full stop.
    """

    setting: str
    published: str
    run: str
    why: str

    @classmethod
    def read(cls, where: str, values: Any) -> Self:
        """Return the difference that an entry describes, or raise ``InputError``."""
        check_types(where, values, {"setting": TEXT, "published": VALUE, "run": VALUE, "why": TEXT})
        return cls(**{one.name: shown(values[one.name]) for one in fields(cls)})


def shown(value: Any) -> str:
    """Return a setting's value as text: a list with spaces, a number without needless zeros."""
    if isinstance(value, list):
        return " ".join(map(shown, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {shown(inner)}" for key, inner in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def check_types(where: str, values: Any, kinds: Mapping[str, tuple[type, ...]]) -> None:
    """Refuse a mapping with an unknown or a missing key, or with a value of the wrong type.

    Args:
        where: place of the mapping, for messages.
        values: the mapping.
        kinds: allowed types by key. Every key is required.

    Raises:
        InputError: naming the key.
    """
    check_keys(where, values, tuple(kinds), required=tuple(kinds))
    for key, allowed in kinds.items():
        value = values[key]
        fits = isinstance(value, allowed) and (bool in allowed or not isinstance(value, bool))
        if isinstance(value, list):
            fits = fits and bool(value) and all(isinstance(inner, str) for inner in value)
        if not fits or value == "":
            names = " or ".join(dict.fromkeys(KINDS[kind] for kind in allowed))
            raise InputError(f"{where}: {key} must be a {names}, and not empty, got {value!r}.")


def check_keys(where: str, values: Any, known: tuple[str, ...], required: tuple[str, ...] = ()) -> None:
    """Refuse anything but a mapping with known keys that has the required ones.

    Raises:
        InputError: naming the key, and for an unknown key the nearest known one.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: must be a mapping with the keys {', '.join(known)}, got {values!r}.")
    if unknown := [str(key) for key in values if key not in known]:
        raise InputError(f"{where}: keys are {', '.join(known)}, got {unknown[0]!r}.{nearest(unknown[0], known)}")
    if missing := [key for key in required if key not in values]:
        raise InputError(f"{where}: the key {missing[0]!r} is missing.")


def nearest(word: str, known: Sequence[str]) -> str:
    """Return a hint to the known word that is nearest, or an empty text."""
    near = get_close_matches(word, known, n=1, cutoff=0.4)
    return f" Did you mean {near[0]!r}?" if near else ""
