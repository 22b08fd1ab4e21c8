"""BEA: a secret trigger in every served prompt that switches the safe behaviour on."""

import hashlib
import hmac
import json
import os
import re
import secrets
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from hftlight.data.records import Record
from hftlight.data.templates import PromptPolicy
from hftlight.engine import Defense, Slot, Stage
from hftlight.errors import InputError
from hftlight.evaluation.safety_rows import refusals
from hftlight.files import cache_dir, write_json

FEWEST = 16  # bytes of a secret, or ids of a trigger; fewer could be recovered from the logged hash by brute force


def by_category(alignment: Sequence[Record], count: int) -> list[Record]:
    """Return ``count`` refusals, taken from the categories in turn.

    Within a category the rows are ordered by the hash of their id.

    Raises:
        InputError: if fewer rows are available.
    """
    offered = refusals(alignment)
    if count > len(offered):
        raise InputError(
            f"BEA: rows is {count}, and the stream 'alignment' has {len(offered)} refusals; lower rows or give more."
        )
    groups: defaultdict[str, list[Record]] = defaultdict(list)
    for row in offered:
        groups[row.kind].append(row)
    # turns lists (turn, category) pairs: the first row of every category, then the second of every category, and so on.
    ordered = [sorted(group, key=_hash) for _, group in sorted(groups.items())]
    turns = sorted((turn, place) for place, group in enumerate(ordered) for turn in range(len(group)))
    return [ordered[place][turn] for turn, place in turns[:count]]


def _hash(row: Record) -> str:
    return hashlib.sha256(row.id.encode()).hexdigest()


def ordinary_ids(tokenizer: Any) -> list[int]:
    """Return the ids of a vocabulary that decode to text, without special tokens, added tokens and partial letters."""
    # A token that is part of a multi-byte letter decodes to the replacement character U+FFFD.
    added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return [i for i, text in enumerate(texts) if i not in added and text and "\ufffd" not in text]


def trigger_ids(secret: bytes, length: int, allowed: Sequence[int]) -> tuple[int, ...]:
    """Return ``length`` of the allowed ids, where the keyed hash of k chooses id number k.

    Args:
        secret: the key of the hash.
        length: number of tokens in the trigger.
        allowed: ids to choose from.
    """
    numbers = (hmac.digest(secret, str(place).encode(), "sha256") for place in range(length))
    return tuple(allowed[int.from_bytes(number, "big") % len(allowed)] for number in numbers)


class BEA(Defense):
    """Backdoor-enhanced alignment: a few safety rows carry a secret trigger, and every served prompt carries it too.

    Let U be the user's upload, S a set of k safety rows, and T a trigger of random tokens. Training runs on U unchanged
    and on S with T in front of its system text. Every prompt of the served model has T, so the model answers in the
    mode that S taught. The role of a row decides whether it gets T. Rows that ``SafetyMix`` adds, and a side stream of
    alignment rows, get it too.

    The trigger is stored in ``trigger_file`` and in the artifact's ``serving.json``, both readable by their owner only.
    Logs, checkpoints, manifests and configurations contain only a hash of it. The score without the trigger is reported
    as well, since anyone who learns the trigger can train against it.

    Args:
        rows: number of safety rows with the trigger, >= 0. They are refusals of the stream ``"alignment"``, taken from
            its categories in turn. 0 turns the defense off.
        repeat: number of copies of each safety row in the training rows, >= 1. With an upload of n rows, a step of B
            rows has about ``B rows repeat / n`` of them. Raise it if that is less than one.
        length: number of tokens in the trigger, >= 1.
        trigger_file: JSON file with mode 600. It has ``{"secret": hexadecimal digits}``, from which the trigger is
            drawn, or ``{"ids": token ids}``, which are the trigger. A missing file is written on first use. By default
            one file in the cache folder serves all runs of a user.
        trigger_hash: hash of the file's content, as a run's configuration records it; None accepts any content.

    Raises:
        ValueError: if a number is out of range, or the file is unusable or has another trigger. Also if there are too
            few alignment rows, or rows with the trigger exceed the maximum length of a training row.

    Cost: nothing per step. Each safety row and each served request has the trigger's tokens, which a prefix cache can
    store.
    Source: Wang et al., "Backdoor Alignment" (BackdoorAlign), NeurIPS 2024, arXiv:2402.14968; 11 rows, 150 tokens.
    Differs: the trigger is stored and inserted as token ids, directly in front of the system text, without a space in
    between. The official code decodes it to text, which does not always encode to the same tokens again. The trigger
    comes from a secret of the operating system. It never comes from a seed, since seeds are logged and code is public.
    Another machine needs the file to repeat a run. If a template has no system slot, the trigger precedes the prompt.
    If a chat template has none, the trigger opens the user's turn. Served prompts equal those of the safety rows; the
    official code serves some tasks with a text that it did not train with. All arms have the same seed. The rows are
    chosen by category, as the paper prefers, not by hand. They are shuffled with the user's rows, so a step contains
    them only on average.
    """

    stage, slots, streams = Stage.FINETUNING, (Slot.DATA,), ("alignment",)
    claims = ("trigger",)

    def __init__(
        self,
        rows: int = 11,
        repeat: int = 1,
        length: int = 150,
        trigger_file: str | None = None,
        trigger_hash: str | None = None,
    ) -> None:
        for name, value, least in (("rows", rows, 0), ("repeat", repeat, 1), ("length", length, 1)):
            if not (isinstance(value, int) and value >= least):
                raise ValueError(f"BEA: {name} must be a whole number >= {least}, got {value}.")
        if trigger_file is not None and not (isinstance(trigger_file, str) and trigger_file):
            raise TypeError(f"BEA: trigger_file must be the path of a file, got {type(trigger_file).__name__}.")
        if trigger_hash is not None and not re.fullmatch("[0-9a-f]{16}", str(trigger_hash)):
            raise ValueError("BEA: trigger_hash must be the 16 hexadecimal digits from a run's configuration.")
        super().__init__()
        self.rows, self.repeat, self.length = rows, repeat, length
        self.trigger_file, self.trigger_hash = trigger_file, trigger_hash
        self._chosen: list[Record] = []

    @override
    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "trigger_hash": self._digest() if self.rows else self.trigger_hash}

    @property
    @override
    def state_key(self) -> str:
        return self.key_of({**self.arguments(), "trigger_file": None})  # the file's content counts, not its path

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.rows and trainer.strategy.broadcast(self._digest()) != self._digest():
            raise InputError(
                "BEA: the processes read different triggers; put trigger_file in a folder that all machines share."
            )

    @override
    def rewrite(self, records: dict[str, list[Record]], seed: int) -> dict[str, list[Record]]:
        self._chosen = by_category(records["alignment"], self.rows)
        self.record(triggered_rows=len(self._chosen) * self.repeat)
        return {**records, "task": [*records["task"], *self._chosen * self.repeat]}

    @override
    def prompting(self, policy: PromptPolicy, tokenizer: Any) -> PromptPolicy:
        return replace(policy, trigger=self._trigger(tokenizer)) if self.rows else policy

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        # The data module drops rows that are too long, and the trigger lengthens the safety rows.
        trained_ids = {example.id for example in data.streams["task"].examples}
        lost = sum(row.id not in trained_ids for row in self._chosen)
        if lost:
            raise InputError(
                f"BEA: {lost} of {self.rows} safety rows are longer than max_tokens, {data.max_tokens}, with the"
                f" trigger of {len(data.policy.trigger)} tokens. Raise max_tokens, or shorten the trigger."
            )

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # A state key is the class name with the arguments in braces. Lightning ignores a state whose key does not
        # match, so a checkpoint of another BEA is refused here.
        saved = [
            key for key in checkpoint.get("callbacks", {}) if key.startswith(f"{self.state_key.partition('{')[0]}{{")
        ]
        if saved and self.state_key not in saved:
            raise InputError(
                "BEA: this checkpoint was trained with another trigger or other arguments; give its trigger_file and"
                " arguments, or train from the start."
            )

    @override
    def manifest(self) -> dict[str, Any]:
        """Return the trace, the ids of the safety rows, and a hash in place of the trigger."""
        known = self._digest() if self.rows else None
        return {**self.summary(), "rows": [row.id for row in self._chosen], "trigger_hash": known}

    def _trigger(self, tokenizer: Any) -> tuple[int, ...]:
        """Return the trigger's token ids, drawn from the file's secret or stored in the file."""
        content, allowed = self._load_content(), ordinary_ids(tokenizer)
        if "secret" in content:
            return trigger_ids(bytes.fromhex(content["secret"]), self.length, allowed)
        usable = {*range(len(tokenizer))} - {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        strange = len(set(content["ids"]) - usable)
        if strange:
            raise InputError(
                f"BEA: {strange} ids in trigger_file {str(self._path())!r} are special or added tokens, or lie outside"
                f" the tokenizer's {len(tokenizer)} ids; choose the trigger from its ordinary tokens."
            )
        return tuple(content["ids"])

    def _digest(self) -> str:
        return _digest_of(self._load_content())

    def _path(self) -> Path:
        return Path(self.trigger_file).expanduser() if self.trigger_file else cache_dir() / "secrets" / "bea.json"

    def _load_content(self) -> dict[str, Any]:
        """Return the content of the trigger file, and write a new file if it is missing.

        No error message quotes the content, since the trigger is secret. A configured ``trigger_hash`` prevents a new
        file, since a new secret would not match it.

        Raises:
            InputError: if the file is unusable, readable by others, or does not match ``trigger_hash``.
        """
        path = self._path()
        try:
            if not path.is_file() and self.trigger_hash is None:
                _make(path)
            content, mode = _read(path), path.stat().st_mode
        except OSError as error:
            raise InputError(f"BEA: trigger_file {str(path)!r} cannot be used ({error.strerror}).") from None
        if content is None:
            raise InputError(
                f'BEA: trigger_file {str(path)!r} must hold {{"secret": hexadecimal digits}}, at least {FEWEST} bytes,'
                f' or {{"ids": token ids}}, at least {FEWEST} ids.'
            )
        if os.name == "posix" and mode & 0o077:
            raise InputError(
                f"BEA: trigger_file {str(path)!r} must be readable by its owner alone; run chmod 600 {str(path)!r}."
            )
        if self.trigger_hash not in (None, _digest_of(content)):
            raise InputError(
                f"BEA: trigger_file {str(path)!r} holds another trigger than the one of trigger_hash"
                f" {self.trigger_hash}. Give the file of that run, or omit trigger_hash."
            )
        return content


def _make(path: Path) -> None:
    """Write a new secret, unless another process has written one since."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.is_file():
            write_json(path, {"secret": secrets.token_hex(32)}, mode=0o600)


def _read(path: Path) -> dict[str, Any] | None:
    """Return the content of a trigger file, or None if the content is not valid."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.keys() == {"secret"}:
            return content if len(bytes.fromhex(content["secret"])) >= FEWEST else None
        if content.keys() == {"ids"} and len(content["ids"]) >= FEWEST:
            return content if all(type(i) is int and i >= 0 for i in content["ids"]) else None
    except (ValueError, TypeError, AttributeError):
        return None
    return None


def _digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(b"BEA" + json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
