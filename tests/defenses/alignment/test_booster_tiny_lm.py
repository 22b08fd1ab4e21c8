"""Booster on a random language model, against a slow computation without shared code."""

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from hftlight import SafetyModule
from hftlight.defenses.alignment.booster import Booster
from hftlight.engine import trainable
from tests.helpers.quadratic import quiet_trainer
from tests.helpers.tiny_lm import slow_booster_training, tiny_lm, token_batch

LR, LAM, ALPHA = 0.03, 5.0, 0.1


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def train(model, micro_batches, harmful, callbacks, micro, **options):
    module = SafetyModule(model, lr=LR, optimizer="sgd")
    for callback in callbacks:
        if isinstance(callback, Booster):
            callback._loaders["harmful"] = harmful
    loader = DataLoader(micro_batches, batch_size=None, shuffle=False)
    trainer = quiet_trainer(
        max_steps=len(micro_batches) // micro, accumulate_grad_batches=micro, callbacks=callbacks, **options
    )
    trainer.fit(module, loader)
    return module


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("steps", [1, 2, 26])
def test_equals_an_independent_computation(lora, micro, steps):
    """26 steps move the model away from its start.

    A regularizer that is computed only once, at the start, would pass the first step alone.
    """
    micro_batches = [token_batch(seed) for seed in range(steps * micro)]
    harmful = [token_batch(1000 + seed) for seed in range(steps)]
    start = tiny_lm(lora=lora)
    windows = [micro_batches[i * micro : (i + 1) * micro] for i in range(steps)]
    expected = slow_booster_training(start, windows, harmful, LR, LAM, ALPHA)
    before = weights(start)
    trained = train(start, micro_batches, harmful, [Booster(LAM, ALPHA)], micro)
    assert (weights(trained.model) - before).norm() > 1e-3
    assert (weights(trained.model) - weights(expected)).abs().max() <= 1e-10


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_zero_weight_is_bitwise_plain_alignment_with_dropout(lora):
    batches = [token_batch(seed) for seed in range(6)]
    results = []
    for callbacks in ([], [Booster(lam=0.0)]):
        model = tiny_lm(lora=lora, dropout=0.2)
        torch.manual_seed(3)
        results.append(weights(train(model, batches, batches, callbacks, micro=2).model))
    assert torch.equal(*results)


@pytest.mark.parametrize("failing_pass", [1, 2])
def test_an_exception_inside_a_pass_leaves_everything_as_found(failing_pass):
    """After the exception, weights, ``.grad``, the random state and the hooks equal those before the pass."""
    snapshots = {}

    def state(module):
        grads = {name: p.grad.clone() for name, p in trainable(module).items()}
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
        return {name: p.detach().clone() for name, p in trainable(module).items()}, grads, torch.get_rng_state(), hooks

    class Before(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            snapshots["before"] = state(pl_module)
            calls = []
            original = pl_module.token_losses

            def failing(batch):
                calls.append(None)
                torch.rand(3)
                losses = original(batch)
                if len(calls) == failing_pass:
                    raise FloatingPointError("inside the pass")
                return losses

            pl_module.token_losses = failing

    module = SafetyModule(tiny_lm(lora=True, dropout=0.1), lr=LR, optimizer="sgd")
    booster = Booster(LAM, ALPHA, streams={"harmful": [token_batch(7)]})
    trainer = quiet_trainer(max_steps=1, callbacks=[Before(), booster])
    with pytest.raises(FloatingPointError):
        trainer.fit(module, DataLoader([token_batch(0)], batch_size=None))
    for before, after in zip(snapshots["before"][:2], state(module)[:2], strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(snapshots["before"][2], state(module)[2])
    assert snapshots["before"][3] == state(module)[3] == 0


def test_both_harmful_passes_see_the_same_dropout_masks():
    """With alpha near zero both harmful gradients are equal, so Booster adds nothing.

    Different dropout masks would add noise.
    """
    batches = [token_batch(seed) for seed in range(3)]
    results = []
    for callbacks in ([], [Booster(lam=5.0, alpha=1e-12)]):
        model = tiny_lm(lora=True, dropout=0.5)
        torch.manual_seed(3)
        results.append(weights(train(model, batches, batches, callbacks, micro=1).model))
    assert (results[0] - results[1]).abs().max() < 1e-8


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_non_reentrant_checkpointing_changes_nothing(lora):
    batches = [token_batch(seed) for seed in range(3)]
    results = []
    for checkpointing in (False, True):
        model = tiny_lm(lora=lora)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        results.append(weights(train(model, batches, batches, [Booster(LAM, ALPHA)], micro=1).model))
    assert (results[0] - results[1]).abs().max() <= 1e-12


def test_reentrant_checkpointing_is_refused():
    model = tiny_lm()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(TypeError, match="reentrant gradient checkpointing"):
        train(model, [token_batch(0)], [token_batch(1)], [Booster()], micro=1)


def test_bfloat16_autocast_reaches_the_extra_passes():
    """Under bf16-mixed the result is close, but not equal, to the exact one. Both extra passes ran in bfloat16."""
    batches = [token_batch(seed) for seed in range(2)]
    exact = weights(train(tiny_lm(dtype=torch.float32), batches, batches, [Booster(LAM, ALPHA)], micro=1).model)
    model = tiny_lm(dtype=torch.float32)
    types = []
    model.get_output_embeddings().register_forward_hook(lambda *args: types.append(args[2].dtype))
    mixed = weights(train(model, batches, batches, [Booster(LAM, ALPHA)], micro=1, precision="bf16-mixed").model)
    assert types == [torch.bfloat16] * 6
    assert 0 < (exact - mixed).norm() / exact.norm() < 0.02


def test_an_overflow_in_a_scaled_pass_skips_the_step():
    """An infinite harmful gradient does not reach the weights, and the loss scaler halves its scale."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    harmful = token_batch(5)

    class Overflow(SafetyModule):
        def loss(self, batch):
            value = super().loss(batch)
            return value * float("inf") if batch["input_ids"].shape == harmful["input_ids"].shape else value

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    module = Overflow(tiny_lm(dtype=torch.float32), lr=LR, optimizer="sgd")
    before = weights(module.model)
    trainer = quiet_trainer(
        max_steps=1,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        callbacks=[Booster(LAM, ALPHA, streams={"harmful": [harmful]})],
    )
    trainer.fit(module, DataLoader([token_batch(0, tokens=8)], batch_size=None))
    assert torch.equal(before, weights(module.model))
    assert scaler.get_scale() == 512.0
