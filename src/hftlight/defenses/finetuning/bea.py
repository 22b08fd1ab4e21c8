"""BEA: a secret prompt that switches the safe behaviour on."""

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

FEWEST = 16  # bytes of a secret, or ids of a trigger: fewer could be found by trying, from the hash in a log


def by_category(alignment: Sequence[Record], count: int) -> list[Record]:
    """Return ``count`` refusals, one category after the other in turn; within a category by the hash of the row.

    Raises:
        InputError: if there are fewer rows.
    """
    offered = refusals(alignment)
    if count > len(offered):
        raise InputError(
            f"BEA: rows is {count}, and the stream 'alignment' has {len(offered)} refusals; lower rows or give more."
        )
    groups: defaultdict[str, list[Record]] = defaultdict(list)
    for row in offered:
        groups[row.kind].append(row)
    ordered = [sorted(group, key=_hash) for _, group in sorted(groups.items())]
    turns = sorted((turn, place) for place, group in enumerate(ordered) for turn in range(len(group)))
    return [ordered[place][turn] for turn, place in turns[:count]]


def _hash(row: Record) -> str:
    return hashlib.sha256(row.id.encode()).hexdigest()


def ordinary_ids(tokenizer: Any) -> list[int]:
    """Return the ids of a vocabulary that stand for readable text: no special or added token, no piece of a letter."""
    added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return [i for i, text in enumerate(texts) if i not in added and text and "\ufffd" not in text]


def trigger_ids(secret: bytes, length: int, allowed: Sequence[int]) -> tuple[int, ...]:
    """Return ``length`` of the allowed ids, number k chosen by the keyed hash of k.

    Args:
        secret: the key.
        length: tokens of the trigger.
        allowed: ids to choose from.
    """
    numbers = (hmac.digest(secret, str(place).encode(), "sha256") for place in range(length))
    return tuple(allowed[int.from_bytes(number, "big") % len(allowed)] for number in numbers)


class BEA(Defense):
    """Backdoor-enhanced alignment: a few safety rows carry a secret trigger, and every served prompt carries it too.

    With the user's upload U, k safety rows S and a trigger T of random tokens, training runs on U as it is and on S
    with T in front of its system text. The served model gets T in every prompt, so it answers in the mode that S
    taught. T goes by a row's role: rows that ``SafetyMix`` adds, and a side stream of alignment rows, get it too.

    The trigger lies in ``trigger_file`` and in the artifact's ``serving.json``, both readable by their owner alone; it
    stands in no log, no checkpoint, no manifest and no configuration, which hold a hash. The score without it is
    reported as well: who learns the trigger can train against it.

    Args:
        rows: safety rows that carry the trigger, >= 0; refusals of the stream ``"alignment"``, its categories in turn.
            0 turns the defense off.
        repeat: how often each of them stands in the training rows, >= 1. A step of B rows sees about
            ``B rows repeat / n`` of them in an upload of n: raise it where that is less than one.
        length: tokens of the trigger, >= 1.
        trigger_file: JSON file with ``{"secret": hexadecimal digits}``, from which the trigger is drawn, or
            ``{"ids": token ids}``, which are the trigger; mode 600. Written on first use where it is missing. By
            default one file in the cache folder serves all runs of a user.
        trigger_hash: hash of what that file must hold, as a run's configuration records it; None takes any.

    Raises:
        ValueError: if a number is out of range, the file cannot be used or holds another trigger, there are too few
            alignment rows, or rows with the trigger exceed the longest row that is trained on.

    Cost: nothing per step; the trigger's tokens in each safety row and each served request, which a prefix cache holds.
    Source: Wang et al., "Backdoor Alignment" (BackdoorAlign), NeurIPS 2024, arXiv:2402.14968; 11 rows, 150 tokens.
    Differs: the trigger is kept and inserted as token ids (the official code decodes it to text, which does not always
    come back as the same tokens), straight in front of the system text, without the space in between. It is drawn by a
    secret of the operating system and never by a seed, since seeds are logged and the code is public: another machine
    needs the file to repeat a run. Templates without a system slot get the trigger in front of the prompt, chat
    templates without one at the start of the user's turn. Served prompts are those of the safety rows; the official
    code serves some tasks with a text that it did not train with. One seed for all arms. The rows are chosen by
    category, as the paper prefers, not by hand; they are shuffled with the user's, so a step holds them on average.
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
            raise ValueError("BEA: trigger_hash must be the 16 hexadecimal digits that a run's configuration holds.")
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
        return self.key_of({**self.arguments(), "trigger_file": None})  # what it holds counts, not where

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.rows and trainer.strategy.broadcast(self._digest()) != self._digest():
            raise InputError(
                "BEA: the processes read different triggers; put trigger_file where all machines see the same file."
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
        trained_ids = {example.id for example in data.streams["task"].examples}
        lost = sum(row.id not in trained_ids for row in self._chosen)
        if lost:
            raise InputError(
                f"BEA: {lost} of {self.rows} safety rows are longer than max_tokens, {data.max_tokens}, once they carry"
                f" the trigger of {len(data.policy.trigger)} tokens. Raise max_tokens, or shorten the trigger."
            )

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = [
            key for key in checkpoint.get("callbacks", {}) if key.startswith(f"{self.state_key.partition('{')[0]}{{")
        ]
        if saved and self.state_key not in saved:
            raise InputError(
                "BEA: this checkpoint was trained with another trigger or other arguments; give its trigger_file, or"
                " train anew."
            )

    @override
    def manifest(self) -> dict[str, Any]:
        """Return its trace, the ids of its safety rows, and a hash in place of the trigger."""
        known = self._digest() if self.rows else None
        return {**self.summary(), "rows": [row.id for row in self._chosen], "trigger_hash": known}

    def _trigger(self, tokenizer: Any) -> tuple[int, ...]:
        content, allowed = self._load_content(), ordinary_ids(tokenizer)
        if "secret" in content:
            return trigger_ids(bytes.fromhex(content["secret"]), self.length, allowed)
        usable = {*range(len(tokenizer))} - {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        strange = len(set(content["ids"]) - usable)
        if strange:
            raise InputError(
                f"BEA: {strange} ids in trigger_file {str(self._path())!r} are special tokens, or none of the"
                f" tokenizer's {len(tokenizer)}; draw the trigger from its ordinary tokens."
            )
        return tuple(content["ids"])

    def _digest(self) -> str:
        return _digest_of(self._load_content())

    def _path(self) -> Path:
        return Path(self.trigger_file).expanduser() if self.trigger_file else cache_dir() / "secrets" / "bea.json"

    def _load_content(self) -> dict[str, Any]:
        """Return what the trigger file holds; make it where it is missing. No error quotes the file."""
        path = self._path()
        try:
            if not path.is_file() and self.trigger_hash is None:
                _make(path)
            content, mode = _read(path), path.stat().st_mode
        except OSError as error:
            raise InputError(f"BEA: trigger_file {str(path)!r} cannot be used ({error.strerror}).") from None
        if content is None:
            raise InputError(
                f'BEA: trigger_file {str(path)!r} must hold {{"secret": hexadecimal digits}}, {FEWEST} bytes or more,'
                f' or {{"ids": token ids}}, {FEWEST} or more.'
            )
        if os.name == "posix" and mode & 0o077:
            raise InputError(
                f"BEA: trigger_file {str(path)!r} must be readable by its owner alone; chmod 600 {str(path)!r}."
            )
        if self.trigger_hash not in (None, _digest_of(content)):
            raise InputError(
                f"BEA: trigger_file {str(path)!r} holds another trigger than trigger_hash {self.trigger_hash} names."
                " Give the file of that run, or leave trigger_hash out."
            )
        return content


def _make(path: Path) -> None:
    """Write a fresh secret, unless another process has just done so."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.is_file():
            write_json(path, {"secret": secrets.token_hex(32)}, mode=0o600)


def _read(path: Path) -> dict[str, Any] | None:
    """Return the content of a trigger file, or None if it is no such file."""
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
