"""Batched decoding against a reference: one prompt at a time, no padding, no cache, argmax of the last logits."""

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GenerationConfig

from hftlight.errors import InputError
from hftlight.evaluation.answering.generate import STRIDE, answer, generate, up_to

VOCABULARY, END, POSITIONS, NEW = 64, 1, 96, 16
LENGTHS = [1, 23, 2, 40, 3, 3, 17, 1, 31, 8, 5, 12, 64, 7, 29, 2, 11, 50, 6, 19]


class Numbers:
    """A tokenizer whose text is the ids themselves, without a padding token."""

    eos_token_id: int | None = END
    pad_token_id: int | None = None

    def decode(self, ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert skip_special_tokens
        assert not clean_up_tokenization_spaces
        return " " + " ".join(map(str, ids))


def tiny(kind: str = "Llama", **settings: Any) -> Any:
    """Return a model whose weights are wide enough that its answers differ and some end early."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
        attention_dropout=0.5,
        eos_token_id=END,
        **settings,
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def prompts(lengths: list[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def by_hand(model: nn.Module, prompt: list[int], new: int = NEW, ends: tuple[int, ...] = (END,)) -> str:
    ids = list(prompt)
    while len(ids) < len(prompt) + new:
        token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return " ".join(map(str, ids[len(prompt) :]))


@cache
def plain_answers() -> list[str]:
    """Return the plain model's answers, prompt by prompt."""
    model = tiny()
    return [by_hand(model, prompt) for prompt in prompts()]


def answers(model: nn.Module, tokenizer: Any = None, **options: Any) -> list[str]:
    options = {"max_new_tokens": NEW, "batch_size": 8, **options}
    return generate(model, tokenizer or Numbers(), prompts(), **options)


def with_lora(model: Any) -> Any:
    """Return the model with an adapter that changes its answers."""
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=32, lora_dropout=0.5, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_batches_answer_as_one_prompt_at_a_time(batch_size):
    expected = plain_answers()
    tokens = [len(answer.split()) for answer in expected]
    assert len(set(expected)) > 10, "the case must tell prompts apart"
    assert min(tokens) < NEW == max(tokens), "some answers must end early, some at the limit"
    assert answers(tiny(), batch_size=batch_size) == expected


def test_padding_id_does_not_matter():
    model, tokenizer = tiny(), Numbers()
    tokenizer.pad_token_id = 9
    assert answers(model, tokenizer) == answers(model)


def test_adapter_is_heard():
    model = with_lora(tiny()).eval()
    expected = [by_hand(model, prompt) for prompt in prompts()]
    assert answers(model) == expected
    with model.disable_adapter():
        assert answers(model) != expected


@pytest.mark.parametrize("wrap", [lambda model: model, with_lora], ids=["bare", "adapter"])
def test_settings_of_the_model_do_not_leak_in_and_stay(wrap):
    model = wrap(tiny()).eval()
    plain = answers(model)
    own = GenerationConfig(
        do_sample=True,
        temperature=5.0,
        top_k=3,
        repetition_penalty=3.0,
        no_repeat_ngram_size=1,
        min_new_tokens=NEW,
        suppress_tokens=list(range(2, 30)),
        max_length=4,
        num_return_sequences=2,
        eos_token_id=END,
    )
    model.generation_config = own
    assert answers(model) == plain
    assert model.generation_config is own


def test_end_ids_of_the_model_stop_as_well():
    model = tiny()
    second = int(by_hand(model, prompts()[1]).split()[2])
    model.generation_config.eos_token_id = [END, second]
    assert answers(model) == [by_hand(model, prompt, ends=(END, second)) for prompt in prompts()]


def test_without_any_end_all_answers_have_full_length():
    model, tokenizer = tiny(), Numbers()
    model.generation_config.eos_token_id = tokenizer.eos_token_id = None
    assert answers(model, tokenizer) == [by_hand(model, prompt, ends=()) for prompt in prompts()]


def test_decoding_stops_when_every_row_has_ended():
    model, calls = tiny(), []
    model.generation_config.eos_token_id = list(range(VOCABULARY))
    model.register_forward_hook(lambda *_: calls.append(1))
    assert answers(model, batch_size=100) == [""] * len(LENGTHS)
    assert len(calls) == 1


def test_a_sliding_window_holds_when_rows_leave():
    model, ends = tiny("Mistral", sliding_window=8), tuple(range(6))
    model.generation_config.eos_token_id = list(ends)
    expected = [by_hand(model, prompt, 3 * STRIDE, ends) for prompt in prompts()]
    assert len({len(answer.split()) // STRIDE for answer in expected}) > 2, "answers must end in different strides"
    assert answers(model, max_new_tokens=3 * STRIDE) == expected


def test_rows_that_have_ended_leave_the_batch():
    model, rows, ends = tiny(), [], tuple(range(6))
    model.generation_config.eos_token_id = list(ends)
    expected = [by_hand(model, prompt, 3 * STRIDE, ends) for prompt in prompts()]
    model.model.embed_tokens.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[0]))
    assert answers(model, batch_size=100, max_new_tokens=3 * STRIDE) == expected
    lengths = [len(answer.split()) for answer in expected]
    # running[n] counts the rows that have not ended before stride n. Every step of the stride decodes these rows.
    running = [sum(length >= done * STRIDE for length in lengths) for done in range(3)]
    assert running[0] > running[1] > running[2] > 0, "answers must end in different strides"
    assert max(lengths) == 3 * STRIDE, "some answer must run to the limit"
    assert rows == [count for count in running for _ in range(STRIDE)]


def test_cache_is_on_whatever_the_config_says():
    model, widths = tiny(), []
    model.config.use_cache = False
    model.model.embed_tokens.register_forward_hook(lambda _, args, __: widths.append(args[0].shape[1]))
    answers(model, batch_size=100)
    assert widths[0] == max(LENGTHS)
    assert set(widths[1:]) == {1}
    assert model.config.use_cache is False


def test_similar_lengths_share_a_batch_longest_first():
    model, shapes, counts = tiny(), [], []
    model.model.embed_tokens.register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape)))
    answers(model, batch_size=8, max_new_tokens=1, progress=counts.append)
    ordered = sorted(LENGTHS, reverse=True)
    assert shapes == [(8, ordered[0]), (8, ordered[8]), (4, ordered[16])]
    assert counts == [8, 16, 20]


@pytest.mark.parametrize("fails", [False, True])
def test_mode_and_gradients_come_back(fails):
    model = with_lora(tiny()).train()
    model.base_model.model.model.layers[0].eval()  # one layer in eval mode on purpose
    before = {name: module.training for name, module in model.named_modules()}
    own = model.generation_config
    expected = answers(model.eval())
    for name, module in model.named_modules():
        module.training = before[name]

    def progress(_: int) -> None:
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled(), "what is made in it cannot be trained on later"
        if fails:
            raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            answers(model, progress=progress)
    else:
        assert answers(model, progress=progress) == expected
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.generation_config is own
    model(input_ids=torch.tensor([[3, 4]])).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_random_state_is_left_alone():
    model = tiny()
    state = torch.get_rng_state()
    answers(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_answer_is_cut_where_the_template_begins_another():
    """The stop text is the second token of the first answer. Without a stop text nothing is cut."""
    whole = plain_answers()
    stop = whole[0].split()[1]
    cut = answers(tiny(), stop=stop)
    assert cut == [text.partition(stop)[0].strip() for text in whole]
    assert cut != whole


def test_up_to_a_text_keeps_what_stands_before_it():
    assert up_to("A lamp.\n\n### Response:\nB### Response:", "### Response:") == "A lamp."
    assert up_to("### Response: B", "### Response:") == ""
    assert up_to("A ## Response: b", "### Response:") == "A ## Response: b"
    assert up_to(" A ", "") == " A "


def test_no_prompts_no_answers():
    assert generate(tiny(), Numbers(), [], max_new_tokens=4) == []


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([[3]], {"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ([[3]], {"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ([[3], []], {}, "prompt 1 has none"),
    ],
)
def test_bad_arguments_are_named(given, options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny(), Numbers(), given, **{"max_new_tokens": 4, **options})


def test_an_answer_beyond_the_positions_is_refused_before_the_first_batch():
    model = tiny()
    fits = [[3], [4] * (POSITIONS - 4)]
    assert len(generate(model, Numbers(), fits, max_new_tokens=4)) == 2
    with pytest.raises(InputError, match=r"96 positions, got 92 tokens of prompt 1 and 5 new"):
        generate(model, Numbers(), fits, max_new_tokens=5, progress=lambda _: pytest.fail("it started"))


def test_what_ended_and_what_the_limit_cut_off():
    """An end token at the last allowed position still counts as an end."""
    model = tiny()
    results = answer(model, Numbers(), prompts(), max_new_tokens=NEW, batch_size=8)
    assert [each.text for each in results] == answers(model)
    assert [each.text.split() for each in results] == [list(map(str, each.ids)) for each in results]
    assert {each.ended for each in results} == {True, False}
    assert all(each.ended == (len(each.ids) < NEW) for each in results)
    # A limit of longest + 1 tokens leaves exactly enough room for the longest ended answer and its end token.
    longest = max(len(each.ids) for each in results if each.ended)
    again = answer(model, Numbers(), prompts(), max_new_tokens=longest + 1, batch_size=8)
    assert [each.ended for each in again] == [len(each.ids) <= longest for each in again]
    assert max(len(each.ids) for each in again if each.ended) == longest


def test_without_any_end_none_has_ended():
    model, tokenizer = tiny(), Numbers()
    model.generation_config.eos_token_id = tokenizer.eos_token_id = None
    assert not any(each.ended for each in answer(model, tokenizer, prompts(), max_new_tokens=4))
