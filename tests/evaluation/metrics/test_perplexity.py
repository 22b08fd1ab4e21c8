"""Perplexity against a reference that scores each token by its own forward pass and full logits."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from hftlight.errors import InputError
from hftlight.evaluation.metrics.perplexity import Perplexity, perplexity, response_losses, response_perplexity
from tests.helpers.tiny_lm import VOCABULARY, tiny_lm


class Words:
    """A tokenizer whose words are numbers, with an optional start token."""

    def __init__(self, bos: int | None = None) -> None:
        self.bos = bos

    def __call__(self, text: str, verbose: bool) -> dict[str, Any]:
        return {"input_ids": ([] if self.bos is None else [self.bos]) + list(map(int, text.split()))}


def long_lm(positions: int = 600, **options: Any) -> Any:
    model: Any = tiny_lm(**options)
    model.config.max_position_embeddings = positions
    return model


def words(count: int) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(3)).tolist()


def text_of(ids: list[int]) -> str:
    return " ".join(map(str, ids))


@torch.no_grad()
def direct(model: nn.Module, ids: list[int], window: int, stride: int) -> tuple[float, int]:
    """Return the sum over single tokens. The first window that contains token i starts the context of token i."""
    nats = []
    for i in range(1, len(ids)):
        begin = 0
        while begin + window <= i:
            begin += stride
        logits = model(input_ids=torch.tensor([ids[begin:i]])).logits[0, -1]
        nats.append(float(torch.logsumexp(logits, 0) - logits[ids[i]]))
    return math.fsum(nats), len(nats)


@pytest.mark.parametrize(
    ("count", "window", "stride", "batch_size"),
    [
        (2, 512, 256, 1),
        (512, 512, 64, 4),
        (513, 512, 64, 4),
        (700, 512, 100, 2),
        pytest.param(700, 512, 511, 4, marks=pytest.mark.slow),
    ],
)
def test_equals_the_sum_over_single_tokens(count, window, stride, batch_size):
    model, ids = long_lm().eval(), words(count)
    nats, tokens = direct(model, ids, window, stride)
    result = perplexity(model, Words(), text_of(ids), window=window, stride=stride, batch_size=batch_size)
    assert (result.tokens, result.window, result.stride) == (tokens, window, stride)
    assert result.nats == pytest.approx(nats, rel=1e-10)
    assert result.value == pytest.approx(math.exp(nats / tokens), rel=1e-10)


def test_a_uniform_model_is_as_surprised_as_it_has_words():
    model = long_lm().eval()
    nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, Words(), text_of(words(900)), window=512).value == pytest.approx(VOCABULARY, rel=1e-12)


def test_batches_change_nothing_and_half_precision_is_added_in_double():
    model, text = long_lm().eval(), text_of(words(1500))
    every = [perplexity(model, Words(), text, window=512, stride=200, batch_size=size) for size in (1, 2, 50)]
    assert every[0].nats == pytest.approx(every[1].nats, rel=1e-13) == pytest.approx(every[2].nats, rel=1e-13)
    half = long_lm(dtype=torch.bfloat16).eval()
    nn.init.zeros_(half.lm_head.weight)
    assert perplexity(half, Words(), text, window=512).nats == pytest.approx(1499 * math.log(VOCABULARY), rel=1e-7)


def test_the_beginning_is_context_and_is_not_scored():
    model, ids = long_lm().eval(), words(50)
    result = perplexity(model, Words(bos=7), text_of(ids), window=512)
    nats, tokens = direct(model, [7, *ids], 512, 256)
    assert (result.tokens, tokens) == (50, 50)
    assert result.nats == pytest.approx(nats, rel=1e-10)


@pytest.mark.parametrize(("positions", "window", "stride"), [(600, 600, 300), (1100, 1100, 512), (4096, 2048, 512)])
def test_the_window_is_what_the_model_has_positions_for(positions, window, stride):
    result = perplexity(long_lm(positions).eval(), Words(), "1 2 3")
    assert (result.window, result.stride) == (window, stride)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 20}, ValueError, r"window must be >= 512 tokens and at most 600.*got 20"),
        ({"window": 511}, ValueError, "got 511"),
        ({"window": 601}, ValueError, "got 601"),
        ({"window": 512, "stride": 512}, ValueError, r"stride must lie in \[1, 511\].*got 512"),
        ({"stride": 0}, ValueError, "got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
        ({"text": "1"}, InputError, "at least 2 tokens, got 1"),
        ({"positions": 511}, InputError, "at least 512 tokens is needed, this model has 511 positions"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, error, message):
    model = long_lm(options.pop("positions", 600))
    with pytest.raises(error, match=message):
        perplexity(model, Words(), options.pop("text", "1 2 3"), **options)


def test_mode_gradients_and_hooks_come_back():
    model = long_lm(lora=True, dropout=0.5).train()
    layer = model.get_decoder().layers[0]
    layer.eval()
    text, hooks = text_of(words(40)), len(model.get_output_embeddings()._forward_pre_hooks)
    first, second = (perplexity(model, Words(), text, window=512).nats for _ in range(2))
    assert first == second
    assert model.training
    assert not layer.training
    assert len(model.get_output_embeddings()._forward_pre_hooks) == hooks
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_answers_are_scored_after_their_prompts(batch_size):
    model, ids = tiny_lm().eval(), words(60)
    prompts = [ids[:3], ids[3:13], ids[13:14], ids[14:20], ids[20:22]]
    answers = [ids[30:34], ids[34:35], [], ids[35:50], ids[50:58]]
    nats = []
    for prompt, answer in zip(prompts, answers, strict=True):
        for i, token in enumerate(answer):
            logits = model(input_ids=torch.tensor([prompt + answer[:i]])).logits[0, -1]
            nats.append(float(torch.logsumexp(logits, 0) - logits[token]))
    result = response_perplexity(model, prompts, answers, batch_size=batch_size)
    assert result.tokens == len(nats) == 28
    assert result.nats == pytest.approx(math.fsum(nats), rel=1e-10)


@pytest.mark.parametrize(
    ("prompts", "answers", "options", "message"),
    [
        ([[1]], [], {}, "got 1 and 0"),
        ([[]], [[1]], {}, "a prompt needs at least one token"),
        ([[1], [2]], [[], []], {}, "none of the 2 answers has a token"),
        ([[1]], [[1]], {"batch_size": 0}, "batch_size must be >= 1, got 0"),
    ],
)
def test_answers_that_cannot_be_scored_are_refused(prompts, answers, options, message):
    with pytest.raises(ValueError, match=message):
        response_perplexity(tiny_lm(), prompts, answers, **options)


def test_a_mean_beyond_the_floats_is_infinite():
    assert Perplexity(2 * math.log(3), 2).value == pytest.approx(3)
    assert Perplexity(1e6, 2).value == math.inf


def test_the_last_window_is_the_first_that_reaches_the_end():
    model, widths = long_lm().eval(), []
    model.model.embed_tokens.register_forward_hook(lambda _, args, __: widths.append(tuple(args[0].shape)))
    perplexity(model, Words(), text_of(words(700)), window=512, stride=100)
    assert widths == [(2, 512), (1, 500)]


def test_losses_of_single_answers_are_in_the_given_order_whatever_the_batch():
    model = tiny_lm()
    prompts, answers = [[1, 2], [3], [4, 5, 6], [7]], [[8], [9, 10, 11], [], [12, 13]]
    alone = [
        (response_perplexity(model, [p], [r]).nats, len(r)) if r else (0.0, 0)
        for p, r in zip(prompts, answers, strict=True)
    ]
    for size in (1, 2, 4):
        for loss, expected in zip(response_losses(model, prompts, answers, batch_size=size), alone, strict=True):
            assert loss == pytest.approx(expected, rel=1e-5)
