"""SEAL's gradients in closed form, its loop on linear regression, and its selection on the tiny model."""

import itertools
import random

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hftlight.data.templates import get_template
from hftlight.data.tokens import encode
from hftlight.defenses import SEAL
from hftlight.defenses.finetuning.seal import Loop, cycled, learned_logits, one_step_scores, row_weights, weighted_loss
from hftlight.errors import InputError
from hftlight.models.row_reader import row_losses
from tests.helpers.contract import hooks_of, model_of, records
from tests.helpers.tiny_lm import reference_loss, tiny_lm, token_batch
from tests.helpers.tokenizers import CHATML, byte_tokenizer

DOUBLE = {"dtype": torch.float64}


def test_the_gradient_of_the_logits_by_hand():
    """Five rows of weight 1, the batch {0, 4} with losses 1 and 5: rows outside of the batch rise."""
    logits = torch.zeros(5, **DOUBLE, requires_grad=True)
    weighted_loss(logits, [0, 4], torch.tensor([1.0, 5.0], **DOUBLE)).backward()
    assert_close(logits.grad, torch.tensor([-0.1, -0.6, -0.6, -0.6, 1.9], **DOUBLE))


def test_the_gradient_of_unequal_logits_matches_its_formula():
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], **DOUBLE, requires_grad=True)
    batch, losses = [2, 0], torch.tensor([0.7, 2.5], **DOUBLE)
    weighted_loss(logits, batch, losses).backward()
    p = (4 * torch.exp(logits) / torch.exp(logits).sum()).detach()
    mean = sum(p[i] * loss for i, loss in zip(batch, losses, strict=True)) / 4
    expected = [p[j] / 2 * ((losses[batch.index(j)] if j in batch else 0) - mean) for j in range(4)]
    assert_close(logits.grad, torch.stack(expected))


def test_weights_have_the_mean_one_or_lie_below_two():
    logits = torch.tensor([-2.0, 0.0, 3.0], **DOUBLE)
    assert_close(row_weights(logits).mean(), torch.tensor(1.0, **DOUBLE))
    assert_close(row_weights(logits, "sigmoid"), 2 / (1 + torch.exp(-logits)))


class Regression:
    """Safe rows follow one linear map. Of the task's rows the last follow its negative."""

    def __init__(self, safe=16, task=24, conflicting=6, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.zeros(4))
        self.inputs = {
            "safe": torch.randn(safe, 4, generator=generator),
            "task": torch.randn(task, 4, generator=generator),
        }
        truth = torch.tensor([1.0, -2.0, 0.5, 1.5])
        self.inputs["task"] += 0.5 * truth * (self.inputs["task"] @ truth).sign()[:, None]  # no output near zero
        self.outputs = {name: x @ truth for name, x in self.inputs.items()}
        self.outputs["task"][task - conflicting :] *= -1
        self.sizes = safe, task

    def losses(self, name):
        return lambda rows: (self.inputs[name][list(rows)] @ self.w - self.outputs[name][list(rows)]) ** 2

    def learn(self, loop, chunk=3, **more):
        return learned_logits({"w": self.w}, self.losses("safe"), self.losses("task"), self.sizes, loop, chunk, **more)


@pytest.mark.parametrize("weights", ["softmax", "sigmoid"])
def test_rows_that_conflict_with_the_safe_rows_rank_last(weights):
    logits = Regression().learn(
        Loop(u=0.9, decay=0.0, epochs=60, lr=0.05, selector_lr=0.02, batch_size=8, weights=weights)
    )
    assert set(logits.argsort()[:6].tolist()) == set(range(18, 24))


def test_without_safe_rows_and_with_a_frozen_model_the_logits_reverse_the_losses():
    levels = torch.tensor([3.0, 0.5, 2.0, 1.0, 4.0, 0.1])
    loop = Loop(u=0.0, decay=0.0, epochs=300, lr=0.0, selector_lr=5e-3, batch_size=2)
    logits = learned_logits({}, lambda rows: torch.zeros(len(rows)), lambda rows: levels[list(rows)], (6, 6), loop)
    assert logits.argsort(descending=True).tolist() == levels.argsort().tolist()


@pytest.mark.parametrize(("u", "decay"), [(1.0, 0.3), (0.4, 0.1), (0.0, 0.0)])
@pytest.mark.parametrize("weights", ["softmax", "sigmoid"])
def test_the_loop_equals_an_independent_one(u, decay, weights):
    """Torch's optimizers, whole batches, and losses that are taken before the model moves."""
    loop = Loop(u=u, decay=decay, epochs=3, lr=0.02, selector_lr=0.1, batch_size=7, weights=weights, seed=5)
    done = []
    found = Regression().learn(loop, progress=done.append)
    slow = Regression()
    omega = nn.Parameter(torch.full((24,), 0.1 if weights == "softmax" else -1e-4))
    options = {"betas": (0.9, 0.95), "weight_decay": 0.0}
    model, selector = torch.optim.AdamW([slow.w], lr=0.02, **options), torch.optim.AdamW([omega], lr=0.1, **options)

    def rows_of(name, count):
        for epoch in itertools.count():
            order = list(range(count))
            random.Random(f"5/seal/{name}/{epoch}").shuffle(order)
            yield from order

    ours, theirs = rows_of("alignment", 16), rows_of("task", 24)
    for step in range(12):  # 24 rows of the larger set take 4 steps of 7 rows
        a, b = ([next(order) for _ in range(7)] for order in (ours, theirs))
        share = max(0.0, u - decay * (step // 4))
        p = 24 * omega.softmax(0) if weights == "softmax" else 2 * omega.sigmoid()
        losses = slow.losses("task")(b)
        model.zero_grad()
        (share * slow.losses("safe")(a).mean() + (1 - share) * (p[b].detach() * losses).mean()).backward()
        model.step()
        selector.zero_grad()
        (p[b] * losses.detach()).mean().backward()
        torch.nn.utils.clip_grad_norm_([omega], 10.0)
        selector.step()
    assert_close(found, omega.detach(), rtol=1e-4, atol=1e-5)
    assert done == [7 * (step + 1) for step in range(12)]
    assert found.std() > 0.05


def test_each_pass_has_every_row_once_in_a_new_order():
    order = list(itertools.islice(cycled(9, "s"), 18))
    assert sorted(order[:9]) == sorted(order[9:]) == list(range(9))
    assert order[:9] != order[9:]
    assert order == list(itertools.islice(cycled(9, "s"), 18))


def test_one_step_scores_are_inner_products_of_gradients():
    """With B = 0, the products with a gradient per row by autograd. Moving along them changes the safe loss so."""
    model = tiny_lm(lora=True).eval()
    factors = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    with torch.no_grad():
        for p in factors.values():
            p.zero_()
    safe, task = token_batch(1, rows=5), token_batch(2, rows=4)

    def part(batch, rows):
        return {name: value[list(rows)] for name, value in batch.items()}

    def flat(batch, rows):
        loss = sum(reference_loss(model, part(batch, [row])) for row in rows) / len(rows)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(factors.values()))])

    expected = torch.stack([flat(task, [row]) @ flat(safe, range(5)) for row in range(4)])
    sums = []
    found = one_step_scores(
        model,
        lambda rows: row_losses(model, part(safe, rows)),
        lambda rows: row_losses(model, part(task, rows)),
        (5, 4),
        chunk=3,
        progress=sums.append,
    )
    assert_close(found, expected.detach(), rtol=1e-6, atol=1e-12, check_dtype=False)
    assert expected.abs().max() > 1e-6
    assert sums == [3, 5, 8, 9]
    assert hooks_of(model) == 0


def tiny(tuning="full"):
    tokenizer = byte_tokenizer(chat_template=CHATML)
    return model_of(tuning, dtype=torch.float32), tokenizer, get_template("chat", tokenizer)


def state_of(model):
    """Return everything that a selection must leave as it was."""
    return (
        {name: t.clone() for name, t in model.state_dict().items()},
        {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()},
        {name: (type(m), m.training, sorted(vars(m))) for name, m in model.named_modules()},
        getattr(model, "active_adapters", None) if hasattr(model, "peft_config") else None,
        hooks_of(model),
    )


def same(before, after):
    return all(torch.equal(t, after[0][name]) for name, t in before[0].items()) and before[1:] == after[1:]


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("mode", ["single_loop", "one_step"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(tuning, mode, fails):
    model, tokenizer, template = tiny(tuning)
    model.train()
    before, random_state = state_of(model), torch.random.get_rng_state()
    rows = records()

    def progress(count):
        if fails and count > 8:
            raise KeyError("trip")

    defense = SEAL(0.75, mode, epochs=2, lr=0.05, batch_size=4, r=2, targets=["q_proj", "down_proj"])
    if fails:
        with pytest.raises(KeyError, match="trip"):
            defense.select(model, tokenizer, template, rows, batch_size=4, progress=progress)
    else:
        defense.select(model, tokenizer, template, rows, batch_size=4, progress=progress)
        assert defense.manifest()["kept"] == 12
    assert same(before, state_of(model))
    assert torch.equal(random_state, torch.random.get_rng_state())


def test_an_adapter_of_the_model_keeps_acting():
    """The losses of the first step are those of the model with its adapter, since the scratch adapter starts at 0."""
    model, tokenizer, template = tiny("lora")
    rows = records()
    defense = SEAL(0.75, epochs=1, batch_size=16, targets=["q_proj"], selector_lr=1.0)
    first = defense.select(model, tokenizer, template, rows, batch_size=16)
    losses = []
    for row in rows["task"]:
        e = encode(row, template, tokenizer, 999)
        ids = torch.tensor([e.input_ids])
        labels = ids.clone()
        labels[:, : e.prompt_length] = -100
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        losses.append(float(reference_loss(model, batch).detach()))
    # One Adam step of length 1 moves each logit by the sign of its gradient: down if its loss exceeds the mean.
    mean = sum(losses) / 16
    signs = [1 if row["score"] > 0.1 else -1 for row in first]
    assert signs == [-1 if loss > mean else 1 for loss in losses]


def test_ids_keep_their_scores_when_rows_cannot_be_read():
    """A row without room for an answer is left out of the loop, and its neighbours keep their own scores."""
    model, tokenizer, template = tiny()
    rows = {name: some[:6] for name, some in records().items()}
    long = type(rows["task"][0])("y" * 300, "no")
    with_long = {**rows, "task": [*rows["task"][:2], long, *rows["task"][2:]]}
    settings = {"topp": 0.5, "epochs": 2, "batch_size": 3, "lr": 0.01, "selector_lr": 0.5}
    plain = SEAL(**settings).select(model, tokenizer, template, rows)
    defense = SEAL(**settings)
    found = defense.select(model, tokenizer, template, with_long)
    assert (found[2]["id"], found[2]["score"], found[2]["kept"]) == (long.id, None, False)
    assert [row for row in found if row["id"] != long.id] == plain
    kept = {row["id"] for row in plain if row["kept"]}
    assert {row.id for row in defense.rewrite(with_long, 0)["task"]} == kept
    assert len(kept) == 3


def test_the_rows_of_the_largest_logits_stay_and_a_seed_repeats_them():
    model, tokenizer, template = tiny()
    rows = records()
    settings = {"epochs": 2, "batch_size": 4, "lr": 0.01, "selector_lr": 0.5}
    one, two, other = (SEAL(**settings).select(model, tokenizer, template, rows, seed=s) for s in (1, 1, 2))
    assert one == two != other
    scores = sorted((row["score"] for row in one), reverse=True)
    assert {row["score"] for row in one if row["kept"]} == set(scores[:12])  # int(0.8 x 16)
    assert one[0]["threshold"] == scores[11]


def test_the_plan_counts_the_phase():
    rows = {**records(), "alignment": records(40)["alignment"]}
    assert SEAL(epochs=3, batch_size=16).selecting(rows) == 3 * 3 * 16
    assert SEAL(epochs=2, batch_size=64).selecting(rows) == 2 * 40
    assert SEAL(mode="one_step").selecting(rows) == 56
    assert (SEAL().selecting_passes, SEAL(mode="one_step").selecting_passes) == (6, 3)
    with pytest.raises(InputError, match=r"SEAL: topp=0.05 would keep none of 16 rows"):
        SEAL(topp=0.05).selecting(rows)


def test_an_unknown_target_is_named():
    model, tokenizer, template = tiny()
    with pytest.raises(InputError, match=r"SEAL: targets: no linear layer is called 'query'; .*q_proj"):
        SEAL(targets=["query"]).select(model, tokenizer, template, records())
