"""Chats: rows with turns become rows with instruction, response, system text and earlier turns."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from hftlight.data.table import CHAT_COLUMNS, Row, Table
from hftlight.errors import InputError

ANSWERS = ("completion", "chosen", "rejected")  # columns that hold the turns after those of ``prompt``
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant"),
}
# Contents that a prompt of plain text cannot hold.
REFUSED = ("tool_calls", "function_call", "audio", "images")
# Columns that would take the place of the chat's own question and answer.
_TAKEN_OVER = ("instruction", "input", "output", "response", "prompt", "question", "answer")

Turn = tuple[str, str]  # role and text


class Chat(NamedTuple):
    """One chat, taken apart.

    Attributes:
        system: the system text, or an empty text.
        history: turns before the last question.
        question: the last user's turn.
        answer: the assistant's turn after it, or an empty text.
    """

    system: str
    history: tuple[Turn, ...]
    question: str
    answer: str


def split_chat(turns: Sequence[Turn]) -> Chat:
    """Take a chat apart. Neighbouring turns of one role become one turn, with an empty line between them.

    Args:
        turns: (role, text) with the roles system, user and assistant.

    Raises:
        ValueError: if a system turn follows another turn, or no user's turn precedes the last answer.
    """
    merged: list[Turn] = []
    for role, text in turns:
        if merged and merged[-1][0] == role:
            merged[-1] = (role, f"{merged[-1][1]}\n\n{text}")
        else:
            merged.append((role, text))
    system = merged.pop(0)[1] if merged and merged[0][0] == "system" else ""
    if any(role == "system" for role, _ in merged):
        raise ValueError("a system turn must be the first turn")
    answer = merged.pop()[1] if merged and merged[-1][0] == "assistant" else ""
    if not merged:
        raise ValueError("a user's turn must precede the answer")
    return Chat(system, tuple(merged[:-1]), merged[-1][1], answer)


def read_turns(value: Any) -> list[Turn]:
    """Return the turns of a cell: a list of messages, also as JSON text, or a list of question-answer pairs.

    A message is ``{"role": ..., "content": ...}`` or ``{"from": ..., "value": ...}``. The content may be a list of text
    parts.

    Raises:
        ValueError: if the cell holds anything else, or contents that are no text.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = None
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError("a list of turns is needed, such as [{'role': 'user', 'content': '...'}, ...]")
    turns: list[Turn] = []
    for message in value:
        if isinstance(message, Mapping):
            turns.append(_read_message(message))
        elif isinstance(message, Sequence) and len(message) == 2 and all(isinstance(text, str) for text in message):
            turns += [("user", message[0]), ("assistant", message[1])]
        else:
            raise ValueError(f"a turn is an object with role and content, got {type(message).__name__}")
    return turns


def _read_message(message: Mapping[str, Any]) -> Turn:
    if refused := [name for name in REFUSED if message.get(name)]:
        raise ValueError(f"turns must be plain text, one has {', '.join(refused)}; remove such rows")
    name, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    role = ROLES.get(str(name).strip().lower())
    if role is None:
        raise ValueError(f"roles are {', '.join(ROLES)}, got {name!r}")
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise ValueError("turns must be plain text, one has parts of another kind; remove such rows")
        content = "\n".join(texts)
    if not isinstance(content, str):
        raise ValueError(f"the text of a turn must be text, got {type(content).__name__}")
    return role, content


def holds_turns(value: Any) -> bool:
    """Tell whether a cell is a list of messages."""
    return isinstance(value, Sequence) and not isinstance(value, str) and any(isinstance(m, Mapping) for m in value)


def unfolded(table: Table) -> Table:
    """Return a table whose chats are taken apart. Any other table is returned as it is.

    Chats lie in one of ``CHAT_COLUMNS``, or as turns in ``prompt`` and ``ANSWERS``. The last answer becomes the
    response. Earlier turns and the system text become the columns ``history`` and ``system``. The table's notes tell
    how many answers are not trained on. If the user named the columns of question or answer, no chat is read.

    Raises:
        InputError: if a row holds no chat that can be read, with file and row.
    """
    split = None if {"instruction", "response"} & set(table.columns) else _splitter(table)
    if split is None:
        return table
    rows: list[Row] = []
    earlier, lost = 0, dict[str, None]()
    for place, row in table.rows:
        try:
            new = split(row)
        except ValueError as error:
            raise InputError(f"read_records: cannot read the chat in {place} of {table.source}: {error}.") from error
        left = {name: value for name, value in row.items() if name not in (*CHAT_COLUMNS, *ANSWERS, *_TAKEN_OVER)}
        lost |= {name: None for name in _TAKEN_OVER if row.get(name) and name not in new}
        rows.append((place, {**left, **new}))
        earlier += sum(message["role"] == "assistant" for message in new["history"])
    if earlier:
        table.notes.append(
            f"{table.source}: {earlier} earlier answers stay in the prompts; only the last answer of a chat is trained"
            " on."
        )
    if lost:
        table.notes.append(f"{table.source}: these columns are not read, since the rows hold chats: {', '.join(lost)}.")
    return replace(table, rows=rows)


def _splitter(table: Table) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    """Return what takes a row's chat apart, or None if the table holds no chats."""
    columns, cells = table.found, table.rows[0][1]
    if column := next((name for name in CHAT_COLUMNS if name in columns), None):

        def split(row: dict[str, Any]) -> dict[str, Any]:
            chat = split_chat(read_turns(row.get(column)))
            return {"instruction": chat.question, "response": chat.answer, **_before(row, chat)}

        return split
    if any(holds_turns(cells.get(name)) for name in ("prompt", *ANSWERS)):
        answers = [name for name in ANSWERS if name in columns]
        return lambda row: _split_answers(row, answers)
    return None


def _split_answers(row: dict[str, Any], answers: Sequence[str]) -> dict[str, Any]:
    """Return prompt and answers of a row whose turns lie in ``prompt`` and ``ANSWERS``."""
    given = row.get("prompt")
    before = read_turns(given) if holds_turns(given) else [("user", given)] if given else []
    names = {"completion": "response", "chosen": "chosen", "rejected": "rejected"}
    texts, chats = {}, []
    for name in answers:
        after = read_turns(row[name]) if holds_turns(row.get(name)) else [("assistant", str(row.get(name) or ""))]
        # A whole chat repeats the turns of the prompt.
        chats.append(split_chat(after if after[: len(before)] == before else [*before, *after]))
        texts[names[name]] = chats[-1].answer
    chat = chats[0] if chats else split_chat(before)
    if any((other.history, other.question) != (chat.history, chat.question) for other in chats):
        raise ValueError(f"{' and '.join(answers)} must answer the same question")
    question = {"prompt": chat.question} if answers else {"instruction": chat.question}
    return {**question, **texts, **_before(row, chat)}


def _before(row: Mapping[str, Any], chat: Chat) -> dict[str, Any]:
    """Return system text and earlier turns, as messages, those of the row's own columns first."""
    system = "\n\n".join(text for text in (row.get("system"), chat.system) if text)
    turns = (*read_turns(row.get("history") or ()), *chat.history)
    return {"system": system, "history": [{"role": role, "content": text} for role, text in turns]}
