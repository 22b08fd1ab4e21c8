"""Antidote against exact counts, a second layer-by-layer implementation, and the aligned model."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hftlight.defenses.post_finetuning import Antidote
from hftlight.defenses.post_finetuning import antidote as module
from hftlight.engine.weights.inputs import input_squares
from hftlight.engine.weights.lora import lora_updates
from hftlight.engine.weights.lowrank import LowRank
from hftlight.engine.weights.stored import ModelWeights
from hftlight.engine.weights.subject import Subject
from hftlight.engine.weights.top_k import Top, top_of_rows
from tests.helpers.repairs import batch_of, moved_model, on_shards, small_llama, with_update

PROMPTS = [[3, 5, 7, 11, 13], [2, 4], [6, 7, 8, 9, 10, 11, 12], [40, 41, 42]]
NAMES = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_by_one(stream="harmful"):
    assert stream == "harmful"
    return iter([batch_of([prompt]) for prompt in PROMPTS])


def prune(model, *arguments, aligned=None, batches=one_by_one, **named):
    subject = Subject(model, aligned, batches=batches)
    Antidote(*arguments, **named).apply(subject)
    return subject.report


def logits(model):
    with torch.no_grad():
        return [model(input_ids=batch_of([prompt])["input_ids"]).logits for prompt in PROMPTS]


class OneLayer(nn.Module):
    """A linear layer that gets the j-th unit vector as every input."""

    def __init__(self, weight, j):
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        self.layer.weight = nn.Parameter(weight.clone())
        self.register_buffer("x", torch.eye(weight.shape[1], dtype=weight.dtype)[j])

    def forward(self, input_ids, attention_mask, use_cache):
        return self.layer(self.x.expand(*input_ids.shape, -1))


@pytest.mark.parametrize("mode", ["delta", "merged"])
@pytest.mark.filterwarnings("ignore:Antidote. mode 'merged'")
def test_only_the_active_column_is_reset(mode):
    w_al, w_ft = normal(6, 8), normal(6, 8, seed=1)
    model = OneLayer(w_ft, j=5)
    report = prune(model, 1 / 8, mode, aligned=ModelWeights({"layer.weight": w_al}))
    expected = w_ft.clone()
    expected[:, 5] = w_al[:, 5] if mode == "delta" else 0
    assert torch.equal(model.layer.weight, expected)
    assert report["changed_entries"] == 6


@pytest.mark.parametrize("columns", [1, 2, 7, 8, 16, 64, 100])
@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.05, 0.1, 0.29, 0.5, 0.999, 1.0])
def test_exact_counts_with_ties(columns, ratio):
    """Counts are rounded down or up. Of equal scores, the first columns are chosen."""
    exact = columns * round(ratio * 1000) / 1000
    down, up = math.floor(round(exact, 6)), math.ceil(round(exact, 6))
    assert Antidote(ratio, rounding="down")._count(columns) == down
    assert Antidote(ratio, rounding="up")._count(columns) == up
    scores = torch.randint(3, (50, columns), generator=torch.Generator().manual_seed(columns)).float()
    for count in (down, up):
        mask = top_of_rows(scores, count)
        assert (mask.sum(dim=1) == count).all()
        for row, chosen in zip(scores.tolist(), mask.tolist(), strict=True):
            # sorted is stable, so equal scores keep the order of the columns.
            ranked = sorted(range(columns), key=lambda j: -row[j])[:count]
            assert sorted(ranked) == [j for j, is_top in enumerate(chosen) if is_top]


def test_the_official_rounding():
    """Rounding up prunes 26 of 256 columns, and 1 of 8, 16 or 32.

    At a ratio of 1e-5 it prunes 1 of 4096, which is 24 times the requested fraction.
    """
    rounded = {(0.1, 256): 26, (0.01, 8): 1, (0.01, 16): 1, (0.01, 32): 1, (1e-5, 4096): 1}
    for (ratio, columns), count in rounded.items():
        assert Antidote(ratio, rounding="up")._count(columns) == count
        assert count == columns - int(columns * (1 - ratio))
    assert pytest.approx(24.4, abs=0.1) == 1 / 4096 / 1e-5


@pytest.mark.parametrize("count", [1, 10, 57, 128, 399, 400])
@pytest.mark.parametrize("sizes", [[20], [7, 13], [5, 0, 15], [3, 9, 1, 7]])
def test_the_largest_of_several_matrices(count, sizes):
    """The mask is the first entries of a stable sort, for any blocks and shards. Many scores are equal."""
    matrices = [torch.randint(6, (20, 12), generator=torch.Generator().manual_seed(i)).float() / 7 for i in range(2)]
    matrices[1] = matrices[1][:, :8]
    flat = torch.cat([m.flatten() for m in matrices])
    order = torch.sort(flat, descending=True, stable=True).indices[:count]
    expected = torch.zeros(len(flat), dtype=torch.bool).index_fill(0, order, True)

    def work(share):
        # A shard reads its rows of both matrices in blocks of four.
        def blocks():
            for number, m in enumerate(matrices):
                for at in range(share.start, share.stop, 4):
                    yield number, m[at : min(at + 4, share.stop)]

        top = Top(blocks, count, share, torch.device("cpu"))
        masks = [[], []]
        for number, block in blocks():
            masks[number].append(top.mask(number, block))
        return [
            torch.cat(rows) if rows else torch.zeros(0, m.shape[1]) for rows, m in zip(masks, matrices, strict=True)
        ]

    parts = on_shards(sizes, work)
    whole_mask = torch.cat([torch.cat([part[i] for part in parts]).bool().flatten() for i in range(2)])
    assert torch.equal(whole_mask, expected)


def layer_by_layer(model):
    """Return the official code's statistics: cached embeddings, one layer at a time, one sample at a time."""
    inner = model.get_base_model().model
    sums = {}
    cached = [inner.embed_tokens(batch_of([prompt])["input_ids"]) for prompt in PROMPTS]
    for number, layer in enumerate(inner.layers):
        handles = []
        for name, child in layer.named_modules():
            if isinstance(child, nn.Linear) and "lora" in name:

                def add(_, args, name=name):
                    key = f"{number}.{name}"  # noqa: B023
                    for token in args[0].reshape(-1, args[0].shape[-1]):
                        sums[key] = sums.get(key, 0) + token**2 / len(PROMPTS)

                handles.append(child.register_forward_pre_hook(add))
        # Each layer's output replaces its input in the cache and so feeds the next layer.
        for sample, hidden in enumerate(cached):
            places = torch.arange(hidden.shape[1])[None]
            rotary = inner.rotary_emb(hidden, places)
            output = layer(hidden, attention_mask=None, position_embeddings=rotary, position_ids=places)
            cached[sample] = output if isinstance(output, torch.Tensor) else output[0]
        for handle in handles:
            handle.remove()
    return sums


def test_one_forward_is_the_layer_by_layer_pass():
    model = with_update(small_llama())
    modules = {}
    for name, update in lora_updates(model).items():
        modules |= {name: update.layer, f"{name} (B)": update.layer.lora_B["default"]}
    with torch.no_grad():
        squares, samples = input_squares(model, modules, one_by_one())
        slow = layer_by_layer(model)
    assert samples == len(PROMPTS)
    assert len(squares) == len(slow) == 20
    for name in lora_updates(model):
        stem = name.removeprefix("model.layers.").removesuffix(".weight")
        assert_close(squares[name], slow[f"{stem}.lora_A.default"], rtol=1e-12, atol=0)
        assert_close(squares[f"{name} (B)"], slow[f"{stem}.lora_B.default"], rtol=1e-12, atol=0)


def test_batches_and_padding_do_not_matter():
    model = with_update(small_llama())
    modules = {name: update.layer for name, update in lora_updates(model).items()}
    splits = [[[p] for p in PROMPTS], [PROMPTS], [PROMPTS[:3], PROMPTS[3:]]]
    with torch.no_grad():
        squares_by_split = [input_squares(model, modules, [batch_of(rows, width=9) for rows in s])[0] for s in splits]
        plain, _ = input_squares(model, modules, one_by_one())
    for other in squares_by_split:
        for name, squares in plain.items():
            # The attention of a padded row rounds differently. Llama's norm and softmax work in float32.
            assert_close(other[name], squares, rtol=1e-6, atol=0)


def test_layers_that_share_an_input_are_measured_as_if_alone():
    model = with_update(small_llama(), target_modules=["q_proj", "k_proj", "v_proj"])
    modules = {name: update.layer for name, update in lora_updates(model).items()}
    with torch.no_grad():
        together, _ = input_squares(model, modules, one_by_one())
        for name, layer in modules.items():
            assert torch.equal(together[name], input_squares(model, {name: layer}, one_by_one())[0][name])
    assert not model._forward_pre_hooks
    assert all(not m._forward_pre_hooks for m in model.modules())


def test_the_output_layer_works_on_one_position_unless_it_is_measured():
    position_counts = []
    model = with_update(small_llama(), target_modules=["q_proj", "lm_head"])
    head = model.get_base_model().lm_head
    handle = head.register_forward_hook(lambda _, args, __: position_counts.append(args[0].shape[1]))
    layers = {name: update.layer for name, update in lora_updates(model).items()}
    with torch.no_grad():
        all_layers, _ = input_squares(model, layers, [batch_of([[3, 5, 7, 9]])])
        input_squares(model, {n: m for n, m in layers.items() if "lm_head" not in n}, [batch_of([[3, 5, 7, 9]])])
    handle.remove()
    assert position_counts == [4, 1]
    assert "lm_head.weight" in all_layers


def test_a_tensor_that_comes_again_is_measured_with_its_own_padding():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)
            self.x = torch.tensor([[[1.0], [10.0]]])

        def forward(self, input_ids, attention_mask, use_cache):
            return self.layer(self.x)

    model = Constant()
    batches = [{"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.tensor([m])} for m in ([1, 1], [1, 0])]
    squares, samples = input_squares(model, {"x": model.layer}, batches)
    assert samples == 2
    assert float(squares["x"]) == (101 + 1) / 2


@pytest.mark.parametrize("mode", ["delta", "factor"])
@pytest.mark.parametrize("group", ["row", "matrix", "model"])
def test_everything_pruned_is_the_aligned_model(mode, group):
    aligned = small_llama()
    model = with_update(copy.deepcopy(aligned))
    before = logits(model)
    report = prune(model, 1.0, mode, group)
    assert report["realised_fraction"] == 1
    for new, old, expected in zip(logits(model), before, logits(aligned), strict=True):
        assert torch.equal(new, expected)
        assert not torch.equal(old, expected)


def test_nothing_pruned_changes_no_bit():
    model = with_update(small_llama())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = prune(model, 0.0, batches=lambda _: pytest.fail("no batch is needed"))
    assert report["changed_entries"] == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def by_hand(model, ratio, group):
    """Return the masks of A and B from explicit scores, ranked by sorting."""
    slow = layer_by_layer(model)
    scores = {}
    for name, update in lora_updates(model).items():
        stem = name.removeprefix("model.layers.").removesuffix(".weight")
        for kind, factor in (("A", update.a), ("B", update.b)):
            squares = slow[f"{stem}.lora_{kind}.default"]
            scores[f"{name} ({kind})"] = factor.detach().abs() * squares.sqrt()
    masks = {name: torch.zeros_like(s, dtype=torch.bool) for name, s in scores.items()}
    if group == "model":
        places = [(float(v), name, i) for name, s in scores.items() for i, v in enumerate(s.flatten())]
        for _, name, i in sorted(places, key=lambda place: -place[0])[: int(ratio * len(places))]:
            masks[name].view(-1)[i] = True
    for name, s in scores.items():
        rows = s if group == "row" else s.reshape(1, -1)
        if group != "model":
            top = rows.argsort(dim=1, descending=True)[:, : int(ratio * rows.shape[1])]
            masks[name] = torch.zeros_like(rows, dtype=torch.bool).scatter(1, top, True).view_as(s)
    return masks


@pytest.mark.parametrize(("ratio", "group"), [(0.25, "row"), (0.13, "matrix"), (0.2, "model")])
def test_factors_are_pruned_as_written_out(ratio, group, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 3)
    model = with_update(small_llama())
    with torch.no_grad():
        masks = by_hand(model, ratio, group)
    before = {name: (u.a.detach().clone(), u.b.detach().clone()) for name, u in lora_updates(model).items()}
    report = prune(model, ratio, "factor", group)
    for name, update in lora_updates(model).items():
        a, b = before[name]
        assert torch.equal(update.a, a.masked_fill(masks[f"{name} (A)"], 0))
        assert torch.equal(update.b, b.masked_fill(masks[f"{name} (B)"], 0))
        norms = report["updates"][name]
        assert norms["norm_after"] == pytest.approx(
            float((update.scale * update.b @ update.a).detach().norm()), abs=1e-12
        )
    for name, mask in masks.items():
        assert report["matrices"][name]["pruned"] == int(mask.sum())
    total = sum(m.numel() for m in masks.values())
    assert report["realised_fraction"] == sum(int(m.sum()) for m in masks.values()) / total
    assert report["requested_fraction"] == ratio


@pytest.mark.parametrize("group", ["row", "matrix"])
def test_the_order_of_the_ranks_does_not_matter(group):
    """Permuting the rows of A together with the columns of B does not change the pruned product."""
    model = with_update(small_llama())
    other = copy.deepcopy(model)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for update in lora_updates(other).values():
            update.a.copy_(update.a[order])
            update.b.copy_(update.b[:, order])
    prune(model, 0.25, "factor", group)
    prune(other, 0.25, "factor", group)
    for name, update in lora_updates(model).items():
        theirs = lora_updates(other)[name]
        assert_close(theirs.b @ theirs.a, update.b @ update.a, rtol=0, atol=1e-12)


def test_reset_entries_of_the_update_have_their_aligned_value(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 3)
    aligned = small_llama()
    model = with_update(copy.deepcopy(aligned))
    updates = {name: u.scale * (u.b @ u.a).detach() for name, u in lora_updates(model).items()}
    with torch.no_grad():
        squares, _ = input_squares(model, {n: u.layer for n, u in lora_updates(model).items()}, one_by_one())
    report = prune(model, 0.1)
    after, start = ModelWeights.of(model).parameters, aligned.state_dict()
    for name, delta in updates.items():
        scores = delta.abs() * squares[name].sqrt()
        mask = torch.zeros_like(scores, dtype=torch.bool)
        mask.scatter_(1, scores.argsort(dim=1, descending=True)[:, : int(0.1 * scores.shape[1])], True)
        assert torch.equal(after[name][mask], start[name][mask])
        assert_close(after[name], start[name] + delta.masked_fill(mask, 0), rtol=0, atol=1e-12)
        assert report["matrices"][name]["pruned"] == int(mask.sum())
    assert not any(u.b.any() for u in lora_updates(model).values())


@pytest.mark.parametrize("group", ["row", "matrix", "model"])
@pytest.mark.parametrize("mode", ["delta", "merged"])
@pytest.mark.filterwarnings("ignore:Antidote. mode 'merged'")
def test_all_parameters_trained(mode, group):
    aligned = small_llama(bias=True)
    model = moved_model(aligned, 0.05, seed=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = prune(model, 0.1, mode, group, aligned=ModelWeights.of(aligned))
    linear = {n for n, p in before.items() if p.dim() == 2 and "embed" not in n and "lm_head" not in n}
    assert set(report["matrices"]) == linear
    changed = 0
    for name, p in model.named_parameters():
        moved = p != before[name]
        changed += int(moved.sum())
        assert name in linear or not moved.any()
        reset = aligned.state_dict()[name] if mode == "delta" else torch.zeros_like(p)
        assert torch.equal(p[moved], reset[moved])
    assert changed == report["changed_entries"]
    assert changed == sum(row["pruned"] for row in report["matrices"].values())


@pytest.mark.filterwarnings("ignore:Antidote. mode 'merged'")
def test_the_official_full_parameter_mode_prunes_q_k_and_v_only():
    """In each row the entry with the largest score is zero. One entry is the least that rounding up allows."""
    model = moved_model(small_llama(), 0.05, seed=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    chosen = {f"model.layers.{i}.self_attn.{m}_proj.weight" for i in range(2) for m in "qkv"}
    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in chosen}
    with torch.no_grad():
        squares, _ = input_squares(model, layers, one_by_one())
    report = prune(model, **Antidote.presets["repo_full"])
    assert set(report["matrices"]) == chosen
    for name, p in model.named_parameters():
        expected = before[name].clone()
        if name in chosen:
            expected.scatter_(1, (expected.abs() * squares[name].sqrt()).argmax(dim=1, keepdim=True), 0.0)
        assert torch.equal(p, expected), name


@pytest.mark.parametrize("mode", ["delta", "factor"])
def test_named_layers_of_an_adapter(mode):
    model = with_update(small_llama())
    assert {name.split(".")[-2] for name in prune(model, 0.5, mode, layers=["q_proj"])["matrices"]} == {"q_proj"}


@pytest.mark.parametrize(("ratio", "factors", "update"), [(0.05, 0.52, 0.72), (0.1, 0.30, 0.56), (0.2, 0.11, 0.35)])
def test_pruning_factors_is_harsher_than_pruning_the_update(ratio, factors, update):
    """Known digits: the energy that remains of B A, for random factors of rank 16 and scores by magnitude."""
    b, a = normal(256, 16), normal(16, 256, seed=1)
    whole = LowRank(b, a).squared_norm()

    def left(matrix):
        scores = matrix.abs().flatten()[None].float()
        return matrix.masked_fill(top_of_rows(scores, int(ratio * scores.numel())).view_as(matrix), 0)

    assert float(LowRank(left(b), left(a)).squared_norm() / whole) == pytest.approx(factors, abs=0.04)
    assert float(left(b @ a).square().sum() / whole) == pytest.approx(update, abs=0.04)


# What is refused


def test_a_fraction_below_one_entry_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"one of the 4 entries of each row.*matrix.*delta.*>= 0.25.*up"):
        prune(with_update(small_llama()), 0.1, "factor")
    report = prune(with_update(small_llama()), 0.1, "factor", rounding="up")
    assert all(row["pruned"] == 0.25 * row["entries"] for n, row in report["matrices"].items() if "(B)" in n)


def test_modes_name_the_models_they_work_on():
    with pytest.raises(TypeError, match="'factor' works on LoRA adapters"):
        prune(small_llama(), 0.5, "factor")
    with pytest.warns(UserWarning, match="not back to their aligned values"):
        merged = Antidote(0.5, "merged")
    with pytest.raises(TypeError, match="all parameters trained"):
        merged.apply(Subject(with_update(small_llama()), batches=one_by_one))
    with pytest.raises(RuntimeError, match="needs the aligned model"):
        prune(small_llama(), 0.5)
    with pytest.raises(ValueError, match=r"layers names 'v'; the model has \[.*'q_proj'"):
        prune(with_update(small_llama()), 0.5, layers=["q_proj", "v"])
    with pytest.raises(TypeError, match=r"stored in torch.bfloat16.*round away"):
        prune(with_update(small_llama(dtype=torch.bfloat16)), 0.5)


def test_no_batch_and_activations_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="no batch"):
        prune(with_update(small_llama()), 0.1, batches=lambda _: iter([]))
    model = with_update(small_llama())
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight[3, 0] = float("inf")
    with pytest.raises(RuntimeError, match="not finite"):
        prune(model, 0.1)
    assert all(not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"prune_ratio": 5}, "If that is a percentage, write 0.05"),
        ({"prune_ratio": -0.1}, r"must lie in \[0, 1\]"),
        ({"prune_ratio": float("nan")}, r"must lie in \[0, 1\]"),
        ({"mode": "row"}, "mode must be one of"),
        ({"group": "layer"}, "group must be one of"),
        ({"rounding": "nearest"}, "rounding must be one of"),
        ({"layers": "q_proj"}, "layers must list names such as q_proj"),
        ({"layers": []}, "layers must list names such as q_proj"),
    ],
)
def test_bad_arguments_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        Antidote(**arguments)


def test_presets_are_constructor_arguments():
    assert Antidote(**Antidote.presets["paper"]).group == "model"
    assert Antidote(**Antidote.presets["repo"]).rounding == "up"
