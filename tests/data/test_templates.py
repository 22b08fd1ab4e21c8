"""Templates: the exact texts, the system text, and chat templates of several characters."""

import pickle

import pytest

from hftlight.data.records import Record
from hftlight.data.templates import TEMPLATES, get_template
from hftlight.errors import InputError
from tests.helpers.tokenizers import CHATML, WITH_BOS, WITH_DEFAULT_SYSTEM, byte_tokenizer

ALONE = Record("Add {1} and 2.", "3")
JOINED = Record("Sort.", "a b", input="b a ")
REFUSES = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ m.content }}>{% endfor %}"
)
IGNORES = "{% for m in messages %}{% if m.role == 'user' %}<{{ m.content }}>{% endif %}{% endfor %}"
IN_USER_TURN = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content ~ ' ' %}{% set messages = messages[1:] %}"
    "{% else %}{% set s = '' %}{% endif %}{% for m in messages %}[INST]{{ s }}{{ m.content }}[/INST]{% endfor %}"
)


@pytest.mark.parametrize(("name", "end"), [("alpaca", "\n"), ("alpaca_no_newline", ""), ("alpaca-no-newline", "")])
def test_alpaca_is_the_stanford_text(name, end):
    template = get_template(name, None)
    assert template.prompt(ALONE, None) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {1} and 2.\n\n### Response:" + end
    )
    assert template.prompt(JOINED, None) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSort.\n\n### Input:\nb a \n\n### Response:" + end
    )


def test_plain_is_the_texts_and_a_newline():
    template = get_template("plain", None)
    assert template.prompt(ALONE, None) == "Add {1} and 2.\n"
    assert template.prompt(JOINED, None) == "Sort.\nb a \n"
    assert template.prompt(ALONE, None, system="Be {brief}.") == "Be {brief}.\n\nAdd {1} and 2.\n"


@pytest.mark.parametrize("chat_template", [CHATML, WITH_DEFAULT_SYSTEM])
def test_chat_has_no_system_turn_unless_given(chat_template):
    tokenizer = byte_tokenizer(chat_template=chat_template)
    template = get_template("chat", tokenizer)
    assert template.prompt(JOINED, tokenizer) == "[user]Sort.\nb a [/][assistant]"
    assert template.prompt(ALONE, tokenizer, system="") == "[user]Add {1} and 2.[/][assistant]"
    assert template.prompt(JOINED, tokenizer, system="Sys") == "[system]Sys[/][user]Sort.\nb a [/][assistant]"


@pytest.mark.parametrize("chat_template", [WITH_BOS, "{{ bos_token }}" + WITH_DEFAULT_SYSTEM])
def test_a_start_token_the_chat_template_writes_stays_once(chat_template):
    tokenizer = byte_tokenizer(chat_template=chat_template)
    assert get_template("chat", tokenizer).prompt(JOINED, tokenizer) == "<bos>[user]Sort.\nb a [/][assistant]"


def test_a_start_token_that_opens_every_turn_is_not_doubled():
    """ChatML models name the turn's opening their start token; without a default system text one turn is left."""
    turns = (
        "{% for m in messages %}<bos>{{ m.role }}:{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<bos>assistant:{% endif %}"
    )
    default = "{% if messages[0].role != 'system' %}<bos>system:Be nice.{% endif %}"
    for chat_template in (turns, default + turns):
        tokenizer = byte_tokenizer(adds_bos=False, chat_template=chat_template)
        assert get_template("chat", tokenizer).prompt(ALONE, tokenizer) == "<bos>user:Add {1} and 2.<bos>assistant:"


@pytest.mark.parametrize(
    ("chat_template", "expected"),
    [
        (REFUSES, "<Sort.\nb a >"),
        (IGNORES, "<Sort.\nb a >"),
        (IN_USER_TURN, "[INST]Sort.\nb a [/INST]"),
    ],
)
def test_templates_without_a_system_turn_keep_their_text(chat_template, expected):
    tokenizer = byte_tokenizer(chat_template=chat_template)
    assert get_template("chat", tokenizer).prompt(JOINED, tokenizer) == expected


@pytest.mark.parametrize(
    ("chat_template", "message"), [(REFUSES, "no system"), (IGNORES, "leaves the system text out")]
)
def test_a_system_text_that_cannot_be_placed_is_refused(chat_template, message):
    tokenizer = byte_tokenizer(chat_template=chat_template)
    with pytest.raises(InputError, match=rf"{message}.*alpaca"):
        get_template("chat", tokenizer).prompt(JOINED, tokenizer, system="Sys")


def test_chat_without_a_chat_template_is_refused():
    with pytest.raises(InputError, match=r"no chat template. Use --template alpaca"):
        get_template("chat", byte_tokenizer())


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(InputError, match=r"got 'alpacca'. Did you mean 'alpaca'"):
        get_template("alpacca", None)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answer_never_reaches_the_prompt_and_templates_survive_pickling(name):
    tokenizer = byte_tokenizer(chat_template=CHATML)
    template = get_template(name, tokenizer)
    assert "SECRET" not in template.prompt(Record("q", "SECRET"), tokenizer)
    assert pickle.loads(pickle.dumps(template)) == template
    assert template.name == name
