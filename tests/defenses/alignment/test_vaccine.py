"""Vaccine on linear chains with known digits, and on a random language model against finite differences."""

from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from hftlight import SafetyModule
from hftlight.defenses import Booster, Vaccine
from hftlight.defenses.alignment.vaccine import joint_norm, worst_shifts
from hftlight.engine import captured, count_passes, trainable
from tests.helpers.quadratic import OneBatch, quiet_trainer
from tests.helpers.tiny_lm import reference_loss, tiny_lm, token_batch

RHO, LR = 0.05, 0.1
F64 = torch.float64


@dataclass
class Output:
    hidden: torch.Tensor
    extra: int = 0


class Attention(nn.Module):
    """A linear map that returns a tensor, a tuple or a dataclass."""

    def __init__(self, weight, kind="tensor"):
        super().__init__()
        self.weight, self.kind = nn.Parameter(torch.tensor(weight, dtype=F64)), kind

    def forward(self, x):
        y = x @ self.weight.T
        return {"tensor": y, "tuple": (y, None), "dataclass": Output(y)}[self.kind]


class Layer(nn.Module):
    def __init__(self, weight, kind):
        super().__init__()
        self.attn = Attention(weight, kind)

    def forward(self, x):
        y = self.attn(x)
        return y if isinstance(y, torch.Tensor) else y[0] if isinstance(y, tuple) else y.hidden


class Chain(LightningModule):
    """Loss ``|W_n ... W_1 x|^2 / 2``. Every W is a site."""

    def __init__(self, *weights, kind="tensor", lr=1.0):
        super().__init__()
        self.layers, self.lr = nn.ModuleList(Layer(w, kind) for w in weights), lr
        self.losses, self.inputs = [], []

    def loss(self, batch):
        for layer in self.layers:
            batch = layer(batch)
        return batch.square().sum() / 2

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def run(module, batches, callbacks, micro=1, **options):
    """Train on the batches in order and return the Trainer."""
    trainer = quiet_trainer(
        max_steps=len(batches) // micro, accumulate_grad_batches=micro, callbacks=callbacks, **options
    )
    trainer.fit(module, DataLoader(batches, batch_size=None, shuffle=False))
    return trainer


def gradients(make, batch, callbacks):
    """Return the module and each weight's gradient, measured as its change in one step of SGD with rate 1."""
    module = make()
    before = {name: p.detach().clone() for name, p in trainable(module).items()}
    run(module, [batch], callbacks)
    return module, {name: before[name] - p.detach() for name, p in trainable(module).items()}


def lm(batches, callbacks, micro=1, model=None, lr=LR, **options):
    """Train the tiny language model and return the module."""
    module = SafetyModule(tiny_lm(lora=True) if model is None else model, lr=lr, optimizer="sgd")
    run(module, batches, callbacks, micro, **options)
    return module


def weights(module):
    return torch.cat([p.detach().flatten() for p in trainable(module).values()])


class Spy(Callback):
    """Record the shifts of every micro-batch. It is listed after Vaccine."""

    def __init__(self, vaccine):
        self.vaccine, self.seen = vaccine, []

    def on_before_backward(self, *args):
        self.seen.append(dict(self.vaccine._shifts))


# ---- digits


def test_one_site_has_the_papers_digits():
    """The paper's digits agree to six places, because the official code adds 1e-7 to the norm."""
    x = torch.ones(2, dtype=F64)
    module, gradient = gradients(lambda: Chain([[1.0, 2.0], [0.0, 1.0]]), x, [Vaccine(rho=1.0)])
    assert module.losses == [pytest.approx(8.6622775, rel=1e-6)]
    assert module.losses == [pytest.approx(5 * (1 + 1 / 10**0.5) ** 2, rel=1e-14)]
    expected = torch.tensor([[3.9486833, 3.9486833], [1.3162278, 1.3162278]], dtype=F64)
    assert_close(gradient["layers.0.attn.weight"], expected, rtol=1e-6, atol=0)


def test_two_sites_share_one_norm():
    """A separate norm per layer would give a loss of 12.0747613."""
    x = torch.ones(2, dtype=F64)
    vaccine = Vaccine(rho=0.5)
    module, gradient = gradients(lambda: Chain([[1.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [0.0, 1.0]]), x, [vaccine])
    assert vaccine.summary()["gradient_norm"] == pytest.approx(6.8556546, abs=1e-7)
    assert module.losses == [pytest.approx(10.3799550, rel=1e-6)]
    first = torch.tensor([[3.8022575, 3.8022575], [6.3127849, 6.3127849]], dtype=F64)
    second = torch.tensor([[4.6341818, 8.9910555], [3.0598246, 5.9365501]], dtype=F64)
    assert_close(gradient["layers.0.attn.weight"], first, rtol=1e-6, atol=0)
    assert_close(gradient["layers.1.attn.weight"], second, rtol=1e-6, atol=0)


def test_shifts_have_the_joint_length_and_no_direction_gives_none():
    gradient = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[0.0], [4.0]])}
    shifts = worst_shifts(gradient, 2.0)
    assert_close(shifts["a"], torch.tensor([1.2, 0.0]))
    assert_close(joint_norm(shifts.values()), torch.tensor(2.0))
    for value in (0.0, float("inf"), float("nan")):
        assert torch.equal(worst_shifts({"a": torch.tensor([value, 0.0])}, 2.0)["a"], torch.zeros(2))


def test_the_norm_of_half_precision_is_taken_in_float32_and_the_length_is_met():
    gradient = {name: torch.full((8, 64), 3e4, dtype=torch.float16) for name in "ab"}
    shifts = worst_shifts(gradient, 2.0)
    assert shifts["a"].dtype == torch.float16
    assert_close(joint_norm(shifts.values()), torch.tensor(2.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["tuple", "dataclass"])
def test_outputs_of_every_kind_give_the_same_update(kind):
    """Three rows expose a tensor that is treated as a tuple: only its first row would be perturbed."""
    x = torch.tensor([[1.0, 1.0], [0.5, -1.0], [2.0, 0.0]], dtype=F64)
    matrices = [[1.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [0.0, 1.0]]
    gradient_pair = [
        gradients(lambda k=k: Chain(*matrices, kind=k), x, [Vaccine(rho=0.5)])[1] for k in ("tensor", kind)
    ]
    for name in gradient_pair[0]:
        assert_close(gradient_pair[0][name], gradient_pair[1][name], rtol=0, atol=1e-15)


def test_clean_and_perturbed_loss_are_logged_apart():
    module = Chain([[1.0, 2.0], [0.0, 1.0]], lr=0.0)
    trainer = run(module, [torch.ones(2, dtype=F64)] * 2, [Vaccine(rho=1.0)], micro=2)
    logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
    assert logged["vaccine/clean_loss"] == pytest.approx(5.0)
    assert logged["vaccine/perturbed_loss"] == pytest.approx(8.6622775)
    assert logged["vaccine/gradient_norm"] == pytest.approx(10**0.5)


def test_the_achieved_ratio_is_the_mean_over_shifted_tokens():
    """Two tokens of lengths 3 and 4 get shifts along z of lengths 0.6 and 0.8.

    The third token is all zeros and gets no shift.
    """
    vaccine = Vaccine(rho=1.0)
    x = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]], dtype=F64)
    run(Chain([[1.0, 0.0], [0.0, 1.0]], lr=0.0), [x], [vaccine])
    assert vaccine.summary()["shift_per_activation"] == pytest.approx(0.2)


# ---- the language model


def slope(rho):
    """Return (f_perturbed - f) / (rho |g|) on the tiny model."""
    vaccine = Vaccine(rho)
    module = SafetyModule(tiny_lm(lora=True), lr=0.0, optimizer="sgd")
    logged = run(module, [token_batch(0)], [vaccine]).logged_metrics
    return float(
        (logged["vaccine/perturbed_loss"] - logged["vaccine/clean_loss"]) / (rho * logged["vaccine/gradient_norm"])
    )


def test_the_loss_rises_by_rho_times_the_gradient_norm_to_first_order():
    errors = [abs(slope(rho) - 1) for rho in (1e-2, 1e-3, 1e-4)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


def shifted_loss(model, batch, shifts):
    """Return the loss with constants added to the attention outputs by the test's own hooks."""
    sites = [m for name, m in model.named_modules() if name.endswith("self_attn")]
    handles = [
        site.register_forward_hook(lambda m, a, out, e=e: (out[0] + e, *out[1:]))
        for site, e in zip(sites, shifts, strict=True)
    ]
    try:
        return float(reference_loss(model, batch))
    finally:
        for handle in handles:
            handle.remove()


def slow_shifts(model, batch, rho):
    outputs = []
    sites = [m for name, m in model.named_modules() if name.endswith("self_attn")]
    handles = [site.register_forward_hook(lambda m, a, out: outputs.append(out[0])) for site in sites]
    site_gradients = torch.autograd.grad(reference_loss(model, batch), outputs)
    for handle in handles:
        handle.remove()
    return [rho * g / torch.cat([g.flatten() for g in site_gradients]).norm() for g in site_gradients]


def test_it_is_the_gradient_with_the_shift_held_fixed():
    """The update agrees with finite differences for a constant shift e, and disagrees if e depends on w.

    The differentiated function is w -> f(w; z + e).
    """
    batch, model, step = token_batch(3), tiny_lm(lora=True), 1e-5
    shifts = slow_shifts(model, batch, RHO)
    generator = torch.Generator().manual_seed(1)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    direction = {name: torch.randn(p.shape, generator=generator, dtype=F64) for name, p in named.items()}

    def difference(loss):
        # The weights move in place by +step and by -step, and return to their start each time.
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for name, p in named.items():
                    p += sign * step * direction[name]
            values.append(loss())
            with torch.no_grad():
                for name, p in named.items():
                    p -= sign * step * direction[name]
        return (values[0] - values[1]) / (2 * step)

    frozen = difference(lambda: shifted_loss(model, batch, shifts))
    moving = difference(lambda: shifted_loss(model, batch, slow_shifts(model, batch, RHO)))
    before = {name: p.detach().clone() for name, p in named.items()}
    module = lm([batch], [Vaccine(RHO)], model=model, lr=1.0)
    after = dict(module.model.named_parameters())
    along = sum(float(((before[name] - after[name].detach()) * direction[name]).sum()) for name in before)
    assert along == pytest.approx(frozen, rel=1e-6)
    assert abs(along - moving) > 1e-3 * abs(along)


def test_padding_gets_no_shift_and_changes_none():
    batch = token_batch(2, ragged=False)
    padded = {name: nn.functional.pad(t, (0, 4), value=-100 if name == "labels" else 0) for name, t in batch.items()}
    shifts = []
    for rows in (batch, padded):
        vaccine = Vaccine(RHO)
        spy = Spy(vaccine)
        lm([rows], [vaccine, spy])
        shifts.append(spy.seen[0])
    tokens = batch["input_ids"].shape[1]
    for name, plain in shifts[0].items():
        assert_close(shifts[1][name][:, :tokens], plain, rtol=0, atol=1e-12)
        assert not shifts[1][name][:, tokens:].any()
        assert not plain[:, -1].any()  # nothing is predicted from the last position
    first, _ = shifts[0].values()
    assert first[:, 0].any()  # prompt positions get a shift, because the response attends to them


def test_per_token_budget_grows_with_the_root_of_the_real_tokens():
    vaccine, batch = Vaccine(0.25, budget="per_token"), token_batch(2)
    spy = Spy(vaccine)
    lm([batch], [vaccine, spy])
    expected = 0.25 * float(batch["attention_mask"].sum()) ** 0.5
    assert float(joint_norm(spy.seen[0].values())) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(TypeError, match="attention_mask"):
        run(Chain([[1.0]]), [torch.ones(1, dtype=F64)], [Vaccine(budget="per_token")])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sites_before_every_trainable_weight_get_no_shift(checkpointing):
    """Checkpointing makes the embeddings' output require a gradient. Layer 0 still gets no shift."""
    model = tiny_lm(lora=True)
    for name, p in model.named_parameters():
        if ".layers.0." in name:
            p.requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    vaccine = Vaccine(RHO)
    spy = Spy(vaccine)
    lm([token_batch(0)], [vaccine, spy], model=model)
    assert [".layers.1." in name for name in spy.seen[0]] == [True]
    assert float(joint_norm(spy.seen[0].values())) == pytest.approx(RHO)


def test_nothing_to_perturb_is_an_error():
    model = tiny_lm()
    for name, p in model.named_parameters():
        p.requires_grad_(name == "lm_head.weight")
    with pytest.raises(RuntimeError, match="no trainable weight lies at or before any site"):
        lm([token_batch(0)], [Vaccine()], model=model)


def test_bfloat16_autocast_reaches_the_probe():
    batches = [token_batch(seed) for seed in range(2)]
    exact = weights(lm(batches, [Vaccine(RHO)], model=tiny_lm(dtype=torch.float32)))
    model, types = tiny_lm(dtype=torch.float32), []
    model.get_output_embeddings().register_forward_hook(lambda *args: types.append(args[2].dtype))
    vaccine = Vaccine(RHO)
    spy = Spy(vaccine)
    mixed = weights(lm(batches, [vaccine, spy], model=model, precision="bf16-mixed"))
    assert types == [torch.bfloat16] * 4
    assert {e.dtype for shifts in spy.seen for e in shifts.values()} == {torch.bfloat16}
    assert float(joint_norm(spy.seen[0].values())) == pytest.approx(RHO, rel=1e-3)
    assert 0 < (exact - mixed).norm() / exact.norm() < 0.02


# ---- passes and cost


class Forwards(Callback):
    """Count forward passes in training and in validation."""

    def __init__(self, model):
        self.train = self.validation = 0
        model.get_input_embeddings().register_forward_hook(self.count)

    def count(self, *args):
        if torch.is_grad_enabled():
            self.train += 1
        else:
            self.validation += 1


def test_beside_booster_a_step_costs_four_forward_passes():
    """Vaccine and Booster take two passes each.

    Booster's passes run on the unperturbed model, because Vaccine has removed its hooks by then.
    """
    model = tiny_lm(lora=True)
    count = Forwards(model)
    defenses = [Booster(5.0, 0.1, streams={"harmful": [token_batch(9)]}), Vaccine(RHO)]
    perturbed = lm([token_batch(0)], defenses, model=model)
    assert count.train == 4 == count_passes(defenses)[0]
    harmful = float(perturbed.trainer.logged_metrics["booster/harmful_loss"])
    assert harmful == pytest.approx(float(reference_loss(tiny_lm(lora=True), token_batch(9))), rel=1e-12)


def test_every_n_steps_leaves_the_other_steps_plain():
    batches = [token_batch(seed) for seed in range(8)]
    model = tiny_lm(lora=True)
    count = Forwards(model)
    vaccine = Vaccine(RHO, every_n_steps=3)
    lm(batches, [vaccine], micro=2, model=model)  # steps 0 and 3 of four
    assert count.train == 8 + 4
    assert vaccine.summary()["calls"] == 4
    assert count_passes([Vaccine(every_n_steps=4)]) == (1.25, 1.25)
    plain, rare = (weights(lm(batches[:2], d)) for d in ([], [Vaccine(RHO, every_n_steps=2)]))
    assert not torch.equal(plain, rare)


def test_the_probe_computes_no_weight_gradient():
    """Without weight gradients a probe costs two thirds of a step's operations.

    With weight gradients it would cost a whole step.
    """
    flops = []
    for defenses in ([], [Vaccine(RHO)]):
        with FlopCounterMode(display=False) as counter:
            lm([token_batch(0, rows=4, tokens=32)], defenses, model=tiny_lm(dtype=torch.float32))
        flops.append(counter.get_total_flops())
    assert flops[1] / flops[0] <= 1.7


def test_validation_never_sees_a_side_pass_or_a_shift():
    model, losses = tiny_lm(lora=True), []

    class Validated(SafetyModule):
        def validation_step(self, batch, batch_idx):
            losses.append(float(self.loss(batch)))

    count = Forwards(model)
    module = Validated(model, lr=0.0, optimizer="sgd")
    trainer = quiet_trainer(max_steps=2, callbacks=[Vaccine(RHO)], val_check_interval=1, num_sanity_val_steps=1)
    held_out = DataLoader(OneBatch(token_batch(5), 1), batch_size=None)
    trainer.fit(module, DataLoader(OneBatch(token_batch(0), 2), batch_size=None), held_out)
    assert count.validation == len(losses) == 3
    assert count.train == 4
    clean = float(reference_loss(tiny_lm(lora=True), token_batch(5)))
    assert losses == [pytest.approx(clean, rel=1e-12)] * 3


def test_a_pass_without_gradients_inside_the_step_stays_clean():
    """An example is the aligned model's pass, which runs through the same modules."""
    clean_losses = []

    class Referring(SafetyModule):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                clean_losses.append(float(self.loss(batch)))
            return self.loss(batch)

    module = Referring(tiny_lm(lora=True), lr=0.0, optimizer="sgd")
    trainer = run(module, [token_batch(0)], [Vaccine(RHO)])
    assert clean_losses == [pytest.approx(float(trainer.logged_metrics["vaccine/clean_loss"]), rel=1e-12)]
    assert float(trainer.logged_metrics["vaccine/perturbed_loss"]) > clean_losses[0] * 1.001


def test_a_step_that_runs_sites_twice_or_never_is_refused():
    class Twice(Chain):
        def training_step(self, batch, batch_idx):
            return self.loss(batch) + self.loss(batch)

    class Never(Chain):
        def training_step(self, batch, batch_idx):
            return self.layers[0].attn.weight.sum()

    class Longer(Chain):
        def training_step(self, batch, batch_idx):
            return self.loss(torch.cat([batch, batch]))

    for kind, words in ((Twice, "ran again"), (Never, "did not run"), (Longer, "once, with the shape")):
        with pytest.raises(RuntimeError, match=words):
            run(kind([[1.0]]), [torch.ones(1, 1, dtype=F64)], [Vaccine()])


def test_sites_by_class_name_and_none_at_all():
    x = torch.ones(2, dtype=F64)
    for sites in (["attn"], ["Attention"]):
        module, _ = gradients(lambda: Chain([[1.0, 2.0], [0.0, 1.0]]), x, [Vaccine(rho=1.0, sites=sites)])
        assert module.losses == [pytest.approx(8.6622775, rel=1e-6)]
    with pytest.raises(ValueError, match=r"Vaccine: sites matches no module.*\['mixer'\].*'attn'"):
        run(Chain([[1.0]]), [torch.ones(1, dtype=F64)], [Vaccine(sites=["mixer"])])


# ---- randomness, exceptions, the loss scaler


class Masks(Callback):
    """Record the first dropout layer's mask in every pass, and the random state after each micro-batch."""

    def __init__(self, model):
        self.patterns, self.states = [], []
        layer = next(m for m in model.modules() if isinstance(m, nn.Dropout))
        layer.register_forward_hook(lambda m, args, out: self.patterns.append(out.detach() == 0))

    def on_train_batch_end(self, *args):
        self.states.append(torch.get_rng_state())


@pytest.mark.parametrize("dropout", ["replay", "independent"])
def test_dropout_masks(dropout):
    """The perturbed pass draws the masks of plain training. The probe draws the same masks, or independent ones."""
    recorders = []
    for defenses in ([], [Vaccine(RHO, dropout=dropout)]):
        model = tiny_lm(lora=True, dropout=0.5)
        masks = Masks(model)
        torch.manual_seed(3)
        lm([token_batch(0), token_batch(1)], [*defenses, masks], model=model)
        recorders.append(masks)
    plain, defended = recorders
    # Passes alternate: the probe, then the perturbed pass.
    probes, passes = defended.patterns[0::2], defended.patterns[1::2]
    assert all(map(torch.equal, passes, plain.patterns))
    assert all(map(torch.equal, defended.states, plain.states))
    same = [torch.equal(a, b) for a, b in zip(probes, passes, strict=True)]
    assert same == [dropout == "replay"] * 2
    assert not torch.equal(*probes)


def test_no_length_is_plain_alignment_with_dropout():
    batches = [token_batch(seed) for seed in range(4)]
    results = []
    for defenses in ([], [Vaccine(rho=0.0)]):
        model = tiny_lm(lora=True, dropout=0.3)
        count = Forwards(model)
        torch.manual_seed(3)
        results.append(weights(lm(batches, defenses, micro=2, model=model)))
        assert count.train == 4
    assert torch.equal(*results)
    assert count_passes([Vaccine(rho=0.0)]) == (1.0, 1.0)


@pytest.mark.parametrize("failing_pass", [1, 2])
def test_an_exception_inside_a_pass_leaves_everything_as_found(failing_pass):
    """The pass fails in the second micro-batch of a window. The first micro-batch's ``.grad`` stays."""
    snapshots = {}

    def state(module):
        grads = {name: p.grad.clone() for name, p in trainable(module).items()}
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
        return {name: p.detach().clone() for name, p in trainable(module).items()}, grads, hooks

    class Before(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx != 1:
                return
            snapshots["before"], calls = state(pl_module), []
            snapshots["random"] = torch.get_rng_state()
            original = pl_module.token_losses

            def failing(batch):
                calls.append(torch.get_rng_state())
                losses = original(batch)
                if len(calls) == failing_pass:
                    raise FloatingPointError("inside the pass")
                return losses

            pl_module.token_losses = failing
            snapshots["calls"] = calls

    model = tiny_lm(lora=True, dropout=0.1)
    module = SafetyModule(model, lr=LR, optimizer="sgd")
    with pytest.raises(FloatingPointError):
        run(module, [token_batch(0), token_batch(1)], [Before(), Vaccine(RHO)], micro=2)
    after = state(module)
    for before, now in zip(snapshots["before"][:2], after[:2], strict=True):
        assert all(torch.equal(before[name], now[name]) for name in before)
    assert snapshots["before"][2] == after[2] == 0
    assert all(torch.equal(snapshots["random"], random_state) for random_state in snapshots["calls"])
    if failing_pass == 1:
        assert torch.equal(snapshots["random"], torch.get_rng_state())


def test_fifty_steps_leave_no_hook():
    module = Chain([[1.0, 2.0], [0.0, 1.0]], lr=1e-3)
    inside = []

    class Look(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            inside.append(sum(len(m._forward_hooks) for m in pl_module.modules()))

    run(module, [torch.ones(2, dtype=F64)] * 50, [Vaccine(rho=0.1), Look()])
    assert inside == [1] * 50
    assert sum(len(m._forward_hooks) for m in module.modules()) == 0


def test_a_step_that_is_skipped_leaves_no_hook():
    class Skipping(Chain):
        def training_step(self, batch, batch_idx):
            self.loss(batch)

    after = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            after.append(sum(len(m._forward_hooks) for m in pl_module.modules()))

    run(Skipping([[1.0]]), [torch.ones(1, dtype=F64)] * 2, [Vaccine(), Look()], limit_train_batches=2, max_epochs=1)
    assert after == [0, 0]


def test_a_zero_gradient_gives_no_shift_and_is_counted():
    vaccine = Vaccine(rho=1.0)
    module, gradient = gradients(lambda: Chain([[0.0, 0.0], [0.0, 0.0]]), torch.ones(2, dtype=F64), [vaccine])
    assert module.losses == [0.0]
    assert not gradient["layers.0.attn.weight"].any()
    summary = vaccine.summary()
    assert summary["zero_gradients"] == 1.0
    assert all(value == value for value in summary.values())


def scaled_run(defenses, scale, kind=SafetyModule):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    module = kind(tiny_lm(dtype=torch.float32), lr=LR, optimizer="sgd")
    run(module, [token_batch(0)], defenses, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    return module


def test_an_overflow_in_the_probe_skips_the_shift_alone():
    """With an infinite probe loss the micro-batch trains without a shift, and the loss scale stays."""

    class Overflow(SafetyModule):
        calls = 0

        def loss(self, batch):
            self.calls += 1
            return super().loss(batch) * (float("inf") if self.calls == 1 else 1.0)

    vaccine = Vaccine(RHO)
    defended = scaled_run([vaccine], 1024.0, Overflow)
    assert torch.equal(weights(defended), weights(scaled_run([], 1024.0)))
    summary = vaccine.summary()
    assert summary["overflows"] == 1.0
    assert all(value == value for value in summary.values())


def test_the_loss_scale_cancels():
    """The loss scale also helps: at scale 1 the half-precision gradients at the sites lose digits."""
    vaccines = [Vaccine(RHO), Vaccine(RHO)]
    spies = [Spy(v) for v in vaccines]
    for vaccine, spy, scale in zip(vaccines, spies, (1.0, 2.0**14), strict=True):
        scaled_run([vaccine, spy], scale)
    norms = [v.summary()["gradient_norm"] for v in vaccines]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)
    assert float(joint_norm(spies[1].seen[0].values())) == pytest.approx(RHO, rel=1e-3)


def test_captured_outputs_are_shifted_for_whoever_looks_later():
    """A loss-slot defense captures the outputs of the perturbed model."""
    site_outputs = []

    class Tapping(Chain):
        def training_step(self, batch, batch_idx):
            with captured({"site": self.layers[0].attn}) as captures:
                loss = self.loss(batch)
            site_outputs.append(captures["site"].detach())
            return loss

    run(Tapping([[1.0, 2.0], [0.0, 1.0]]), [torch.ones(2, dtype=F64)], [Vaccine(rho=1.0)])
    expected = torch.tensor([3.0, 1.0], dtype=F64) * (1 + 1 / 10**0.5)
    assert_close(site_outputs[0], expected)


def test_presets():
    assert Vaccine(**Vaccine.presets["paper"]).arguments() == Vaccine(rho=2.0).arguments()
    assert Vaccine(**Vaccine.presets["repo"]).dropout == "independent"
    assert Vaccine(**Vaccine.presets["booster"]).rho == 5.0
