"""Prompt templates by name, which turn a record into the text before its answer in training and evaluation."""

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
    """System text and trigger of a prompt.

    Attributes:
        text: the system text; None or empty for no system text.
        trigger: token ids in front of the system text. They are ids and not text, so that no tokenizer can change them.
            The trigger is secret, so ``repr`` omits it.
    """

    text: str | None = None
    trigger: tuple[int, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class PromptPolicy:
    """System slot of each record in training, and of every prompt when the model is served.

    Attributes:
        system: system text in training.
        serving: system text when serving.
        trigger: token ids in front of the system text, when serving and in training rows of ``trigger_roles``.
        trigger_roles: roles of the rows that are trained with the trigger; never a role of the user's rows.
    """

    system: str | None = None
    serving: str | None = None
    trigger: tuple[int, ...] = field(default=(), repr=False)
    trigger_roles: frozenset[str] = frozenset({"alignment"})

    @classmethod
    def same(cls, system: str | None) -> "PromptPolicy":
        """Return the policy with one system text, or none, for both training and serving."""
        return cls(system, system)

    def training_slot(self, role: str) -> SystemSlot:
        """Return the system slot of a training row with role ``role``."""
        return SystemSlot(self.system, self.trigger if role in self.trigger_roles else ())

    def serving_slot(self) -> SystemSlot:
        """Return the system slot of every prompt when the model is served."""
        return SystemSlot(self.serving, self.trigger)


@dataclass(frozen=True)
class Template:
    """A prompt with slots for the texts of a record.

    Attributes:
        name: name of the template on the command line and in manifests.
        without_input: text with the slot ``{instruction}``, for records without an input.
        with_input: text with ``{instruction}`` and ``{input}``, for records that have an input.
        stop: text at which an answer is cut, since it begins another turn; empty for no such text.

    Both texts may have a slot ``{system}`` for the system text. Without that slot the system text stands in front.
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
            system: system text. It becomes a system turn if the template has turns, else it stands in front with an
                empty line after it. The record's own system text follows it.
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
        """Return the texts before and after a trigger, which stands exactly where a system text begins.

        Args:
            record: as for ``prompt``.
            tokenizer: as for ``prompt``.
            system: system text after the trigger; None if the trigger alone is the system text.
        """
        mark = _TRIGGER
        texts = (record.instruction, record.input, record.system, *(text for _, text in record.history))
        while mark in "\n".join(texts):  # the record itself may contain the mark
            mark += mark[-1]
        before, _, after = self._prompt(record, tokenizer, mark + _joined(system, record.system)).partition(mark)
        return before, after


@dataclass(frozen=True)
class ChatTemplate(Template):
    """The tokenizer's own chat template, up to the opening of the assistant's turn.

    Without ``system`` there is no system turn. The chat template's own system text is removed, since it would silently
    differ between models. If the chat template has no place for a system text, the text opens the user's turn and an
    empty line follows.

    Attributes:
        thinking: value of ``enable_thinking`` for the chat template; None leaves the choice to the template.
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
        except TemplateError:  # Gemma's template refuses a system turn
            text = ""
        # Some templates drop a system text without an error, so count whether it was added to the turns' text.
        if text.count(system.strip()) > sum(content.count(system.strip()) for _, content in turns):
            return text
        first = next(place for place, (role, _) in enumerate(turns) if role == "user")
        opened = [(r, f"{system}\n\n{t}" if place == first else t) for place, (r, t) in enumerate(turns)]
        return self._without_system(opened, tokenizer)

    def render(self, tokenizer: Any, turns: Sequence[tuple[str, str]]) -> str:
        """Return the chat template's text of turns (role, text), up to the answer if the last turn is the user's."""
        messages = [{"role": role, "content": text} for role, text in turns]
        options = {} if self.thinking is None else {"enable_thinking": self.thinking}
        user_last = turns[-1][0] == "user"
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=user_last, **options)
        return text

    def _without_system(self, turns: Sequence[tuple[str, str]], tokenizer: Any) -> str:
        """Return the turns and the opening of the answer, without a system text of the template's own."""
        # A marked system text replaces the template's own one; ``full`` without ``head`` is then the turns alone.
        plain = self.render(tokenizer, turns)
        try:
            head = self.render(tokenizer, [("system", _MARK)])
            full = self.render(tokenizer, [("system", _MARK), *turns])
        except TemplateError:  # without a system turn the template has no system text of its own
            return plain
        if not full.startswith(head):  # some templates add an end token if no answer follows
            head = head.rstrip().removesuffix(tokenizer.eos_token or "")
        rest = full.removeprefix(head)
        if not plain.endswith(rest):  # the system text has no turn of its own
            return plain
        # The beginning-of-sequence token was removed with the head, so put it back.
        bos = tokenizer.bos_token or ""
        return bos + rest if bos and plain.startswith(bos) and not rest.startswith(bos) else rest


def _joined(*systems: str | None) -> str:
    """Return system texts one after the other, with an empty line between them."""
    return "\n\n".join(text for text in systems if text)


def injects_system(template: Template, tokenizer: Any) -> bool:
    """Return whether the chat template writes a system text of its own into a prompt without one.

    Args:
        template: how a record becomes a prompt.
        tokenizer: the model's tokenizer.
    """
    return bool(own_text(template, tokenizer))


def own_text(template: Template, tokenizer: Any) -> str:
    """Return the system text that a chat template writes by itself in front of a prompt, or an empty text.

    Let P be the text before the user's words in a prompt without a system text. In a prompt with a system text, let B
    be the text before it. Let A be the text between the system text and the user's words.

    P has no text of the template's own if two conditions hold. P is a prefix of B followed by a suffix of A. P also
    opens a later user turn, special tokens aside. Anything else in P is the template's own system text.

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
    # Here ``plain`` is P, ``before`` is B, and ``after`` is A.
    if not any(before.startswith(plain[:cut]) and after.endswith(plain[cut:]) for cut in range(len(plain) + 1)):
        return _words(_bare(plain, tokenizer)) or plain
    try:
        talk = template.render(tokenizer, [("user", "\x02first\x03"), ("assistant", _MARK), ("user", _USER)])
    except TemplateError:  # the template accepts a single turn only
        return ""
    opening = _bare(talk.partition(_MARK)[2].partition(_USER)[0], tokenizer)
    plain = _bare(plain, tokenizer)
    # ``same`` is the length of the longest suffix that ``plain`` shares with the opening of the later turn.
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
    """Return an Alpaca text in Llama 2's chat markup, with its preamble as the system text."""
    preamble, _, rest = alpaca.partition("\n\n")
    return f"[INST] <<SYS>>\n{{system}}{preamble}\n<</SYS>>\n\n{rest} [/INST]"


_TEMPLATES = {
    template.name: template
    for template in (
        Template("alpaca", INSTRUCTION_ONLY + "\n", INSTRUCTION_AND_INPUT + "\n", RESPONSE),
        Template("alpaca_no_newline", INSTRUCTION_ONLY, INSTRUCTION_AND_INPUT, RESPONSE),
        ChatTemplate("chat"),
        Template("plain", "{instruction}\n", "{instruction}\n{input}\n"),
        Template("alpaca_llama2", _in_llama2(INSTRUCTION_ONLY + "\n"), _in_llama2(INSTRUCTION_AND_INPUT + "\n")),
        # No blank at the end: Llama 2's tokenizer itself opens the answer with one.
        Template("human_assistant", "Human: {instruction} Assistant:", "Human: {instruction}\n{input} Assistant:"),
        Template(
            "question_answer", "Question: {instruction}\nAnswer:\n", "Question: {instruction}\n{input}\nAnswer:\n"
        ),
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
        name: one of ``TEMPLATES``, ``"chat_thinking"`` or ``"chat_no_thinking"``. The last two need a chat template
            with ``enable_thinking``, which sets whether the model reasons first. Hyphens count as underscores.
        tokenizer: the tokenizer that the template will be used with.

    Raises:
        InputError: if the name is unknown, the tokenizer has no chat template, or its chat template has no
            ``enable_thinking``.
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
                f"Template {template.name}: this tokenizer's chat template knows no enable_thinking, so the setting"
                " would change nothing. Use --template chat."
            )
    return template
