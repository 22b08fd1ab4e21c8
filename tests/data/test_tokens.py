"""Tokens: labels on exactly the response, one start token, long rows dropped or cut, padding by the mask."""

from collections import OrderedDict

import pytest
import torch

from hftlight.data import tokens as tokens_module
from hftlight.data.records import Record
from hftlight.data.streams import ExampleStream
from hftlight.data.templates import TEMPLATES, PromptPolicy, SystemSlot, get_template
from hftlight.data.tokens import Example, collate, encode, encode_all, encode_prompt, padding_id
from hftlight.errors import InputError
from tests.helpers.tokenizers import CHATML, WITH_BOS, byte_tokenizer

BOS, EOS, PAD = 256, 257, 258
T = (7, 199, 0, 7)
PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nHi!\n\n### Response:"
)
ROW = Record("Sort.", "a b", input="b a", role="attack")
PLAIN = get_template("plain", None)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "Be kind."])
def test_prompt_and_response_are_encoded_apart_and_joined(name, system):
    tokenizer = byte_tokenizer(chat_template=CHATML)
    template = get_template(name, tokenizer)
    example = encode(ROW, template, tokenizer, max_tokens=999, system=system)
    prompt, response = example.input_ids[: example.prompt_length], example.input_ids[example.prompt_length :]
    assert prompt[0] == BOS
    assert tokenizer.decode(prompt[1:]) == template.prompt(ROW, tokenizer, system)
    assert response[-1] == EOS
    assert tokenizer.decode(response[:-1]) == "a b"
    assert (example.id, example.role) == (ROW.id, "attack")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "Be kind."])
def test_generation_starts_from_the_ids_that_training_puts_before_the_response(name, system):
    tokenizer = byte_tokenizer(chat_template=WITH_BOS)
    template = get_template(name, tokenizer)
    example = encode(ROW, template, tokenizer, max_tokens=999, system=system)
    assert encode_prompt(ROW, template, tokenizer, system) == example.input_ids[: example.prompt_length]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("chat_template", [CHATML, WITH_BOS])
@pytest.mark.parametrize("adds_eos", [False, True])
def test_there_is_one_start_token_and_no_end_token_in_a_prompt(name, chat_template, adds_eos):
    tokenizer = byte_tokenizer(adds_eos=adds_eos, chat_template=chat_template)
    ids = encode_prompt(ROW, get_template(name, tokenizer), tokenizer)
    assert ids[0] == BOS
    assert ids.count(BOS) == 1
    assert EOS not in ids


def test_no_start_token_where_the_tokenizer_adds_none():
    tokenizer = byte_tokenizer(adds_bos=False, adds_eos=True, chat_template=WITH_BOS)
    assert BOS not in encode_prompt(ROW, PLAIN, tokenizer)
    assert encode_prompt(ROW, get_template("chat", tokenizer), tokenizer).count(BOS) == 1


def test_an_end_token_added_last_is_not_taken_for_a_start_token():
    """GPT-2 uses one token as start and end. A tokenizer that appends this token need not prepend it."""
    tokenizer = byte_tokenizer(adds_bos=False, adds_eos=True)
    tokenizer.bos_token = "<eos>"
    assert encode_prompt(ROW, PLAIN, tokenizer) == tokenizer("Sort.\nb a\n", add_special_tokens=False).input_ids


def test_a_row_fits_exactly_or_is_left_out_whole():
    tokenizer = byte_tokenizer()
    whole = len("Sort.\nb a\n") + len("a b") + 2
    assert len(encode(ROW, PLAIN, tokenizer, whole).input_ids) == whole
    assert encode(ROW, PLAIN, tokenizer, whole - 1) is None


def test_long_rows_are_counted_and_the_others_kept_in_order():
    tokenizer = byte_tokenizer()
    records = [Record("q", "a" * n) for n in (3, 50, 1, 60, 2)]
    examples, dropped = encode_all(records, PLAIN, tokenizer, max_tokens=10, name="task")
    assert [e.id for e in examples] == [records[i].id for i in (0, 2, 4)]
    assert dropped == 2
    assert examples == [encode(records[i], PLAIN, tokenizer, 10) for i in (0, 2, 4)]


def test_long_rows_are_cut_at_the_end_and_lose_it():
    """A cut row keeps its prompt and a part of its answer. A row whose prompt fills the limit is dropped."""
    tokenizer = byte_tokenizer()
    records = [Record("q", "abc"), Record("q", "abcdefgh"), Record("q" * 30, "abc")]
    examples, dropped = encode_all(records, PLAIN, tokenizer, max_tokens=8, name="task", long_rows="truncate")
    assert [tokenizer.decode(e.input_ids[e.prompt_length :]) for e in examples] == ["abc<eos>", "abcde"]
    assert [e.cut for e in examples] == [False, True]
    assert dropped == 1
    assert encode(records[1], PLAIN, tokenizer, 8, long_rows="truncate") == examples[1]


def test_long_rows_can_be_refused_and_unknown_ways_are():
    records = [Record("q", "abc"), Record("q", "abcdefgh")]
    with pytest.raises(InputError, match=rf"1 of 2 rows have more than 8 tokens, first row {records[1].id}. .* to 12"):
        encode_all(records, PLAIN, byte_tokenizer(), max_tokens=8, name="task", long_rows="refuse")
    with pytest.raises(InputError, match="--long_rows must be one of drop, truncate, refuse, got 'cut'"):
        encode_all(records, PLAIN, byte_tokenizer(), max_tokens=8, long_rows="cut")


def test_every_kept_row_ends_and_starts_its_labels_where_the_response_does():
    """A row whose prompt fills the limit is dropped: it gives neither empty labels nor labels on its prompt."""
    tokenizer = byte_tokenizer()
    records = [Record("q" * n, "abc") for n in range(1, 20)]
    examples, dropped = encode_all(records, PLAIN, tokenizer, max_tokens=16)
    labels = collate(examples, PAD)["labels"]
    assert dropped > 0
    for row in labels:
        assert tokenizer.decode(row[row != -100]) == "abc<eos>"


def test_nothing_left_names_the_stream_the_limit_and_the_shortest_row():
    records = [Record("q" * 30, "a"), Record("q" * 20, "a")]
    with pytest.raises(InputError, match=r"Stream 'task': .* at most 8 tokens .* shortest of 2 has 24. .* 24 or more"):
        encode_all(records, PLAIN, byte_tokenizer(), max_tokens=8, name="task")
    with pytest.raises(InputError, match="Stream 'harmful': at least one row"):
        encode_all([], PLAIN, byte_tokenizer(), max_tokens=8, name="harmful")


def test_a_row_without_response_is_no_training_row():
    with pytest.raises(InputError, match=r"needs a response, .* of prompts\.jsonl has none"):
        encode(Record("q", source="prompts.jsonl"), PLAIN, byte_tokenizer(), 99)


def test_a_tokenizer_without_end_token_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="needs an end-of-sequence token"):
        encode(ROW, PLAIN, tokenizer, 99)


def test_a_batch_has_exact_labels_and_is_as_wide_as_its_longest_row():
    batch = collate([Example("x", "task", [5, 6, 7, 8], 2), Example("y", "attack", [9, 1], 1)], pad_id=3)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 1, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8], [-100, 1, -100, -100]]
    assert (batch["id"], batch["role"]) == (["x", "y"], ["task", "attack"])
    assert {batch[key].dtype for key in ("input_ids", "attention_mask", "labels")} == {torch.int64}


def test_large_token_ids_are_labels_without_rounding():
    """A mask multiplied in bfloat16 would keep 8 bits of an id: 257 would become 256, 128009 become 128000."""
    ids = [1, 255, 256, 257, 4097, 32001, 128009, 151645, 255999]
    assert collate([Example("x", "task", ids, 1)], 0)["labels"].tolist() == [[-100, *ids[1:]]]


@pytest.mark.parametrize("pad_id", [0, EOS])
def test_padding_is_never_told_by_its_id(pad_id):
    """Token 0 and the end token are ordinary tokens: they stay in the labels and under the mask."""
    batch = collate([Example("x", "task", [0, 4, 0, EOS], 1), Example("y", "task", [4, EOS], 1)], pad_id)
    assert batch["labels"].tolist() == [[-100, 4, 0, EOS], [-100, EOS, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_the_end_token_pads_where_there_is_no_pad_token():
    assert padding_id(byte_tokenizer()) == PAD
    assert padding_id(byte_tokenizer(pad=False)) == EOS


def golden(text):
    """Return a text's ids by hand: printable characters from 0 on, the newline 198, the space 220."""
    return [{" ": 220, "\n": 198}.get(char, ord(char) - 33) for char in text]


SLOTS = {
    ("chat", CHATML): ("[user]Hi![/][assistant]", "[system]", "[/][user]Hi![/][assistant]"),
    ("alpaca", None): (PREAMBLE + "\n", "", "\n\n" + PREAMBLE + "\n"),
    ("alpaca_no_newline", None): (PREAMBLE, "", "\n\n" + PREAMBLE),
    ("plain", None): ("Hi!\n", "", "\n\nHi!\n"),
}


@pytest.mark.parametrize(("name", "chat_template"), SLOTS)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_golden_ids_of_every_template_with_system_text_trigger_and_both(name, chat_template, adds_bos):
    tokenizer = byte_tokenizer(adds_bos=adds_bos, chat_template=chat_template)
    template, bos = get_template(name, tokenizer), [BOS] * adds_bos
    plain, before, after = SLOTS[name, chat_template]

    def ids(*slot):
        return encode_prompt(Record("Hi!"), template, tokenizer, SystemSlot(*slot))

    assert ids() == bos + golden(plain)
    assert ids("Be safe.") == bos + golden(before + "Be safe." + after)
    assert ids(None, T) == [*bos, *golden(before), *T, *golden(after)]
    assert ids("Be safe.", T) == [*bos, *golden(before), *T, *golden("Be safe." + after)]


def test_golden_ids_in_full():
    tokenizer = byte_tokenizer(chat_template=CHATML)
    ids = encode_prompt(Record("Hi!"), get_template("chat", tokenizer), tokenizer, SystemSlot("Be", T))
    system, user, assistant = [82, 88, 82, 83, 68, 76], [84, 82, 68, 81], [64, 82, 82, 72, 82, 83, 64, 77, 83]
    turn = [58, *user, 60, 39, 72, 0, 58, 14, 60]
    assert ids == [256, 58, *system, 60, 7, 199, 0, 7, 33, 68, 58, 14, 60, *turn, 58, *assistant, 60]


@pytest.mark.parametrize(("name", "chat_template"), SLOTS)
@pytest.mark.parametrize(("system", "serving"), [(None, "Safe."), ("Task.", "Safe.\n\nTask."), ("Task.", "Task.")])
@pytest.mark.parametrize("trigger", [(), T])
def test_serving_adds_the_system_segment_and_the_trigger_and_nothing_else(
    name, chat_template, system, serving, trigger
):
    tokenizer = byte_tokenizer(chat_template=chat_template)
    template = get_template(name, tokenizer)
    policy = PromptPolicy(system, serving, trigger)
    trained = encode(Record("Hi!", "ok"), template, tokenizer, 999, policy)
    trained = trained.input_ids[: trained.prompt_length]
    served = encode_prompt(Record("Hi!"), template, tokenizer, policy.serving_slot())
    _, before, after = SLOTS[name, chat_template]
    # Serving inserts ``added``: the trigger and the serving text. Without a system text in training, ``added`` is
    # the whole system segment after the start token. With one, ``added`` follows the opening of the system segment.
    closing = after.partition("[user]")[0] if chat_template else "\n\n"
    added = [*trigger, *golden("" if system == serving else "Safe." if system is None else "Safe.\n\n")]
    if system is None:
        added = [*golden(before), *added, *golden(closing)]
    place = 1 if system is None else 1 + len(before)
    assert served == trained[:place] + added + trained[place:]


def test_rows_of_the_policys_roles_carry_the_trigger_and_no_label_stands_on_it():
    tokenizer = byte_tokenizer(chat_template=CHATML)
    template = get_template("chat", tokenizer)
    rows = [Record("q", "yes", role=role) for role in ("task", "alignment", "attack", "harmful")]
    examples, _ = encode_all(rows, template, tokenizer, 999, PromptPolicy("S", "S", T))
    assert [example.trigger_length for example in examples] == [0, 4, 0, 0]
    triggered = examples[1].input_ids
    assert triggered[: examples[1].prompt_length] == encode_prompt(rows[1], template, tokenizer, SystemSlot("S", T))
    batch = collate(examples, PAD)
    start = 1 + len("[system]")
    assert tuple(triggered[start : start + 4]) == T
    assert batch["labels"][1, start : start + 4].tolist() == [-100] * 4
    for labels in batch["labels"]:
        assert tokenizer.decode(labels[labels != -100]) == "yes<eos>"


def test_the_trigger_does_not_count_in_the_order_of_batches():
    """A sort by full length would give triggered rows batches of their own. The sort ignores the trigger."""
    tokenizer = byte_tokenizer(chat_template=CHATML)
    template = get_template("chat", tokenizer)
    rows = [Record(f"q{i:02d}", "yes", role="alignment" if i % 8 == 0 else "task") for i in range(64)]

    def order(trigger):
        examples, _ = encode_all(rows, template, tokenizer, 999, PromptPolicy("S", "S", trigger))
        stream = ExampleStream(examples, "task", 8, PAD, seed=0)
        return [[e.id for e in stream.rows(k, 0)] for k in range(8)]

    assert order(T * 40) == order(())


def test_rows_are_encoded_once_and_anew_for_anything_that_changes_their_tokens(monkeypatch):
    """Each case differs from the first in one thing: template text, special token, system text, answer, template."""
    calls = []
    encode_anew = tokens_module._encode_anew
    monkeypatch.setattr(tokens_module, "_encodings", OrderedDict())
    monkeypatch.setattr(tokens_module, "_encode_anew", lambda *args: calls.append(args) or encode_anew(*args))
    rows = [Record("ask", "yes"), Record("more", "no")]
    other = byte_tokenizer(chat_template=CHATML)
    other.eos_token = "<pad>"
    cases = [
        (rows, "chat", byte_tokenizer(chat_template=CHATML), None),
        (rows, "chat", byte_tokenizer(chat_template=CHATML.replace("[/]", "[end]")), None),
        (rows, "chat", byte_tokenizer(adds_bos=False, chat_template=CHATML), None),
        (rows, "chat", other, None),
        (rows, "chat", byte_tokenizer(chat_template=CHATML), "Be brief."),
        ([*rows[:1], Record("more", "not")], "chat", byte_tokenizer(chat_template=CHATML), None),
        (rows, "alpaca", byte_tokenizer(chat_template=CHATML), None),
    ]
    results = [encode_all(r, get_template(name, t), t, 999, system)[0] for r, name, t, system in cases]
    assert len(calls) == len(cases)
    assert all(results[0] != result for result in results[1:])
    again = [encode_all(r, get_template(name, t), t, 999, system)[0] for r, name, t, system in cases]
    assert again == results
    assert len(calls) == len(cases)


def test_encodings_over_the_limit_are_not_remembered(monkeypatch):
    monkeypatch.setattr(tokens_module, "_encodings", OrderedDict())
    monkeypatch.setattr(tokens_module, "REMEMBERED_TOKENS", 60)
    tokenizer = byte_tokenizer(chat_template=CHATML)
    template = get_template("chat", tokenizer)
    for count in (1, 1, 9):
        encode_all([Record(f"ask {i}", "yes") for i in range(count)], template, tokenizer, 999)
    assert sum(len(e.input_ids) for rows in tokens_module._encodings.values() for e in rows) <= 60
