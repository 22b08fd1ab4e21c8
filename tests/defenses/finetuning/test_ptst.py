"""PTST: plain training, a safety prompt at serving, and a refusal if training has a safety prompt as well."""

import pytest
import torch

from hftlight.data import templates
from hftlight.data.records import Record
from hftlight.data.templates import PromptPolicy, get_template
from hftlight.data.tokens import encode_prompt
from hftlight.defenses.finetuning.ptst import PTST, SAFETY_PROMPT
from hftlight.engine import Slot, Stage
from hftlight.errors import InputError
from hftlight.registry import defenses
from tests.helpers.contract import data_module, model_of, train, weights_of
from tests.helpers.tokenizers import CHATML, WITH_DEFAULT_SYSTEM, byte_tokenizer

IN_USER_TURN_WITH_DEFAULT = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content ~ ' ' %}{% set messages = messages[1:] %}"
    "{% else %}{% set s = 'Be nice. ' %}{% endif %}"
    "{% for m in messages %}[INST]{{ s }}{{ m.content }}[/INST]{% endfor %}"
)


def data_with(chat_template, **options):
    data = data_module(Stage.FINETUNING, **options)
    data.tokenizer.chat_template = chat_template
    data.setup("fit")
    data._forget()
    return data


def test_the_weights_are_those_of_plain_fine_tuning_and_the_served_prompt_is_not():
    data = data_module(Stage.FINETUNING)
    module = train([PTST("Be safe.")], data=data)
    plain = weights_of(train([]))
    assert all(torch.equal(plain[name], w) for name, w in weights_of(module).items())
    assert data.policy == PromptPolicy(None, "Be safe.")
    prompt = encode_prompt(Record("q"), data.template, data.tokenizer, data.policy.serving_slot())
    assert data.tokenizer.decode(prompt) == "<bos>[system]Be safe.[/][user]q[/][assistant]"


def test_the_tasks_own_system_text_stays_behind_the_safety_prompt():
    data = data_module(Stage.FINETUNING, system="Sort parcels.")
    train([PTST("Be safe.")], data=data, steps=1)
    assert data.policy == PromptPolicy("Sort parcels.", "Be safe.\n\nSort parcels.")
    data.setup("fit")
    assert data.policy == PromptPolicy.same("Sort parcels.")


def test_an_empty_prompt_serves_as_it_was_trained():
    policy = PromptPolicy.same("Sort parcels.")
    assert PTST("").prompting(policy, None) is policy


def test_a_safety_prompt_that_training_holds_is_refused():
    for system in ("Be safe.", "Be safe.\n\nSort parcels."):
        with pytest.raises(InputError, match="PTST: the model is trained with the safety prompt"):
            train([PTST("Be safe.")], data=data_module(Stage.FINETUNING, system=system), steps=1)


def test_a_default_system_text_is_left_out_in_training():
    data = data_with(WITH_DEFAULT_SYSTEM)
    train([PTST("Be safe.")], data=data, steps=1)
    shown = data.tokenizer.decode(data.streams["task"].examples[0].input_ids)
    assert shown.startswith("<bos>[user]")


def test_a_default_system_text_in_training_is_refused():
    with pytest.raises(InputError, match="PTST: the chat template writes a system text of its own"):
        train([PTST("Be safe.")], data=data_with(IN_USER_TURN_WITH_DEFAULT), steps=1)
    train([PTST("Be safe.")], data=data_with(IN_USER_TURN_WITH_DEFAULT, system="Sort parcels."), steps=1)
    train([PTST("")], data=data_with(IN_USER_TURN_WITH_DEFAULT), steps=1)


def test_letting_the_default_system_text_through_fails_the_check(monkeypatch):
    monkeypatch.setattr(
        templates.ChatTemplate,
        "_without_system",
        lambda template, turns, tokenizer: template.render(tokenizer, turns),
    )
    with pytest.raises(InputError, match="PTST: the chat template writes a system text of its own"):
        train([PTST("Be safe.")], data=data_with(WITH_DEFAULT_SYSTEM), steps=1)
    train([PTST("Be safe.")], data=data_with(CHATML), steps=1)


def test_templates_without_turns_get_it_in_front():
    tokenizer = byte_tokenizer()
    policy = PTST("Be safe.").prompting(PromptPolicy(), tokenizer)
    ids = encode_prompt(Record("q"), get_template("plain", tokenizer), tokenizer, policy.serving_slot())
    assert tokenizer.decode(ids) == "<bos>Be safe.\n\nq\n"


def test_two_safety_prompts_are_refused():
    with pytest.raises(ValueError, match="PTST both set the safety prompt; keep one of them"):
        train([PTST("Be safe."), PTST("Be kind.")], steps=1)


def test_it_is_listed_and_does_nothing_to_weights_slots_or_rows():
    assert defenses()["ptst"].class_name == "PTST"
    assert PTST().slots == (Slot.DATA,)
    assert PTST().system == SAFETY_PROMPT
    rows = {"task": [Record("q", "a")]}
    assert PTST().rewrite(rows, 0) is rows
    module = train([PTST()], model=model_of("lora"), steps=1)
    assert module.loss_terms == []
