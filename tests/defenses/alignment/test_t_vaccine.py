"""T-Vaccine: closed forms of the draw, frozen weights, memory, resuming, and other defenses beside it."""

import copy
import random
from collections import Counter

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from hftlight import SafetyModule
from hftlight.defenses import Booster, TVaccine, Vaccine
from hftlight.defenses.alignment.t_vaccine import drawn_layers, first_rows, layer_probabilities
from hftlight.engine import Stage, count_passes
from tests.defenses.rows.t_vaccine import DRAW, PROBE, SlowTVaccine
from tests.defenses.rows.vaccine import RHO
from tests.helpers.contract import data_module, distance, model_of, train, weights_of
from tests.helpers.quadratic import quiet_trainer
from tests.helpers.tiny_lm import PlainModule, reference_loss, tiny_lm, token_batch

LR = 0.01


def deep_lm(layers=4, lora=False, dropout=0.0, dtype=torch.float64, vocabulary=48):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        attention_dropout=0.0 if lora else dropout,
    )
    model = LlamaForCausalLM(config)
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, lora_dropout=dropout, target_modules="all-linear"))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
    return model.to(dtype)


def t_vaccine(rho=RHO, **options):
    harmful = [token_batch(500 + k) for k in range(40)]
    return TVaccine(
        rho, **{"layers": 1, "probe_every": 4, "resample_every": 2, "streams": {"harmful": harmful}, **options}
    )


def run(model, callbacks, steps=4, micro=1, optimizer="adamw", checkpoint=None, **options):
    module = SafetyModule(model, lr=LR, optimizer=optimizer)
    trainer = quiet_trainer(max_steps=steps, accumulate_grad_batches=micro, callbacks=callbacks, **options)
    batches = [token_batch(k) for k in range(steps * micro)]
    trainer.fit(module, DataLoader(batches, batch_size=None, shuffle=False), ckpt_path=checkpoint)
    return module


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in right)


class Watch(Callback):
    """Record the active layers, the shifted sites, the harmful batches drawn and the weights at each micro-batch.

    It is listed after T-Vaccine.
    """

    def __init__(self, defense):
        self.defense, self.active, self.weights, self.drawn, self.shifted = defense, [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.active.append(list(self.defense._active))
        self.shifted.append(sorted(self.defense._shifts))
        self.drawn.append(self.defense._drawn.get("harmful", 0))

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.weights.append(weights(pl_module))


# ---- the draw


def test_probabilities_are_the_scores_shares():
    assert layer_probabilities([3.0, 1.0, 4.0]) == [0.375, 0.125, 0.5]
    assert layer_probabilities([0.0, 0.0]) == [0.5, 0.5]


def test_first_draws_have_the_probabilities_and_later_ones_those_of_what_is_left():
    scores, draws = [3.0, 1.0, 4.0], 6000
    first = Counter(drawn_layers(scores, 1, 0, step)[0] for step in range(draws))
    assert [first[i] / draws for i in range(3)] == pytest.approx([0.375, 0.125, 0.5], abs=0.02)
    pairs = Counter(tuple(drawn_layers(scores, 2, 0, step)) for step in range(draws))
    p = layer_probabilities(scores)
    # A pair comes up as i then j, or as j then i.
    for i, j in ((0, 1), (0, 2), (1, 2)):
        expected = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        assert pairs[i, j] / draws == pytest.approx(expected, abs=0.02)


def test_draws_depend_on_seed_and_step_alone():
    scores = [1.0] * 8
    assert drawn_layers(scores, 3, 5, 7) == drawn_layers(scores, 3, 5, 7)
    assert len({tuple(drawn_layers(scores, 3, seed, step)) for seed in range(3) for step in range(3)}) > 5
    random.seed(1)
    one = drawn_layers(scores, 3, 5, 7)
    random.seed(2)
    assert drawn_layers(scores, 3, 5, 7) == one == sorted(set(one))


def test_other_selections():
    assert drawn_layers([3.0, 1.0, 4.0], 2, 0, 0, "topk") == [0, 2]
    assert drawn_layers([1.0, 1.0, 1.0], 1, 0, 9, "topk") == [0]
    uniform = Counter(drawn_layers([1e9, 1.0, 0.0], 1, 0, step, "uniform")[0] for step in range(3000))
    assert [uniform[i] / 3000 for i in range(3)] == pytest.approx([1 / 3] * 3, abs=0.03)


def test_layers_of_score_zero_come_last_and_not_always_the_same():
    draws = {tuple(drawn_layers([0.0, 2.0, 0.0, 0.0], 2, 0, step)) for step in range(50)}
    assert draws == {(0, 1), (1, 2), (1, 3)}


def test_rows_of_a_batch():
    batch = {"input_ids": torch.arange(6).view(3, 2), "id": ["a", "b", "c"], "window_tokens": 3.5}
    cut = first_rows(batch, 2)
    assert cut["input_ids"].tolist() == [[0, 1], [2, 3]]
    assert cut["id"] == ["a", "b"]
    assert cut["window_tokens"] == 3.5
    assert first_rows(batch, None) is batch
    with pytest.raises(TypeError, match="probe_batch"):
        first_rows((1, 2), 1)


# ---- clocks


@pytest.mark.parametrize("micro", [1, 3])
def test_probe_and_draw_once_per_optimizer_step(micro):
    """Over nine steps K = 4 probes at steps 0, 4 and 8, and J = 2 draws at the even steps.

    Gradient accumulation does not change these steps.
    """
    defense = t_vaccine()
    watch = Watch(defense)
    run(deep_lm(), [defense, watch], steps=9, micro=micro)
    by_step = [watch.active[k * micro : (k + 1) * micro] for k in range(9)]
    assert all(window == [window[0]] * micro for window in by_step)
    assert all(by_step[k] == by_step[k + 1] for k in (0, 2, 4, 6))
    assert len({tuple(window[0]) for window in by_step}) > 1
    assert [watch.drawn[k * micro] for k in range(9)] == [1, 1, 1, 1, 2, 2, 2, 2, 3]
    summary = defense.summary()
    assert summary["probes"] == 3
    assert sum(value for name, value in summary.items() if name.startswith("steps_on_layer")) == 9


def test_only_drawn_layers_are_shifted_and_with_the_whole_budget():
    defense = t_vaccine(layers=2)
    lengths = []

    class Length(Callback):
        def on_before_backward(self, *args):
            lengths.append(float(torch.cat([e.flatten() for e in defense._shifts.values()]).norm()))

    watch = Watch(defense)
    run(deep_lm(), [defense, watch, Length()])
    for active, shifted in zip(watch.active, watch.shifted, strict=True):
        assert [f"layers.{i}.self_attn" in name for i, name in zip(active, shifted, strict=True)] == [True, True]
    assert lengths == [pytest.approx(RHO)] * 4


def slow_scores(model, batch):
    outputs = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda m, a, out: outputs.append(out[0]))
    return [float(g.norm()) for g in torch.autograd.grad(reference_loss(model, batch), outputs)]


def test_scores_are_the_norms_of_the_first_rows_gradients():
    defense = t_vaccine(probe_batch=2, smoothing=0.75, probe_every=1, selection="topk")
    models, scores = [], []

    class Before(Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            models.append(copy.deepcopy(pl_module.model))

    class After(Callback):
        def on_train_batch_start(self, *args):
            scores.append(list(defense._scores))

    run(deep_lm(), [Before(), defense, After()], steps=2)
    slow = [slow_scores(model, first_rows(token_batch(500 + k), 2)) for k, model in enumerate(models)]
    assert scores[0] == pytest.approx(slow[0], rel=1e-6)
    assert scores[1] == pytest.approx([0.75 * a + 0.25 * b for a, b in zip(*slow, strict=True)], rel=1e-6)


# ---- what is frozen


@pytest.mark.parametrize("scope", ["attention", "layer"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("micro", [1, 2])
def test_frozen_weights_do_not_move_under_momentum_and_decay(scope, lora, micro):
    """Each weight of the scope is frozen in some steps and trains in others.

    With a gradient of zero instead of ``None``, momentum and decay would move a frozen weight.
    """
    defense = t_vaccine(freeze_scope=scope, resample_every=1)
    watch = Watch(defense)
    model = deep_lm(layers=3, lora=lora)
    start = {f"model.{name}": p.detach().clone() for name, p in model.named_parameters()}
    run(model, [defense, watch], steps=6, micro=micro)
    states = [start, *watch.weights[micro - 1 :: micro]]
    trained = {f"model.{name}" for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    thawed = 0
    for step, active in enumerate(watch.active[::micro]):
        for name in trained:
            layer = next((i for i in range(3) if f".layers.{i}." in name), None)
            inside = layer is not None and (scope == "layer" or ".self_attn." in name)
            frozen = inside and layer not in active  # weights outside the scope always train
            assert torch.equal(states[step][name], states[step + 1][name]) == frozen, (step, name)
            thawed += inside and not frozen and step > 0
    assert thawed
    assert all(p.requires_grad == (f"model.{name}" in trained) for name, p in model.named_parameters())


def test_no_length_only_freezes():
    defense = t_vaccine(rho=0.0)
    watch = Watch(defense)
    run(deep_lm(layers=2), [defense, watch], steps=1)
    assert defense.summary()["calls"] == 1
    assert watch.shifted == [[]]


def test_an_exception_while_weights_are_frozen_thaws_them():
    class Trip(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            assert not all(p.requires_grad for p in pl_module.parameters())
            raise KeyError("trip")

    model = deep_lm()
    with pytest.raises(KeyError, match="trip"):
        run(model, [t_vaccine(), Trip()])
    assert all(p.requires_grad for p in model.parameters())
    assert all("forward" not in m.__dict__ and not m._forward_hooks for m in model.modules())


# ---- against others


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_all_layers_are_vaccine(lora):
    results = []
    for defense in (t_vaccine(layers=4), Vaccine(RHO)):
        torch.manual_seed(3)
        results.append(weights(run(deep_lm(lora=lora, dropout=0.2), [defense], micro=2)))
    assert same(*results)


def test_the_default_is_a_quarter_of_the_layers_and_too_many_are_refused():
    for depth, expected in ((2, 1), (4, 1), (8, 2)):
        defense = t_vaccine(layers=None)
        watch = Watch(defense)
        run(deep_lm(layers=depth), [defense, watch], steps=1)
        assert len(watch.active[0]) == expected
    with pytest.raises(ValueError, match="TVaccine: layers must be at most 4"):
        run(deep_lm(), [t_vaccine(layers=5)])


class SlowBoth(SlowTVaccine):
    """Booster's term on top of T-Vaccine's gradient. Booster's norm and step use the unfrozen weights only."""

    def edit(self, step, grads):
        grads = super().edit(step, grads)
        other = f"layers.{1 - self.chosen[0]}.self_attn."
        free = [i for i, (name, _) in enumerate(self.weights) if other not in name]
        # T-Vaccine draws from the same stream. Each defense has its own count.
        batch = self.side["harmful"][step]
        for module in self.added:
            module.tensor = torch.zeros(())
        here = self.gradient_of(reference_loss(self.model, batch))
        length = sum(float((here[i] ** 2).sum()) for i in free) ** 0.5
        # The copy takes Booster's step in place, and self keeps its weights.
        there = copy.deepcopy(self)
        with torch.no_grad():
            for i in free:
                there.weights[i][1].sub_(0.1 * here[i] / length)
        stepped = there.gradient_of(reference_loss(there.model, batch))
        return [g + 5.0 * (here[i] - stepped[i]) if i in free else g for i, g in enumerate(grads)]


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_beside_booster_its_norm_is_over_what_is_not_frozen(tuning):
    defenses = [
        Booster(5.0, 0.1),
        TVaccine(RHO, layers=1, probe_every=PROBE, resample_every=DRAW, probe_batch=None),
    ]
    fast = weights_of(train(defenses, tuning, accumulate=2))
    slow = SlowBoth(model_of(tuning), Stage.ALIGNMENT, accumulate=2).run()
    assert distance(fast, slow) <= 1e-10
    assert count_passes(defenses, accumulate=2) == (4 + 2 + 0.5, 4 + 2 + 0.5)


def test_uniform_needs_no_harmful_data():
    defense = TVaccine(RHO, layers=1, selection="uniform", resample_every=1)
    watch = Watch(defense)
    run(deep_lm(), [defense, watch], steps=6)
    assert len({tuple(active) for active in watch.active}) > 1
    assert defense.streams == ()
    assert count_passes([defense]) == (2.0, 2.0)
    with pytest.raises(ValueError, match="stream 'harmful' is missing"):
        run(deep_lm(), [TVaccine(RHO, layers=1)])


# ---- memory


class Saved:
    """Bytes of the distinct storages that autograd saves, without weights, in the largest pass inside the block.

    Autograd saves no inner tensor of a checkpointed layer, so none is counted.
    """

    def __init__(self, model):
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.passes = [{}]
        model.get_input_embeddings().register_forward_hook(lambda *_: self.passes.append({}))

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.passes[-1][storage._cdata] = storage.nbytes()
        return tensor

    @property
    def peak(self):
        return max(sum(sizes.values()) for sizes in self.passes)


def saved_bytes(callbacks, lora):
    model = deep_lm(layers=6, lora=lora, dtype=torch.float32)
    saved = Saved(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        run(model, callbacks, steps=1)
    return saved.peak


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_memory_grows_with_the_layers_and_is_below_vaccines(lora):
    """The harmful probe has a batch of the same size here and runs through all layers. It must not set the peak."""
    sizes = [saved_bytes([t_vaccine(layers=count, probe_batch=None)], lora) for count in (1, 2, 4, 6)]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == saved_bytes([Vaccine(RHO)], lora)
    assert sizes[0] < 0.45 * sizes[-1]


def test_a_layer_that_checkpoints_itself_is_not_checkpointed_twice():
    model = deep_lm()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wrapped = []

    class Look(Callback):
        def on_before_backward(self, *args):
            wrapped.append(sum("forward" in m.__dict__ for m in model.modules()))

    twice = weights(run(model, [t_vaccine(), Look()]))
    assert wrapped == [0] * 4
    once = weights(run(deep_lm(), [t_vaccine()]))
    assert all(torch.allclose(once[name], twice[name], rtol=0, atol=1e-12) for name in once)


# ---- state


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_resumed_equals_uninterrupted(stop, tmp_path):
    """With K = 3 and J = 2, step 4 draws from the scores of step 3.

    Those scores are smoothed with the scores of step 0.
    """

    class Keep(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == stop:
                trainer.save_checkpoint(tmp_path / "kept.ckpt")

    def trained(callbacks, checkpoint=None):
        module = SafetyModule(deep_lm(lora=True, vocabulary=259), lr=LR)
        trainer = quiet_trainer(max_steps=8, max_epochs=-1, callbacks=callbacks)
        trainer.fit(module, data_module(Stage.ALIGNMENT), ckpt_path=checkpoint)
        return weights(module)

    first, second = (TVaccine(RHO, 1, probe_every=3, resample_every=2, smoothing=0.5) for _ in range(2))
    whole = trained([first, Keep()])
    resumed = trained([second], tmp_path / "kept.ckpt")
    assert same(resumed, whole)
    assert second.summary() == first.summary()
    assert sum(name.startswith("steps_on_layer") for name in first.summary()) > 1


def test_an_overflow_in_the_harmful_probe_keeps_the_scores():
    """The second probe's loss is infinite. The scores of the first probe stay, and training continues."""
    harmful = token_batch(500)

    class Overflow(SafetyModule):
        probes = 0

        def loss(self, batch):
            value = super().loss(batch)
            if len(batch["input_ids"]) == 1:
                self.probes += 1
                return value * (float("inf") if self.probes == 2 else 1.0)
            return value

    defense = TVaccine(RHO, layers=1, probe_every=1, streams={"harmful": [harmful]})
    scores = []

    class Look(Callback):
        def on_train_batch_start(self, *args):
            scores.append(list(defense._scores))

    module = Overflow(deep_lm(dtype=torch.float32), lr=LR, optimizer="sgd")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer = quiet_trainer(
        max_steps=3, callbacks=[defense, Look()], plugins=[MixedPrecision("16-mixed", "cpu", scaler)]
    )
    trainer.fit(module, DataLoader([token_batch(k) for k in range(3)], batch_size=None))
    assert scores[0] == scores[1] != scores[2]
    expected = slow_scores(deep_lm(dtype=torch.float32), first_rows(harmful, 1))
    assert scores[0] == pytest.approx(expected, rel=0.05)  # the loss scale is divided out
    assert defense.summary()["probe_overflows"] == 1


def test_presets():
    assert TVaccine(**TVaccine.presets["paper"]).resample_every == 1
    repo = TVaccine(**TVaccine.presets["repo"])
    assert (repo.rho, repo.layers, repo.probe_every, repo.resample_every) == (3.0, 8, 200, 20)
    assert (repo.probe_batch, repo.dropout) == (1, "independent")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_module_of_ones_own_may_leave_the_cache_of_keys_and_values_on(attention):
    """Backward recomputes a resting layer. A key-value cache would then contain every key twice."""

    def trained(use_cache):
        batches = [token_batch(seed) for seed in range(4)]
        module = PlainModule(tiny_lm())
        module.model.config._attn_implementation, module.model.config.use_cache = attention, use_cache
        defense = TVaccine(layers=1, rho=0.5, probe_every=2, streams={"harmful": batches[:2]})
        quiet_trainer(max_steps=4, callbacks=[defense]).fit(module, DataLoader(batches, batch_size=None))
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    assert_close(trained(True), trained(False), rtol=0, atol=1e-12)
