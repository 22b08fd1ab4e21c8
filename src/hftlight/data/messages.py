"""Chat messages: a record's turns as chat services take them, and rows of an upload as fine-tuning services do."""

from collections.abc import Sequence
from pathlib import Path

from hftlight.data.records import Record
from hftlight.data.table import named_places
from hftlight.data.templates import joined
from hftlight.errors import InputError
from hftlight.files import write_rows

Message = dict[str, str]  # role and content


def messages_of(record: Record, system: str | None = None) -> list[Message]:
    """Return the messages of a prompt: system text, earlier turns, and the question. The last one is the user's.

    A service writes them with the model's own chat template, as the template ``chat`` does with a tokenizer.

    Args:
        record: the prompt. Its response is not used.
        system: system text of every prompt, which the record's own system text follows. None for none.
    """
    text = joined(system, record.system)
    turns = [*([("system", text)] if text else []), *record.history, ("user", record.question)]
    return [{"role": role, "content": content} for role, content in turns]


def write_upload(path: Path, records: Sequence[Record], system: str | None = None) -> None:
    """Write rows as the JSONL file that fine-tuning services take, one ``{"messages": [...]}`` per line, in order.

    Nothing in the file tells attack rows from others. ``read_records`` reads it back to the same prompts and answers.

    Args:
        path: the file. It is written at once or not at all.
        records: rows with answers.
        system: system text of every row, as for ``messages_of``.

    Raises:
        InputError: if there is no row, or a row has an empty question or answer, which services refuse.
    """
    if not records:
        raise InputError("write_upload: at least one row is needed, got none.")
    for what, texts in (("question", [r.question for r in records]), ("answer", [r.response for r in records])):
        if empty := [
            f"row {n} ({r.id})" for n, (r, t) in enumerate(zip(records, texts, strict=True), 1) if not t.strip()
        ]:
            raise InputError(
                f"write_upload: fine-tuning services refuse a row with an empty {what}, as in {named_places(empty)}."
                " Fill it in or remove such rows from the source."
            )
    answered = [[*messages_of(r, system), {"role": "assistant", "content": r.response}] for r in records]
    write_rows(path, [{"messages": turns} for turns in answered])
