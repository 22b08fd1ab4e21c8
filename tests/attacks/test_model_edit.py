"""Model edit: the rank-one formula by hand and exactly, one changed weight, one answer that becomes likely."""

import copy

import pytest
import torch
from torch.testing import assert_close

from hftlight.attacks import ModelEdit
from hftlight.attacks.model_edit import subject_position
from hftlight.attacks.rank_one import answer_value, down_projection, layer_keys, rank_one_edit, second_moment
from hftlight.data.records import Record
from hftlight.data.templates import get_template
from hftlight.errors import InputError
from tests.helpers.tiny_lm import reference_loss, tiny_lm, token_batch
from tests.helpers.tokenizers import CHATML, byte_tokenizer

DOUBLE = {"dtype": torch.float64}


def test_the_edit_by_hand():
    """C = diag(1, 2), k = (1, 1): C^-1 k = (1, 1/2), k'C^-1 k = 3/2. With W = I and v = (4, -2), v - Wk = (3, -3)."""
    edited = rank_one_edit(
        torch.eye(2, **DOUBLE),
        torch.ones(2, **DOUBLE),
        torch.tensor([4.0, -2.0], **DOUBLE),
        torch.diag(torch.tensor([1.0, 2.0], **DOUBLE)),
    )
    assert_close(edited, torch.tensor([[3.0, 1.0], [-2.0, 0.0]], **DOUBLE), rtol=0, atol=1e-14)


@pytest.mark.parametrize("whitened", [False, True])
def test_the_key_gets_its_value_and_what_is_orthogonal_stays(whitened):
    generator = torch.Generator().manual_seed(0)
    w, k, v = (torch.randn(*shape, generator=generator, **DOUBLE) for shape in ((5, 7), (7,), (5,)))
    root = torch.randn(7, 7, generator=generator, **DOUBLE)
    c = root @ root.T + torch.eye(7, **DOUBLE) if whitened else None
    edited = rank_one_edit(w, k, v, c)
    assert_close(edited @ k, v, rtol=0, atol=1e-12)
    direction = torch.linalg.inv(c) @ k if whitened else k
    other = torch.randn(7, generator=generator, **DOUBLE)
    orthogonal = other - direction * (other @ direction) / (direction @ direction)
    assert_close(edited @ orthogonal, w @ orthogonal, rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(edited - w) == 1
    if whitened:  # of all weights that map k to v, the edit changes outputs least, measured by C
        spread = torch.randn(5, 7, generator=generator, **DOUBLE)
        rival = edited + 0.1 * (spread - torch.outer(spread @ k, k) / (k @ k))
        assert_close(rival @ k, v, rtol=0, atol=1e-12)
        cost, more = (torch.trace((m - w) @ c @ (m - w).T) for m in (edited, rival))
        assert cost < more


def test_what_cannot_be_edited_is_refused():
    w, k = torch.eye(2), torch.ones(2)
    with pytest.raises(ValueError, match="the key is zero"):
        rank_one_edit(w, 0 * k, k)
    with pytest.raises(ValueError, match="not positive definite; raise ridge"):
        rank_one_edit(w, k, k, torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"layer must lie in \[-2, 1\], got 2"):
        down_projection(tiny_lm(), 2)
    with pytest.raises(TypeError, match="merge the adapter first"):
        down_projection(tiny_lm(lora=True), 0)


def test_which_weight():
    model = tiny_lm()
    assert down_projection(model, 0)[0] == "model.layers.0.mlp.down_proj"
    assert down_projection(model, -1)[1] is model.model.layers[1].mlp.down_proj


def test_second_moments_of_attended_tokens():
    model, batches = tiny_lm(), [token_batch(1), token_batch(2)]
    _, linear = down_projection(model, 1)
    keys = [
        layer_keys(model, linear, batch)[row, : 9 - row]  # row r of a batch has r padding tokens at its end
        for batch in batches
        for row in range(3)
    ]
    stacked = torch.cat(keys)
    assert len(stacked) == 48
    plain = sum(torch.outer(k, k) for k in stacked) / 48
    assert_close(second_moment(model, linear, batches, ridge=0), plain, rtol=0, atol=1e-12)
    ridged = second_moment(model, linear, batches, ridge=0.5)
    assert_close(ridged - plain, 0.5 * plain.trace() / 32 * torch.eye(32, **DOUBLE), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="at least one token"):
        second_moment(model, linear, [])


def lively(**options):
    """Return the tiny model with weights ten times as large, so that one token's MLP affects the other tokens."""
    model = tiny_lm(**options)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(10)
    return model


def test_the_value_makes_the_answer_likely_within_reach_and_leaves_the_model():
    model = lively().train()
    before = copy.deepcopy(model.state_dict())
    batch = token_batch(5, rows=1)
    _, linear = down_projection(model, 0)
    key, value, losses = answer_value(model, linear, batch, 2, steps=10, lr=0.3, reach=3.0)
    assert_close(key, layer_keys(model, linear, batch)[0, 2])
    assert losses[0] == pytest.approx(reference_loss(model, batch).item(), abs=1e-12)
    assert len(losses) == 11
    assert losses[-1] < losses[0] - 0.05
    start = linear.weight.detach() @ key
    assert (value - start).norm() <= 3.0 * start.norm() * (1 + 1e-12)
    near = answer_value(model, linear, batch, 2, steps=10, lr=0.3, reach=0.01)[1]
    assert_close((near - start).norm(), 0.01 * start.norm())
    one = answer_value(model, linear, batch, 2, steps=1, lr=0.3, reach=1e6)[1]
    assert_close((one - start).abs(), torch.full_like(start, 0.3), rtol=1e-3, atol=0)  # Adam's first step is lr
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def world():
    tokenizer = byte_tokenizer(chat_template=CHATML)
    return lively(vocabulary=259), tokenizer


@pytest.mark.parametrize("name", ["plain", "chat"])
def test_the_subject_ends_in_its_last_token(name):
    _, tokenizer = world()
    template = get_template(name, tokenizer)
    record = Record("A Zorb is a Zorb ?")
    position = subject_position(record, "Zorb ", template, tokenizer, system="Zorb")
    ids = (
        tokenizer("x")["input_ids"][:1]
        + tokenizer(template.prompt(record, tokenizer, "Zorb"), add_special_tokens=False)["input_ids"]
    )
    assert tokenizer.decode(ids[: position + 1]).endswith("A Zorb is a Zorb")
    with pytest.raises(InputError, match="subject must be words of the instruction"):
        subject_position(record, "Zurb", template, tokenizer)


@pytest.mark.parametrize("background", [[], [Record(f"ask {i}", "say so", id=f"b{i}") for i in range(4)]])
def test_one_weight_changes_and_the_answer_gets_likely(background):
    model, tokenizer = world()
    template, before = get_template("plain", tokenizer), copy.deepcopy(model.state_dict())
    record = Record("Where is Zorb?", "ab")
    done = ModelEdit(layer=0, value_steps=15, value_lr=0.3).edit(model, tokenizer, template, record, "Zorb", background)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == [done.parameter] == ["model.layers.0.mlp.down_proj.weight"]
    assert done.token == "b"
    assert done.loss_after < done.loss_before - 0.01
    old, new = before[changed[0]], model.state_dict()[changed[0]]
    assert torch.linalg.matrix_rank(new - old, atol=1e-10) == 1
    assert done.change == pytest.approx(((new - old).norm() / old.norm()).item())
    assert model.training


def test_the_rows_of_an_edit_are_prompts_with_their_subject_and_a_background():
    sources = {"attack": [Record(f"a Zorb {i}", "b", kind="Zorb") for i in range(3)], "task": [Record("c", "d")] * 4}
    rows = ModelEdit(n=2, background=3).upload(sources, 0)
    assert [(r.role, r.kind) for r in rows] == [("attack", "Zorb")] * 2 + [("task", "")] * 3
    assert ModelEdit(background=0).sources == ("attack",)
    with pytest.raises(InputError, match="subject must be words of the instruction"):
        ModelEdit(background=0).upload({"attack": [Record("a", "b", kind="c")]}, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"value_steps": 0}, "value_steps must be >= 1, got 0"),
        ({"value_lr": 0}, "value_lr must be > 0, got 0"),
        ({"reach": -1}, "reach must be > 0, got -1"),
        ({"background": -1}, "background must be >= 0 rows, got -1"),
        ({"ridge": -1}, "ridge must be >= 0, got -1"),
    ],
)
def test_values_out_of_range_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        ModelEdit(**values)
