"""RSNTune's neurons against brute force, and weights outside them that keep every bit."""

import pytest
import torch
from torch.testing import assert_close

from hftlight import SafetyModule
from hftlight.defenses import RSNTune
from hftlight.engine import Stage
from hftlight.engine.weights.neurons import agreement, find_neurons
from hftlight.engine.weights.regions import linear_targets
from hftlight.models.module import decoder_layers
from tests.helpers.contract import data_module, model_of, train, weights_of
from tests.helpers.quadratic import quiet_trainer
from tests.helpers.tiny_lm import tiny_lm, token_batch


def own(**more):
    settings = {"safety_ratio": 0.5, "utility_ratio": 0.25, "samples": 4, "safety": "harmful", "utility": "retain"}
    return RSNTune(**(settings | more))


def parts(model):
    targets = linear_targets(model, decoder_layers, "RSNTune")
    return targets, find_neurons(model, decoder_layers(model), {t.layer: n for n, t in targets.items()})


def test_every_mlp_and_attention_has_its_neurons():
    """The tiny model has 32 hidden units, and two query heads of 8 channels that share one value head."""
    _, neurons = parts(tiny_lm())
    by_name = {n.name: n for n in neurons}
    assert {n.count for name, n in by_name.items() if name.endswith("mlp")} == {32}
    attention = by_name["model.layers.0.self_attn"]
    assert (attention.count, attention.owner.tolist()) == (8, [*range(8), *range(8)])
    assert attention.writers == ("model.layers.0.self_attn.v_proj.weight",)
    assert set(by_name["model.layers.1.mlp"].writers) == {
        f"model.layers.1.mlp.{n}.weight" for n in ("gate_proj", "up_proj")
    }


def test_deactivation_of_a_hidden_unit_is_its_activation_times_its_column():
    """|a_j| |down_j| is the exact change of the MLP's output, so the ranking equals that of setting units to zero."""
    model, batch = tiny_lm().eval(), token_batch(0, rows=1, ragged=False)
    targets, neurons = parts(model)
    mlp = model.model.layers[1].mlp
    inputs = []
    handle = mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(input_ids=batch["input_ids"])
    handle.remove()
    changes = []
    for unit in range(32):
        without = inputs[0].clone()
        without[..., unit] = 0
        changes.append((mlp.down_proj(inputs[0]) - mlp.down_proj(without)).norm())
    order = torch.stack(changes).argsort(descending=True)
    closed = (inputs[0].square().sum((0, 1)).sqrt() * mlp.down_proj.weight.norm(dim=0)).detach()
    assert_close(torch.stack(changes), closed, rtol=0, atol=1e-12)
    for count in (1, 5, 16):
        shares = agreement(lambda b: model(input_ids=b["input_ids"]), neurons, targets, [(batch, 1)], count / 32, False)
        chosen = shares["model.layers.1.mlp"] == 1
        assert chosen.nonzero().flatten().tolist() == sorted(order[:count].tolist())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("score", ["deactivation", "snip", "wanda"])
def test_weights_outside_the_neurons_keep_every_bit(score, optimizer):
    model = model_of("full")
    start, defense = weights_of(SafetyModule(model)), own(score=score)
    end = weights_of(train([defense], "full", model=model, optimizer=optimizer, lr=1e-2))
    report = defense.report
    assert report["trained"] == report["safety"] - report["both"] > 0
    moved = {name: (end[name] != start[name]) for name in end}
    for name, m in moved.items():
        if any(part in name for part in ("norm", "embed", "lm_head", "q_proj", "k_proj")):
            assert not m.any(), name
    rows, columns = (sum(int(m.any(1).sum()) for n, m in moved.items() if k in n) for k in ("up_proj", "v_proj"))
    assert rows + columns == report["trained"]
    for layer in (0, 1):
        up, down = (moved[f"model.model.layers.{layer}.mlp.{n}.weight"] for n in ("up_proj", "down_proj"))
        assert torch.equal(up.any(1), down.any(0))
        assert torch.equal(up.any(1), up.all(1))


def test_a_new_adapter_moves_only_the_rows_and_columns_of_the_neurons():
    """With B = 0 at the start, s B A itself stays zero outside, although both factors train."""
    model = model_of("lora")
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    module = train([own()], model=model, optimizer="adamw", lr=1e-2)
    named = dict(module.named_parameters())
    for layer in (0, 1):
        v, o = (
            named[f"{stem}.lora_B.default.weight"] @ named[f"{stem}.lora_A.default.weight"]
            for stem in (f"model.base_model.model.model.layers.{layer}.self_attn.{n}" for n in ("v_proj", "o_proj"))
        )
        trained = v.detach().abs().sum(1) > 0
        assert 0 < int(trained.sum()) < 8
        assert torch.equal(o.detach().abs().sum(0) > 0, trained.repeat(2))


def test_without_utility_rows_all_safety_neurons_train():
    defense = own(utility_ratio=0.0)
    train([defense], "full", steps=1)
    assert defense.streams == ("harmful",)
    assert defense.report["trained"] == defense.report["safety"]


def test_a_smaller_share_of_rows_gives_more_safety_neurons():
    strict, loose = own(utility_ratio=0.0), own(utility_ratio=0.0, shared=0.25)
    for defense in (strict, loose):
        train([defense], "full", steps=1)
    assert strict.report["safety"] < loose.report["safety"]


def test_no_neuron_left_is_refused():
    with pytest.raises(ValueError, match="no neuron is a safety neuron and no foundation neuron"):
        train([own(utility="alignment", safety="harmful", safety_ratio=0.04, utility_ratio=0.99)], "full", steps=1)


def test_a_model_without_known_neurons_is_refused():
    model = model_of("full")
    for layer in model.model.layers:
        layer.mlp.requires_grad_(False)
        layer.self_attn.o_proj.requires_grad_(False)
    with pytest.raises(TypeError, match="RSNTune: no decoder layer has an MLP"):
        quiet_trainer(max_steps=1, callbacks=[own()]).fit(SafetyModule(model), data_module(Stage.ALIGNMENT))
