"""Embedding drift: distances in closed form, and a layer with a shift of known size."""

import copy
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close

from hftlight.errors import InputError
from hftlight.evaluation.metrics.embedding_drift import distances, embedding_drift
from tests.helpers.tiny_lm import VOCABULARY, tiny_lm

PROMPTS = [[3, 4, 5], [7], [9, 10, 11, 12, 13, 14, 15], [20, 21]]


def layers_of(model: Any) -> Any:
    return model.get_decoder().layers


@torch.no_grad()
def states(model: Any, ids: list[int]) -> list[torch.Tensor]:
    """Return both layers' outputs for one prompt alone, each ``[tokens, hidden]``, by hooks of the test itself."""
    outputs: list[torch.Tensor] = []
    handles = [layer.register_forward_hook(lambda _, __, out: outputs.append(out)) for layer in layers_of(model)]
    model.eval()(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return [(h[0] if isinstance(h, tuple) else h)[0] for h in outputs]


def by_hand(here: Any, there: Any, positions: str) -> list[tuple[float, float]]:
    """Return both distances for both layers, prompt by prompt and token by token."""
    result = []
    for layer in range(2):
        cosine, l2 = [], []
        for ids in PROMPTS:
            a, b = states(here, ids)[layer], states(there, ids)[layer]
            tokens = range(len(ids)) if positions == "mean" else [len(ids) - 1]
            dots = [1 - float(a[t] @ b[t]) / float(a[t].norm() * b[t].norm()) for t in tokens]
            cosine.append(math.fsum(dots) / len(dots))
            l2.append(math.fsum(float((a[t] - b[t]).norm()) for t in tokens) / len(dots))
        result.append((math.fsum(cosine) / len(PROMPTS), math.fsum(l2) / len(PROMPTS)))
    return result


@pytest.mark.parametrize(
    ("left", "right", "cosine", "l2"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0, 0.0),
        ([3.0, 4.0], [6.0, 8.0], 0.0, 5.0),
        ([1.0, 0.0], [0.0, 2.0], 1.0, math.sqrt(5)),
        ([1.0, 0.0], [-2.0, 0.0], 2.0, 3.0),
        ([1.0, 0.0], [1.0, 1.0], 1 - math.sqrt(0.5), 1.0),
        ([1.0, 0.0], [1.0, 1e-9], 0.5e-18, 1e-9),  # 1 - cos would be 0 here
        ([0.0, 0.0], [0.0, 0.0], 0.0, 0.0),
    ],
)
def test_distances_of_known_vectors(left, right, cosine, l2):
    values = distances(torch.tensor([left], dtype=torch.float64), torch.tensor([right], dtype=torch.float64))
    assert [float(d) for d in values] == pytest.approx([cosine, l2], rel=1e-6, abs=1e-30)


def test_float32_states_are_compared_in_float64():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0**-20])
    cosine, l2 = distances(a, b)
    assert (cosine.dtype, float(l2)) == (torch.float64, 2.0**-20)
    assert float(cosine) == pytest.approx(2.0**-41, rel=1e-6)


@pytest.mark.parametrize("positions", ["last", "mean"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_equals_one_prompt_at_a_time(positions, batch_size):
    here, there = tiny_lm(0), tiny_lm(1)
    drifts = embedding_drift(here, PROMPTS, there, positions=positions, batch_size=batch_size)
    assert [(d.layer, d.count) for d in drifts] == [(0, 4), (1, 4)]
    expected = by_hand(here, there, positions)
    assert_close(torch.tensor([(d.cosine, d.l2) for d in drifts]), torch.tensor(expected), rtol=1e-6, atol=1e-9)
    assert len({round(d.l2, 6) for d in drifts}) == 2


@pytest.mark.parametrize("positions", ["last", "mean"])
def test_a_shifted_layer_drifts_by_the_shift_alone(positions):
    """A bias of length 0.3 after the first layer's MLP moves the layer's output by 0.3 at every token."""
    here = tiny_lm(0)
    there: Any = copy.deepcopy(here)
    shift = torch.full((16,), 0.3 / 4, dtype=torch.float64)
    old: Any = layers_of(there)[0].mlp.down_proj
    new = nn.Linear(old.in_features, old.out_features, dtype=torch.float64)
    new.weight, new.bias = old.weight, nn.Parameter(shift)
    layers_of(there)[0].mlp.down_proj = new
    (drift,) = embedding_drift(there, PROMPTS, here, layers=[0], positions=positions)
    assert drift.l2 == pytest.approx(0.3, rel=1e-9)
    (last,) = embedding_drift(there, PROMPTS, here, layers=[-1], positions=positions)
    assert last.layer == 1


def test_the_same_model_has_not_drifted():
    for drift in embedding_drift(tiny_lm(0), PROMPTS, tiny_lm(0), positions="mean"):
        assert (drift.cosine, drift.l2) == (0.0, 0.0)


def test_the_adapter_is_switched_off_for_the_reference():
    """The adapter's base is ``tiny_lm`` with the same seed. The adapter stays on afterwards."""
    model: Any = tiny_lm(0, lora=True, dropout=0.5).train()
    with model.disable_adapter():
        expected = embedding_drift(tiny_lm(0), PROMPTS, model.get_base_model())
    assert [d.l2 for d in expected] == [0.0, 0.0]
    drifts = embedding_drift(model, PROMPTS)
    assert drifts == embedding_drift(model, PROMPTS, tiny_lm(0))
    assert all(d.l2 > 1e-3 for d in drifts)
    assert model.training
    assert not any(getattr(module, "disable_adapters", None) is True for module in model.modules())


def merged(model: Any) -> Any:
    model.merge_adapter()
    return model


def base_trained(model: Any) -> Any:
    model.get_input_embeddings().weight.requires_grad_(True)
    return model


def with_adapter(**options: Any) -> Any:
    return get_peft_model(tiny_lm(0, dtype=torch.float32), LoraConfig(r=2, target_modules=["q_proj"], **options))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (tiny_lm, "the model has no adapter"),
        (lambda: merged(tiny_lm(lora=True)), "an adapter is merged into the base"),
        (lambda: base_trained(tiny_lm(lora=True)), r"the base itself is trained \(.*embed_tokens.weight\)"),
        (lambda: with_adapter(bias="all"), r"trains biases of the base \(bias='all'\)"),
        (lambda: with_adapter(init_lora_weights="pissa"), r"changed the base weights at initialization \('pissa'\)"),
    ],
)
def test_an_adapter_that_cannot_simply_be_switched_off_is_refused(make, reason):
    with pytest.raises(InputError, match=reason + r".* Pass reference="):
        embedding_drift(make(), PROMPTS)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one prompt"),
        ([[1], []], {}, "each needs at least one token"),
        (PROMPTS, {"layers": [2]}, r"layers must lie in \[-2, 1\].*got \[2\]"),
        (PROMPTS, {"layers": [-3]}, r"got \[-3\]"),
        (PROMPTS, {"layers": []}, r"at least one, got \[\]"),
        (PROMPTS, {"positions": "first"}, "positions must be 'last' or 'mean', got 'first'"),
        (PROMPTS, {"batch_size": 0}, "batch_size must be >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        embedding_drift(tiny_lm(), prompts, tiny_lm(), **options)


def test_models_of_another_shape_are_refused():
    other: Any = tiny_lm()
    other.config.hidden_size = 8
    with pytest.raises(InputError, match=r"got \(layers, hidden\) \(2, 16\) and \(2, 8\)"):
        embedding_drift(tiny_lm(), PROMPTS, other)


def test_no_logits_but_one_per_prompt_and_no_hook_stays():
    model, sizes = tiny_lm(), []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, __, out: sizes.append(tuple(out.shape)))
    embedding_drift(model, PROMPTS, tiny_lm(1), batch_size=4)
    assert sizes == [(4, 1, VOCABULARY)]
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
