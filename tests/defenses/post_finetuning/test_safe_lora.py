"""Safe LoRA against its closed forms, the dense operator, hand-made shards, and models on disk."""

import copy
import math
import sys

import pytest
import torch
from torch.testing import assert_close

from hftlight.defenses.post_finetuning.safe_lora import SafeLoRA, WeightUpdate, chosen, dense_update, safe_lora
from hftlight.engine.weights import stored as engine_weights
from hftlight.engine.weights.lora import lora_updates
from hftlight.engine.weights.lowrank import LowRank
from hftlight.engine.weights.shards import Share
from hftlight.engine.weights.spectrum import leading
from hftlight.engine.weights.stored import Adapted, Difference, ModelWeights, stored
from hftlight.engine.weights.subject import Subject
from tests.helpers.buffers import LiveBytes
from tests.helpers.repairs import moved_model, on_shards, small_llama, with_update

NAME = "weight"
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(rows, columns, seed=0):
    return torch.linalg.qr(normal(rows, columns, seed=seed)).Q


def dense_pair(v, base=None):
    """Return V as the difference of two stored models."""
    base = torch.zeros_like(v) if base is None else base
    return Difference(ModelWeights({NAME: base + v}), ModelWeights({NAME: base}), NAME)


def thin(v, b, a, scale=1.0, rows=None):
    """Return the update s B A of a process that has only the given rows of B."""
    rows = rows or Share(0, len(b), len(b))
    mine = b[rows.start : rows.stop].clone()
    gram = scale**2 * (a @ a.T)
    return WeightUpdate(NAME, v, rows, mine, gram, lambda: iter([(slice(None), mine)]))


def repaired(part, operator=None, factor=None, strength=1.0):
    cosine, _, displacement, *_ = part.measure().tolist()
    part.write(operator, factor or 1 / math.sqrt(displacement), strength)
    return part.target, cosine


def dense_form(v, b, a):
    """Return C B for the dense C = V V^T / ||V||_F, and the cosine between B A and C B A."""
    c = v @ v.T / v.norm()
    before, after = b @ a, c @ b @ a
    return c @ b, float((before * after).sum() / before.norm() / after.norm())


@pytest.mark.parametrize("kind", ["thin", "dense"])
def test_in_the_span_it_shrinks_and_across_it_it_deletes(kind):
    """Let V = s U_k W_k^T.

    If B lies in the span of U_k, it becomes (s / sqrt k) B with cosine 1. If B is orthogonal to U_k, it becomes 0 with
    cosine 0.
    """
    s, k = 0.3, 4
    u, w = orthonormal(24, 2 * k), orthonormal(16, k, seed=1)
    v = LowRank(u[:, :k], w.T, s) if kind == "thin" else dense_pair(s * u[:, :k] @ w.T)
    a = normal(3, 16, seed=2)
    inside, across = u[:, :k] @ normal(k, 3, seed=3), u[:, k:] @ normal(k, 3, seed=4)
    new, cosine = repaired(thin(v, inside, a))
    assert_close(new, s / math.sqrt(k) * inside, rtol=0, atol=1e-12)
    assert cosine == pytest.approx(1, abs=1e-12)
    new, cosine = repaired(thin(v, across, a))
    assert_close(new, torch.zeros_like(across), rtol=0, atol=1e-12)
    assert cosine == pytest.approx(0, abs=1e-12)


def test_three_times_the_alignment_writes_three_times_the_update_with_the_same_cosine():
    v, b, a = normal(20, 12), normal(20, 4, seed=1), normal(4, 12, seed=2)
    once, cosine = repaired(thin(dense_pair(v), b, a))
    thrice, cosine_of_thrice = repaired(thin(dense_pair(3 * v), b, a))
    assert_close(thrice, 3 * once, rtol=0, atol=1e-12)
    assert cosine_of_thrice == pytest.approx(cosine, abs=1e-12)


@pytest.mark.parametrize("shape", [(24, 24), (40, 12), (12, 40), (4, 24)])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_the_thin_form_is_the_dense_one(shape, strength, monkeypatch):
    """Thin and dense form agree to 1e-12 in float64, with blocks of three rows.

    The last shape has as many outputs as the update's rank.
    """
    monkeypatch.setattr(engine_weights, "BLOCK", 3 * shape[1])
    v, b, a = normal(*shape), normal(shape[0], 4, seed=1), normal(4, shape[1], seed=2)
    image, expected = dense_form(v, b, a)
    new, cosine = repaired(thin(dense_pair(v, base=normal(*shape, seed=3)), b, a, scale=2.0), strength=strength)
    assert_close(new, (1 - strength) * b + strength * image, rtol=0, atol=1e-12)
    assert cosine == pytest.approx(expected, abs=1e-12)


def test_a_thin_alignment_is_the_dense_one():
    up, down = normal(20, 3), normal(3, 14, seed=1)
    b, a = normal(20, 4, seed=2), normal(4, 14, seed=3)
    new, cosine = repaired(thin(LowRank(up, down, 0.5), b, a))
    image, expected = dense_form(0.5 * up @ down, b, a)
    assert_close(new, image, rtol=0, atol=1e-12)
    assert cosine == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("sizes", [[7, 13], [5, 0, 15], [3, 9, 1, 7]])
@pytest.mark.parametrize("kind", ["thin", "dense"])
def test_uneven_shards_give_what_one_process_gives(sizes, kind):
    up, down = normal(20, 3), normal(3, 14, seed=1)
    v = LowRank(up, down, 0.5) if kind == "thin" else dense_pair(normal(20, 14, seed=5))
    b, a = normal(20, 4, seed=2), normal(4, 14, seed=3)
    whole = thin(v, b, a)
    numbers = whole.measure()
    parts = on_shards(sizes, lambda share: (part := thin(v, b, a, rows=share), part.measure()))
    for _, shard_numbers in parts:
        assert_close(shard_numbers, numbers, rtol=1e-12, atol=1e-12)
    counts = on_shards(sizes, lambda share: (p := thin(v, b, a, rows=share), p.measure(), p.write(None, 2.0, 0.5)))
    expected = whole.write(None, 2.0, 0.5)
    assert_close(torch.cat([part.target for part, _, _ in counts]), whole.target, rtol=0, atol=1e-12)
    for _, _, shard_counts in counts:
        assert_close(torch.stack(shard_counts), torch.stack(expected), rtol=1e-12, atol=0)


def test_the_papers_exact_operator_is_the_identity_for_square_weights():
    """If V has full row rank, V (V^T V)^-1 V^T is the identity. The operator is then no defense."""
    v = normal(24, 24)
    projector = v @ torch.linalg.inv(v.T @ v) @ v.T
    assert_close(projector, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-9)
    u, s = leading(dense_pair(v), 24, Share(0, 24, 24), v)
    assert_close(u @ u.T, projector, rtol=0, atol=1e-9)
    assert_close(s, torch.linalg.svdvals(v), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("shape", "expected"), [((384, 384), 0.707), ((1024, 384), 0.524), ((384, 1024), 0.852)])
def test_the_null_band_of_a_random_alignment(shape, expected):
    """Known digits: sqrt(participation ratio / out) is .707 for square, .524 for tall, .852 for wide V."""
    v, b, a = normal(*shape), normal(shape[0], 8, seed=1), normal(8, shape[1], seed=2)
    cosine, _, _, _, null, spread = thin(dense_pair(v), b, a).measure().tolist()
    assert null == pytest.approx(expected, abs=0.02)
    assert cosine == pytest.approx(null, abs=4 * spread)
    assert 0 < spread < 0.05


def test_the_null_band_of_a_thin_alignment_is_exact():
    up, down = normal(64, 3), normal(3, 40, seed=1)
    v = up @ down
    null = thin(LowRank(up, down), normal(64, 4, seed=2), normal(4, 40, seed=3)).measure()[4]
    assert float(null) == pytest.approx(float(v.norm() ** 2 / (8 * (v @ v.T).norm())), abs=1e-12)


def spiked(out=48, inner=32):
    """Return V with singular values 5, 4, 3 and small ones, its left singular vectors and the values."""
    values = torch.tensor([5.0, 4.0, 3.0] + [0.05] * (inner - 3), dtype=torch.float64)
    u, w = orthonormal(out, inner), orthonormal(inner, inner, seed=1)
    return u * values @ w.T, u, values


@pytest.mark.parametrize("kind", ["thin", "dense"])
def test_leading_directions(kind):
    v, u, values = spiked()
    if kind == "thin":
        v = u[:, :3] * values[:3] @ orthonormal(32, 32, seed=1)[:, :3].T
        form = LowRank(u[:, :3] * values[:3], orthonormal(32, 32, seed=1)[:, :3].T)
    else:
        form = dense_pair(v)
    directions, s = leading(form, 3, Share(0, 48, 48), v)
    assert_close(s, values[:3], rtol=1e-6, atol=0)
    assert_close(directions @ directions.T, u[:, :3] @ u[:, :3].T, rtol=0, atol=1e-6)
    parts = on_shards([11, 20, 17], lambda share: leading(form, 3, share, v))
    for theirs, _ in parts:
        assert_close(theirs @ theirs.T, directions @ directions.T, rtol=0, atol=1e-9)


def test_exactly_n_are_chosen_with_ties_and_none_above_the_threshold():
    cosines = {"e": 0.5, "a": 0.2, "d": 0.2, "c": 0.2, "b": 0.1}
    assert chosen(cosines, 1, None) == ["b"]
    assert chosen(cosines, 3, None) == ["b", "a", "d"]
    assert chosen(cosines, 5, None) == ["b", "a", "d", "c", "e"]
    assert chosen(cosines, None, 0.2) == ["b", "a", "d", "c"]
    assert chosen({"a": 0.3500001, "b": 0.35}, None, 0.35) == ["b"]


# Models


@pytest.fixture
def pair(tmp_path):
    """Return a base and an aligned model with biases, and the folder that both are saved in."""
    base = small_llama(bias=True)
    aligned = moved_model(base, 0.02, seed=1)
    for kind, model in (("base", base), ("aligned", aligned)):
        model.save_pretrained(tmp_path / kind)
    return base, aligned, tmp_path


def by_hand(base, aligned, model, names):
    """Return B by weight name, with C B for ``names`` (``None``: all), and the cosine of every weight.

    The dense matrices are looked up by name.
    """
    before, after = base.state_dict(), aligned.state_dict()
    new, cosines = {}, {}
    for name, update in lora_updates(model).items():
        image, cosines[name] = dense_form(after[name] - before[name], update.b.detach(), update.a.detach())
        new[name] = image if names is None or name in names else update.b.detach().clone()
    return new, cosines


@pytest.mark.parametrize("rank", [4, 16], ids=["rank 4", "rank equals outputs"])
def test_a_model_is_repaired_by_name(pair, rank):
    """Every weight gets its own V, even with biases and with B and A of one shape.

    Exactly the N weights with the lowest cosines are projected.
    """
    base, aligned, folder = pair
    model = with_update(copy.deepcopy(aligned), r=rank)
    _, cosines = by_hand(base, aligned, model, [])
    lowest = sorted(cosines, key=cosines.get)[:3]
    expected, _ = by_hand(base, aligned, model, lowest)
    other_parameters = {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_B." not in name}
    report = safe_lora(model, str(folder / "base"), number=3)
    for name, update in lora_updates(model).items():
        assert_close(update.b.detach(), expected[name], rtol=0, atol=1e-12)
        assert report["weights"][name]["cosine"] == pytest.approx(cosines[name], abs=1e-12)
    assert report["projected"] == lowest
    assert report["changed_entries"] == sum(lora_updates(model)[name].b.numel() for name in lowest)
    assert all(
        torch.equal(p, other_parameters[name]) for name, p in model.named_parameters() if name in other_parameters
    )


def test_threshold_and_fraction(pair):
    base, aligned, folder = pair
    model = with_update(copy.deepcopy(aligned))
    _, cosines = by_hand(base, aligned, model, [])
    middle = sorted(cosines.values())[4]
    report = safe_lora(with_update(copy.deepcopy(aligned)), str(folder / "base"), threshold=middle + 1e-9)
    assert len(report["projected"]) == 5
    report = safe_lora(with_update(copy.deepcopy(aligned)), str(folder / "base"), fraction=0.39)
    assert len(report["projected"]) == 3
    with pytest.warns(UserWarning, match="lowest cosine"):
        report = safe_lora(model, str(folder / "base"), threshold=0.0)
    assert report["changed_entries"] == 0
    with pytest.raises(ValueError, match="only 10 weights"):
        safe_lora(with_update(copy.deepcopy(aligned)), str(folder / "base"), number=11)


def test_from_folders_as_from_memory(pair):
    """Aligned weights under the adapter and aligned weights from a folder give the same result."""
    _, aligned, folder = pair
    models = [with_update(copy.deepcopy(aligned)) for _ in range(2)]
    safe_lora(models[0], str(folder / "base"), fraction=1.0)
    safe_lora(models[1], str(folder / "base"), str(folder / "aligned"), fraction=1.0)
    for name, update in lora_updates(models[0]).items():
        assert torch.equal(update.b, lora_updates(models[1])[name].b)


def test_an_alignment_adapter_needs_no_dense_weights(tmp_path):
    """After an alignment with LoRA, the thin form equals the result from merged weights.

    Weights that the alignment adapter does not cover stay unchanged.
    """
    base = small_llama()
    base.save_pretrained(tmp_path / "base")
    alignment = with_update(copy.deepcopy(base), seed=3, r=2, use_rslora=True, target_modules=["q_proj", "v_proj"])
    alignment.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    alignment.save_pretrained(tmp_path / "aligned")
    merged = alignment.merge_and_unload()
    model = with_update(copy.deepcopy(merged))
    expected, cosines = by_hand(base, merged, model, [n for n in lora_updates(model) if "q_proj" in n or "v_proj" in n])
    aligned = stored(tmp_path / "aligned")
    assert isinstance(aligned, Adapted)
    subject = Subject(model, aligned)
    assert all(isinstance(subject.alignment(n), LowRank | None) for n in lora_updates(model))
    with pytest.warns(UserWarning, match="6 weights stay unchanged"):
        report = safe_lora(model, str(tmp_path / "base"), str(tmp_path / "aligned"), fraction=1.0)
    for name, update in lora_updates(model).items():
        assert_close(update.b.detach(), expected[name], rtol=0, atol=1e-12)
    assert {name for name in cosines if "q_proj" in name or "v_proj" in name} == set(report["projected"])
    assert set(report["skipped"].values()) == {"the alignment did not move it"}


@pytest.mark.parametrize("operator", ["released", "normalized"])
def test_stored_scores_are_all_that_an_edit_needs(pair, monkeypatch, operator):
    """The stored product V V^T B is written. The edit multiplies by V only for the largest singular value."""
    _, aligned, folder = pair
    first, second = (with_update(copy.deepcopy(aligned)) for _ in range(2))
    measuring = SafeLoRA(base=str(folder / "base"))
    subject = Subject(first, base=stored(folder / "base"))
    with torch.no_grad():
        scores = measuring.scored(subject)
    monkeypatch.setattr(sys.modules[SafeLoRA.__module__], "back_and_forth", None)  # a call fails
    for name, update in lora_updates(second).items():
        scores[f"{name} (image)"] *= 2
        update.b.data *= 2
    SafeLoRA(fraction=1.0, operator=operator, base=str(folder / "base")).apply(Subject(second, kept=lambda *_: scores))
    monkeypatch.undo()
    SafeLoRA(fraction=1.0, operator=operator, base=str(folder / "base")).apply(Subject(first))
    for name, update in lora_updates(first).items():
        assert torch.equal(2 * update.b, lora_updates(second)[name].b)


@pytest.mark.parametrize("kind", ["thin", "dense"])
def test_all_parameters_trained(tmp_path, kind, monkeypatch):
    """W becomes W_al + C (W - W_al), in column blocks. Biases, embeddings and the output layer stay."""
    monkeypatch.setattr(sys.modules[SafeLoRA.__module__], "COLUMNS", 5)
    base = small_llama(bias=True)
    if kind == "dense":
        aligned = moved_model(base, 0.02, seed=1)
    else:
        adapted = with_update(copy.deepcopy(base), seed=3, target_modules=["q_proj", "k_proj"])
        aligned = adapted.merge_and_unload()
    model = moved_model(aligned, 0.05, seed=2)
    names = [n for n, p in base.named_parameters() if p.dim() == 2 and "embed" not in n and "lm_head" not in n]
    if kind == "thin":
        names = [n for n in names if "q_proj" in n or "k_proj" in n]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    expected = dict(before)
    for name in names:
        v = aligned.state_dict()[name] - base.state_dict()[name]
        expected[name] = aligned.state_dict()[name] + v @ (v.T @ (before[name] - aligned.state_dict()[name])) / v.norm()
    base.save_pretrained(tmp_path / "base")
    aligned.save_pretrained(tmp_path / "aligned")
    if kind == "dense":
        report = safe_lora(model, str(tmp_path / "base"), str(tmp_path / "aligned"), fraction=1.0)
    else:
        with pytest.warns(UserWarning, match="stay unchanged"):
            report = safe_lora(model, str(tmp_path / "base"), str(tmp_path / "aligned"), fraction=1.0)
    assert set(report["projected"]) == set(names)
    for name, p in model.named_parameters():
        assert_close(p.detach(), expected[name], rtol=0, atol=1e-12)
        assert (name in names) or torch.equal(p, before[name])


def test_all_parameters_on_uneven_shards(pair):
    base, aligned, _ = pair
    weight = moved_model(aligned, 0.05, seed=2).state_dict()["model.layers.0.mlp.up_proj.weight"]
    name = "model.layers.0.mlp.up_proj.weight"
    v = Difference(ModelWeights.of(aligned), ModelWeights.of(base), name)
    w_al = aligned.state_dict()[name]

    def part(share):
        mine = weight[share.start : share.stop].clone()
        start = w_al[share.start : share.stop]
        blocks = lambda: iter([(slice(0, 9), mine[:, :9] - start[:, :9]), (slice(9, 16), mine[:, 9:] - start[:, 9:])])  # noqa: E731
        update = WeightUpdate(name, v, share, mine, None, blocks, lambda columns: start[:, columns])
        numbers = update.measure()
        update.write(None, 1.5, 1.0)
        return numbers, update.target

    subject = Subject(torch.nn.Module(), ModelWeights.of(aligned))
    whole = dense_update(name, torch.nn.Parameter(weight.clone()), v, subject)
    expected = whole.measure()
    with torch.no_grad():
        whole.write(None, 1.5, 1.0)
    parts = on_shards([10, 1, 21], part)
    for numbers, _ in parts:
        assert_close(numbers[:4], expected[:4], rtol=1e-12, atol=1e-12)
    assert_close(torch.cat([rows for _, rows in parts]), whole.target.detach(), rtol=0, atol=1e-12)


def test_operators(tmp_path):
    """``normalized`` has gain 1 on the strongest direction of V. ``projector`` is U_k U_k^T."""
    base = small_llama()
    aligned = moved_model(base, 0.02, seed=1)
    base.save_pretrained(tmp_path / "base")
    for arguments in ({"operator": "normalized"}, {"operator": "projector", "rank": 3}):
        model = with_update(copy.deepcopy(aligned), target_modules=["q_proj"])
        before = {name: u.b.detach().clone() for name, u in lora_updates(model).items()}
        safe_lora(model, str(tmp_path / "base"), fraction=1.0, **arguments)
        for name, update in lora_updates(model).items():
            v = aligned.state_dict()[name] - base.state_dict()[name]
            u, s, _ = torch.linalg.svd(v)
            c = v @ v.T / s[0] ** 2 if arguments["operator"] == "normalized" else u[:, :3] @ u[:, :3].T
            assert_close(update.b.detach(), c @ before[name], rtol=0, atol=1e-9)
    model = with_update(copy.deepcopy(aligned))
    with pytest.raises(ValueError, match="give rank"):
        safe_lora(model, str(tmp_path / "base"), operator="projector")


# What is refused or skipped


def test_zero_updates_and_unmoved_weights_are_skipped(pair):
    base, aligned, _ = pair
    q, v, up = (f"model.layers.0.{n}.weight" for n in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"))
    model = with_update(copy.deepcopy(aligned))
    updates = lora_updates(model)
    with torch.no_grad():
        updates[q].b.zero_()
    same = {**ModelWeights.of(base).parameters, v: aligned.state_dict()[v]}
    # A difference in the last bits of a bfloat16 weight is rounding and no alignment.
    stored16 = aligned.state_dict()[up].bfloat16()
    rounded = ModelWeights({**ModelWeights.of(aligned).parameters, up: stored16})
    noise = stored16.flatten().clone()
    noise[0] *= 1 + 2**-6
    subject = Subject(model, rounded, ModelWeights({**same, up: noise.view_as(stored16)}))
    before = {name: updates[name].b.detach().clone() for name in (q, v, up)}
    with pytest.warns(UserWarning, match="2 weights stay unchanged"):
        SafeLoRA(fraction=1.0).apply(subject)
    assert set(subject.report["skipped"]) == {q, v, up}
    assert "zero" in subject.report["skipped"][q]
    assert "did not move" in subject.report["skipped"][v]
    assert "rounding" in subject.report["skipped"][up]
    assert all(torch.equal(updates[name].b, before[name]) for name in before)
    assert len(subject.report["projected"]) == 7


def test_two_equal_models_and_an_untrained_adapter_are_refused(pair):
    _, aligned, folder = pair
    with pytest.raises(ValueError, match="give the model before its alignment"):
        safe_lora(with_update(copy.deepcopy(aligned)), str(folder / "aligned"))
    model = with_update(copy.deepcopy(aligned))
    with torch.no_grad():
        for update in lora_updates(model).values():
            update.b.zero_()
    with pytest.raises(RuntimeError, match="Check that the adapter was trained"):
        safe_lora(model, str(folder / "base"))


def test_a_weight_that_is_not_a_number_is_named(pair):
    _, aligned, folder = pair
    model = with_update(copy.deepcopy(aligned))
    with torch.no_grad():
        lora_updates(model)["model.layers.1.self_attn.o_proj.weight"].b[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"layers\.1\.self_attn\.o_proj.*not finite"):
        safe_lora(model, str(folder / "base"))


def test_a_displacement_so_large_that_updates_grow_is_told(pair):
    _, aligned, folder = pair
    far = moved_model(aligned, 5.0, seed=7)
    far.save_pretrained(folder / "far")
    with pytest.warns(UserWarning, match="updates grew"):
        safe_lora(with_update(copy.deepcopy(aligned)), str(folder / "far"), fraction=1.0)


def test_other_shapes_are_refused(pair):
    _, aligned, _ = pair
    model = with_update(copy.deepcopy(aligned))
    name = "model.layers.0.self_attn.q_proj.weight"
    base = ModelWeights({n: t[:, :8] if n == name else t for n, t in ModelWeights.of(aligned).parameters.items()})
    with pytest.raises(ValueError, match="one shape"):
        SafeLoRA().apply(Subject(model, None, base))
    both = ModelWeights(base.parameters)
    with pytest.raises(ValueError, match="in the aligned one"):
        SafeLoRA().apply(Subject(model, base, both))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"number": 0}, "number counts weights"),
        ({"number": 2.5}, "number counts weights"),
        ({"number": float("nan")}, "number counts weights"),
        ({"threshold": 1.1}, "threshold is a cosine"),
        ({"threshold": float("nan")}, "threshold is a cosine"),
        ({"number": 3, "threshold": 0.3}, "not both"),
        ({"fraction": 0.0}, "fraction of the weights"),
        ({"fraction": float("nan")}, "fraction of the weights"),
        ({"operator": "exact"}, "operator must be"),
        ({"rank": 3}, "rank must be"),
        ({"operator": "projector", "rank": 0}, "rank must be"),
        ({"strength": 2.0}, "strength must lie"),
        ({"strength": float("nan")}, "strength must lie"),
    ],
)
def test_bad_arguments_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        SafeLoRA(**arguments)


def test_presets_are_constructor_arguments():
    assert SafeLoRA(**SafeLoRA.presets["paper"]).threshold == 0.35
    assert SafeLoRA(**SafeLoRA.presets["repo"]).number == 10


def test_no_matrix_of_the_size_of_the_weight_is_ever_made(monkeypatch):
    """The weight is 512 x 512 in float32, read in blocks of 16 rows.

    At any time less than a quarter of one such matrix is alive.
    """
    size, rank = 512, 8
    monkeypatch.setattr(engine_weights, "BLOCK", 16 * size)
    v = dense_pair(torch.randn(size, size), torch.randn(size, size))
    b, a = torch.randn(size, rank), torch.randn(rank, size)
    part = thin(v, b, a)

    class Largest(LiveBytes):
        entries = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = super().__torch_dispatch__(func, types, args, kwargs)
            for value in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata not in input_storages:
                    self.entries = max(self.entries, value.numel())
            return result

    input_storages = {w.parameters[NAME].untyped_storage()._cdata for w in (v.model, v.other)}
    with Largest() as live:
        part.measure()
        part.write(None, 1.0, 1.0)
    assert live.entries <= 16 * size
    assert live.peak < size * size * 4 / 4
