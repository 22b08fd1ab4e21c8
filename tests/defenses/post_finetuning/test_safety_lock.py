"""SafetyLock on planted heads, against plain loops and hooks, and on the model that plain transformers loads."""

import copy
import math

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hftlight.defenses.post_finetuning.safety_lock import (
    SafetyLock,
    head_directions,
    last_response_tokens,
    linear_probes,
    probe_quality,
    prompt_digests,
    ranked_heads,
    safety_lock,
    validation_prompts,
)
from hftlight.engine.weights.biases import open_biases
from hftlight.engine.weights.lora import lora_updates
from hftlight.engine.weights.stored import ModelWeights
from hftlight.engine.weights.subject import Subject
from hftlight.models.state import ModelState
from tests.helpers.families import FAMILIES
from tests.helpers.repairs import moved_model, small_llama, with_update
from tests.helpers.slow import some_slow

IGNORED = -100


def pairs(count=12, seed=0, end=1):
    """Return one batch of pairs with ragged rows: even rows end in tokens 10-19, odd rows in tokens 30-39."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, size):
        return torch.randint(low, high, (size,), generator=generator).tolist()

    rows = []
    for i in range(count):
        prompt = [i + 2, *draw(2, 9, 1 + i % 3)]
        rows += [(prompt, [*draw(10, 20, 3 + i % 4), end]), (prompt, [*draw(30, 40, 2 + i % 5), end])]
    width = max(len(p) + len(a) for p, a in rows)
    pad = [width - len(p) - len(a) for p, a in rows]
    return {
        "input_ids": torch.tensor([[*p, *a, *[0] * n] for (p, a), n in zip(rows, pad, strict=True)]),
        "attention_mask": torch.tensor([[1] * (width - n) + [0] * n for n in pad]),
        "labels": torch.tensor(
            [[*[IGNORED] * len(p), *a, *[IGNORED] * n] for (p, a), n in zip(rows, pad, strict=True)]
        ),
        "pairs": count,
    }


BATCH = pairs()


def subject_of(model, **options):
    return Subject(model, batches=lambda stream: iter([BATCH]), **options)


def logits(model, hook=None):
    with torch.no_grad():
        return model.eval()(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits


def heads_by_hand(model, layer, tokens):
    """Return the outputs of a layer's heads, one row and token at a time: two lists of ``[heads, head_dim]``.

    Every query head attends by itself, with the keys and values of its group.
    """
    attention, config = model.model.layers[layer].self_attn, model.config
    wide = {}
    handle = attention.register_forward_pre_hook(lambda _, args, kwargs: wide.update(kwargs), with_kwargs=True)
    found = ([], [])
    for row in range(len(BATCH["input_ids"])):
        size = int(BATCH["attention_mask"][row].sum())
        with torch.no_grad():
            model(input_ids=BATCH["input_ids"][row : row + 1, :size])
        x, (cos, sin) = wide["hidden_states"][0], wide["position_embeddings"]
        dim = config.head_dim
        outputs = []
        for head in range(config.num_attention_heads):
            group = head // (config.num_attention_heads // config.num_key_value_heads)
            q, k, v = (
                x @ w.weight[i * dim : (i + 1) * dim].T
                for w, i in ((attention.q_proj, head), (attention.k_proj, group), (attention.v_proj, group))
            )
            half = torch.cat([torch.eye(dim)[dim // 2 :], -torch.eye(dim)[: dim // 2]]).to(x)
            q, k = (t * cos[0] + (t @ half) * sin[0] for t in (q, k))
            scores = (q @ k.T / math.sqrt(dim)).masked_fill(torch.ones(size, size).triu(1).bool(), -math.inf)
            outputs.append(scores.softmax(dim=1) @ v)
        response = [t for t in range(size) if BATCH["labels"][row, t] != IGNORED][:-1]
        for t in response[-tokens:]:
            found[row % 2].append(torch.stack([o[t] for o in outputs]).detach())
    handle.remove()
    return found


def test_a_planted_direction_is_found_and_its_head_ranked_first():
    """Only head 2 of layer 1 tells the kinds apart. There the means differ by 3 u, with variance 1 along every axis."""
    generator = torch.Generator().manual_seed(0)
    u = torch.tensor([3.0, 4.0, 0.0, 0.0], dtype=torch.float64) / 5
    accuracy, separation = [], []
    for layer in range(2):
        kinds = []
        for sign in (1.5, -1.5):
            x = torch.randn(2000, 3, 4, generator=generator, dtype=torch.float64) + 7
            if layer == 1:
                x[:, 2] += sign * u
            kinds.append(x)
        safe, unsafe = kinds
        w, c = linear_probes(safe[:1000], unsafe[:1000])
        quality = probe_quality(w, c, safe[1000:], unsafe[1000:])
        accuracy.append(quality[0])
        separation.append(quality[1])
    assert ranked_heads(torch.stack(accuracy), torch.stack(separation))[0] == (1, 2)
    theta, sigma = head_directions(safe, unsafe)
    assert_close(theta[2], u, rtol=0, atol=0.05)
    assert float(sigma[2]) == pytest.approx(math.sqrt(1 + 1.5**2), rel=0.03)
    assert float(accuracy[1][2]) == pytest.approx(0.933, abs=0.02)  # Phi(1.5), the best that any probe reaches
    assert float(separation[1][2]) == pytest.approx(3, rel=0.05)
    assert max(float(accuracy[0].max()), float(accuracy[1][:2].max())) < 0.56


def test_theta_and_sigma_by_hand():
    safe = torch.tensor([[[3.0, 0.0]], [[5.0, 0.0]]], dtype=torch.float64)
    unsafe = torch.tensor([[[0.0, 1.0]], [[0.0, -1.0]]], dtype=torch.float64)
    theta, sigma = head_directions(safe, unsafe)
    assert_close(theta, torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    assert_close(sigma, torch.tensor([math.sqrt(34 / 4 - 4)], dtype=torch.float64))  # of 3, 5, 0, 0
    theta, sigma = head_directions(safe, safe)
    assert not theta.any()
    assert not sigma.any()


def test_ties_go_to_the_clearer_then_to_the_earlier_head():
    accuracy = torch.tensor([[0.9, 1.0], [1.0, 1.0]])
    separation = torch.tensor([[9.0, 2.0], [3.0, 2.0]])
    assert ranked_heads(accuracy, separation) == [(1, 0), (0, 1), (1, 1), (0, 0)]


def test_no_prompt_is_on_both_sides():
    """Rows with one prompt share a digest, also across kinds and padding. The sides have exact sizes."""
    digests = prompt_digests(BATCH)
    assert digests[0::2] == digests[1::2]
    assert len(set(digests)) == 12
    left = {key: torch.nn.functional.pad(BATCH[key], (3, 0), value=v) for key, v in
            (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORED))}  # fmt: skip
    assert prompt_digests(left) == digests
    assert len(validation_prompts(digests, 0.4)) == 5
    assert validation_prompts(reversed(digests), 0.4) == validation_prompts(digests, 0.4)
    assert len(validation_prompts(digests[:4], 0.01)) == len(validation_prompts(digests[:4], 0.99)) == 1
    with pytest.raises(ValueError, match="at least two prompts"):
        validation_prompts(digests[:2], 0.4)


def test_last_response_tokens():
    labels = torch.tensor([[IGNORED, 1, 2, 3, IGNORED], [IGNORED, IGNORED, 4, IGNORED, IGNORED]])
    assert last_response_tokens(labels, 2).tolist() == [
        [False, False, True, True, False],
        [False, False, True, False, False],
    ]


def test_a_model_is_locked_as_a_loop_over_heads_says():
    """Heads are query heads, two to a group of keys and values. The directions are the aligned model's.

    The projection is the fine-tuned model's. The bias equals a shift of the head outputs by a hook.
    """
    aligned = small_llama()
    model = with_update(copy.deepcopy(aligned))
    tuned = copy.deepcopy(model).merge_and_unload()
    subject = subject_of(model)
    SafetyLock(heads=3, strength=2.0, tokens=2).apply(subject)
    assert subject.dense
    chosen = [(r["weight"], r["head"]) for r in subject.report["heads"]]
    assert len(set(chosen)) == 3
    rows = [[], []]
    for layer in range(2):
        safe, unsafe = (torch.stack(kind) for kind in heads_by_hand(aligned, layer, 2))
        assert len(safe) == subject.report["safe_tokens"] == 24
        theta, sigma = head_directions(safe, unsafe)
        rows[layer] = [2.0 * s * t for s, t in zip(sigma, theta, strict=True)]
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        expected = torch.zeros(16, dtype=torch.float64)
        for head in range(4):
            if (name, head) in chosen:
                expected += tuned.get_parameter(name)[:, 4 * head : 4 * head + 4] @ rows[layer][head]
        bias = ModelWeights.of(model).parameters[name.replace("weight", "bias")]
        assert_close(bias, expected, rtol=0, atol=1e-12)

        def shift(_, args, layer=layer, name=name):
            x = args[0].clone()
            for head in range(4):
                if (name, head) in chosen:
                    x[..., 4 * head : 4 * head + 4] += rows[layer][head]
            return (x,)

        tuned.get_submodule(name[:-7]).register_forward_pre_hook(shift)
    assert_close(logits(model), logits(tuned), rtol=0, atol=1e-6)
    assert subject.report["changed_entries"] == 16 * len({name for name, _ in chosen})


def test_accuracy_is_that_of_the_other_prompts():
    model = with_update(small_llama())
    subject = subject_of(model)
    SafetyLock(heads=8, tokens=2).apply(subject)
    held_out = validation_prompts(prompt_digests(BATCH), 0.4)
    counts = [2] * 12
    out = torch.tensor([d in held_out for d in prompt_digests(BATCH)[0::2]]).repeat_interleave(torch.tensor(counts))
    for layer in range(2):
        safe, unsafe = (torch.stack(kind) for kind in heads_by_hand(small_llama(), layer, 2))
        w, c = linear_probes(safe[~out], unsafe[~out])
        for row in subject.report["heads"]:
            if f"layers.{layer}." in row["weight"]:
                values = [((x[out][:, row["head"]] @ w[row["head"]]) > c[row["head"]]).double() for x in (safe, unsafe)]
                assert row["accuracy"] == pytest.approx(float(values[0].mean() + 1 - values[1].mean()) / 2)
    assert (subject.report["training_prompts"], subject.report["validation_prompts"]) == (7, 5)


@pytest.mark.parametrize(
    ("kind", "bias"),
    [("adapter", False), *(pytest.param(*c, marks=pytest.mark.slow) for c in (("adapter", True), ("full", False)))],
)
def test_plain_transformers_loads_what_was_saved(kind, bias, tmp_path):
    aligned = small_llama(bias=bias, dtype=torch.float32)
    aligned.save_pretrained(tmp_path / "aligned")
    model = moved_model(aligned, 0.05, seed=1) if kind == "full" else with_update(copy.deepcopy(aligned))
    plain = logits(model)
    folder = tmp_path / "locked"
    safety_lock(model, [BATCH], heads=3, output=str(folder), aligned=str(tmp_path / "aligned"))
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    assert (logits(model) - plain).abs().max() > 1e-3
    assert loaded.config.attention_bias


def test_zero_strength_is_the_identity(tmp_path):
    model = with_update(small_llama(dtype=torch.float32))
    plain = logits(model)
    safety_lock(model, [BATCH], strength=0.0, output=str(tmp_path / "locked"))
    assert torch.equal(logits(model), plain)
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())
    model.get_base_model().save_pretrained(tmp_path / "base")
    assert (tmp_path / "locked" / "adapter_config.json").is_file()


def test_a_sweep_reuses_the_scores():
    """Heads and strength change the edit alone. Twice the strength is twice the bias."""
    stored, biases = {}, []

    def kept(repair, compute):
        return stored.setdefault("scores", None) or stored.update(scores=compute()) or stored["scores"]

    for strength in (1.0, 2.0):
        model = with_update(small_llama())
        SafetyLock(heads=8, strength=strength).apply(subject_of(model, kept=kept))
        biases.append(ModelWeights.of(model).parameters["model.layers.0.self_attn.o_proj.bias"])
        stored_batches = stored["scores"]
    assert_close(biases[1], 2 * biases[0], rtol=1e-12, atol=0)
    assert set(stored_batches) == {"accuracy", "separation", "theta", "sigma", "numbers"}


def test_scores_come_from_the_aligned_model_alone():
    subjects = [subject_of(with_update(small_llama(), seed=seed)) for seed in (0, 1)]
    scores = [SafetyLock(heads=1).scored(subject) for subject in subjects]
    for name, value in scores[0].items():
        assert torch.equal(value, scores[1][name])
    before = lora_updates(with_update(small_llama(), seed=1))
    for name, update in lora_updates(subjects[1].model).items():
        assert torch.equal(update.b, before[name].b)
    aligned = small_llama()
    full = subject_of(moved_model(aligned, 0.1, seed=3), aligned=ModelWeights.of(aligned))
    assert torch.equal(SafetyLock(heads=1).scored(full)["theta"], scores[0]["theta"])


def test_a_locked_state_goes_into_a_model_without_biases():
    """An attacker's trial puts the repaired state into a fresh base model in memory."""
    model = with_update(small_llama())
    subject = subject_of(model)
    SafetyLock(heads=2).apply(subject)
    from hftlight.engine.weights.save import repaired_state

    fresh = ModelState(repaired_state(subject)).put_into(small_llama(seed=5))
    assert_close(logits(fresh), logits(model), rtol=0, atol=1e-12)


# Families


def family(name, **changes):
    config = FAMILIES[name]() if name in FAMILIES else changes.pop("config")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", some_slow(["qwen", "gemma", "gpt_neox", "opt"], ["opt"]))
def test_families_with_a_bias_are_locked_and_load_again(name, tmp_path):
    model = family(name)
    aligned = ModelWeights.of(copy.deepcopy(model))
    plain = logits(model)
    subject = subject_of(model, aligned=aligned)
    SafetyLock(heads=3).apply(subject)
    model.save_pretrained(tmp_path / "locked")
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "locked")), logits(model), rtol=0, atol=1e-5)
    assert (logits(model) - plain).abs().max() > 1e-5
    assert subject.report["switched_on"] == (None if name in ("gpt_neox", "opt") else "attention_bias")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Qwen2Config", r"Qwen2ForCausalLM has no model\.layers\.0\.self_attn\.o_proj\.bias"),
        pytest.param("MistralConfig", "MistralForCausalLM has no", marks=pytest.mark.slow),
        ("gpt2", r"transformer\.h\.0\.attn\.c_proj\.weight is a Conv1D"),
    ],
)
def test_families_without_the_bias_are_refused_by_name(name, words):
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1}
    config = None if name in FAMILIES else getattr(transformers, name)(**size, **heads, eos_token_id=2)
    model = family(name, config=config)
    with pytest.raises(TypeError, match=words):
        SafetyLock(heads=2).apply(subject_of(model, aligned=ModelWeights.of(model)))
    assert all(p.isfinite().all() for p in model.parameters())


def test_opened_biases_change_nothing_and_name_their_setting():
    model = small_llama()
    plain = logits(model)
    assert open_biases(model, ["model.layers.0.self_attn.o_proj.bias"], "Test") == "attention_bias"
    assert torch.equal(logits(model), plain)
    assert sum(name.endswith(".bias") for name, _ in model.named_parameters()) == 8
    with pytest.raises(TypeError, match=r"Test: LlamaForCausalLM has no model\.norm\.bias"):
        open_biases(small_llama(), ["model.norm.bias"], "Test")


# What is refused


def test_what_cannot_be_locked_is_named():
    model = with_update(small_llama())
    with pytest.raises(ValueError, match="the model has 8 attention heads"):
        SafetyLock().apply(subject_of(model))
    single = {key: value for key, value in BATCH.items() if key != "pairs"}
    with pytest.raises(ValueError, match="two rows for each prompt"):
        SafetyLock(heads=2).apply(Subject(model, batches=lambda stream: iter([single])))
    mixed = {**BATCH, "input_ids": BATCH["input_ids"].roll(1, dims=0), "labels": BATCH["labels"].roll(1, dims=0)}
    with pytest.raises(ValueError, match="12 of 12 pairs have"):
        SafetyLock(heads=2).apply(Subject(model, batches=lambda stream: iter([mixed])))
    with pytest.raises(RuntimeError, match="needs the aligned model"):
        SafetyLock(heads=2).apply(subject_of(small_llama()))
    with pytest.raises(TypeError, match="Load the model in float32"):
        SafetyLock(heads=2).check_model(with_update(small_llama(dtype=torch.bfloat16)))
    SafetyLock(heads=2).apply(subject_of(model))
    with pytest.raises(RuntimeError, match="applied to the model before"):
        SafetyLock(heads=2).apply(subject_of(model))


def test_equal_answers_change_nothing_and_say_so():
    same = {key: v[0::2].repeat_interleave(2, dim=0) if key != "pairs" else v for key, v in BATCH.items()}
    subject = Subject(with_update(small_llama()), batches=lambda stream: iter([same]))
    with pytest.warns(UserWarning, match="same output on safe and unsafe answers"):
        SafetyLock(heads=2).apply(subject)
    assert subject.report["changed_entries"] == 0


@pytest.mark.slow
def test_an_adapter_folder_becomes_a_whole_model(tmp_path):
    base = small_llama(dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    model = with_update(base)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "tuned")
    folder = tmp_path / "locked"
    subject = subject_of(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.float32))
    SafetyLock(heads=2).apply(subject)
    from hftlight.engine.weights.save import save_repaired

    save_repaired(folder, subject)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(subject.model), rtol=0, atol=1e-5)
