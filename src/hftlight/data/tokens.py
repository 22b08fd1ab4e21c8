"""Tokenization of prompt and response separately, so that labels cover exactly the response."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hftlight.data.records import Record
from hftlight.data.templates import PromptPolicy, SystemSlot, Template
from hftlight.errors import InputError

IGNORED = -100
REMEMBERED_TOKENS = 2_000_000  # of all encodings that are remembered; some 80 MB
LongRows = Literal["drop", "truncate", "refuse"]


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded record.

    Attributes:
        id: the record's id.
        role: the record's role.
        input_ids: prompt, response and end of sequence, as token ids.
        prompt_length: number of tokens at the start that belong to the prompt.
        trigger_length: number of prompt tokens that belong to the trigger.
        cut: whether the row was too long and its end, with the end of sequence, was cut off.
        rejected: if this is the preferred row of a pair, the row with the rejected answer to the same prompt; else
            None.
    """

    id: str
    role: str
    input_ids: list[int]
    prompt_length: int
    trigger_length: int = 0
    cut: bool = False
    rejected: "Example | None" = None


_encodings: OrderedDict[Any, Sequence[Example]] = OrderedDict()


def encode_prompt(
    record: Record, template: Template, tokenizer: Any, system: str | SystemSlot | None = None
) -> list[int]:
    """Return the token ids before the response, the same in training and generation.

    The ids have one beginning-of-sequence token if the tokenizer adds it or the template writes it, else none. A
    trigger stands where the system text begins. The texts before and after the trigger are tokenized separately.
    """
    slot = system if isinstance(system, SystemSlot) else SystemSlot(system)
    return _prompt_ids([record], template, tokenizer, [slot])[0]


def encode(
    record: Record,
    template: Template,
    tokenizer: Any,
    max_tokens: int,
    system: str | PromptPolicy | None = None,
    long_rows: LongRows = "drop",
) -> Example | None:
    """Return the encoded record, or None if it is too long.

    Arguments and errors are as for ``encode_all``.
    """
    example = _encode_whole([record], template, tokenizer, system)[0]
    return _limited([example], max_tokens, long_rows, "data")[0]


def encode_all(
    records: Sequence[Record],
    template: Template,
    tokenizer: Any,
    max_tokens: int,
    system: str | PromptPolicy | None = None,
    name: str = "data",
    long_rows: LongRows = "drop",
) -> tuple[list[Example], int]:
    """Return the encoded records that fit, in order, and how many were left out as too long.

    A cut record teaches an answer without its end. A record whose prompt alone fills the limit teaches nothing, so it
    is left out even if rows are cut.

    Args:
        records: rows with responses.
        template: how a record becomes a prompt.
        tokenizer: the model's tokenizer.
        max_tokens: longest row in tokens, prompt, response and end together.
        system: system text of every prompt, None for no system text, or the policy that sets the system slot of each
            row.
        name: the stream's name, for messages.
        long_rows: ``"drop"`` leaves longer rows out, ``"truncate"`` cuts their end off, ``"refuse"`` raises.

    Raises:
        InputError: if there are no records, no record fits, ``"refuse"`` meets a longer row, or a record has no
            response. Also if the tokenizer has no end-of-sequence token, or ``long_rows`` has no allowed value.
    """
    if not records:
        raise InputError(f"Stream {name!r}: at least one row is needed, got none.")
    whole = _encode_whole(records, template, tokenizer, system)
    fitting = [example for example in _limited(whole, max_tokens, long_rows, name) if example is not None]
    if not fitting:
        shortest = min(len(example.input_ids) for example in whole)
        raise InputError(
            f"Stream {name!r}: rows may have at most {max_tokens} tokens (prompt, response and end),"
            f" but the shortest of {len(whole)} has {shortest}. Raise max_tokens to {shortest} or more."
        )
    return fitting, len(whole) - len(fitting)


def _limited(whole: Sequence[Example], max_tokens: int, long_rows: LongRows, name: str) -> list[Example | None]:
    """Return each row, cut if it must be, or None for a row that is left out."""
    if long_rows not in get_args(LongRows):
        raise InputError(f"--long_rows must be one of {', '.join(get_args(LongRows))}, got {long_rows!r}.")
    long = [example for example in whole if len(example.input_ids) > max_tokens]
    if long and long_rows == "refuse":
        longest = max(len(example.input_ids) for example in long)
        raise InputError(
            f"Stream {name!r}: --long_rows refuse allows no row over the limit, but {len(long)} of {len(whole)} rows"
            f" have more than {max_tokens} tokens, first row {long[0].id}. Raise --max_tokens to {longest}, or choose"
            " --long_rows drop or truncate."
        )
    return [
        example if len(example.input_ids) <= max_tokens else _cut(example, max_tokens, long_rows) for example in whole
    ]


def _cut(example: Example, max_tokens: int, long_rows: LongRows) -> Example | None:
    if long_rows == "drop" or example.prompt_length >= max_tokens:
        return None
    return replace(example, input_ids=example.input_ids[:max_tokens], cut=True)


def encode_pairs(
    pairs: Sequence[tuple[Record, Record]],
    template: Template,
    tokenizer: Any,
    max_tokens: int,
    system: str | PromptPolicy | None = None,
    name: str = "pairs",
    long_rows: LongRows = "drop",
) -> tuple[list[Example], int]:
    """Return the encoded pairs whose rows both fit, in order, and how many pairs were left out.

    Args:
        pairs: (preferred row, rejected row), both with the same prompt.
        template: as for ``encode_all``.
        tokenizer: as for ``encode_all``.
        max_tokens: as for ``encode_all``, for each row by itself.
        system: as for ``encode_all``.
        name: the stream's name, for messages.
        long_rows: as for ``encode_all``.

    Raises:
        InputError: if there are no pairs, no pair fits, or ``"refuse"`` meets a longer row.
    """
    whole = [_encode_whole([pair[k] for pair in pairs], template, tokenizer, system) for k in (0, 1)]
    preferred, rejected = (_limited(rows, max_tokens, long_rows, name) for rows in whole)
    # A pair is left out if either of its rows is too long.
    fitting = [
        replace(first, rejected=second) for first, second in zip(preferred, rejected, strict=True) if first and second
    ]
    if not fitting:
        raise InputError(f"Stream {name!r}: no pair of {len(pairs)} fits {max_tokens} tokens. Raise max_tokens.")
    return fitting, len(pairs) - len(fitting)


def single_rows(examples: Iterable[Example]) -> list[Example]:
    """Return examples as single rows: each pair gives its preferred row, then its rejected row."""
    return [row for example in examples for row in (example, example.rejected) if row is not None]


def padding_id(tokenizer: Any) -> int:
    """Return the token id that pads short rows: the pad token, or the end token if there is no pad token.

    The id may also occur inside a row, so only the attention mask marks padding.
    """
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else _end_id(tokenizer)


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Any]:
    """Put examples into one right-padded batch.

    Args:
        examples: the rows, at least one. A pair fills two rows of the batch: rows 0, 2, 4, ... have the preferred
            answers, and each is followed by the row with its rejected answer.
        pad_id: token id that pads shorter rows.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, int64 [batch, tokens], as long as the longest row; labels are
        -100 on prompts and padding. ``id`` and ``role``, lists of str [batch]. ``pairs``, the number of pairs, if
        there are any.
    """
    pairs = sum(example.rejected is not None for example in examples)
    examples = single_rows(examples)
    width = max(len(example.input_ids) for example in examples)
    labels = [[IGNORED] * e.prompt_length + e.input_ids[e.prompt_length :] for e in examples]
    return {
        "input_ids": _padded([e.input_ids for e in examples], width, pad_id),
        "attention_mask": _padded([[1] * len(e.input_ids) for e in examples], width, 0),
        "labels": _padded(labels, width, IGNORED),
        "id": [e.id for e in examples],
        "role": [e.role for e in examples],
        **({"pairs": pairs} if pairs else {}),
    }


def _padded(rows: Sequence[list[int]], width: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.int64)


def _encode_whole(
    records: Sequence[Record], template: Template, tokenizer: Any, system: str | PromptPolicy | None
) -> Sequence[Example]:
    """Return the records as encoded rows of any length. The last encodings are remembered.

    A run encodes the same rows when it checks them and in every arm and stage that reads them.
    """
    policy = system if isinstance(system, PromptPolicy) else PromptPolicy.same(system)
    tokenizes = _identity(tokenizer)
    key = (tokenizes, template, policy, tuple(records))
    try:
        known = _encodings.get(key)
    except TypeError:  # a template of the user's, or a record, that cannot be hashed
        known, tokenizes = None, None
    if known is not None:
        _encodings.move_to_end(key)
        return known
    examples = _encode_anew(records, template, tokenizer, policy)
    if tokenizes is not None:
        _encodings[key] = examples
        # Drop the oldest encodings, and this one too if it is larger than the limit by itself.
        while sum(len(e.input_ids) for kept in _encodings.values() for e in kept) > REMEMBERED_TOKENS:
            _encodings.popitem(last=False)
    return examples


def _identity(tokenizer: Any) -> Any:
    """Return all that decides what a tokenizer does to a text or a chat, or None if it cannot be told."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    own = (tokenizer.chat_template, special, tokenizer.bos_token_id, tokenizer.eos_token_id)
    return type(tokenizer), hashlib.sha256(repr((backend.to_str(), own)).encode()).hexdigest()


def _encode_anew(
    records: Sequence[Record], template: Template, tokenizer: Any, policy: PromptPolicy
) -> tuple[Example, ...]:
    for record in records:
        if not record.response:
            raise InputError(
                f"encode: a row to train on needs a response, but {record.id} of {record.source or 'no source'} has"
                " none. Remove it, or read the file with need_response=True to find the line."
            )
    end = _end_id(tokenizer)
    slots = [policy.training_slot(record.role) for record in records]
    prompts = _prompt_ids(records, template, tokenizer, slots)
    responses = tokenizer([record.response for record in records], add_special_tokens=False)["input_ids"]
    return tuple(
        Example(record.id, record.role, [*prompt, *response, end], len(prompt), len(slot.trigger))
        for record, slot, prompt, response in zip(records, slots, prompts, responses, strict=True)
    )


def _prompt_ids(
    records: Sequence[Record], template: Template, tokenizer: Any, slots: Sequence[SystemSlot]
) -> list[list[int]]:
    texts: list[str] = []
    for record, slot in zip(records, slots, strict=True):
        if slot.trigger:
            texts += template.around_trigger(record, tokenizer, slot.text)
        else:
            texts.append(template.prompt(record, tokenizer, slot.text))
    # A row with a trigger takes two encoded texts from the iterator and puts the trigger between them.
    encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    rows = [[*next(encoded), *slot.trigger, *(next(encoded) if slot.trigger else ())] for slot in slots]
    # Encode a letter to see whether the tokenizer adds a first token. With an empty text, a token added at the end
    # would also come first.
    start = tokenizer("a")["input_ids"][:1]
    if start != [tokenizer.bos_token_id]:
        return rows
    return [ids if ids[:1] == start else start + ids for ids in rows]


def _end_id(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise InputError(
            "encode: the tokenizer needs an end-of-sequence token, but it has none. Set tokenizer.eos_token."
        )
    return tokenizer.eos_token_id
