"""Templates: the exact texts, the system text, and chat templates of several kinds."""

import pickle
from dataclasses import replace

import pytest

from hftlight.data import templates
from hftlight.data.records import Record
from hftlight.data.templates import TEMPLATES, PromptPolicy, SystemSlot, get_template, injects_system, own_text
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

LLAMA = (
    "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\n' ~ messages[0].content ~ '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
    "{% for m in messages %}[INST] {{ s }}{{ m.content }} [/INST]{% endfor %}"
)
# LLAMA and IN_USER_TURN with a default system text.
LLAMA_WITH_DEFAULT = LLAMA.replace("set s = ''", "set s = '<<SYS>>\nBe nice.\n<</SYS>>\n\n'")
IN_USER_TURN_WITH_DEFAULT = IN_USER_TURN.replace("set s = ''", "set s = 'Be nice. '")


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


def test_an_answer_ends_where_alpaca_begins_another():
    """Alpaca's stop text is the last line of its prompt. Other templates have no stop text."""
    for name in ("alpaca", "alpaca_no_newline"):
        template = get_template(name, None)
        assert template.prompt(ALONE, None).rstrip().endswith(f"\n\n{template.stop}")
    assert get_template("plain", None).stop == get_template("chat", byte_tokenizer(chat_template=CHATML)).stop == ""


def test_plain_is_the_texts_and_a_newline():
    template = get_template("plain", None)
    assert template.prompt(ALONE, None) == "Add {1} and 2.\n"
    assert template.prompt(JOINED, None) == "Sort.\nb a \n"
    assert template.prompt(ALONE, None, system="Be {brief}.") == "Be {brief}.\n\nAdd {1} and 2.\n"


def test_the_alpaca_text_within_llama_2s_marks():
    """The preamble is the system text. Another system text precedes the preamble, within the same marks."""
    template = get_template("alpaca_llama2", None)
    sentence = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    middle = "\n<</SYS>>\n\n### Instruction:\nAdd {1} and 2.\n\n### Response:\n [/INST]"
    assert template.prompt(ALONE, None) == f"[INST] <<SYS>>\n{sentence}{middle}"
    assert template.prompt(ALONE, None, "Sys") == f"[INST] <<SYS>>\nSys\n\n{sentence}{middle}"
    assert template.around_trigger(ALONE, None) == ("[INST] <<SYS>>\n", f"\n\n{sentence}{middle}")
    assert template.prompt(JOINED, None) == (
        "[INST] <<SYS>>\nBelow is an instruction that describes a task, paired with an input that provides further"
        " context. Write a response that appropriately completes the request.\n<</SYS>>\n\n"
        "### Instruction:\nSort.\n\n### Input:\nb a \n\n### Response:\n [/INST]"
    )


@pytest.mark.parametrize(
    ("name", "alone", "joined"),
    [
        ("human_assistant", "Human: Add {1} and 2. Assistant:", "Human: Sort.\nb a  Assistant:"),
        ("question_answer", "Question: Add {1} and 2.\nAnswer:\n", "Question: Sort.\nb a \nAnswer:\n"),
    ],
)
def test_frames_of_two_words(name, alone, joined):
    template = get_template(name, None)
    assert (template.prompt(ALONE, None), template.prompt(JOINED, None)) == (alone, joined)
    assert template.prompt(ALONE, None, "Sys") == f"Sys\n\n{alone}"


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
    """ChatML models open every turn with their start token. Removal of a default system text leaves one turn."""
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


@pytest.mark.parametrize("chat_template", [REFUSES, IGNORES])
def test_a_system_text_without_a_place_opens_the_users_turn(chat_template):
    tokenizer = byte_tokenizer(chat_template=chat_template)
    template = get_template("chat", tokenizer)
    assert template.prompt(JOINED, tokenizer, system="Sys") == "<Sys\n\nSort.\nb a >"
    quoting = Record("Say Sys", "Sys")
    assert template.prompt(quoting, tokenizer, system="Sys") == "<Sys\n\nSay Sys>"


@pytest.mark.parametrize(
    ("name", "chat_template", "before", "alone", "with_text"),
    [
        (
            "chat",
            CHATML,
            "[system]",
            "[/][user]Add {1} and 2.[/][assistant]",
            "Sys[/][user]Add {1} and 2.[/][assistant]",
        ),
        ("chat", LLAMA, "[INST] <<SYS>>\n", "\n<</SYS>>\n\nAdd {1} and 2. [/INST]", None),
        ("chat", IN_USER_TURN, "[INST]", " Add {1} and 2.[/INST]", "Sys Add {1} and 2.[/INST]"),
        ("chat", REFUSES, "<", "\n\nAdd {1} and 2.>", "Sys\n\nAdd {1} and 2.>"),
        ("plain", None, "", "\n\nAdd {1} and 2.\n", "Sys\n\nAdd {1} and 2.\n"),
    ],
)
def test_a_trigger_stands_where_a_system_text_begins(name, chat_template, before, alone, with_text):
    tokenizer = byte_tokenizer(chat_template=chat_template)
    template = get_template(name, tokenizer)
    assert template.around_trigger(ALONE, tokenizer) == (before, alone)
    assert template.around_trigger(ALONE, tokenizer, "Sys") == (before, with_text or f"Sys{alone}")


USER_FIRST = "{% for m in messages | reverse %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}"


@pytest.mark.parametrize("chat_template", [CHATML, USER_FIRST])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_user_cannot_say_where_the_trigger_stands(name, chat_template):
    tokenizer = byte_tokenizer(chat_template=chat_template)
    template = get_template(name, tokenizer)
    for text in ("\x02trigger\x03", "\x02trigger\x03\x03", "a\x02trigger\x03b\x02trigger\x03"):
        before, after = template.around_trigger(Record(text), tokenizer, "Sys")
        assert before + after == template.prompt(Record(text), tokenizer, "Sys")
        assert after.startswith("Sys")
        assert text in template.prompt(Record(text), tokenizer, "Sys")


@pytest.mark.parametrize(
    "chat_template", [CHATML, WITH_BOS, WITH_DEFAULT_SYSTEM, LLAMA, IN_USER_TURN, REFUSES, IGNORES]
)
@pytest.mark.parametrize("name", TEMPLATES)
def test_no_template_here_writes_a_system_text_by_itself(name, chat_template):
    tokenizer = byte_tokenizer(chat_template=chat_template)
    assert not injects_system(get_template(name, tokenizer), tokenizer)


@pytest.mark.parametrize("chat_template", [LLAMA_WITH_DEFAULT, IN_USER_TURN_WITH_DEFAULT])
def test_a_system_text_that_cannot_be_left_out_is_seen(chat_template):
    """The default text is in the user's turn, so turns alone do not separate it from the user's words."""
    tokenizer = byte_tokenizer(chat_template=chat_template)
    template = get_template("chat", tokenizer)
    assert "Be nice." in template.prompt(ALONE, tokenizer)
    assert injects_system(template, tokenizer)


@pytest.mark.parametrize("chat_template", [WITH_DEFAULT_SYSTEM, "{{ bos_token }}" + WITH_DEFAULT_SYSTEM])
def test_a_default_system_text_let_through_is_seen(chat_template, monkeypatch):
    monkeypatch.setattr(
        templates.ChatTemplate,
        "_without_system",
        lambda template, content, tokenizer: template.render(tokenizer, [("user", content)]),
    )
    tokenizer = byte_tokenizer(chat_template=chat_template)
    assert "Be nice." in get_template("chat", tokenizer).prompt(ALONE, tokenizer)
    assert injects_system(get_template("chat", tokenizer), tokenizer)


def test_a_policy_gives_the_trigger_to_its_roles_and_to_every_served_prompt():
    policy = PromptPolicy("Task.", "Safe.", (5, 6))
    assert policy.training_slot("alignment") == SystemSlot("Task.", (5, 6))
    for role in ("task", "attack", "harmful", "retain", "test"):
        assert policy.training_slot(role) == SystemSlot("Task.", ())
    assert policy.serving_slot() == SystemSlot("Safe.", (5, 6))
    plain = PromptPolicy.same("Task.")
    assert plain.training_slot("alignment") == plain.serving_slot() == SystemSlot("Task.")


def test_what_is_printed_holds_no_trigger():
    policy = PromptPolicy(trigger=(31337, 31338))
    for value in (policy, policy.serving_slot(), policy.training_slot("alignment")):
        assert "3133" not in repr(value) + str(value)


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


ALWAYS = (
    "{{ bos_token }}<sys>You follow a strict policy.{% if messages[0].role=='system' %} {{ messages[0].content }}"
    "{% endif %}<end>{% for m in messages %}{% if m.role!='system' %}<{{ m.role }}>{{ m.content }}<end>{% endif %}"
    "{% endfor %}<assistant>"
)
ENDS_WITH_EOS = (
    "{{ bos_token }}{% if messages[0].role=='system' %}<sys>{{ messages[0].content }}<end>{% else %}"
    "<sys>You are a careful assistant.<end>{% endif %}{% for m in messages %}{% if m.role!='system' %}<{{ m.role }}>"
    "{{ m.content }}<end>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% else %}{{ eos_token }}"
    "{% endif %}"
)
ROLES_IN_WORDS = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} {% else %}{{ m.role }}: {{ m.content }}\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_a_text_in_front_of_every_system_text_is_seen():
    """The fixed text also precedes any other system text, so it looks like the opening of the turn."""
    tokenizer = byte_tokenizer(chat_template=ALWAYS)
    template = get_template("chat", tokenizer)
    assert own_text(template, tokenizer) == "<sys>You follow a strict policy."
    assert injects_system(template, tokenizer)


def test_a_default_text_is_left_out_where_a_conversation_ends_with_eos():
    tokenizer = byte_tokenizer(chat_template=ENDS_WITH_EOS)
    template = get_template("chat", tokenizer)
    assert template.prompt(ALONE, tokenizer) == "<bos><user>Add {1} and 2.<end><assistant>"
    assert template.prompt(ALONE, tokenizer, "Sys") == "<bos><sys>Sys<end><user>Add {1} and 2.<end><assistant>"
    assert not injects_system(template, tokenizer)


def test_words_that_open_every_turn_are_no_system_text():
    tokenizer = byte_tokenizer(chat_template=ROLES_IN_WORDS)
    assert own_text(get_template("chat", tokenizer), tokenizer) == ""


def test_a_template_can_be_told_to_think_or_not():
    thinks = CHATML + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    tokenizer = byte_tokenizer(chat_template=thinks)
    plain = get_template("chat", tokenizer).prompt(ALONE, tokenizer)
    assert get_template("chat_thinking", tokenizer).prompt(ALONE, tokenizer) == plain
    assert get_template("chat-no-thinking", tokenizer).prompt(ALONE, tokenizer) == plain + "<think></think>"


# Records with their own system text and earlier turns.

CHAT = Record(
    "And the lid?", "Blue.", system="Keep jars.", history=(("user", "Which shelf?"), ("assistant", "Shelf 2."))
)


def test_earlier_turns_are_prompts_with_their_answers():
    plain = get_template("plain", None)
    assert plain.prompt(CHAT, None) == "Keep jars.\n\nWhich shelf?\nShelf 2.\n\nAnd the lid?\n"
    assert plain.prompt(CHAT, None, "Be kind.").startswith("Be kind.\n\nKeep jars.\n\nWhich shelf?\n")
    llama2 = get_template("alpaca_llama2", None).prompt(CHAT, None)
    assert llama2.count("Keep jars.") == 1
    assert llama2.index("Keep jars.") < llama2.index("Which shelf?") < llama2.index("Shelf 2.") < llama2.index("lid")


@pytest.mark.parametrize("system", [None, "Be kind."])
def test_a_chat_template_gets_every_turn(system):
    tokenizer = byte_tokenizer(chat_template=CHATML)
    both = f"{system}\n\nKeep jars." if system else "Keep jars."
    turns = [("system", both), *CHAT.history, ("user", "And the lid?")]
    expected = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns], tokenize=False, add_generation_prompt=True
    )
    assert get_template("chat", tokenizer).prompt(CHAT, tokenizer, system) == expected


def test_a_chat_template_without_a_place_for_it_opens_the_first_turn_with_the_system_text():
    tokenizer = byte_tokenizer(chat_template=REFUSES)
    assert get_template("chat", tokenizer).prompt(CHAT, tokenizer) == (
        "<Keep jars.\n\nWhich shelf?><Shelf 2.><And the lid?>"
    )


def test_a_default_text_stays_out_of_a_chat_with_turns():
    tokenizer = byte_tokenizer(chat_template=WITH_DEFAULT_SYSTEM)
    text = get_template("chat", tokenizer).prompt(replace(CHAT, system=""), tokenizer)
    bare = get_template("chat", tokenizer).prompt(Record("And the lid?"), tokenizer)
    assert text.endswith(bare)
    assert own_text(get_template("chat", tokenizer), tokenizer) == ""


def test_a_trigger_stands_before_the_rows_own_system_text():
    before, after = get_template("plain", None).around_trigger(CHAT, None, "Be kind.")
    assert (before, after[:22]) == ("", "Be kind.\n\nKeep jars.\n\n")


def test_turns_that_a_chat_template_refuses_are_named():
    alternating = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}"
        "{% endif %}{% endfor %}"
    )
    tokenizer = byte_tokenizer(chat_template=alternating)
    odd = Record("b", history=(("assistant", "a"),))
    with pytest.raises(InputError, match=rf"refuses the turns of row {odd.id} \(assistant, user\).*--template alpaca"):
        get_template("chat", tokenizer).prompt(odd, tokenizer)
