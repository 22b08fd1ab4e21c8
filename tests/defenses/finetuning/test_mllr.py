"""MLLR: two blocks of a quadratic at two rates, names as whole words, and schedules that keep the ratio."""

import pytest
import torch
from torch.testing import assert_close

from hftlight.defenses.finetuning.mllr import MLLR, in_modules
from tests.helpers.contract import model_of, train, weights_of
from tests.helpers.tiny_lm import tiny_lm, token_batch

NAMES = [f"model.layers.{i}.self_attn.{kind}.weight" for i in range(3) for kind in ("q_proj", "v_proj")]
LAYERS = {name: int(name.split(".")[2]) for name in NAMES}


def test_block_errors_follow_their_own_rate():
    """With curvature h, k steps of SGD shrink a robust block to (1 - lr h)^k.

    Another block shrinks to (1 - gamma lr h)^k.
    """
    lr, gamma, h, steps = 0.1, 0.25, 2.0, 5
    blocks = {"q_proj.weight": torch.nn.Parameter(torch.ones(1)), "up_proj.weight": torch.nn.Parameter(torch.ones(1))}
    robust = in_modules(list(blocks), ["q_proj"], {})
    optimizer = torch.optim.SGD(MLLR(["q_proj"], gamma).groups(blocks, robust, lr), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        sum((h * p**2 / 2).sum() for p in blocks.values()).backward()
        optimizer.step()
    assert_close(blocks["q_proj.weight"].data, torch.tensor([(1 - lr * h) ** steps]))
    assert_close(blocks["up_proj.weight"].data, torch.tensor([(1 - gamma * lr * h) ** steps]))


def test_gamma_zero_freezes_bit_for_bit_under_adamw():
    model = model_of("lora")
    before = weights_of(model)
    train([MLLR(["v_proj"], gamma=0.0)], model=model, optimizer="adamw", lr=0.01)
    for name, p in weights_of(model).items():
        assert torch.equal(p, before[name]) == (".v_proj." not in name), name


def test_names_are_whole_words_and_spans_are_of_layers():
    assert sum(in_modules(NAMES, ["q_proj"], LAYERS).values()) == 3
    flags = in_modules(NAMES, ["v_proj:1-2"], LAYERS)
    assert [name for name, robust in flags.items() if robust] == [NAMES[3], NAMES[5]]
    for pattern in ("proj", "q", "layers.0"):
        with pytest.raises(ValueError, match="no trainable module is called"):
            in_modules(NAMES, [pattern], LAYERS)
    for pattern in ("q_proj:2-1", "q_proj:1", "q_proj:a-b"):
        with pytest.raises(ValueError, match="robust names modules such as"):
            in_modules(NAMES, [pattern], LAYERS)


def test_all_modules_robust_is_refused():
    with pytest.raises(ValueError, match="names every trainable module"):
        train([MLLR(["q_proj", "v_proj", "o_proj"])], "lora")


def test_the_cosine_schedule_scales_both_rates():
    from hftlight import SafetyModule

    module = SafetyModule(tiny_lm(lora=True), lr=0.1, schedule="cosine")
    module.parameter_groups = lambda named: [
        {"params": [p for name, p in named.items() if "v_proj" in name], "lr": 0.1},
        {"params": [p for name, p in named.items() if "v_proj" not in name], "lr": 0.025},
    ]
    module._trainer = type("T", (), {"estimated_stepping_batches": 4})()
    configuration = module.configure_optimizers()
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in configuration["optimizer"].param_groups])
        module.loss(token_batch(1)).backward()
        configuration["optimizer"].step()
        configuration["lr_scheduler"]["scheduler"].step()
    assert all(slow == pytest.approx(fast / 4) for fast, slow in rates)
    assert rates[0][0] > rates[3][0]
