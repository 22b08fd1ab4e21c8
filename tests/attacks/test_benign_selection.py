"""Benign selection: scores by hand and against slow passes of one row, on a model that stays unchanged."""

import copy
import math

import pytest
import torch
from torch.testing import assert_close

from hftlight.attacks import BenignSelection, select, write_scores
from hftlight.data.records import Record
from hftlight.data.templates import get_template
from hftlight.engine.row_scores import gradient_scores, representation_scores, sketch
from hftlight.errors import InputError
from hftlight.models.row_reader import chosen_parameters, first_tokens_only, last_hidden, row_gradients
from tests.attacks.rows import ids, made_up
from tests.helpers.tiny_lm import reference_loss, tiny_lm, token_batch
from tests.helpers.tokenizers import byte_tokenizer

DOUBLE = {"dtype": torch.float64}


def test_representation_scores_by_hand():
    """Cosines of (3, 4) with the axes and with (3, 4) itself are 0.6, 0.8 and 1. Lengths do not count."""
    anchors = torch.tensor([[2.0, 0.0], [0.0, 5.0], [0.3, 0.4]], **DOUBLE)
    rows = torch.tensor([[3.0, 4.0], [-1.0, 0.0]], **DOUBLE)
    assert_close(representation_scores(rows, anchors), torch.tensor([1.0, 0.0], **DOUBLE))
    assert_close(representation_scores(rows, anchors, top=2), torch.tensor([0.9, -0.3], **DOUBLE))
    assert_close(representation_scores(rows, anchors, top=3), torch.tensor([0.8, -1.6 / 3], **DOUBLE))
    for top in (0, 4):
        with pytest.raises(ValueError, match=rf"top must lie in \[1, 3\], the number of anchors, got {top}"):
            representation_scores(rows, anchors, top)


def test_gradient_scores_by_hand():
    """Anchors (9, 0) and (0, 1) have the mean direction (1, 1) / sqrt 2: unit length first, then the mean."""
    harmful = torch.tensor([[9.0, 0.0], [0.0, 1.0]], **DOUBLE)
    safe = [torch.tensor([[0.0, -3.0]], **DOUBLE), torch.tensor([[7.0, 0.0]], **DOUBLE)]
    rows = torch.tensor([[5.0, 0.0], [0.0, 2.0], [0.0, 0.0]], **DOUBLE)
    half = math.sqrt(0.5)
    assert_close(gradient_scores(rows, harmful), torch.tensor([half, half, 0.0], **DOUBLE))
    assert_close(gradient_scores(rows, harmful, safe), torch.tensor([half - 1, half + 1, 0.0], **DOUBLE))


def test_means_of_unit_gradients_as_released_are_not_renormalized():
    """The example: harmful anchors (1, 0) and (0, 1), safe anchors (1, 0) twice. Renormalizing flips the ranks."""
    harmful, safe = torch.eye(2, **DOUBLE), [torch.tensor([[1.0, 0.0], [1.0, 0.0]], **DOUBLE)]
    rows = torch.tensor([[0.0, 1.0], [-0.9, math.sqrt(0.19)]], **DOUBLE)
    official = gradient_scores(rows, harmful, safe, renormalize=False).tolist()
    assert official == pytest.approx([0.500, 0.668], abs=5e-4)
    half, ours = math.sqrt(0.5), gradient_scores(rows, harmful, safe).tolist()
    assert ours == pytest.approx([half, half * (math.sqrt(0.19) - 0.9) + 0.9], abs=1e-12)
    assert ours[0] > ours[1]


def test_the_hidden_state_is_the_one_of_the_last_attended_token():
    model, batch = tiny_lm().eval(), token_batch(1)
    hidden = last_hidden(model, batch)
    full = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
    ).hidden_states[-1]
    assert_close(hidden, torch.stack([full[0, 8], full[1, 7], full[2, 6]]), rtol=0, atol=1e-12)
    assert not hidden.requires_grad
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize(("lora", "which"), [(False, "all"), (False, "last_layer"), (True, "trainable")])
def test_row_gradients_match_a_pass_per_row(lora, which):
    model, batch = tiny_lm(lora=lora).eval(), token_batch(2)
    gradients = row_gradients(model, batch, which)
    names = chosen_parameters(model, which)
    for row in range(3):
        twin = copy.deepcopy(model)
        for p in twin.parameters():
            p.requires_grad_(True)
        reference_loss(twin, {key: value[row : row + 1] for key, value in batch.items()}).backward()
        parameters = dict(twin.named_parameters())
        expected = torch.cat([parameters[name].grad.flatten() for name in names])
        assert expected.abs().max() > 1e-3
        assert_close(gradients[row], expected, rtol=0, atol=1e-12)


def test_which_parameters():
    model = tiny_lm(lora=True)
    assert all("lora_" in name for name in chosen_parameters(model, "trainable"))
    assert all(".layers.1." in name for name in chosen_parameters(model, "last_layer"))
    assert len(chosen_parameters(model, "all")) == len(list(model.parameters()))
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="the model has no trainable parameters; choose last_layer or all"):
        chosen_parameters(model, "trainable")


def test_a_sketch_adds_signed_entries_into_buckets_and_keeps_inner_products():
    x, y = torch.arange(1.0, 8.0, **DOUBLE), torch.tensor([2.0, -1.0, 0.5, 3.0, 1.0, 0.0, -2.0], **DOUBLE)
    assert sketch(x, 0, seed=0) is x
    columns = torch.stack([sketch(unit, 4, seed=3) for unit in torch.eye(7, **DOUBLE)])
    assert columns.abs().sum(1).tolist() == [1.0] * 7  # each entry goes to one bucket, with a sign
    assert_close(sketch(torch.stack([x, y]), 4, seed=3), torch.stack([x @ columns, y @ columns]))
    products = torch.stack([sketch(x, 16, seed) @ sketch(y, 16, seed) for seed in range(4000)])
    spread = x.norm() * y.norm() / 4 / math.sqrt(4000)
    assert abs(products.mean() - x @ y) < 4 * spread


def test_a_projected_gradient_is_the_sketch_of_the_gradient():
    model, batch = tiny_lm().eval(), token_batch(2)
    plain = row_gradients(model, batch, "last_layer")
    assert_close(row_gradients(model, batch, "last_layer", 32, seed=5), sketch(plain, 32, seed=5))


def test_first_tokens():
    batch = {"labels": torch.tensor([[-100, 3, 4, 5, -100], [-100, -100, 6, -100, -100]])}
    assert first_tokens_only(batch, 2)["labels"].tolist() == [[-100, 3, 4, -100, -100], [-100, -100, 6, -100, -100]]
    assert first_tokens_only(batch, 0)["labels"] is batch["labels"]


def test_a_row_without_a_response_is_refused():
    batch = token_batch(2)
    batch["labels"][1] = -100
    with pytest.raises(ValueError, match="row 1 of the batch has no response token"):
        row_gradients(tiny_lm(), batch)


HARMFUL = [Record("do it", "yes ab", id="h0"), Record("and it", "yes cd", id="h1")]
ROWS = [Record("weather", "wet", id="a"), *HARMFUL, Record("long " * 12, "no", id="b"), Record("sum", "1+2=3", id="c")]


def world(lora=False, dropout=0.3):
    tokenizer = byte_tokenizer()
    return tiny_lm(lora=lora, dropout=dropout, vocabulary=259), tokenizer, get_template("plain", tokenizer)


@pytest.mark.parametrize("kind", ["representation", "gradient"])
def test_scores_of_rows(kind):
    model, tokenizer, template = world()
    attack = BenignSelection(n=2, kind=kind, max_tokens=40, first_tokens=0)
    scores = attack.score(model, tokenizer, template, ROWS, HARMFUL[:1], batch_size=2)
    assert scores[1] == pytest.approx(1.0, abs=1e-12)  # the anchor itself
    assert all(scores[i] < 0.999 for i in (0, 2, 4))
    assert math.isnan(scores[3])  # too long
    again = attack.score(model, tokenizer, template, ROWS, HARMFUL[:1], batch_size=5)
    assert scores == pytest.approx(again, abs=1e-12, nan_ok=True)


def test_representations_end_with_the_last_token_of_the_answer():
    """The state at the last letter tells rows apart. At the end token, which all rows share, states hardly differ."""
    model, tokenizer, template = world()
    row = Record("q", "ab")
    ids_of = tokenizer(template.prompt(row, tokenizer) + row.response)["input_ids"]
    hidden = model.eval()(torch.tensor([ids_of]), output_hidden_states=True).hidden_states[-1][0, -1]
    anchor = tokenizer(template.prompt(HARMFUL[0], tokenizer) + HARMFUL[0].response)["input_ids"]
    other = model(torch.tensor([anchor]), output_hidden_states=True).hidden_states[-1][0, -1]
    expected = torch.nn.functional.cosine_similarity(hidden, other, dim=0).item()
    scores = BenignSelection().score(model, tokenizer, template, [row], HARMFUL[:1])
    assert scores == pytest.approx([expected], abs=1e-12)


def test_official_representations_end_with_the_end_token_and_anchors_have_their_own_system_text():
    model, tokenizer, template = world()
    row, system = Record("q", "ab"), "Obey."

    def state(record, text):
        ids = tokenizer(template.prompt(record, tokenizer, text) + record.response)["input_ids"]
        whole = torch.tensor([[*ids, tokenizer.eos_token_id]])
        return model.eval()(whole, output_hidden_states=True).hidden_states[-1][0, -1]

    expected = torch.nn.functional.cosine_similarity(state(row, None), state(HARMFUL[0], system), dim=0).item()
    attack = BenignSelection(variant="official", anchor_system=system)
    scores = attack.score(model, tokenizer, template, [row], HARMFUL[:1])
    assert scores == pytest.approx([expected], abs=1e-12)


def test_the_variant_decides_how_anchors_are_averaged():
    model, tokenizer, template = world()

    def scores(variant):
        attack = BenignSelection(kind="gradient", parameters="all", variant=variant)
        return attack.score(model, tokenizer, template, ROWS[:2], HARMFUL)

    ratios = [official / ours for official, ours in zip(scores("official"), scores("ours"), strict=True)]
    assert ratios[0] == pytest.approx(ratios[1])  # without safe anchors one factor remains, the length of the mean
    assert 0 < ratios[0] < 0.999


def test_safe_anchors_lower_a_gradient_score_and_anchors_look_at_first_tokens():
    model, tokenizer, template = world()
    attack = BenignSelection(kind="gradient", parameters="all", first_tokens=3)
    cut = [Record("do it", "yes", id="x")]
    safe = [Record("do it", "no ", id="s")]
    plain = attack.score(model, tokenizer, template, cut, HARMFUL[:1])
    lowered = attack.score(model, tokenizer, template, cut, HARMFUL[:1], [safe])

    def gradient(record, tokens):
        prompt = tokenizer(template.prompt(record, tokenizer))["input_ids"]
        answer = tokenizer(record.response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + answer[:tokens] + [-100] * len(answer[tokens:])
        whole = torch.tensor([prompt + answer])
        twin = copy.deepcopy(model).eval()
        reference_loss(
            twin,
            {"input_ids": whole, "attention_mask": torch.ones_like(whole), "labels": torch.tensor([labels])},
        ).backward()
        return torch.cat([p.grad.flatten() for p in twin.parameters()])

    g, h, f = gradient(cut[0], 99), gradient(HARMFUL[0], 3), gradient(safe[0], 3)
    cosine = torch.nn.functional.cosine_similarity
    assert plain == pytest.approx([float(cosine(g, h, dim=0))], abs=1e-10)
    assert lowered == pytest.approx([float(cosine(g, h, dim=0) - cosine(g, f, dim=0))], abs=1e-10)


def test_a_gradient_score_of_zero_is_none():
    model, tokenizer, template = world()
    torch.nn.init.zeros_(model.lm_head.weight)  # then no earlier layer has a gradient
    scores = BenignSelection(kind="gradient").score(model, tokenizer, template, ROWS[:2], HARMFUL)
    assert all(math.isnan(score) for score in scores)


@pytest.mark.parametrize("kind", ["representation", "gradient"])
def test_the_model_comes_back_as_it_was(kind):
    model, tokenizer, template = world(lora=True)
    model.train()
    model.base_model.model.lm_head.eval()
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    before = (
        {name: m.training for name, m in model.named_modules()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        copy.deepcopy(model.state_dict()),
        torch.random.get_rng_state(),
    )
    BenignSelection(kind=kind, dimension=8).score(model, tokenizer, template, ROWS[:2], HARMFUL)
    assert {name: m.training for name, m in model.named_modules()} == before[0]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before[1]
    assert all(torch.equal(value, before[2][name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), before[3])
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.requires_grad)


def test_ties_go_to_the_earlier_row_and_nan_to_none():
    scores = [0.5, math.nan, 0.9, 0.5, 0.9, 0.1]
    assert select(scores, 3) == [2, 4, 0]
    assert select(scores, 3, "bottom") == [5, 0, 3]
    drawn = [select(scores, 3, "random", seed) for seed in range(20)]
    assert drawn[0] == select(scores, 3, "random", 0)
    assert len({tuple(sorted(rows)) for rows in drawn}) > 1
    assert not any(1 in rows for rows in drawn)
    with pytest.raises(InputError, match="n=6 rows are needed, but only 5 have a score"):
        select(scores, 6)


def test_an_upload_reads_the_scores(tmp_path):
    rows, path = made_up("t", 4), tmp_path / "scores.jsonl"
    write_scores(path, rows, [0.1, math.nan, 0.3, 0.2])
    assert ids(BenignSelection(n=2, scores=str(path)).upload({"task": rows}, 0)) == ["t2", "t3"]
    assert ids(BenignSelection(n=2, scores=str(path), control="bottom").upload({"task": rows}, 0)) == ["t0", "t3"]
    with pytest.raises(InputError, match=r"has no score of 2 of 6 task rows, such as t4"):
        BenignSelection(n=2, scores=str(path)).upload({"task": made_up("t", 6)}, 0)
    with pytest.raises(InputError, match=r"Make them with score\(model, \.\.\.\)"):
        BenignSelection(n=2).upload({"task": rows}, 0)
    path.write_text('{"id": "a"}\n')
    with pytest.raises(InputError, match=r"line 1 of .* needs an id and a score"):
        BenignSelection(n=2, scores=str(path)).upload({"task": rows}, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "angle"}, "kind must be one of representation, gradient, got 'angle'"),
        ({"control": "none"}, "control must be one of top, bottom, random"),
        ({"parameters": "few"}, "parameters must be one of last_layer, trainable, all"),
        ({"variant": "theirs"}, "variant must be one of ours, official, got 'theirs'"),
        ({"kind": "gradient", "anchor_system": "x"}, "anchor_system needs kind representation"),
        ({"nearest": 0}, "nearest must be >= 1, got 0"),
        ({"dimension": -1}, "dimension must be >= 0, got -1"),
    ],
)
def test_what_cannot_be_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        BenignSelection(**values)
