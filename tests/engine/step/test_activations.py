"""Sites found by name, layers recomputed at run time, gradients at activations."""

import contextlib

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from hftlight import SafetyModule
from hftlight.engine.step.activations import (
    ATTENTION,
    branched,
    enclosing_layer,
    modules_called,
    recomputed,
    site_gradients,
)
from tests.helpers.quadratic import quiet_trainer
from tests.helpers.tiny_lm import tiny_lm, token_batch


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleDict({"attention": nn.Linear(2, 2)})
        self.mlp = nn.Linear(2, 2)


def test_modules_are_found_by_name_or_class_outermost_first():
    model = nn.ModuleDict({"h": nn.ModuleList(Block() for _ in range(2)), "norm": nn.LayerNorm(2)})
    assert list(modules_called(model, ATTENTION)) == ["h.0.attention", "h.1.attention"]
    assert list(modules_called(model, ["LayerNorm"])) == ["norm"]
    assert list(modules_called(model, ["Block", "attention"])) == ["h.0", "h.1"]

    class Sharded(Block):
        pass

    model["h"][0].__class__ = Sharded  # as FSDP2 does
    assert list(modules_called(model, ["Block"])) == ["h.0", "h.1"]
    with pytest.raises(
        ValueError, match=r"no module is called \['mixer'\]; there are \['attention', 'h', 'mlp', 'norm'"
    ):
        modules_called(model, ["mixer"])


def test_the_enclosing_layer_is_an_entry_of_a_module_list():
    model = nn.ModuleDict({"h": nn.ModuleList(Block() for _ in range(2)), "norm": nn.LayerNorm(2)})
    assert enclosing_layer(model, "h.1.attention") == "h.1"
    assert enclosing_layer(model, "h.0.attention.attention") == "h.0"
    assert enclosing_layer(model, "norm") == "norm"


def test_recomputed_modules_keep_their_input_only_and_get_their_forward_back():
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 4)) for _ in range(2))
    own = layers[1].forward
    layers[1].forward = own  # a ``forward`` that a user set on the instance
    x = torch.randn(3, 4)

    def measured():
        torch.manual_seed(1)
        sizes = []
        # The first hook records each saved tensor's size and returns the tensor.
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            loss = layers[1](layers[0](x)).square().sum()
        return sum(sizes), torch.autograd.grad(loss, list(layers.parameters()))

    plain = measured()
    with contextlib.suppress(ZeroDivisionError), recomputed(layers):
        less = measured()
        raise ZeroDivisionError
    assert less[0] < 0.1 * plain[0]
    for a, b in zip(plain[1], less[1], strict=True):
        assert torch.equal(a, b)
    assert "forward" not in layers[0].__dict__
    assert layers[1].__dict__["forward"] == own
    assert measured()[0] == plain[0]


@pytest.fixture
def module():
    module = SafetyModule(tiny_lm(lora=True, dropout=0.2))
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, DataLoader([token_batch(0)], batch_size=None))
    module.trainer = trainer
    module.zero_grad()
    return module


def test_gradients_at_sites_touch_nothing_else(module):
    sites, batch = modules_called(module, ATTENTION), token_batch(1)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    state = torch.get_rng_state()
    result = site_gradients(module, batch, sites)
    again = site_gradients(module, batch, sites)
    assert result.grads.keys() == sites.keys()
    assert all(torch.equal(result.grads[name], again.grads[name]) for name in sites)  # the same dropout masks
    other = site_gradients(module, batch, sites, fresh_masks=True)
    assert not torch.equal(result.loss, other.loss)
    assert torch.equal(site_gradients(module, batch, sites, fresh_masks=True).loss, other.loss)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert not any(m._forward_hooks for m in module.modules())
    assert result.scale == 1


def test_the_first_of_several_runs_counts_and_a_site_that_decides_nothing_gets_zeros(module):
    """The loss runs one site twice. Finite differences give the gradient at the first run alone."""
    layer = nn.Linear(3, 3, dtype=torch.float64)
    idle = nn.Linear(3, 3, dtype=torch.float64)
    x = torch.ones(1, 3, dtype=torch.float64)

    def loss(_):
        idle(x)
        return layer(layer(x).tanh()).square().sum()

    module.loss = loss
    result = site_gradients(module, None, {"layer": layer, "idle": idle})
    first = layer(x).detach()

    def rest(y):
        return float(layer(y.tanh()).detach().square().sum())

    step = 1e-6
    slopes = []
    for i in range(3):
        shift = torch.zeros_like(first)
        shift[0, i] = step
        slopes.append((rest(first + shift) - rest(first - shift)) / (2 * step))
    assert_close(result.grads["layer"], torch.tensor([slopes], dtype=torch.float64), rtol=1e-6, atol=1e-8)
    assert not result.grads["idle"].any()


def test_a_branch_is_added_to_the_output_and_comes_off():
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    weight = torch.randn(2, 3)
    plain = layer(x)
    with branched({"one": layer}, lambda name, value: value @ weight.T if name == "one" else value):
        assert_close(layer(x), plain + x @ weight.T)
    assert torch.equal(layer(x), plain)
