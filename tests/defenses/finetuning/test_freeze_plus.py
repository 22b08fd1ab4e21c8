"""FreezePlus on planted units whose groups are known, and weights of frozen units that keep every bit."""

import copy
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hftlight import SafetyModule
from hftlight.defenses import FreezePlus
from hftlight.defenses.finetuning import importance_ranks, unit_groups
from hftlight.engine import Stage
from hftlight.engine.weights.lora import lora_updates
from hftlight.engine.weights.neurons import importance, kept_parts, trained_neurons
from hftlight.engine.weights.scores import calibration, input_variances, without_end
from hftlight.models.module import decoder_layers
from tests.helpers.contract import data_module, model_of
from tests.helpers.quadratic import quiet_trainer
from tests.helpers.regions import slow_scores, train
from tests.helpers.tiny_lm import tiny_lm, token_batch

SIDE = {"refusals": [token_batch(100), token_batch(101)], "ordinary": [token_batch(200), token_batch(201)]}


def own(**more):
    settings = {"scu": 0.2, "ucu": 0.2, "ru": 0.1, "cu": 0.3, "samples": 4, "streams": SIDE}
    return FreezePlus(**(settings | more))


def counted_ranks(scores):
    return [sum(other < score for other in scores) / max(1, len(scores) - 1) for score in scores]


def test_ranks_are_the_share_of_less_important_units():
    scores = torch.tensor([3.0, 0.0, 7.0, 0.0, 3.0])
    assert importance_ranks(scores).tolist() == counted_ranks(scores.tolist()) == [0.5, 0.0, 1.0, 0.0, 0.5]
    assert importance_ranks(torch.tensor([4.0])).tolist() == [0.0]


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_exclusive_of_exact_size_and_in_order(seed):
    """No unit outside SCU has a larger difference than one inside, and likewise for the other groups."""
    generator = torch.Generator().manual_seed(seed)
    # Coarse ranks have many ties.
    safe, useful = (torch.randint(0, 8, (50,), generator=generator).double() / 7 for _ in range(2))
    groups = unit_groups(safe, useful, 0.1, 0.24, 0.3)
    masks = torch.stack([groups.safety, groups.utility, groups.redundant, groups.complex])
    assert masks.sum(1).tolist() == [5, 12, 15, 18]
    assert masks.sum(0).tolist() == [1] * 50
    difference, total = safe - useful, safe + useful
    assert difference[groups.safety].min() >= difference[~groups.safety].max()
    assert difference[groups.utility].max() <= difference[~groups.utility].min()
    assert total[groups.redundant].max() <= total[groups.complex].min()
    nothing = unit_groups(safe, useful, 0.0, 0.0, 0.0)
    assert nothing.complex.all()
    assert not (nothing.safety | nothing.utility | nothing.redundant).any()


class Mlp(nn.Module):
    def __init__(self, up, down):
        super().__init__()
        self.up_proj, self.down_proj = (nn.Linear(*w.shape[::-1], bias=False, dtype=w.dtype) for w in (up, down))
        self.up_proj.weight.data.copy_(up)
        self.down_proj.weight.data.copy_(down)

    def forward(self, x):
        return self.down_proj(self.up_proj(x).relu())


class Planted(LightningModule):
    """One layer with an MLP. Inputs 0 and 1 belong to task S, 2 and 3 to task U. Output 0 answers S, and 1 answers U.

    Hidden units 0 to 2 read the inputs of S only, 3 to 5 those of U only, 6 to 9 both. Units 10 to 13 are never active.
    """

    GROUPS = (range(3), range(3, 6), range(6, 10), range(10, 14))

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        up, down = torch.zeros(14, 4, dtype=torch.float64), torch.zeros(2, 14, dtype=torch.float64)
        safety, useful, shared, dead = self.GROUPS
        for units, inputs, outputs in ((safety, [0, 1], [0]), (useful, [2, 3], [1]), (shared, range(4), [0, 1])):
            for unit in units:
                up[unit, list(inputs)] = torch.rand(len(inputs), generator=generator, dtype=torch.float64) + 0.5
                down[outputs, unit] = torch.rand(len(outputs), generator=generator, dtype=torch.float64) + 0.5
        up[list(dead)] = -1
        down[:, list(dead)] = 3
        self.model = nn.Module()
        self.model.config = SimpleNamespace(num_hidden_layers=1, num_attention_heads=1)
        layer = nn.Module()
        layer.mlp = Mlp(up, down)
        self.model.layers = nn.ModuleList([layer])
        self.truth = copy.deepcopy(layer.mlp)

    @property
    def mlp(self):
        return self.model.layers[0].mlp

    def loss(self, batch):
        return (self.mlp(batch["x"]) - batch["y"]).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=0.05, weight_decay=0.1)

    def task(self, inputs):
        """Return inputs of one task, and the model's own answers at the start."""
        x = torch.zeros(16, 4, dtype=torch.float64)
        x[:, inputs] = torch.rand(16, 2, generator=torch.Generator().manual_seed(inputs[0]), dtype=torch.float64)
        return {"x": x, "y": self.truth(x).detach()}


@pytest.mark.parametrize("estimator", ["variance", "wanda", "snip"])
def test_planted_groups_are_recovered_and_safety_units_carry_task_s_alone(estimator):
    module = Planted()
    safety, useful = module.task([0, 1]), module.task([2, 3])
    targets, neurons = trained_neurons(module.model, decoder_layers, "test")
    if estimator == "snip":  # SNIP scores are zero where the loss is at its minimum
        safety["y"], useful["y"] = safety["y"] + 1, useful["y"] + 1
    ranks = [
        importance_ranks(importance(estimator, module.loss, neurons, targets, calibration([b], 16))[neurons[0].name])
        for b in (safety, useful)
    ]
    groups = unit_groups(*ranks, 3 / 14, 3 / 14, 4 / 14)
    expected = zip((groups.safety, groups.utility, groups.complex, groups.redundant), module.GROUPS, strict=True)
    for mask, units in expected:
        assert mask.nonzero().flatten().tolist() == list(units)
    before = [module.loss(batch).item() for batch in (safety, useful)]
    module.mlp.down_proj.weight.data[:, groups.safety] = 0
    after = [module.loss(batch).item() for batch in (safety, useful)]
    assert abs(after[0] - before[0]) > 0.1
    assert after[1] == before[1]


def test_planted_safety_units_stay_while_the_others_learn():
    module = Planted()
    streams = {"refusals": [module.task([0, 1])], "ordinary": [module.task([2, 3])]}
    start = copy.deepcopy(module.mlp)
    upload = {"x": torch.rand(16, 4, dtype=torch.float64), "y": torch.full((16, 2), 3.0, dtype=torch.float64)}
    defense = FreezePlus(3 / 14, 3 / 14, 4 / 14, cu=0.5, samples=32, streams=streams)
    quiet_trainer(max_steps=5, callbacks=[defense]).fit(module, DataLoader([upload] * 5, batch_size=None))
    up, down = (getattr(module.mlp, n).weight != getattr(start, n).weight for n in ("up_proj", "down_proj"))
    summary = defense.summary()
    assert [summary[n] for n in ("unit_count", "safety", "utility", "redundant", "complex")] == [14, 3, 3, 4, 4]
    assert summary["frozen_units"] == 5
    assert summary["jaccard_of_halves"] == 1
    frozen = ~up.any(1)
    assert torch.equal(frozen, ~down.any(0))
    assert frozen[:3].all()
    assert frozen.tolist().count(True) == 5
    assert frozen[6:10].sum() == 2


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_variance_equals_the_two_pass_formula_of_response_tokens(offset):
    """The inputs have a large mean. In float32, the difference of the two sums would be rounding alone."""
    layer = nn.Linear(3, 2, bias=False)
    x = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0)) + offset
    labels = torch.full((2, 7), -100)
    labels[0, 3:], labels[1, 5:] = 1, 1
    batch = {"x": x, "labels": labels}
    variance = input_variances(lambda b: layer(b["x"]).sum(), {"w": layer}, calibration([batch], 2))["w"]
    chosen = torch.cat([x[0, 3:], x[1, 5:]]).double()
    assert_close(variance, chosen.var(dim=0, unbiased=False), rtol=1e-5, atol=0)
    assert (variance - x.double().flatten(0, 1).var(dim=0, unbiased=False)).abs().max() > 0.05


def grouped(heads=4, groups=2, qwen=False):
    """Return a random model with four query heads of four channels that share two value heads."""
    torch.manual_seed(0)
    config = (Qwen2Config if qwen else LlamaConfig)(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=64,
    )
    return (Qwen2ForCausalLM if qwen else LlamaForCausalLM)(config).double()


def test_a_value_channel_reaches_exactly_the_frozen_columns():
    """Query heads 0 and 1 read value head 0, heads 2 and 3 value head 1, so channel 5 is read by columns 9 and 13."""
    model = grouped()
    targets, neurons = trained_neurons(model, decoder_layers, "test")
    attention = next(n for n in neurons if n.name.endswith("0.self_attn"))
    layer = model.model.layers[0].self_attn
    inputs = []
    handle = layer.o_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    ids = token_batch(0)["input_ids"]
    for channel in range(8):
        chosen = torch.arange(8) == channel
        masks = {id(p): m for p, m in kept_parts(attention, chosen, targets)}
        assert len(masks) == 2
        assert masks[id(layer.v_proj.weight)].flatten().tolist() == chosen.tolist()
        columns = masks[id(layer.o_proj.weight)][0]
        assert columns.nonzero().flatten().tolist() == [channel // 4 * 8 + head * 4 + channel % 4 for head in (0, 1)]
        # A change of the channel's row of v_proj changes the inputs of these columns, and no others.
        inputs.clear()
        model(input_ids=ids)
        layer.v_proj.weight.data[channel] += 1
        model(input_ids=ids)
        layer.v_proj.weight.data[channel] -= 1
        assert torch.equal((inputs[1] - inputs[0]).abs().amax((0, 1)) > 1e-9, columns)
    handle.remove()


def test_queries_and_keys_are_frozen_only_on_request():
    for qk in (False, True):
        model = grouped()
        start = copy.deepcopy(model)
        trained = train(model, [own(qk=qk)], steps=3)
        for layer, before in zip(trained.model.model.layers, start.model.layers, strict=True):
            still = {
                name: (getattr(layer.self_attn, name).weight == getattr(before.self_attn, name).weight).all(1)
                for name in ("q_proj", "k_proj", "v_proj")
            }
            assert 0 < still["v_proj"].sum() < 8
            wide = still["v_proj"].unflatten(0, (2, 1, 4)).expand(2, 2, 4).flatten()
            assert torch.equal(still["k_proj"], still["v_proj"] & qk)
            assert torch.equal(still["q_proj"], wide & qk)


def test_biases_of_frozen_rows_stay():
    model = grouped(qwen=True)
    start = copy.deepcopy(model)
    trained = train(model, [own()], steps=3)
    for layer, before in zip(trained.model.model.layers, start.model.layers, strict=True):
        now, then = layer.self_attn.v_proj, before.self_attn.v_proj
        assert 0 < (now.bias == then.bias).sum() < 8
        assert torch.equal(now.bias == then.bias, (now.weight == then.weight).all(1))
        assert (layer.self_attn.q_proj.bias != before.self_attn.q_proj.bias).all()


@pytest.mark.parametrize("estimator", ["variance", "wanda", "snip"])
def test_frozen_units_keep_every_bit_and_all_others_move(estimator):
    start = tiny_lm()
    defense = own(estimator=estimator)
    trained = train(copy.deepcopy(start), [defense], steps=4)
    assert defense.manifest()["estimator"] == estimator
    frozen = 0
    for layer, before in zip(trained.model.model.layers, start.model.layers, strict=True):
        moved = {n: p != before.get_parameter(n) for n, p in layer.named_parameters()}
        hidden, channels = ~moved["mlp.up_proj.weight"].all(1), ~moved["self_attn.v_proj.weight"].all(1)
        for name, mask in (
            ("mlp.up_proj", hidden[:, None]),
            ("mlp.gate_proj", hidden[:, None]),
            ("mlp.down_proj", hidden[None]),
            ("self_attn.v_proj", channels[:, None]),
            ("self_attn.o_proj", channels.repeat(2)[None]),
            ("self_attn.q_proj", torch.zeros(1, 1, dtype=torch.bool)),
        ):
            assert torch.equal(moved[f"{name}.weight"], (~mask).expand(moved[f"{name}.weight"].shape)), name
        frozen += int(hidden.sum() + channels.sum())
    assert defense.summary()["frozen_units"] == frozen == 16 + 12  # 0.2 of 80 units, and 0.3 of the 40 complex ones


def adapted(fresh):
    """Return a tiny model with an adapter on every linear layer. In a continued one, B is not zero."""
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"])
    model = get_peft_model(tiny_lm(), settings)
    for u in lora_updates(model).values():
        torch.nn.init.zeros_(u.b) if fresh else torch.nn.init.normal_(u.b, std=0.1)
    return model.double()


def effective(model):
    return {name: (u.weight + u.scale * u.b @ u.a).detach() for name, u in lora_updates(model).items()}


@pytest.mark.parametrize("fresh", [True, False], ids=["new", "continued"])
def test_frozen_entries_of_the_adapted_weight_keep_every_bit(fresh):
    """Under AdamW with weight decay 0.1, W + s B A itself is compared. A continued adapter has no zero to rely on."""
    start, batch = adapted(fresh), token_batch(7)
    before = effective(start)
    model, defense = copy.deepcopy(start), own()

    class AtStart(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch_, batch_idx):
            if trainer.global_step == 0:
                inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
                with torch.no_grad():
                    assert torch.equal(pl_module.model(**inputs).logits, start.train()(**inputs).logits)

    module = train(model, [defense, AtStart()], steps=5)
    after = effective(module.model)
    frozen = 0
    for layer in (0, 1):
        moved = {
            n: after[f"model.layers.{layer}.{n}.weight"] != before[f"model.layers.{layer}.{n}.weight"]
            for n in ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj", "self_attn.v_proj", "self_attn.o_proj")
        }
        hidden, channels = ~moved["mlp.up_proj"].any(1), ~moved["self_attn.v_proj"].any(1)
        assert torch.equal(moved["mlp.gate_proj"].any(1), ~hidden)
        assert torch.equal(moved["mlp.down_proj"].any(0), ~hidden)
        assert torch.equal(moved["self_attn.o_proj"].any(0), ~channels.repeat(2))
        frozen += int(hidden.sum() + channels.sum())
    assert defense.summary()["frozen_units"] == frozen > 20
    updates = lora_updates(module.model)
    a_moves, b_moves = (
        [not torch.equal(getattr(u, f), getattr(lora_updates(start)[n], f)) for n, u in updates.items()] for f in "ab"
    )
    assert all(a_moves if fresh else [a or b for a, b in zip(a_moves, b_moves, strict=True)])
    assert all(b_moves) == fresh


@pytest.mark.parametrize("estimator", ["wanda", "snip"])
def test_other_estimators_sum_the_scores_of_the_columns_that_read_a_unit(estimator):
    """In the continued adapter, the scored weight is W + s B A."""
    for model in (tiny_lm(), adapted(fresh=False)):
        module, batches = SafetyModule(model.eval()), SIDE["refusals"]
        targets, neurons = trained_neurons(model, decoder_layers, "test")
        data = [(without_end(batch), count) for batch, count in calibration(batches, 5)]
        scores = importance(estimator, module.loss, neurons, targets, data)
        names = {module: name for name, module in model.named_modules()}
        for n in neurons:
            columns = slow_scores(model, names[targets[n.reader].layer], batches, 5, estimator).sum(0)
            folded = columns.view(2, 8).sum(0) if n.name.endswith("self_attn") else columns
            assert_close(scores[n.name], folded.detach(), rtol=1e-9, atol=1e-14)


def test_columns_that_are_zero_in_a_continued_adapter_leave_b_free():
    """Such columns come from an earlier training with FreezePlus. B A stays zero there whatever B is."""
    model = adapted(fresh=False)
    targets, neurons = trained_neurons(model, decoder_layers, "test")
    mlp = next(n for n in neurons if n.name.endswith("1.mlp"))
    update = targets[mlp.reader].update
    chosen = torch.arange(32) < 5
    assert id(update.b) in {id(p) for p, _ in kept_parts(mlp, chosen, targets)}
    update.a.data[:, :5] = 0
    assert id(update.b) not in {id(p) for p, _ in kept_parts(mlp, chosen, targets)}


def test_random_units_are_as_many_per_module_and_others():
    scored, control = own(), own(units="random")
    one, two = (train(tiny_lm(), [d], steps=2) for d in (scored, control))
    counts = [{name: m["frozen"] for name, m in d.report["modules"].items()} for d in (scored, control)]
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) == scored.summary()["frozen_units"] == control.summary()["frozen_units"]
    assert scored.summary()["frozen_and_safety"] == scored.summary()["safety"]
    assert control.summary()["frozen_and_safety"] < control.summary()["safety"]
    assert scored.summary()["mask_digest"] != control.summary()["mask_digest"]
    assert control.manifest()["units"] == "random"
    assert not all(map(torch.equal, one.model.parameters(), two.model.parameters()))
    again = own(units="random")
    train(tiny_lm(), [again], steps=1)
    assert again.summary()["mask_digest"] == control.summary()["mask_digest"]


def test_halves_with_equal_rows_have_equal_safety_units_and_others_are_compared():
    same = {"refusals": [token_batch(100)] * 2, "ordinary": SIDE["ordinary"]}
    equal, different, single = own(samples=6, streams=same), own(samples=6), own(samples=1)
    for defense in (equal, different, single):
        train(tiny_lm(), [defense], steps=1)
    assert equal.summary()["jaccard_of_halves"] == 1
    assert 0 <= different.summary()["jaccard_of_halves"] < 1
    assert different.summary()["jaccard_by_chance"] == pytest.approx(0.2 * 0.2 / (0.4 - 0.04))
    assert "jaccard_of_halves" not in single.summary()


class SaveAt(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class Moved(Callback):
    """Counts the rows of v_proj that differ from the start after each step."""

    def on_train_start(self, trainer, pl_module):
        self.start, self.counts = self.rows(pl_module), []

    def rows(self, module):
        return [layer.self_attn.v_proj.weight.detach().clone() for layer in decoder_layers(module.model)]

    def on_train_batch_end(self, trainer, pl_module, *args):
        changed = [(a != b).any(1).sum() for a, b in zip(self.rows(pl_module), self.start, strict=True)]
        self.counts.append(int(sum(changed)))


def test_all_complex_units_are_frozen_in_the_first_epoch():
    defense, moved = own(complex_epochs=1, scu=0.1, cu=0.1), Moved()
    module = SafetyModule(tiny_lm(), lr=0.05)
    loader = DataLoader([token_batch(k) for k in range(2)], batch_size=None)
    quiet_trainer(max_epochs=3, callbacks=[defense, moved]).fit(module, loader)
    modules = defense.report["modules"]
    attention = [m for name, m in modules.items() if name.endswith("self_attn")]
    first = sum(8 - m["safety"] - m["complex"] for m in attention)
    then = sum(8 - m["frozen"] for m in attention)
    assert moved.counts == [first] * 2 + [then] * 4
    assert first < then
    assert defense.summary()["complex_steps"] == 2


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("step", range(1, 6))
def test_a_resumed_run_equals_the_uninterrupted_one(tuning, step, tmp_path):
    """An epoch has two steps. The stored masks are those of the aligned model, also over the end of an epoch."""
    path = tmp_path / "one.ckpt"

    def run(callbacks, **where):
        module = SafetyModule(model_of(tuning), lr=0.05)
        trainer = quiet_trainer(max_steps=6, max_epochs=-1, callbacks=callbacks)
        trainer.fit(module, data_module(Stage.FINETUNING), **where)
        return module

    def make():
        return own(complex_epochs=1, streams=None, safety="alignment", utility="retain")

    first, second = make(), make()
    whole = run([first, SaveAt(step, path)])
    resumed = run([second], ckpt_path=path)
    assert first.summary()["complex_steps"] == 2
    assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))
    assert first.summary() == second.summary()
    one, two = first.state_dict(), second.state_dict()
    for kind in ("masks", "values"):
        assert one[kind].keys() == two[kind].keys()
        assert all(torch.equal(one[kind][name], two[kind][name]) for name in one[kind])


def test_a_fraction_below_one_unit_is_refused():
    with pytest.raises(ValueError, match=r"scu 0.01 is less than one of the model's 80 units.*Use scu >= 0.0125"):
        train(tiny_lm(), [own(scu=0.01)])


def test_no_frozen_unit_is_said():
    with pytest.warns(UserWarning, match="FreezePlus freezes no unit"):
        defended = train(tiny_lm(), [own(scu=0.0, ucu=0.6, ru=0.4, cu=1.0)], steps=2)
    plain = train(tiny_lm(), [], steps=2)
    assert all(map(torch.equal, defended.model.parameters(), plain.model.parameters()))


def test_a_model_without_units_is_refused():
    with pytest.raises(TypeError, match="FreezePlus: no decoder layer has an MLP"):
        train(get_peft_model(tiny_lm(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])), [own()])


def test_a_trained_layer_whose_units_are_unknown_is_refused():
    """Without an adapter on o_proj, the channels that v_proj writes are read by a layer that is not scored."""
    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj", "gate_proj", "down_proj"])
    with pytest.raises(TypeError, match=r"FreezePlus: model.layers.0.self_attn.v_proj.weight is trained and holds no"):
        train(get_peft_model(tiny_lm(), settings), [own()])


def test_the_presets_have_the_published_sizes():
    sizes = {name: (p["scu"], p["ucu"], p["ru"]) for name, p in FreezePlus.presets.items()}
    assert sizes == {
        "llama2_7b_chat": (0.013, 0.133, 0.148),
        "llama3_8b_instruct": (0.014, 0.068, 0.066),
        "mistral_7b_instruct": (0.02, 0.013, 0.134),
    }
