"""Subspaces of updates: planted directions, closed forms, thin against dense, and models in files."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hftlight.analysis.subspace import (
    Subspace,
    energy,
    noise_share,
    participation_ratio,
    stable_rank,
    subspace_overlap,
)
from hftlight.analysis.updates import alignment, update
from hftlight.engine.weights.lowrank import LowRank
from hftlight.engine.weights.stored import Difference, ModelWeights
from hftlight.errors import InputError
from tests.helpers.families import write_family


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def directions(out, count, seed=0):
    return torch.linalg.qr(random(out, count, seed=seed)).Q


def test_the_share_of_an_update_is_one_inside_zero_outside_and_k_of_out_on_average():
    u = directions(6, 2)
    inside = u @ random(2, 5)
    outside = random(6, 5, seed=1)
    outside -= u @ (u.T @ outside)
    assert energy(u, inside) == pytest.approx(1)
    assert energy(u, outside) == pytest.approx(0, abs=1e-15)
    units = [torch.outer(e, random(5)) for e in torch.eye(6, dtype=torch.float64)]
    assert sum(energy(u, one) for one in units) / 6 == pytest.approx(2 / 6)


def test_thin_updates_have_the_numbers_of_the_whole_matrix():
    thin = LowRank(random(7, 3), random(3, 9, seed=1), 0.7)
    whole = thin.rows()
    u = directions(7, 2, seed=2)
    assert energy(u, thin) == pytest.approx(energy(u, whole))
    assert stable_rank(thin) == pytest.approx(stable_rank(whole))
    assert participation_ratio(thin) == pytest.approx(participation_ratio(whole))


def test_ranks_count_equal_directions_and_give_the_cosine_of_the_projection():
    turn = directions(5, 5)
    assert stable_rank(turn) == pytest.approx(5)
    assert participation_ratio(turn) == pytest.approx(5)
    assert stable_rank(torch.diag(torch.tensor([2.0, 1.0]))) == pytest.approx(5 / 4)
    assert participation_ratio(torch.diag(torch.tensor([2.0, 1.0]))) == pytest.approx(25 / 17)
    v = random(4, 9)
    c = v @ v.T
    cosine = c.trace() / (c.norm() * 4**0.5)  # of V V^T and the identity
    assert participation_ratio(v) / 4 == pytest.approx(float(cosine) ** 2)


def test_overlap_of_subspaces_is_one_for_nested_and_k_of_out_on_average_for_unit_vectors():
    u = directions(6, 2)
    assert subspace_overlap(u, u @ directions(2, 2, seed=3)) == pytest.approx(1)
    assert subspace_overlap(u[:, :1], u) == pytest.approx(1)
    units = torch.eye(6, dtype=torch.float64).split(1, dim=1)
    assert sum(subspace_overlap(u, one) for one in units) / 6 == pytest.approx(2 / 6)


def test_noise_is_that_of_the_stored_types():
    """W of 0.02 in bfloat16 gives a displacement of 1e-3 a relative error of 4.7 %."""
    w = 0.02 * random(200, 300)
    moved = w + 1e-3 * random(200, 300, seed=1)

    def difference(dtype):
        return Difference(ModelWeights({"w": moved.to(dtype)}), ModelWeights({"w": w.to(dtype)}), "w")

    assert noise_share(difference(torch.bfloat16)) ** 0.5 == pytest.approx(0.047, rel=0.05)
    error = (difference(torch.bfloat16).rows().double() - (moved - w)).square().mean().sqrt()
    assert noise_share(difference(torch.bfloat16)) ** 0.5 == pytest.approx(float(error) / 1e-3, rel=0.05)
    assert noise_share(difference(torch.float32)) < 1e-10
    assert noise_share(LowRank(random(4, 2), random(2, 3))) == 0


def view_of(base, aligned, model, stage="finetuning"):
    shared = {}

    def kept(key, compute):
        if key not in shared:
            shared[key] = compute()
        return shared[key]

    subject = SimpleNamespace(
        stage=stage,
        config=SimpleNamespace(model=str(base)),
        artifact=SimpleNamespace(name=str(model), identity=str(model)),
        reference=SimpleNamespace(name=str(aligned), identity=str(aligned)),
    )
    return SimpleNamespace(subject=subject, shared=kept)


def adapter(folder, base, factors):
    """Write a LoRA adapter on every q_proj and return the folder."""
    rank = factors[0][0].shape[1]
    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    for layer, (b, a) in zip(model.get_base_model().model.layers, factors, strict=True):
        layer.self_attn.q_proj.lora_A["default"].weight.data.copy_(a)
        layer.self_attn.q_proj.lora_B["default"].weight.data.copy_(b)
    model.save_pretrained(folder)
    return folder


def test_adapters_and_merged_models_give_the_same_rows(tmp_path):
    base = write_family(tmp_path / "base", "llama")
    first = [(random(32, 2, seed=n), random(2, 32, seed=n + 9)) for n in range(2)]
    more = [(torch.cat([b, random(32, 1, seed=n + 20)], 1), torch.cat([a, random(1, 32, seed=n + 30)]))
            for n, (b, a) in enumerate(first)]  # fmt: skip
    aligned, tuned = adapter(tmp_path / "aligned", base, first), adapter(tmp_path / "tuned", base, more)
    analysis = Subspace(directions=2)
    rows = analysis.measure({}, view_of(base, aligned, tuned))
    found = {(r.metric, r.layer, r.position): r.value for r in rows}
    u = torch.linalg.svd(first[0][0] @ first[0][1]).U[:, :2]
    delta = torch.outer(more[0][0][:, 2], more[0][1][2])
    assert found["update_in_alignment", 0, "q_proj"] == pytest.approx(energy(u, delta), rel=1e-4)
    assert found["update_in_alignment_by_chance", 0, "q_proj"] == 2 / 32
    assert found["update_stable_rank", 0, "q_proj"] == pytest.approx(1, rel=1e-5)
    assert found["update_norm", 0, "q_proj"] == pytest.approx(float(delta.norm()), rel=1e-5)
    squares = [found["update_norm", n, "q_proj"] ** 2 for n in range(2)]
    pooled = sum(s * found["update_in_alignment", n, "q_proj"] for n, s in enumerate(squares)) / sum(squares)
    assert found["update_in_alignment", None, None] == pytest.approx(pooled)
    whole = {}
    for name, place in (("aligned", aligned), ("tuned", tuned)):
        from peft import AutoPeftModelForCausalLM

        whole[name] = tmp_path / f"whole_{name}"
        AutoPeftModelForCausalLM.from_pretrained(place).merge_and_unload().save_pretrained(whole[name])
    dense = analysis.measure({}, view_of(base, whole["aligned"], whole["tuned"]))
    assert [(r.metric, r.layer, r.position) for r in dense] == [(r.metric, r.layer, r.position) for r in rows]
    assert_close(torch.tensor([r.value for r in dense]), torch.tensor([r.value for r in rows]), rtol=1e-3, atol=1e-5)
    before = analysis.measure({}, view_of(base, aligned, base, "base"))
    assert all(r.value == pytest.approx(1) for r in before if r.metric == "update_in_alignment")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert_close(
        update(view_of(base, aligned, base, "base"), name).rows(),
        -alignment(view_of(base, aligned, tuned), name).rows(),
    )
    of_alignment = analysis.measure({}, view_of(base, aligned, aligned, "alignment"))
    assert {r.metric for r in of_alignment} >= {"alignment_norm", "alignment_stable_rank"}
    names = [p.name for p in analysis.pictures([r.labelled("none", "finetuning") for r in rows])]
    assert names == ["subspace_energy"]


def test_transposed_weights_are_turned(tmp_path):
    """GPT-2 stores [in, out]. The alignment moves one output direction, and the update moves it again."""
    base = write_family(tmp_path / "base", "gpt2")
    places = {}
    for name, seeds in (("aligned", [1]), ("tuned", [1, 2])):
        model = AutoModelForCausalLM.from_pretrained(base)
        for seed in seeds:
            for block in model.transformer.h:
                block.attn.c_attn.weight.data += 0.1 * torch.outer(random(32, seed=seed), random(96, seed=50)).float()
        model.save_pretrained(places.setdefault(name, tmp_path / name))
    rows = Subspace(directions=1).measure({}, view_of(base, places["aligned"], places["tuned"]))
    shares = [r.value for r in rows if r.metric == "update_in_alignment" and r.position == "c_attn"]
    assert shares == pytest.approx([1, 1], abs=1e-4)
    assert {r.position for r in rows} == {"c_attn", None}  # weights that did not move have no rows


def test_what_cannot_be_described_is_named(tmp_path):
    base = write_family(tmp_path / "base", "llama")
    with pytest.raises(InputError, match="no weight matrix differs"):
        Subspace().measure({}, view_of(base, base, tmp_path / "base" / ".." / "base", "finetuning"))
    with pytest.raises(InputError, match="model before it is not known"):
        Subspace().measure({}, view_of(base, base, base, ""))
    with pytest.raises(ValueError, match="directions must be >= 1, got 0"):
        Subspace(directions=0)
