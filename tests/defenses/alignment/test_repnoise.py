"""RepNoise's parts against closed forms and published numbers; its row compares whole steps with a slow loop."""

import math

import pytest
import torch
from torch.testing import assert_close

from hftlight import SafetyModule, StreamsDataModule
from hftlight.data.records import Record
from hftlight.data.streams import apart
from hftlight.data.templates import get_template
from hftlight.defenses import RepNoise
from hftlight.defenses.alignment.repnoise import FLOOR, discrepancy, own_tokens, rounded
from hftlight.engine import Stage
from tests.helpers.contract import LR, data_module, distance, model_of, train, weights_of
from tests.helpers.quadratic import quiet_trainer
from tests.helpers.tiny_lm import tiny_lm
from tests.helpers.tokenizers import CHATML, byte_tokenizer

F64 = torch.float64


def test_equal_samples_have_no_discrepancy_and_order_does_not_matter():
    torch.manual_seed(0)
    x, y = torch.randn(4, 7, dtype=F64), torch.randn(4, 7, dtype=F64)
    assert_close(discrepancy(x, x), torch.zeros((), dtype=F64), rtol=0, atol=1e-12)
    assert_close(discrepancy(x[[2, 0, 3, 1]], y[[1, 3, 2, 0]]), discrepancy(x, y), rtol=0, atol=1e-12)
    assert_close(discrepancy(y, x), discrepancy(x, y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [4, 8])
def test_matched_samples_in_many_dimensions_have_the_published_floor(size):
    """Their distances are all but equal, so that the statistic is 6.186 / B."""
    torch.manual_seed(1)
    assert_close(FLOOR, 6.186, rtol=0, atol=5e-4)
    assert_close(
        float(discrepancy(torch.randn(size, 20_000), torch.randn(size, 20_000))), FLOOR / size, rtol=0.02, atol=0
    )


def test_the_discrepancy_of_one_row_is_the_same_number_for_any_row():
    """The curve of such a training says nothing. Its gradient is not zero, because the bandwidth carries none."""
    x = torch.randn(1, 50, dtype=F64, requires_grad=True)
    value = discrepancy(x, torch.randn(1, 50, dtype=F64))
    value.backward()
    assert_close(value.item(), FLOOR, rtol=0, atol=1e-9)
    assert x.grad.norm() > 0.1


def test_the_gradient_of_the_discrepancy_agrees_with_a_fixed_bandwidth():
    """The bandwidth carries no gradient: the reference computes it once, as a number."""
    torch.manual_seed(2)
    x, y = torch.randn(3, 4, dtype=F64, requires_grad=True), torch.randn(3, 4, dtype=F64)
    both = torch.cat([x.detach(), y])
    width = sum(float((a - b).square().sum()) for a in both for b in both) / 30 / 4

    def fixed(x):
        rows, total = torch.cat([x, y]), 0.0
        for i, a in enumerate(rows):
            for j, b in enumerate(rows):
                sign = 1 if (i < 3) == (j < 3) else -1
                total = total + sign * sum(torch.exp(-(a - b).square().sum() / (width * 2**k)) for k in range(5))
        return total / 9

    assert_close(discrepancy(x, y), fixed(x), rtol=0, atol=1e-12)
    assert_close(*(torch.autograd.grad(f, x)[0] for f in (discrepancy(x, y), fixed(x))), rtol=0, atol=1e-12)


def test_only_an_answers_own_tokens_count():
    """A prompt of two tokens, an equal token, two that differ, one beyond the other's end, then padding."""
    one = torch.tensor([[-100, -100, 5, 6, 7, 8, -100]])
    two = torch.tensor([[-100, -100, 5, 9, 4, -100, -100]])
    assert own_tokens(one, two).tolist() == [[False, False, False, True, True, True, False]]
    assert own_tokens(two, one).tolist() == [[False, False, False, True, True, False, False]]


def test_the_known_bad_port_rounds_most_ids():
    ids = torch.tensor([1000, 2023, 5000, 29871, 31999])
    assert rounded(ids, 10**6).tolist() == [1000, 2024, 4992, 29824, 32000]
    assert rounded(ids, 32_000)[-1] == 31_999
    everything = torch.arange(32_000)
    unchanged = rounded(everything, 10**6) == everything
    assert_close(float(unchanged.float().mean()), 0.036, rtol=0, atol=5e-4)
    assert len(set(rounded(everything, 10**6).tolist())) == 1147


@pytest.fixture
def batch():
    return apart(data_module(Stage.ALIGNMENT, main="pairs").streams["pairs"].batch(0))


def parts(defense, batch, model):
    """Return hidden states and MLP outputs as leaves, and the terms that the defense computes from them."""
    rejected = batch["rejected"]
    mask = own_tokens(rejected["labels"], batch["labels"])
    states, outputs = defense._states(model, rejected)
    return rejected, mask, [h.detach().requires_grad_() for h in states], outputs


def test_masked_and_padded_positions_get_no_gradient(batch):
    defense, model = RepNoise(), model_of("full")
    rejected, mask, states, outputs = parts(defense, batch, model)
    assert len({int(row) for row in rejected["attention_mask"].sum(1)}) > 1  # answers of different length
    defense._mean_loss(model, states, rejected["labels"], mask, defense._form).backward()
    module = SafetyModule(model)
    module._trainer = quiet_trainer()
    leaves = {name: y.detach().requires_grad_() for name, y in outputs.items()}
    defense._noise(module, leaves, mask, 0).backward()
    predicts = mask.roll(-1, 1)
    for h in states:
        assert (h.grad.abs().sum(2) > 0).tolist() == predicts.tolist()
    for y in leaves.values():
        assert (y.grad.abs().sum(2) > 0).tolist() == mask.tolist()


def test_a_first_token_that_does_not_count_is_log_v_without_a_gradient(batch):
    model = model_of("full")
    rejected, mask, states, _ = parts(RepNoise(), batch, model)
    all_tokens, later = RepNoise(double_norm=False), RepNoise(double_norm=False, first_token=False)
    losses = [d._mean_loss(model, states, rejected["labels"], mask, d._form) for d in (all_tokens, later)]
    first = mask & ~mask.roll(1, 1)
    rest = mask & ~first
    kept = all_tokens._mean_loss(model, states, rejected["labels"], rest, all_tokens._form)
    # S is L + 2 means over the tokens of the mask, over L + 1.
    count, layers = int(mask.sum()), len(states)
    expected = (kept * int(rest.sum()) + (layers + 1) / layers * int(first.sum()) * math.log(259)) / count
    assert_close(losses[1], expected, rtol=0, atol=1e-9)
    slopes = torch.autograd.grad(losses[1], states[-1])[0].abs().sum(2)
    assert (slopes > 0).tolist() == rest.roll(-1, 1).tolist()


def test_without_noise_and_ascent_it_is_the_masked_loss_of_the_safe_answers():
    module = train([RepNoise(0.0, 0.0)], "full", steps=1)
    model, data = model_of("full"), data_module(Stage.ALIGNMENT, main="pairs")
    batch = data.main_batch(0)
    mask = own_tokens(batch["labels"], batch["rejected"]["labels"])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    rows, places = mask.nonzero().T
    loss = torch.nn.functional.cross_entropy(logits[rows, places - 1], batch["labels"][rows, places])
    names, weights = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    for name, w, g in zip(names, weights, torch.autograd.grad(loss, weights), strict=True):
        assert_close(weights_of(module)[f"model.{name}"], w - LR * g, rtol=0, atol=1e-10)


def test_a_bound_limits_the_ascents_part_of_the_update():
    """The update is -lr (g + a), with |a| at most the bound times |g|; the noise is off."""
    start, plain = weights_of(SafetyModule(model_of("lora"))), weights_of(train([RepNoise(0.0, 0.0)], steps=1))
    alignment = distance(plain, start)
    free, held = (weights_of(train([RepNoise(0.0, 50.0, bound=b)], steps=1)) for b in (None, 0.3))
    assert distance(free, plain) > 0.5 * alignment
    assert_close(distance(held, plain), 0.3 * alignment, rtol=0.01, atol=0)


def test_npo_starts_from_the_aligned_models_loss():
    defense = RepNoise(0.0, 1.0, ascent="npo")
    train([defense], steps=1)
    assert defense.passes[0].forward == 2
    shown = defense.summary()
    assert shown["mean_loss"] > 0


def test_a_run_with_noise_takes_one_pass_and_with_a_bound_two():
    assert [p.backward for p in RepNoise().passes] == [1]
    assert [p.backward for p in RepNoise(bound=0.5).passes] == [2]
    assert [p.backward for p in RepNoise(0.0, bound=0.5).passes] == [1]
    assert RepNoise(0.0, 0.0).passes == ()


def pairs(rejected, count=4):
    rows = [Record(f"ask {i}", f"no {i}", role="pairs", rejected=rejected(i)) for i in range(count)]
    tokenizer = byte_tokenizer(chat_template=CHATML)
    return StreamsDataModule(tokenizer, get_template("chat", tokenizer), "pairs", batch_size=2, pairs=rows)


def test_what_it_cannot_train_on_is_refused_before_the_first_step():
    cases = [
        (
            pairs(lambda i: f"no {i}" if i == 2 else f"yes {i}"),
            "the two answers of a pair must differ, but those of row",
        ),
        (data_module(Stage.ALIGNMENT), "each batch needs the rejected answers"),
        (data_module(Stage.ALIGNMENT, accumulate=8, main="pairs"), "at least 2 of them, got 1. Raise"),
    ]
    for data, words in cases:
        module = SafetyModule(model_of("lora"))
        with pytest.raises(ValueError, match=words):
            quiet_trainer(max_steps=2, callbacks=[RepNoise()]).fit(module, data)


def test_adapters_beside_the_mlp_are_warned_about():
    with pytest.warns(UserWarning, match="no MLP has an adapter"):
        train([RepNoise()], steps=1)


def test_a_model_without_mlps_is_refused():
    model = tiny_lm(vocabulary=259)
    for layer in model.model.layers:
        layer.other = layer.mlp
        del layer.mlp
        layer.forward = lambda x, *_, **__: x
    with pytest.raises(TypeError, match="RepNoise: no module is called"):
        train([RepNoise()], "full", model=model, steps=1)
