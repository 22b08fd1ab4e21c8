"""Prompt templates by name: a record becomes the text before its answer, in training and evaluation alike."""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from jinja2 import TemplateError
from typing_extensions import override

from hftlight.data.records import Record
from hftlight.errors import InputError

INSTRUCTION_ONLY = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
INSTRUCTION_AND_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_MARK = "\x02system\x03"


@dataclass(frozen=True)
class Template:
    """A prompt with slots for the texts of a record.

    Attributes:
        name: what the template is called on the command line and in manifests.
        without_input: text with the slot ``{instruction}``.
        with_input: text with ``{instruction}`` and ``{input}``, for records that have an input.
    """

    name: str
    without_input: str = ""
    with_input: str = ""

    def prompt(self, record: Record, tokenizer: Any, system: str | None = None) -> str:
        """Return the text before the answer.

        Args:
            record: its instruction and input are used, never its response.
            tokenizer: the model's tokenizer; only the chat template needs it.
            system: text put in front, as a system turn where the template has turns, else with an empty line after it.
        """
        pattern = self.with_input if record.input else self.without_input
        text = pattern.format(instruction=record.instruction, input=record.input)
        return f"{system}\n\n{text}" if system else text


@dataclass(frozen=True)
class ChatTemplate(Template):
    """The tokenizer's own chat template, up to the opening of the assistant's turn.

    Without ``system`` there is no system turn: a text that the chat template would put there by itself is left out,
    since it would silently differ between models.
    """

    @override
    def prompt(self, record: Record, tokenizer: Any, system: str | None = None) -> str:
        content = f"{record.instruction}\n{record.input}" if record.input else record.instruction
        if not system:
            return _without_system(content, tokenizer)
        try:
            text = _render(tokenizer, content, system)
        except TemplateError as error:
            raise InputError(
                f"Template chat: this tokenizer's chat template takes no system text ({error})."
                " Drop it or use --template alpaca."
            ) from error
        if system.strip() not in text:
            raise InputError(
                "Template chat: this tokenizer's chat template leaves the system text out."
                " Drop it or use --template alpaca."
            )
        return text


def _render(tokenizer: Any, content: str | None, system: str | None) -> str:
    turns = [("system", system), ("user", content)]
    messages = [{"role": role, "content": text} for role, text in turns if text is not None]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=content is not None)


def _without_system(content: str, tokenizer: Any) -> str:
    """Return the user's turn and the opening of the answer, without a system text the template adds by itself."""
    plain = _render(tokenizer, content, None)
    try:
        head = _render(tokenizer, None, _MARK)
        full = _render(tokenizer, content, _MARK)
    except TemplateError:  # no system turn, hence no text of its own in it
        return plain
    turn = full.removeprefix(head)
    if not plain.endswith(turn):  # the system text has no turn of its own
        return plain
    bos = tokenizer.bos_token or ""
    return bos + turn if bos and plain.startswith(bos) and not turn.startswith(bos) else turn


_TEMPLATES = {
    template.name: template
    for template in (
        Template("alpaca", INSTRUCTION_ONLY + "\n", INSTRUCTION_AND_INPUT + "\n"),
        Template("alpaca_no_newline", INSTRUCTION_ONLY, INSTRUCTION_AND_INPUT),
        ChatTemplate("chat"),
        Template("plain", "{instruction}\n", "{instruction}\n{input}\n"),
    )
}
TEMPLATES = tuple(_TEMPLATES)


def get_template(name: str, tokenizer: Any) -> Template:
    """Return a template by name.

    Args:
        name: one of ``TEMPLATES``; hyphens count as underscores.
        tokenizer: the tokenizer it will be used with.

    Raises:
        InputError: if the name is unknown, or it is ``"chat"`` and the tokenizer has no chat template.
    """
    template = _TEMPLATES.get(name.replace("-", "_"))
    if template is None:
        near = get_close_matches(name, TEMPLATES, n=1, cutoff=0)[0]
        raise InputError(f"Template: names are {list(TEMPLATES)}, got {name!r}. Did you mean {near!r}?")
    if isinstance(template, ChatTemplate) and not getattr(tokenizer, "chat_template", None):
        raise InputError("Template chat: this tokenizer has no chat template. Use --template alpaca.")
    return template
