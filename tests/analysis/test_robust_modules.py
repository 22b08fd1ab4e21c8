"""The search for robust modules: a probe with a closed form, and a model with known carriers of the difference."""

import pytest
import torch
from torch.testing import assert_close

from hftlight.analysis import robust_modules
from hftlight.analysis.ridge import RIDGE, probe
from hftlight.defenses import MLLR
from tests.helpers.contract import train
from tests.helpers.tiny_lm import VOCABULARY, tiny_lm

HARMFUL, ORDINARY = 5, 9  # the first token of a harmful and of an ordinary prompt


def prompts(opening, count=12, tokens=5):
    generator = torch.Generator().manual_seed(opening)
    ids = torch.randint(10, VOCABULARY, (count, tokens), generator=generator)
    ids[:, 0] = opening
    mask = torch.ones_like(ids)
    mask[1::3, -1] = 0
    return [{"input_ids": part, "attention_mask": m} for part, m in zip(ids.split(5), mask.split(5), strict=True)]


def model_that_carries_it(lora=False):
    """Return a model in which only layer 1's v_proj and o_proj bring the first token's kind to the last position."""
    model = tiny_lm(lora=lora)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or (".layers." in name and "norm" not in name and "lora" not in name):
                p.zero_()
        embeddings = model.get_input_embeddings().weight
        embeddings[:, :2] = 0
        embeddings[HARMFUL, :2], embeddings[ORDINARY, :2] = torch.tensor([[40.0, 0.0], [0.0, 40.0]]).double()
        layer = dict(model.named_modules())["base_model.model.model.layers.1" if lora else "model.layers.1"]
        for module, width in ((layer.self_attn.v_proj, 2), (layer.self_attn.o_proj, 2)):
            getattr(module, "base_layer", module).weight[:width, :width] = torch.eye(2).double()
    return model


def test_the_probe_is_ridge_regression():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    harmful = torch.arange(10) < 4
    w, b = probe(states, harmful)
    x = torch.cat([states - states.mean(0)], 1)
    ridge = RIDGE * (x**2).sum(1).mean()
    y = harmful.double() * 2 - 1
    expected = torch.linalg.solve(x.T @ x + ridge * torch.eye(3, dtype=torch.float64), x.T @ (y - y.mean()))
    assert_close(w, expected)
    assert_close(b, y.mean() - states.mean(0) @ expected)


@pytest.mark.parametrize("lora", [False, True])
def test_it_finds_what_the_difference_does_not_hang_on(lora, monkeypatch):
    model = model_that_carries_it(lora).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = robust_modules(model, prompts(HARMFUL), prompts(ORDINARY), spans=2, scale=30.0, retained=1.0)
    assert result.accuracy == result.joint == 1.0
    assert set(result.alone) - set(result.robust) <= {"v_proj:1-1", "o_proj:1-1"}
    assert result.alone["v_proj:1-1"] < 1.0
    assert {"q_proj:0-0", "v_proj:0-0", "down_proj:1-1"} <= set(result.robust)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(m.training for m in model.modules())


def test_a_looser_threshold_never_gives_fewer_modules():
    model = model_that_carries_it()
    sizes = [
        len(robust_modules(model, prompts(HARMFUL), prompts(ORDINARY), 2, scale=30.0, retained=share).robust)
        for share in (1.0, 0.7, 0.01)
    ]
    assert sizes == sorted(sizes)
    assert sizes[-1] == 14


def test_what_it_finds_is_what_the_defense_takes():
    result = robust_modules(model_that_carries_it(), prompts(HARMFUL), prompts(ORDINARY), 2, 30.0, 1.0)
    defense = MLLR([p for p in result.robust if p.startswith(("q_proj", "v_proj"))])
    train([defense], steps=1)
    assert defense.summary()["robust_tensors"] > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spans": 0}, "spans"),
        ({"scale": 0.0}, "scale"),
        ({"retained": 1.5}, "retained"),
        ({"harmful": prompts(HARMFUL, 3)}, "at least 4 harmful"),
        ({"harmful": prompts(ORDINARY)}, "no more than chance"),
    ],
)
def test_bad_input_is_named(changes, said):
    values = {"harmful": prompts(HARMFUL), "ordinary": prompts(ORDINARY), **changes}
    with pytest.raises(ValueError, match=said):
        robust_modules(model_that_carries_it(), **values)
