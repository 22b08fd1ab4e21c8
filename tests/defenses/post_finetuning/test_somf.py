"""SOMF against dense matrices, an independent training of the logits, and plain libraries that load its result."""

import copy

import pytest
import torch
from peft import PeftModel
from torch.func import functional_call
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hftlight.defenses.post_finetuning import somf as module
from hftlight.defenses.post_finetuning.somf import SOMF, gate, relaxed
from hftlight.engine.step.simulation import draws
from hftlight.engine.weights.lora import lora_updates
from hftlight.engine.weights.repair import linear_weights
from hftlight.engine.weights.save import save_repaired
from hftlight.engine.weights.stored import ModelWeights, plain_name, stored
from hftlight.engine.weights.subject import Subject
from tests.helpers.contract import hooks_of
from tests.helpers.repairs import moved_model, small_llama, with_update
from tests.helpers.tiny_lm import tiny_lm, token_batch

IDS = torch.tensor([[3, 5, 7, 11, 13, 2]])
PAIRS = [{**token_batch(seed, rows=4), "pairs": 2} for seed in (7, 8)]


def batches(stream):
    assert stream == "pairs"
    return iter(PAIRS)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def dense(model):
    """Return copies of a model's weights by plain name, its adapter merged in."""
    model = copy.deepcopy(model)
    model = model.merge_and_unload() if hasattr(model, "peft_config") else model
    return {plain_name(name): p.detach().clone() for name, p in model.named_parameters()}


def repaired(model, scores, aligned=None, **options):
    """Apply SOMF with given logits: a number for all of a weight's parts, or a tensor by weight."""
    repair = SOMF(**options)

    def given(_, compute):
        parts = repair._parts(subject)
        full = {n: torch.full_like(p.logits(), 1.0) for n, p in parts.items()}
        given = scores if isinstance(scores, dict) else {n: scores * ones for n, ones in full.items()}
        return {**given, "preference_loss": torch.zeros(1)}

    subject = Subject(model, aligned, batches=batches, kept=given)
    repair.apply(subject)
    return subject


def test_a_cold_sample_is_one_with_probability_sigmoid():
    u = torch.rand(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for phi in (-2.0, 0.0, 1.5):
        sample = relaxed(torch.tensor(phi, dtype=torch.float64), u, 1e-4)
        p = torch.tensor(phi).sigmoid()
        assert abs(float(sample.mean() - p)) < 4 * float(p * (1 - p) / len(u)) ** 0.5
    assert_close(relaxed(torch.zeros(1), torch.tensor([0.8]), 0.5), torch.tensor([0.8**2 / (0.8**2 + 0.2**2)]))


def test_gates_have_mean_one_and_an_empty_mask_gives_zero():
    """With equal logits, the expectation of each gate is 1 by symmetry, so that of the masked update is the update."""
    n = 1000
    noise = torch.rand(n, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gates = torch.stack([gate(relaxed(torch.zeros(12, dtype=torch.float64), u, 0.5)) for u in noise])
    assert_close(gates.mean(dim=1), torch.ones(n, dtype=torch.float64))
    assert ((gates.mean(dim=0) - 1).abs() < 5 * gates.std(dim=0) * n**-0.5).all()
    assert not gate(torch.zeros(5)).any()
    assert_close(gate(torch.eye(100)[0]), torch.eye(100)[0] / 0.05)


@pytest.mark.parametrize(
    ("granularity", "lora"),
    [
        ("component", True),
        pytest.param("row", True, marks=pytest.mark.slow),
        ("weight", True),
        ("row", False),
        pytest.param("weight", False, marks=pytest.mark.slow),
    ],
)
def test_everything_kept_is_the_fine_tuned_model_and_nothing_kept_the_aligned_one(granularity, lora):
    aligned = small_llama()

    def fresh():
        return with_update(copy.deepcopy(aligned)) if lora else moved_model(aligned, 0.1, seed=1)

    tuned, safe = dense(fresh()), dense(aligned)
    model = fresh()
    with pytest.warns(UserWarning, match="every part was kept"):
        repaired(model, 9.0, ModelWeights.of(copy.deepcopy(aligned)), granularity=granularity)
    for name, p in dense(model).items():
        assert_close(p, tuned[name], rtol=0, atol=1e-12)
    model = fresh()
    subject = repaired(model, -9.0, ModelWeights.of(copy.deepcopy(aligned)), granularity=granularity)
    assert subject.report["kept_fraction"] == 0
    for name, p in dense(model).items():
        masked = name in subject.report["matrices"]
        assert torch.equal(p, safe[name] if masked else tuned[name]), name
    assert subject.dense == (lora and granularity == "weight")


def random_scores(model, shape):
    generator = torch.Generator().manual_seed(3)
    return {n: torch.randn(shape(u), generator=generator) for n, u in lora_updates(model).items()}


SHAPES = {
    "component": lambda u: (4,),
    "row": lambda u: (u.b.shape[0],),
    "weight": lambda u: (u.b.shape[0], u.a.shape[1]),
}


@pytest.mark.parametrize("granularity", SHAPES)
def test_kept_parts_are_divided_by_the_mean_of_the_mask(granularity, tmp_path):
    aligned = small_llama()
    model = with_update(copy.deepcopy(aligned))
    tuned, safe = dense(model), dense(aligned)
    scores = random_scores(model, SHAPES[granularity])
    subject = repaired(model, scores, granularity=granularity, threshold=0.1)
    result = dense(model)
    for name, phi in scores.items():
        mask, update = (phi > 0.1).double(), tuned[name] - safe[name]
        if granularity == "component":
            u, s, vh = torch.linalg.svd(update)
            expected = (u[:, :4] * (s[:4] * mask)) @ vh[:4]
        else:
            expected = update * (mask[:, None] if granularity == "row" else mask)
        expected = expected / max(float(mask.mean()), 0.05)
        assert_close(result[name], safe[name] + expected, rtol=0, atol=1e-12)
        row = subject.report["matrices"][name]
        assert (row["units"], row["kept"]) == (mask.numel(), int(mask.sum()))
        assert row["factor"] == pytest.approx(1 / max(float(mask.mean()), 0.05))
        assert row["repaired_norm"] == pytest.approx(float(expected.norm()))
    save_repaired(tmp_path / "repaired", subject)
    if subject.dense:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "repaired", dtype=torch.float64)
        assert torch.equal(logits(loaded), logits(model))
    else:
        loaded = PeftModel.from_pretrained(copy.deepcopy(aligned), tmp_path / "repaired").to(torch.float64)
        assert_close(logits(loaded), logits(model), rtol=0, atol=1e-12)


def answer_log_probs(scores, batch):
    """Return the sum of the log-probabilities of each row's labels, row by row."""
    totals = []
    for row, labels in zip(scores, batch["labels"], strict=True):
        positions = [t for t in range(1, len(labels)) if labels[t] != -100]
        totals.append(sum(F.log_softmax(row[t - 1], -1)[labels[t]] for t in positions))
    return torch.stack(totals)


@pytest.mark.parametrize("case", ["component", "row", "weight", "full"])
def test_logits_equal_those_of_an_independent_training(case):
    """Plain autograd through whole dense weights, torch's AdamW, and the DPO loss written out."""
    steps, lr, beta, t = 3, 0.1, 0.7, 0.5
    start = tiny_lm(seed=2)
    model = with_update(copy.deepcopy(start), target_modules=["q_proj", "down_proj"]) if case != "full" else None
    model = moved_model_like(start) if model is None else model
    tuned, safe = dense(model), dense(start)
    names = list(lora_updates(model)) if case != "full" else list(linear_weights(model))
    subject = Subject(model, ModelWeights.of(start), batches=batches, seed=4)
    scores = SOMF("row" if case == "full" else case, steps, lr, beta, t).scored(subject)
    triples = {n: torch.linalg.svd(tuned[n] - safe[n], full_matrices=False) for n in names}
    phi = {}
    for n in names:
        shape = {"component": (4,), "weight": safe[n].shape}.get(case, safe[n].shape[:1])
        phi[n] = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW(phi.values(), lr=lr, weight_decay=0.0)

    def merged():
        gated = {}
        for n in names:
            u = module._uniform(phi[n], 4, step, n)
            m = torch.sigmoid((phi[n] + torch.log(u / (1 - u))) / t)
            g = m / m.mean()
            svd_u, s, vh = triples[n]
            if case == "component":
                gated[n] = safe[n] + (svd_u[:, :4] * (s[:4] * g)) @ vh[:4]
            else:
                gated[n] = safe[n] + (tuned[n] - safe[n]) * (g if case == "weight" else g[:, None])
        return {**tuned, **gated}

    def run(weights, batch):
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        return answer_log_probs(functional_call(start, weights, (), inputs).logits, batch)

    for step in range(steps):
        order = [0, 1]
        draws(4, step // 2, "somf").shuffle(order)
        batch = PAIRS[order[step % 2]]
        margins = run(merged(), batch) - run(safe, batch).detach()
        loss = -F.logsigmoid(beta * (margins[0::2] - margins[1::2])).mean()
        assert_close(scores["preference_loss"][step], loss.detach(), rtol=0, atol=1e-10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for n in names:
        assert_close(scores[n], phi[n].detach(), rtol=0, atol=1e-7)
        assert phi[n].any()


def moved_model_like(start):
    """Return a copy of the tiny model with noise on all parameters, as after full training."""
    model = copy.deepcopy(start)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def test_training_leaves_the_model_as_it_was():
    model = with_update(small_llama()).train()
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    hooks, random = hooks_of(model), torch.random.get_rng_state()
    with torch.no_grad():
        scores = SOMF(steps=2).scored(Subject(model, batches=batches))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0])
        assert (p.requires_grad, p.grad) == (before[name][1], None)
    assert hooks_of(model) == hooks
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not any(phi.requires_grad for phi in scores.values())


@pytest.mark.slow
def test_the_loss_falls():
    subject = Subject(with_update(small_llama()), batches=batches)
    loss = SOMF("weight", steps=40, lr=0.3, beta=1.0).scored(subject)["preference_loss"]
    assert float(loss[-10:].mean()) < 0.8 * float(loss[:10].mean())


def test_the_dials_share_the_scores():
    """Whatever the export, the control and the threshold, the same logits are trained."""
    variants = [SOMF(steps=2), SOMF(steps=2, export="sampled", threshold=1.0, units="random")]
    trained = [repair.scored(Subject(with_update(small_llama()), batches=batches)) for repair in variants]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_the_control_and_the_draw_keep_the_right_numbers():
    model = with_update(small_llama())
    shapes = {n: (u.b.shape[0], u.a.shape[1]) for n, u in lora_updates(model).items()}
    scores = {n: torch.linspace(-2, 3, rows * columns).view(rows, columns) for n, (rows, columns) in shapes.items()}
    learned = repaired(with_update(small_llama()), scores, granularity="weight")
    control = repaired(with_update(small_llama()), scores, granularity="weight", units="random")
    drawn = repaired(with_update(small_llama()), scores, granularity="weight", export="sampled")
    other = False
    for name, phi in scores.items():
        kept = [s.report["matrices"][name]["kept"] for s in (learned, control, drawn)]
        assert kept[0] == kept[1] == int((phi > 0).sum())
        p = phi.sigmoid()
        assert abs(kept[2] - float(p.sum())) < 4 * float((p * (1 - p)).sum()) ** 0.5
        norms = [s.report["matrices"][name]["repaired_norm"] for s in (learned, control)]
        other = other or norms[0] != norms[1]
    assert other


@pytest.mark.parametrize("granularity", ["component", pytest.param("row", marks=pytest.mark.slow)])
def test_several_adapters_are_fused_with_their_weights(tmp_path, granularity):
    """With everything kept, the result is the aligned model plus the weighted sum of all updates."""
    aligned = small_llama()
    aligned.save_pretrained(tmp_path / "aligned")
    model, other = (with_update(copy.deepcopy(aligned), seed=seed, r=r) for seed, r in ((0, 4), (1, 2)))
    other.peft_config["default"].base_model_name_or_path = str(tmp_path / "aligned")
    other.save_pretrained(tmp_path / "other")
    tuned, second, safe = dense(model), dense(other), dense(aligned)
    options = {"weights": (0.3, 0.6), "others": (str(tmp_path / "other"),), "granularity": granularity}
    subject = repaired(model, 9.0, stored(tmp_path / "aligned"), **options)
    for name, p in dense(model).items():
        expected = safe[name] + 0.3 * (tuned[name] - safe[name]) + 0.6 * (second[name] - safe[name])
        assert_close(p, expected, rtol=0, atol=1e-12)
    units = {row["units"] for row in subject.report["matrices"].values()}
    assert units == ({6} if granularity == "component" else {16, 8, 32})
    assert SOMF(**options).identity()["others"]
    with pytest.raises(ValueError, match="SOMF: under an adapter, others must be adapters"):
        repaired(with_update(copy.deepcopy(aligned)), 9.0, **options)
    narrow = with_update(copy.deepcopy(aligned), target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"SOMF: others moved .*which the user's adapter does not have"):
        repaired(narrow, 9.0, stored(tmp_path / "aligned"), **options)
    full = moved_model(aligned, 0.1, seed=1)
    before = dense(full)
    repaired(full, 9.0, stored(tmp_path / "aligned"), **{**options, "granularity": "row"})
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = safe[name] + 0.3 * (before[name] - safe[name]) + 0.6 * (second[name] - safe[name])
    assert_close(dense(full)[name], expected, rtol=0, atol=1e-12)


def test_what_cannot_work_is_named():
    aligned = small_llama()
    with pytest.raises(TypeError, match="SOMF: granularity 'component' needs"):
        SOMF().apply(Subject(moved_model(aligned, 0.1, seed=1), ModelWeights.of(aligned), batches=batches))
    with pytest.raises(RuntimeError, match="SOMF: it needs the aligned model"):
        SOMF("row").apply(Subject(moved_model(aligned, 0.1, seed=1), batches=batches))
    with pytest.raises(ValueError, match="SOMF: the stream 'pairs' must give pairs"):
        SOMF().apply(Subject(with_update(small_llama()), batches=lambda _: iter([token_batch(1)])))
    with pytest.raises(ValueError, match="SOMF: the stream 'pairs' has no batch"):
        SOMF().apply(Subject(with_update(small_llama()), batches=lambda _: iter([])))
    with pytest.raises(TypeError, match=r"SOMF: granularity 'weight' adds .* torch.bfloat16"):
        SOMF("weight").apply(Subject(with_update(small_llama(dtype=torch.bfloat16)), batches=batches))
