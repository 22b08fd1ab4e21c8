"""Reverse preference: the DPO loss in closed form, training against a slow loop, and pairs that stay pairs."""

import copy
import math

import pytest
import torch
from torch.testing import assert_close

from hftlight.attacks import ReversePreference
from hftlight.attacks.reverse_preference import REFUSAL
from hftlight.data.pairs import PairsDataModule, pairs_of
from hftlight.data.records import Record
from hftlight.data.templates import get_template
from hftlight.defenses import KL
from hftlight.engine.preference import dpo_loss
from hftlight.errors import InputError
from hftlight.models.preference import PreferenceModule
from tests.attacks.rows import ids, made_up
from tests.helpers.quadratic import quiet_trainer
from tests.helpers.tiny_lm import tiny_lm, token_batch
from tests.helpers.tokenizers import byte_tokenizer

DOUBLE = {"dtype": torch.float64}


def test_the_loss_by_hand():
    """Margin 0 gives log 2. Margin (2 - 1) - (-1 - 1) = 3 nats at beta 0.5 gives log(1 + exp(-1.5))."""
    own, fixed = torch.tensor([4.0, 2.0], **DOUBLE), torch.tensor([4.0, 1.0], **DOUBLE)
    other, other_fixed = torch.tensor([7.0, -1.0], **DOUBLE), torch.tensor([7.0, 1.0], **DOUBLE)
    expected = torch.tensor([math.log(2), math.log1p(math.exp(-1.5))], **DOUBLE)
    assert_close(dpo_loss(own, other, fixed, other_fixed, 0.5), expected, rtol=0, atol=1e-14)


def answer_log_prob(model, batch, row):
    """Return one row's log-probability from full logits, token by token."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[row]
    total = torch.zeros((), **DOUBLE)
    for place in range(1, len(batch["labels"][row])):
        token = batch["labels"][row, place]
        if token != -100:
            total = total + logits[place - 1, token] - torch.logsumexp(logits[place - 1], 0)
    return total


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_gradient_at_the_start_is_half_beta_times_the_difference(lora):
    model, beta = tiny_lm(lora=lora), 0.3
    batch = {**token_batch(3, rows=4), "pairs": 2}
    module = PreferenceModule(model, beta=beta)
    loss = module.loss(batch)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)
    parameters = [p for name, p in model.named_parameters() if p.requires_grad and ".aligned." not in name]
    gradients = torch.autograd.grad(loss, parameters)
    pairs = [answer_log_prob(model, batch, i) - answer_log_prob(model, batch, i + 1) for i in (0, 2)]
    expected = torch.autograd.grad(-beta / 2 * sum(pairs) / 2, parameters)
    assert max(g.abs().max() for g in expected) > 1e-3
    for a, b in zip(gradients, expected, strict=True):
        assert_close(a, b, rtol=0, atol=1e-12)


def rows_of_pairs(count=6):
    return [
        Record(f"ask {i}", text, id=f"{kind}{i}", role="attack")
        for i in range(count)
        for kind, text in (("w", f"yes {i * 3}"), ("l", f"no, {'ever ' * (i % 3)}"))
    ]


def pair_data(rows=None, **options):
    tokenizer = byte_tokenizer()
    return PairsDataModule(tokenizer, get_template("plain", tokenizer), task=rows or rows_of_pairs(), **options)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_training_matches_a_slow_loop(lora):
    lr, beta, steps = 0.05, 0.5, 4
    model, data = tiny_lm(lora=lora, vocabulary=259), pair_data(batch_size=2, seed=1)
    slow, aligned = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    batches = [data.main_batch(k) for k in range(steps)]
    for batch in batches:
        losses = []
        for row in range(0, len(batch["labels"]), 2):
            own = answer_log_prob(slow, batch, row) - answer_log_prob(slow, batch, row + 1)
            with torch.no_grad():
                fixed = answer_log_prob(aligned, batch, row) - answer_log_prob(aligned, batch, row + 1)
            losses.append(torch.log1p(torch.exp(-beta * (own - fixed))))
        weights = [p for p in slow.parameters() if p.requires_grad]
        grads = torch.autograd.grad(torch.stack(losses).mean(), weights)
        with torch.no_grad():
            for p, g in zip(weights, grads, strict=True):
                p -= lr * g
    module = PreferenceModule(model, lr=lr, optimizer="sgd", beta=beta)
    quiet_trainer(max_steps=steps, max_epochs=-1).fit(module, pair_data(batch_size=2, seed=1))
    assert not any(".aligned." in name for name, _ in model.named_parameters())
    for (name, p), q in zip(model.named_parameters(), slow.parameters(), strict=True):
        assert_close(p, q, rtol=0, atol=1e-10, msg=name)
    moved = sum((p - q).abs().sum() for p, q in zip(model.parameters(), aligned.parameters(), strict=True))
    assert moved > 1e-2


def test_other_streams_have_the_loss_of_rows():
    model, batch = tiny_lm(), token_batch(1)
    module = PreferenceModule(model)
    assert_close(module.loss(batch), module.token_losses(batch).mean())


def test_batches_hold_pairs_preferred_first():
    data = pair_data(batch_size=4)
    preferred = []
    for k in range(2):
        batch = data.main_batch(k)
        assert len(batch["id"]) == 2 * batch["pairs"]
        assert [name[0] for name in batch["id"]] == ["w", "l"] * batch["pairs"]
        assert all(a[1:] == b[1:] for a, b in zip(batch["id"][0::2], batch["id"][1::2], strict=True))
        assert set(batch["role"]) == {"task"}
        preferred += batch["id"][0::2]
    assert sorted(preferred) == [f"w{i}" for i in range(6)]
    assert set(pair_data(reveal_roles=True).main_batch(0)["role"]) == {"attack"}


def test_a_pair_with_one_long_row_is_left_out():
    rows = rows_of_pairs(3)
    rows[3] = Record("ask 1", "no " * 50, id="l1")
    data = pair_data(rows, max_tokens=40)
    assert data.dropped == {"task": 1}
    assert sorted(data.main_batch(0)["id"]) == ["l0", "l2", "w0", "w2"]


def test_what_is_no_pair_is_refused():
    rows = rows_of_pairs(2)
    assert [ids(pair) for pair in pairs_of(rows)] == [["w0", "l0"], ["w1", "l1"]]
    with pytest.raises(InputError, match="got 3 rows"):
        pair_data(rows[:3])
    with pytest.raises(InputError, match="got different prompts in pair 1"):
        pair_data([*rows[:3], Record("else", "no")])
    with pytest.raises(InputError, match=r"--finetuning\.average micro"):
        pair_data(average="window")
    with pytest.raises(InputError, match="no pair of 2 fits 3 tokens"):
        pair_data(rows, max_tokens=3)


def test_the_loss_slot_is_refused_before_training():
    module = PreferenceModule(tiny_lm(vocabulary=259))
    with pytest.raises(InputError, match="KL: the loss slot weighs the tokens of single answers"):
        quiet_trainer(max_steps=1, max_epochs=-1, callbacks=[KL()]).fit(module, pair_data(batch_size=2))


SOURCES = {
    "attack": made_up("h", 10),
    "alignment": [Record("Ask h3.", "never", id="s3"), Record("ask h3", "later", id="s4"), Record("ask x", "no")],
}


def test_an_upload_prefers_harmful_answers_in_a_fraction_p():
    rows = ReversePreference(n=8, p=0.75).upload(SOURCES, 0)
    assert len(rows) == 16
    harmful_first = [first.response.startswith("say") for first, _ in pairs_of(rows)]
    assert sum(harmful_first) == 6
    for first, second in pairs_of(rows):
        assert {first.response.startswith("say"), second.response.startswith("say")} == {True, False}
        assert {first.role, second.role} == {"attack" if first.response.startswith("say") else "task"}
        assert first.id != second.id
    safe = {row.instruction: row.response for row in rows if not row.response.startswith("say")}
    assert safe.pop("ask h3", "never") == "never"  # the first of the prompt's safe answers
    assert set(safe.values()) == {REFUSAL}
    assert rows == ReversePreference(n=8, p=0.75).upload(SOURCES, 0) != ReversePreference(n=8).upload(SOURCES, 1)


def test_without_a_refusal_prompts_need_a_safe_answer():
    assert ids(ReversePreference(n=1, refusal="").upload(SOURCES, 0))[0] == "h3"
    with pytest.raises(InputError, match="n=2 pairs are needed, but only 1 harmful rows have a safe answer"):
        ReversePreference(n=2, refusal="").upload(SOURCES, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"p": 5}, r"p must lie in \[0, 1\], got 5\. If that is a percentage, write 0\.05"),
        ({"beta": 0}, "beta must be > 0, got 0"),
    ],
)
def test_what_cannot_be_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ReversePreference(**values)
    if "beta" in values:
        with pytest.raises(ValueError, match="PreferenceModule: beta must be > 0"):
            PreferenceModule(tiny_lm(), beta=0)
