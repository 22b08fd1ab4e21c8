"""NLSR against dense matrices and plain loops, for adapters however they are factored."""

import copy
import math
import warnings

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close

from hftlight.defenses.post_finetuning import nlsr
from hftlight.defenses.post_finetuning.nlsr import (
    NLSR,
    common_frame,
    in_frame,
    keep_probabilities,
    kept_rank,
    reference_gain,
    region,
    similarity,
    transplanted,
)
from hftlight.engine.weights.lora import lora_updates, other_updates, put_factors
from hftlight.engine.weights.lowrank import LowRank, combined
from hftlight.engine.weights.save import save_repaired
from hftlight.engine.weights.shards import Share
from hftlight.engine.weights.stored import Adapted, ModelWeights
from hftlight.engine.weights.subject import Subject
from tests.helpers.regions import SIDE
from tests.helpers.repairs import moved_model, small_llama, with_update

TARGETS = ["q_proj", "down_proj"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(out, inner, rank, seed, scale=1.0):
    return LowRank(normal(out, rank, seed=seed), normal(rank, inner, seed=seed + 1), scale)


def batches(stream):
    return iter(SIDE[stream])


def fine_tuned(seed=0, alignment_rank=3, size=0.1, **settings):
    """Return base weights, alignment displacements by name, and the user's adapter on the aligned model."""
    base = small_llama()
    names = [n for n in dict(base.named_parameters()) if any(f"{t}.weight" in n for t in TARGETS)]
    moved = {}
    for k, name in enumerate(names):
        m = low_rank(*base.get_parameter(name).shape, alignment_rank, seed=100 + 2 * k)
        moved[name] = LowRank(size * m.b, size * m.a, 2.0)
    aligned = copy.deepcopy(base)
    with torch.no_grad():
        for name, m in moved.items():
            aligned.get_parameter(name).add_(m.rows())
    return base, moved, with_update(aligned, seed=seed, target_modules=TARGETS, **settings)


def subject_of(base, moved, model, **options):
    return Subject(model, aligned=Adapted(ModelWeights.of(base), moved), batches=batches, **options)


def repaired(model):
    """Return the dense displacement of every adapted weight from the aligned one."""
    return {name: u.factors().rows() for name, u in lora_updates(model).items()}


# The maths


def test_the_orientation_of_the_gate():
    """A low similarity means damage. The official code corrects the most similar layer more often."""
    similarities = [0.9, 0.1, 0.5, 0.3]
    assert keep_probabilities(similarities, 0.5, 0.4, "paper") == pytest.approx(
        [0.7, 0.3, 0.5 + 0.2 / 3, 0.5 - 0.2 / 3]
    )
    assert keep_probabilities(similarities, 0.5, 0.4, "released") == pytest.approx(
        [0.3, 0.7, 0.5 - 0.2 / 3, 0.5 + 0.2 / 3]
    )
    assert keep_probabilities([0.2], 0.5, 0.4, "paper") == [0.5]
    worst, best = NLSR(gate="worst"), NLSR(gate="worst", mode="released")
    assert worst._corrected(similarities, [], torch.Generator()) == [False, True, False, True]
    assert best._corrected(similarities, [], torch.Generator()) == [True, False, True, False]
    assert sum(NLSR(gate="worst", keep=0.7)._corrected(similarities, [], torch.Generator())) == 1


def test_the_expected_number_of_corrected_layers():
    similarities = normal(9).tolist()
    probabilities = keep_probabilities(similarities, 0.6, 0.4, "paper")
    assert sum(1 - p for p in probabilities) == pytest.approx(0.4 * 9)
    assert all(
        (similarities[i] < similarities[j]) == (probabilities[i] < probabilities[j])
        for i in range(9)
        for j in range(9)
        if i != j
    )
    repair, generator = NLSR(keep=0.6), torch.Generator().manual_seed(0)
    draws = torch.tensor([repair._corrected(similarities, probabilities, generator) for _ in range(3000)]).double()
    assert_close(draws.mean(dim=0), 1 - torch.tensor(probabilities, dtype=torch.float64), rtol=0, atol=0.04)


def test_the_references_gain():
    assert reference_gain(0.9, "paper") == pytest.approx(1.9)
    assert reference_gain(0.9, "released") == pytest.approx(3.24)
    assert reference_gain(0.0, "paper") == 1
    assert (kept_rank(128, 0.8, "paper"), kept_rank(128, 0.8, "released")) == (25, 102)
    assert kept_rank(2, 0.8, "paper") == 1


def test_the_frame_spans_both_and_does_not_depend_on_factors():
    """Under ``continue`` the update is a difference of two adapters. The rank is then less than the stacked one."""
    a, later = low_rank(12, 20, 3, seed=0, scale=0.5), low_rank(12, 20, 3, seed=4)
    difference = combined([(1.0, later), (-1.0, a)])
    frame = common_frame(a, difference)
    assert frame.shape == (6, 20)
    assert_close(frame @ frame.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)
    for m in (a, difference, later):
        assert_close(in_frame(m, frame) @ frame, m.rows(), rtol=0, atol=1e-12)
    turn = normal(3, 3, seed=9)
    other = common_frame(LowRank(a.b @ torch.linalg.inv(turn), turn @ a.a, a.scale), difference)
    assert_close(other.T @ other, frame.T @ frame, rtol=0, atol=1e-9)
    assert common_frame(a, LowRank(torch.zeros(12, 2), torch.ones(2, 20))).shape == (3, 20)


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_the_region_against_sorting(mode):
    """ActSVD by the singular vectors of the outputs on samples, and the top entries by a sort."""
    c, z = normal(10, 6, seed=1), normal(500, 6, seed=2) * torch.arange(1, 7)
    z = z @ torch.linalg.eigh(z.T @ z).eigenvectors  # inputs along principal axes
    mask = region(c, (z**2).mean(dim=0), 4, 0.6, mode)
    rank = 1 if mode == "paper" else 2  # 0.4 or 0.6 of 4, rounded down
    u = torch.linalg.svd(c @ z.T, full_matrices=False)[0][:, :rank]
    scores = (u @ u.T @ c).abs()
    if mode == "paper":
        expected = torch.zeros_like(mask)
        for row in range(10):
            for column in sorted(range(6), key=lambda k: -float(scores[row, k]))[:2]:
                expected[row, column] = True
    else:
        expected = scores >= scores.flatten().sort(descending=True).values[23]
    assert torch.equal(mask, expected)


def test_similarity_and_transplant_by_hand():
    reference, tuned = torch.tensor([[3.0, 1.0], [0.0, 4.0]]), torch.tensor([[4.0, 9.0], [7.0, 3.0]])
    mask = torch.tensor([[True, False], [False, True]])
    assert similarity(reference, tuned, mask) == pytest.approx(24 / 25)
    assert transplanted(reference, tuned, mask).tolist() == [[3.0, 9.0], [7.0, 4.0]]
    assert similarity(reference, torch.zeros(2, 2), mask) == 0
    assert similarity(reference, 5 * reference, mask) == pytest.approx(1)


# Models


def by_hand(base, moved, model, sparsity, samples):
    """Return similarity and repaired dense displacement from the aligned model, by dense matrices in mode ``paper``."""
    reference = copy.deepcopy(base)
    with torch.no_grad():
        for name, m in moved.items():
            reference.get_parameter(name).add_(1.9 * m.rows())
    inputs = {name: [] for name in moved}
    batches = [{k: t[i : i + 1] for k, t in b.items()} for b in SIDE["refusals"] for i in range(3)][:samples]
    keep = [None]
    handles = [
        reference.get_submodule(name[:-7]).register_forward_pre_hook(
            lambda _, args, name=name: inputs[name].append(args[0][keep[0]])
        )
        for name in moved
    ]
    with torch.no_grad():
        for row in batches:
            keep[0] = row["labels"] != -100
            reference(input_ids=row["input_ids"], attention_mask=row["attention_mask"])
    for handle in handles:
        handle.remove()
    similarities, new = {}, {}
    for name, update in lora_updates(model).items():
        v, delta, x = moved[name].rows(), update.factors().rows().detach(), torch.cat(inputs[name])
        s, vh = torch.linalg.svd(torch.cat([v, delta]), full_matrices=False)[1:]
        span = vh[s > 1e-9]
        span = torch.linalg.svd(x @ span.T, full_matrices=False)[2] @ span  # principal axes of the data in the span
        safe, tuned = 1.9 * v @ span.T, (v + delta) @ span.T
        u = torch.linalg.svd(safe @ span @ x.T, full_matrices=False)[0]
        u = u[:, : max(1, math.floor((1 - sparsity) * 3 + 1e-9))]
        scores = (u @ (u.T @ safe)).abs()
        mask = torch.zeros_like(scores, dtype=torch.bool)
        for row, values in enumerate(scores):
            mask[row, values.argsort(descending=True)[: math.floor((1 - sparsity) * len(span) + 1e-9)]] = True
        a, b = safe[mask], tuned[mask]
        similarities[name] = float(a @ b / a.norm() / b.norm())
        new[name] = torch.where(mask, safe, tuned) @ span - v
    return similarities, new


def test_a_model_is_repaired_as_dense_matrices_say():
    """Inputs are measured at the reference. Exactly the less similar half of the layers is corrected."""
    base, moved, model = fine_tuned()
    similarities, new = by_hand(base, moved, model, 0.5, 6)
    before = repaired(model)
    subject = subject_of(base, moved, model)
    NLSR(gate="worst", sparsity=0.5, samples=6).apply(subject)
    corrected = sorted(similarities, key=similarities.get)[:2]
    assert sorted(subject.report["corrected"]) == sorted(corrected)
    for name, delta in repaired(model).items():
        assert subject.report["weights"][name]["similarity"] == pytest.approx(similarities[name], abs=1e-9)
        assert_close(delta, new[name] if name in corrected else before[name], rtol=0, atol=1e-9)
        assert subject.report["weights"][name]["corrected"] == (name in corrected)
    rows = subject.report["weights"]
    assert not subject.dense
    assert subject.report["rank"] == 7  # 3 of the alignment and 4 of the update
    assert all(row["region"] == row["entries"] // 7 * 3 for row in rows.values())
    expected = sum(rows[n]["region"] for n in corrected) / sum(row["entries"] for row in rows.values())
    assert subject.report["transplanted_fraction"] == pytest.approx(expected)
    assert subject.report["changed_entries"] == sum(rows[n]["region"] for n in corrected)


def test_the_adapter_protocol_and_the_factors_change_nothing():
    """One update as an adapter of its own, and as the difference of a continued adapter and the alignment's."""
    base, moved, model = fine_tuned()
    results, similarities = [], []
    for kind in ("merge", "continue"):
        tuned = copy.deepcopy(model)
        if kind == "continue":
            total = {
                n: combined([(1.0, moved[n]), (1.0, u.factors()), (-1.0, moved[n])])
                for n, u in lora_updates(tuned).items()
            }
            put_factors(tuned, total)
        subject = subject_of(base, moved, tuned)
        NLSR(gate="worst", sparsity=0.5, samples=6).apply(subject)
        results.append(repaired(tuned))
        similarities.append([row["similarity"] for row in subject.report["weights"].values()])
    assert similarities[0] == pytest.approx(similarities[1], abs=1e-9)
    for name, delta in results[0].items():
        assert_close(results[1][name], delta, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_a_model_that_equals_its_reference_stays(mode):
    """W_e = W_t: every similarity is 1, and the transplant of every layer is the identity."""
    base, moved, model = fine_tuned(alignment_rank=4)
    gain = reference_gain(0.9, mode)
    put_factors(model, {n: LowRank(m.b, m.a, (gain - 1) * m.scale) for n, m in moved.items()})
    before = repaired(model)
    subject = subject_of(base, moved, model)
    NLSR(mode=mode, gate="worst", keep=0.0, sparsity=0.5, samples=6).apply(subject)
    assert len(subject.report["corrected"]) == 4
    for row in subject.report["weights"].values():
        assert row["similarity"] == pytest.approx(1, abs=1e-12)
    for name, delta in repaired(model).items():
        assert_close(delta, before[name], rtol=0, atol=1e-9)


def test_without_extrapolation_the_whole_region_is_the_aligned_model():
    """B = 0 and a region of everything give W_e = W_a: the user's update is gone."""
    base, moved, model = fine_tuned()
    NLSR(gate="worst", keep=0.0, sparsity=0.0, beta=0.0, samples=6).apply(subject_of(base, moved, model))
    for delta in repaired(model).values():
        assert_close(delta, torch.zeros_like(delta), rtol=0, atol=1e-12)


def test_random_regions_have_the_same_size_and_another_place():
    reports, results = [], []
    for seed, regions in ((0, "actsvd"), (0, "random"), (0, "random"), (1, "random")):
        base, moved, model = fine_tuned()
        subject = subject_of(base, moved, model, seed=seed)
        NLSR(gate="worst", keep=0.0, sparsity=0.5, samples=6, regions=regions).apply(subject)
        reports.append({name: row["region"] for name, row in subject.report["weights"].items()})
        results.append(torch.cat([d.flatten() for d in repaired(model).values()]))
    assert reports[0] == reports[1] == reports[3]
    assert torch.equal(results[1], results[2])
    assert (results[0] - results[1]).abs().max() > 1e-3
    assert (results[1] - results[3]).abs().max() > 1e-3


def test_the_coin_has_the_runs_seed():
    chosen = []
    for seed in (0, 0, 1, 2, 3):
        base, moved, model = fine_tuned()
        subject = subject_of(base, moved, model, seed=seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*no layer was chosen")
            NLSR(sparsity=0.5, samples=6).apply(subject)
        chosen.append(subject.report["corrected"])
    assert chosen[0] == chosen[1]
    assert any(names != chosen[0] for names in chosen[2:])


def test_a_sweep_reuses_the_scores():
    """The scores do not depend on the dials, and leave the model as it was."""
    base, moved, model = fine_tuned()
    before = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in before.items()}
    subject = subject_of(base, moved, model)
    scores = [NLSR(samples=6, **o).scored(subject) for o in ({}, {"sparsity": 0.5, "keep": 0.8, "regions": "random"})]
    assert all(torch.equal(scores[1][name], value) for name, value in scores[0].items())
    for name, p in model.named_parameters():
        assert p is before[name]
        assert torch.equal(p, values[name])
    assert all(u.scale == 2 for u in lora_updates(model).values())


def test_plain_peft_loads_what_was_saved(tmp_path):
    base, moved, model = fine_tuned(use_rslora=True)
    subject = subject_of(base, moved, model)
    NLSR(gate="worst", sparsity=0.5, samples=6).apply(subject)
    save_repaired(tmp_path / "repaired", subject)
    fresh = small_llama()
    with torch.no_grad():
        for name, p in fresh.named_parameters():
            p.copy_(ModelWeights.of(model).parameters[name])
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "repaired").to(torch.float64).eval()
    ids = SIDE["task"][0]["input_ids"]
    with torch.no_grad():
        assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-12)
    assert loaded.peft_config["default"].r == 7


def test_other_updates_come_off_after_an_error():
    _, moved, model = fine_tuned()
    updates = lora_updates(model)
    before = repaired(model)
    name = next(iter(moved))

    def look():
        inside = repaired(model)
        assert_close(inside[name], moved[name].rows(), rtol=0, atol=1e-12)
        assert not any(d.any() for n, d in inside.items() if n != name)
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), other_updates(updates, {name: moved[name]}):
        look()
    assert all(torch.equal(d, before[n]) for n, d in repaired(model).items())


def test_weights_that_the_alignment_did_not_move_keep_their_update():
    base, moved, model = fine_tuned()
    name = next(iter(moved))
    before = repaired(model)
    del moved[name]
    subject = subject_of(base, moved, model)
    NLSR(gate="worst", keep=0.0, sparsity=0.5, samples=6).apply(subject)
    assert set(subject.report["skipped"]) == {name}
    assert_close(repaired(model)[name], before[name], rtol=0, atol=1e-12)
    assert len(subject.report["corrected"]) == 3


# What is refused


def test_what_is_not_of_low_rank_is_refused(tmp_path):
    base, moved, model = fine_tuned()
    repair = NLSR(gate="worst", sparsity=0.5, samples=6)
    with pytest.raises(TypeError, match="LlamaForCausalLM has no adapter"):
        repair.apply(Subject(small_llama(), batches=batches))
    with pytest.raises(ValueError, match="difference of two whole models"):
        repair.apply(Subject(model, ModelWeights.of(moved_model(base, 0.1, 1)), ModelWeights.of(base), batches=batches))
    with pytest.raises(ValueError, match="moved no weight that was fine-tuned"):
        repair.apply(subject_of(base, {}, model))
    with pytest.raises(RuntimeError, match="Apply NLSR first"):
        repair.apply(subject_of(base, moved, model, dense=True))
    with pytest.raises(ValueError, match=r"less than one of the 7 entries of each row.*sparsity <= 0\.857"):
        NLSR(sparsity=0.9, samples=6).apply(subject_of(base, moved, model))


def test_a_sharded_adapter_is_refused(monkeypatch):
    monkeypatch.setattr(nlsr, "share", lambda tensor: Share(0, 1, 2, group="ranks"))
    with pytest.raises(TypeError, match=r"q_proj\.weight is sharded .*its rank cannot grow"):
        NLSR().check_model(fine_tuned()[2])


def test_no_layer_may_be_chosen_and_this_is_said():
    base, moved, model = fine_tuned()
    before = repaired(model)
    subject = subject_of(base, moved, model)
    with pytest.warns(UserWarning, match="no layer was chosen at keep 1.0"):
        NLSR(gate="worst", sparsity=0.5, keep=1.0, samples=6).apply(subject)
    assert all(torch.equal(d, before[n]) for n, d in repaired(model).items())
