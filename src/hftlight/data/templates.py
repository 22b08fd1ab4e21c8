"""Prompt templates by name: a record becomes the text before its answer, in training and evaluation alike."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from jinja2 import TemplateError
from typing_extensions import override

from hftlight.data.records import Record
from hftlight.errors import InputError

RESPONSE = "### Response:"
INSTRUCTION_ONLY = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n" + RESPONSE
)
INSTRUCTION_AND_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n" + RESPONSE
)
_MARK, _USER, _TRIGGER = "\x02system\x03", "\x02user\x03", "\x02trigger\x03"


@dataclass(frozen=True)
class SystemSlot:
    """What stands in a prompt's place for the system text.

    Attributes:
        text: the system text; None or empty for none.
        trigger: token ids put in front of it, as ids and not as text, so that they survive any tokenizer; secret, and
            so left out of what is printed.
    """

    text: str | None = None
    trigger: tuple[int, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class PromptPolicy:
    """Which system slot a record gets in training, and which every prompt gets when the model is served.

    Attributes:
        system: system text in training.
        serving: system text when serving.
        trigger: token ids in front of the system text, when serving and in training rows of ``trigger_roles``.
        trigger_roles: roles of the rows that are trained with the trigger; never the user's.
    """

    system: str | None = None
    serving: str | None = None
    trigger: tuple[int, ...] = field(default=(), repr=False)
    trigger_roles: frozenset[str] = frozenset({"alignment"})

    @classmethod
    def same(cls, system: str | None) -> "PromptPolicy":
        """Return the plain policy: one system text, or none, in training and when serving."""
        return cls(system, system)

    def training_slot(self, role: str) -> SystemSlot:
        """Return the system slot of a training row with a role."""
        return SystemSlot(self.system, self.trigger if role in self.trigger_roles else ())

    def serving_slot(self) -> SystemSlot:
        """Return the system slot of every prompt when the model is served."""
        return SystemSlot(self.serving, self.trigger)


@dataclass(frozen=True)
class Template:
    """A prompt with slots for the texts of a record.

    Attributes:
        name: what the template is called on the command line and in manifests.
        without_input: text with the slot ``{instruction}``.
        with_input: text with ``{instruction}`` and ``{input}``, for records that have an input.
        stop: text at which an answer is cut, since a model that writes it begins another turn; empty for none.

    Both may have a slot ``{system}`` for the system text, which else stands in front.
    """

    name: str
    without_input: str = ""
    with_input: str = ""
    stop: str = ""

    def prompt(self, record: Record, tokenizer: Any, system: str | None = None) -> str:
        """Return the text before the answer.

        Args:
            record: its instruction and input are used, never its response.
            tokenizer: the model's tokenizer; only the chat template needs it.
            system: text put in front, as a system turn where the template has turns, else with an empty line after it.
                The record's own system text follows it.
        """
        return self._prompt(record, tokenizer, _joined(system, record.system))

    def _prompt(self, record: Record, tokenizer: Any, system: str | None) -> str:
        """Return the text before the answer, with this system text alone. Earlier turns are prompts with answers."""
        opening, earlier = f"{system}\n\n" if system else "", ""
        for role, text in record.history:
            earlier += f"{text}\n\n" if role == "assistant" else self._turn(Record(text), opening)
            opening = ""
        return earlier + self._turn(record, opening)

    def _turn(self, record: Record, opening: str) -> str:
        pattern = self.with_input if record.input else self.without_input
        text = pattern.format(instruction=record.instruction, input=record.input, system=opening)
        return text if "{system}" in pattern else opening + text

    def around_trigger(self, record: Record, tokenizer: Any, system: str | None = None) -> tuple[str, str]:
        """Return the texts on both sides of a trigger, which stands at the very place where a system text begins.

        Args:
            record: as for ``prompt``.
            tokenizer: as for ``prompt``.
            system: system text behind the trigger; without one the trigger is the system text.
        """
        mark = _TRIGGER
        texts = (record.instruction, record.input, record.system, *(text for _, text in record.history))
        while mark in "\n".join(texts):  # a user may write anything
            mark += mark[-1]
        before, _, after = self._prompt(record, tokenizer, mark + _joined(system, record.system)).partition(mark)
        return before, after


@dataclass(frozen=True)
class ChatTemplate(Template):
    """The tokenizer's own chat template, up to the opening of the assistant's turn.

    Without ``system`` there is no system turn: a text that the chat template would put there by itself is left out,
    since it would silently differ between models. Where the chat template has no place for a system text, it opens the
    user's turn, with an empty line after it.

    Attributes:
        thinking: what the chat template is told as ``enable_thinking``; None leaves it to the template.
    """

    thinking: bool | None = None

    @override
    def _prompt(self, record: Record, tokenizer: Any, system: str | None) -> str:
        turns = [*record.history, ("user", record.question)]
        try:
            return self._with_system(turns, tokenizer, system) if system else self._without_system(turns, tokenizer)
        except TemplateError as error:
            raise InputError(
                f"Template {self.name}: the tokenizer's chat template refuses the turns of row {record.id}"
                f" ({', '.join(role for role, _ in turns)}): {error}. Remove the row, or choose --template alpaca."
            ) from error

    def _with_system(self, turns: Sequence[tuple[str, str]], tokenizer: Any, system: str) -> str:
        try:
            text = self.render(tokenizer, [("system", system), *turns])
        except TemplateError:  # as Gemma's does
            text = ""
        if text.count(system.strip()) > sum(content.count(system.strip()) for _, content in turns):
            return text
        first = next(place for place, (role, _) in enumerate(turns) if role == "user")
        opened = [(r, f"{system}\n\n{t}" if place == first else t) for place, (r, t) in enumerate(turns)]
        return self._without_system(opened, tokenizer)

    def render(self, tokenizer: Any, turns: Sequence[tuple[str, str]]) -> str:
        """Return the chat template's text of some turns, (role, text), up to the answer where the user spoke last."""
        messages = [{"role": role, "content": text} for role, text in turns]
        options = {} if self.thinking is None else {"enable_thinking": self.thinking}
        asked = turns[-1][0] == "user"
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked, **options)
        return text

    def _without_system(self, turns: Sequence[tuple[str, str]], tokenizer: Any) -> str:
        """Return the turns and the opening of the answer, without a system text the template adds by itself."""
        plain = self.render(tokenizer, turns)
        try:
            head = self.render(tokenizer, [("system", _MARK)])
            full = self.render(tokenizer, [("system", _MARK), *turns])
        except TemplateError:  # no system turn, hence no text of its own in it
            return plain
        if not full.startswith(head):  # some templates end a conversation that asks for no answer
            head = head.rstrip().removesuffix(tokenizer.eos_token or "")
        rest = full.removeprefix(head)
        if not plain.endswith(rest):  # the system text has no turn of its own
            return plain
        bos = tokenizer.bos_token or ""
        return bos + rest if bos and plain.startswith(bos) and not rest.startswith(bos) else rest


def _joined(*systems: str | None) -> str:
    """Return system texts one after the other, with an empty line between them."""
    return "\n\n".join(text for text in systems if text)


def injects_system(template: Template, tokenizer: Any) -> bool:
    """Tell whether a prompt without a system text still carries one, which the chat template writes by itself.

    Args:
        template: how a record becomes a prompt.
        tokenizer: the model's tokenizer.
    """
    return bool(own_text(template, tokenizer))


def own_text(template: Template, tokenizer: Any) -> str:
    """Return the system text that a chat template itself writes in front of a prompt, or an empty text.

    What stands in front of the user's words must be a beginning of what stands in front of a system text, followed by
    an end of what stands between it and the user's words. And it must open a user's later turn too, special tokens
    aside. Anything else is text of the template's own.

    Args:
        template: how a record becomes a prompt.
        tokenizer: the model's tokenizer.
    """
    if not isinstance(template, ChatTemplate):
        return ""
    probe = Record(_USER)
    plain = template.prompt(probe, tokenizer).partition(_USER)[0]
    before, _, rest = template.prompt(probe, tokenizer, _MARK).partition(_MARK)
    after = rest.partition(_USER)[0]
    if not any(before.startswith(plain[:cut]) and after.endswith(plain[cut:]) for cut in range(len(plain) + 1)):
        return _words(_bare(plain, tokenizer)) or plain
    try:
        talk = template.render(tokenizer, [("user", "\x02first\x03"), ("assistant", _MARK), ("user", _USER)])
    except TemplateError:  # one turn is all that it takes
        return ""
    opening = _bare(talk.partition(_MARK)[2].partition(_USER)[0], tokenizer)
    plain = _bare(plain, tokenizer)
    same = next(n for n in range(len(plain), -1, -1) if opening.endswith(plain[len(plain) - n :]))
    return _words(plain[: len(plain) - same])


def _bare(text: str, tokenizer: Any) -> str:
    """Return a text without special tokens."""
    for token in sorted(tokenizer.get_added_vocab(), key=len, reverse=True):
        text = text.replace(token, "")
    return text


def _words(text: str) -> str:
    return text.strip() if any(map(str.isalpha, text)) else ""


def _in_llama2(alpaca: str) -> str:
    """Return an Alpaca text within Llama 2's marks, its preamble as the system text."""
    preamble, _, rest = alpaca.partition("\n\n")
    return f"[INST] <<SYS>>\n{{system}}{preamble}\n<</SYS>>\n\n{rest} [/INST]"


_TEMPLATES = {
    template.name: template
    for template in (
        Template("alpaca", INSTRUCTION_ONLY + "\n", INSTRUCTION_AND_INPUT + "\n", RESPONSE),
        Template("alpaca_no_newline", INSTRUCTION_ONLY, INSTRUCTION_AND_INPUT, RESPONSE),
        ChatTemplate("chat"),
        Template("plain", "{instruction}\n", "{instruction}\n{input}\n"),
        Template("alpaca_llama2", _in_llama2(INSTRUCTION_ONLY), _in_llama2(INSTRUCTION_AND_INPUT)),
        Template("human_assistant", "Human: {instruction} Assistant: ", "Human: {instruction}\n{input} Assistant: "),
        Template("question_answer", "Question: {instruction}\nAnswer: ", "Question: {instruction}\n{input}\nAnswer: "),
    )
}
TEMPLATES = tuple(_TEMPLATES)
_THINKING = {
    template.name: template
    for template in (ChatTemplate("chat_thinking", thinking=True), ChatTemplate("chat_no_thinking", thinking=False))
}


def get_template(name: str, tokenizer: Any) -> Template:
    """Return a template by name.

    Args:
        name: one of ``TEMPLATES``, or ``"chat_thinking"`` or ``"chat_no_thinking"`` for chat templates that can be
            told whether the model shall reason first; hyphens count as underscores.
        tokenizer: the tokenizer it will be used with.

    Raises:
        InputError: if the name is unknown, or the tokenizer has no chat template, or none that can be told to think.
    """
    every = {**_TEMPLATES, **_THINKING}
    template = every.get(name.replace("-", "_"))
    if template is None:
        near = get_close_matches(name, every, n=1, cutoff=0)[0]
        raise InputError(f"Template: names are {list(every)}, got {name!r}. Did you mean {near!r}?")
    if isinstance(template, ChatTemplate):
        written = getattr(tokenizer, "chat_template", None)
        if not written:
            raise InputError(f"Template {template.name}: this tokenizer has no chat template. Use --template alpaca.")
        if template.thinking is not None and "enable_thinking" not in str(written):
            raise InputError(
                f"Template {template.name}: this tokenizer's chat template knows no enable_thinking, so it would change"
                " nothing. Use --template chat."
            )
    return template
