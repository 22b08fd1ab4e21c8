"""Freeze on small regressions with known solutions, and on a random language model against plain loops."""

import copy
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from hftlight import SafetyModule
from hftlight.defenses.finetuning.freeze import Freeze, rank_factors, top
from hftlight.engine import Defense, Slot, Stage
from hftlight.engine.weights.lora import lora_updates
from hftlight.engine.weights.masks import minus, unpack
from hftlight.engine.weights.repair import ModelWeights, Repair
from hftlight.engine.weights.subject import Subject
from tests.helpers.contract import data_module, model_of
from tests.helpers.quadratic import OneBatch, quiet_trainer
from tests.helpers.repairs import moved_model, small_llama, with_update
from tests.helpers.tiny_lm import reference_loss, tiny_lm, token_batch

SIDE = {"refusals": [token_batch(100), token_batch(101)], "task": [token_batch(200), token_batch(201)]}


class Net(nn.Module):
    """Layers in a list that counts as decoder layers, and a head that does not."""

    def __init__(self, layers, head):
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=len(layers))
        self.layers, self.head = nn.ModuleList(layers), head

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Regression(LightningModule):
    """Mean over rows of the squared residuals of the outputs that have a target."""

    def __init__(self, model, optimizer):
        super().__init__()
        self.model, self.make = model, optimizer

    def loss(self, batch):
        missing = batch["y"].isnan()
        return (self.model(batch["x"]) - batch["y"].nan_to_num()).masked_fill(missing, 0).square().sum(dim=1).mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return self.make([p for p in self.parameters() if p.requires_grad])


def linear(weight):
    layer = nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return layer


def regression(weight, optimizer):
    return Regression(Net([linear(weight)], nn.Identity()), optimizer)


def fit(module, batch, callbacks, steps):
    quiet_trainer(max_steps=steps, callbacks=callbacks).fit(module, DataLoader(OneBatch(batch, steps), batch_size=None))
    return module.model.layers[0].weight.detach()


def data(*x, target):
    x = torch.tensor(x, dtype=torch.float64)
    return {"x": x, "y": torch.full((len(x), 1), target, dtype=torch.float64)}


W0 = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
FIRST, SECOND = data([1.0, 0.1], target=5.0), data([0.1, 1.0], target=5.0)  # where the first, the second weight matters
UPLOAD = data([1.0, 0.5], [0.5, 1.0], [-0.3, 0.8], target=1.0)


def held_first(**options):
    return Freeze(0.5, 0.5, samples=1, streams={"refusals": [FIRST], "task": [SECOND]}, **options)


def test_the_region_is_the_top_of_safety_without_the_top_of_utility():
    safety = torch.tensor([[5.0, 4.0, 3.0], [2.0, 1.0, 0.0]])
    utility = torch.tensor([[9.0, 0.0, 8.0], [0.0, 0.0, 7.0]])
    assert minus(top(safety, 0.5), top(utility, 0.5)).tolist() == [[False, True, False], [False] * 3]
    assert not minus(top(safety, 0.5), top(safety, 0.5)).any()
    assert minus(top(safety, 0.5), top(5 - safety, 0.5)).tolist() == [[True] * 3, [False] * 3]
    assert [int(top(safety, ratio).sum()) for ratio in (0, 0.1, 0.2, 0.5, 0.99, 1)] == [0, 0, 1, 3, 5, 6]


def test_training_with_one_weight_held_and_rewinding_it_give_different_solutions():
    """Loss w'Hw/2 - b'w + c with H12 != 0: held, the free weight is (b2 - H21 w1)/H22; rewound, that of H^-1 b."""
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.2)  # noqa: E731
    x, y = UPLOAD["x"], UPLOAD["y"]
    h, b = 2 * x.T @ x / len(x), 2 * x.T @ y[:, 0] / len(x)
    held = fit(regression(W0, sgd), UPLOAD, [held_first()], 500)
    free = fit(regression(W0, sgd), UPLOAD, [], 500)
    assert held[0, 0] == W0[0, 0]
    assert_close(held[0, 1], (b[1] - h[1, 0] * W0[0, 0]) / h[1, 1], rtol=0, atol=1e-10)
    assert_close(free[0], torch.linalg.solve(h, b), rtol=0, atol=1e-10)
    assert (free[0, 1] - held[0, 1]).abs() > 0.1


class Naive(Freeze):
    """Masks gradients and restores nothing."""

    def on_train_batch_end(self, *args):
        pass


def stale_adamw(parameters):
    """AdamW with the momentum of one earlier step whose gradient was one, and no decay; weights put back."""
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.0)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, value in zip(parameters, before, strict=True):
        p.data.copy_(value)
        p.grad = None
    return optimizer


def decaying(parameters):
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)


def heavy(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


def test_masking_gradients_alone_does_not_hold_a_weight():
    """Decay moves 1.0 to 0.99 in one step, and momentum slips by 0.067: lr m/(1-b1^2) / sqrt(v/(1-b2^2))."""
    streams = {"refusals": [FIRST], "task": [SECOND]}
    naive = lambda: Naive(0.5, 0.5, samples=1, streams=streams)  # noqa: E731
    assert_close(fit(regression(W0, decaying), UPLOAD, [naive()], 1)[0, 0].item(), 0.99, rtol=0, atol=1e-12)
    slip = 1 - fit(regression(W0, stale_adamw), UPLOAD, [naive()], 1)[0, 0].item()
    assert_close(slip, 0.1 * (0.09 / 0.19) / (0.000999 / 0.001999) ** 0.5, rtol=0, atol=1e-6)
    assert_close(slip, 0.067, rtol=0, atol=1e-4)


@pytest.mark.parametrize("optimizer", [decaying, stale_adamw, heavy])
@pytest.mark.parametrize("steps", [1, 2, 17])
def test_a_held_weight_keeps_its_bits_under_decay_and_momentum(optimizer, steps):
    weight = torch.tensor([[0.3, -2.0]], dtype=torch.float64)
    trained = fit(regression(weight, optimizer), UPLOAD, [held_first()], steps)
    assert torch.equal(trained[0, 0], weight[0, 0])
    assert (trained[0, 1] - weight[0, 1]).abs() > 1e-3


def test_clipping_sees_the_masked_gradient():
    module = regression(W0, lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    trainer = quiet_trainer(max_steps=1, callbacks=[held_first()], gradient_clip_val=0.01)
    trainer.fit(module, DataLoader(OneBatch(UPLOAD, 1), batch_size=None))
    assert_close((module.model.layers[0].weight - W0).abs()[0, 1].item(), 0.01, rtol=1e-5, atol=0)


def test_the_planted_safety_units_are_found_exactly():
    """Units 0 and 1 feed the refusal alone, 2 and 3 the task alone, 4 and 5 both; the head is not scored."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    head = torch.tensor([[1.0, -2, 0, 0, 1, 1], [0, 0, 2, 1, -1, 1]], dtype=torch.float64)
    module = Regression(Net([linear(w)], linear(head)), decaying)
    x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    gap = torch.full((8,), float("nan"), dtype=torch.float64)
    refusal = {"x": x, "y": torch.stack([torch.full_like(gap, 9), gap], dim=1)}
    task = {"x": x, "y": torch.stack([gap, torch.full_like(gap, 9)], dim=1)}
    defense = Freeze(4 / 6, 4 / 6, samples=8, streams={"refusals": [refusal], "task": [task]})
    fit(module, task, [defense], 3)
    masks = {name: unpack(bits, (6, 5)) for name, bits in defense.state_dict()["masks"].items()}
    assert {name: mask.all(dim=1).tolist() for name, mask in masks.items()} == {
        "model.layers.0.weight": [True, True, False, False, False, False]
    }
    assert masks["model.layers.0.weight"].sum() == 10
    assert torch.equal(module.model.layers[0].weight[:2], w[:2])
    assert (module.model.head.weight != head).any(dim=1).all()
    trace = defense.summary()
    assert trace["requested_fraction"] == 4 / 6
    assert trace["realised_fraction"] == 1 / 3
    assert trace["jaccard"] == pytest.approx(10 / 30)
    assert trace["jaccard_by_chance"] == pytest.approx(0.5)
    assert trace["kept_entries"] == 10
    assert trace["calls"] == 3


@pytest.mark.parametrize("samples", [1, 3, 5])
def test_equal_sets_leave_nothing_and_it_is_said(samples):
    streams = {"refusals": SIDE["refusals"], "task": SIDE["refusals"]}
    defense = Freeze(0.3, 0.3, samples=samples, streams=streams)
    with pytest.warns(UserWarning, match="Freeze holds no weight"):
        held = train(tiny_lm(), [defense], steps=2)
    assert defense.state_dict()["masks"] == {}
    plain = train(tiny_lm(), [], steps=2)
    assert all(map(torch.equal, held.model.parameters(), plain.model.parameters()))


def train(model, callbacks, steps=3, optimizer="adamw", lr=0.01, **options):
    module = SafetyModule(model, lr=lr, optimizer=optimizer)
    batches = DataLoader([token_batch(k) for k in range(steps)], batch_size=None, shuffle=False)
    quiet_trainer(max_steps=steps, callbacks=callbacks, **options).fit(module, batches)
    return module


def freeze(q=0.4, p=0.3, **options):
    return Freeze(q, p, samples=options.pop("samples", 4), streams=SIDE, **options)


def endless(row):
    """Return a batch of one row whose last response token, its end token, has no label."""
    labels = row["labels"].clone()
    labels[0, max(t for t, label in enumerate(labels[0].tolist()) if label != -100)] = -100
    return {**row, "labels": labels}


def slow_scores(model, name, batches, samples, score="snip"):
    """Return one weight's score at the model as it is, its adapter included, this weight alone trainable."""
    model = copy.deepcopy(model).requires_grad_(False).eval()
    layer = model.get_submodule(name)
    weight = getattr(layer, "base_layer", layer).weight
    effective = weight.clone()
    if hasattr(layer, "lora_A"):
        effective += layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    rows = [endless({k: t[i : i + 1] for k, t in batch.items()}) for batch in batches for i in range(3)][:samples]
    total = torch.zeros_like(weight)
    if score == "snip":
        weight.requires_grad_()
        for row in rows:
            total += torch.autograd.grad(reference_loss(model, row), weight)[0].abs()
        return effective.abs() * total
    inputs = []
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        for row in rows:
            model(input_ids=row["input_ids"], attention_mask=row["attention_mask"])
    handle.remove()
    tokens = torch.cat([x[row["labels"] != -100] for x, row in zip(inputs, rows, strict=True)])
    return effective.abs() * tokens.square().mean(dim=0).sqrt()


def test_the_end_token_counts_only_if_it_is_asked_for():
    """Its label decides no score by default; with ``end`` it does."""
    other = {k: [{**b, "labels": endless_rows(b)} for b in batches] for k, batches in SIDE.items()}

    def digest(streams, **options):
        defense = Freeze(0.4, 0.3, samples=4, streams=streams, **options)
        train(tiny_lm(), [defense], steps=1)
        return defense.summary()["mask_digest"]

    assert digest(SIDE) == digest(other, end=True) != digest(SIDE, end=True)


def endless_rows(batch):
    rows = [endless({k: t[i : i + 1] for k, t in batch.items()})["labels"] for i in range(3)]
    return torch.cat(rows)


def sorted_region(safety, utility, q, p):
    """Return S(q) minus U(p) by sorting, as a flat boolean list."""
    tops = []
    for scores, fraction in ((safety, q), (utility, p)):
        flat = scores.flatten().tolist()
        count = int(fraction * len(flat) + 1e-9)
        tops.append(set(sorted(range(len(flat)), key=lambda i, flat=flat: (-flat[i], i))[:count]))
    return [i in tops[0] - tops[1] for i in range(safety.numel())]


@pytest.mark.parametrize("score", ["snip", "wanda"])
@pytest.mark.parametrize("unit", ["entry", "row"])
def test_all_parameters_what_is_held_and_what_is_free(score, unit):
    start = tiny_lm()
    defense = freeze(score=score, unit=unit)
    trained = train(copy.deepcopy(start), [defense])
    seen = 0
    for name, p in trained.model.named_parameters():
        before = start.get_parameter(name)
        if not name.endswith("_proj.weight"):
            assert (p != before).any(), name  # embeddings, norms and the head are free
            continue
        s, u = (slow_scores(start, name[:-7], SIDE[k], 4, score) for k in ("refusals", "task"))
        if unit == "row":
            s, u = s.sum(dim=1, keepdim=True), u.sum(dim=1, keepdim=True)
        mask = torch.tensor(sorted_region(s, u, 0.4, 0.3)).view_as(s).expand_as(p)
        assert torch.equal(p[mask], before[mask]), name
        assert (p[~mask] != before[~mask]).all(), name
        seen += int(mask.sum())
    assert defense.summary()["kept_entries"] == seen > 0


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "continued"])
def test_lora_rows_of_the_weight_keep_their_bits(fresh):
    """Of a fresh adapter only B's rows are held; of one that training continues, A is held too."""
    start = tiny_lm(lora=True)
    if fresh:
        with torch.no_grad():
            for u in lora_updates(start).values():
                u.b.zero_()
    defense = freeze()
    trained = train(copy.deepcopy(start), [defense], steps=4)
    assert any("lora_A" in name for name in defense.state_dict()["masks"]) != fresh
    after = lora_updates(trained.model)
    for name, u in lora_updates(start).items():
        layer = "base_model.model." + name[:-7]
        s, v = (slow_scores(start, layer, SIDE[k], 4).sum(dim=1) for k in ("refusals", "task"))
        rows = torch.tensor(sorted_region(s, v, 0.4, 0.3))
        was, now = u.weight + u.scale * u.b @ u.a, after[name].weight + u.scale * after[name].b @ after[name].a
        assert 0 < rows.sum() < len(rows)
        assert torch.equal(now[rows], was[rows])
        assert (now[~rows] != was[~rows]).any(dim=1).all()
        assert torch.equal(after[name].a, u.a) != fresh


def test_single_entries_under_an_adapter_are_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"use unit='row', or\s+mode='rewind'"):
        train(tiny_lm(lora=True), [freeze(unit="entry")])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_ratio_zero_reads_nothing_and_is_plain_fine_tuning(lora):
    off = Freeze(0.0, streams={"refusals": [None], "task": [None]})
    weights = [
        list(train(tiny_lm(lora=lora, dropout=0.2), callbacks).model.parameters())
        for callbacks in ([], [off])
        if torch.manual_seed(1)
    ]
    assert all(map(torch.equal, *weights))
    assert off.summary() == {}


def test_a_ratio_below_one_entry_is_refused():
    with pytest.raises(ValueError, match=r"safety_ratio 0.05 is less than one of the 16 rows of .*>= 0.0625"):
        train(tiny_lm(), [freeze(q=0.05, unit="row")])


def test_utility_rows_are_not_asked_for_where_nothing_is_spared():
    assert Freeze(0.1, 0.0).streams == ("refusals",)
    assert Freeze().streams == ("refusals", "task")
    trained = train(tiny_lm(), [Freeze(0.2, 0.0, samples=2, streams={"refusals": SIDE["refusals"]})])
    assert trained is not None


@pytest.mark.parametrize("average", [EMAWeightAveraging, StochasticWeightAveraging])
def test_averaged_weights_are_refused(average):
    made = average(swa_lrs=0.1) if average is StochasticWeightAveraging else average()
    with pytest.raises(ValueError, match="averages weights after they moved"):
        train(tiny_lm(), [freeze(), made])


def test_a_model_without_decoder_layers_is_refused():
    module = Regression(nn.Linear(2, 1), decaying)
    with pytest.raises(TypeError, match="Freeze: Linear has no config that counts decoder layers"):
        fit(module, UPLOAD, [held_first()], 1)


def test_slots_stage_and_streams_follow_the_mode():
    training, rewinding = Freeze(), Freeze(mode="rewind")
    assert (training.stage, training.slots) == (Stage.FINETUNING, (Slot.PROJECTION, Slot.UPDATE))
    assert (rewinding.stage, rewinding.slots) == (Stage.POST_FINETUNING, (Slot.WEIGHTS,))
    assert rewinding.needs == ("aligned",)
    assert training.state_key != rewinding.state_key


def test_no_hook_of_a_repair_acts_in_training():
    """In mode "train" none of what ``Repair`` does on a Trainer may happen, also what it may learn to do later."""
    hooks = {name for name in vars(Repair) if callable(getattr(Callback, name, None)) and not name.startswith("__")}
    assert hooks >= {"setup", "on_train_start", "on_train_end"}
    assert {name for name in hooks if name.startswith("on_") or name == "setup"} <= vars(Freeze).keys()


class SaveAt(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("case", ["full", "lora", "full-row", "empty"])
def test_a_resumed_run_keeps_the_mask_of_the_aligned_model(case, tmp_path):
    path = tmp_path / "two.ckpt"

    def make():
        unit, p = "row" if case == "full-row" else "auto", 1.0 if case == "empty" else 0.2
        return Freeze(0.3, p, samples=5, unit=unit, safety="alignment")

    def run(callbacks, **where):
        module = SafetyModule(model_of("lora" if case == "lora" else "full"), lr=0.05)
        trainer = quiet_trainer(max_steps=4, max_epochs=-1, callbacks=callbacks)
        trainer.fit(module, data_module(Stage.FINETUNING), **where)
        return module

    first, second = make(), make()
    whole = run([first, SaveAt(2, path)])
    resumed = run([second], ckpt_path=path)
    assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))
    assert first.summary() == second.summary()
    assert first.summary()["calls"] == 4
    for kind in ("masks", "values"):
        one, two = first.state_dict()[kind], second.state_dict()[kind]
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert bool(one) == (case != "empty")
    if case != "empty":
        moved = make()
        quiet_trainer(max_steps=1, callbacks=[moved]).fit(whole, data_module(Stage.FINETUNING))
        assert moved.summary()["mask_digest"] != first.summary()["mask_digest"]  # a mask chosen anew would differ


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = tmp_path / "one.ckpt"
    train(tiny_lm(), [freeze(), SaveAt(1, path)], steps=1)
    saved = torch.load(path, weights_only=False)
    state = next(iter(v for k, v in saved["callbacks"].items() if k.startswith("Freeze")))
    for kind in ("masks", "values"):
        state[kind] = {f"elsewhere.{name}": t for name, t in state[kind].items()}
    torch.save(saved, path)
    module = SafetyModule(tiny_lm(), lr=0.05)
    loader = DataLoader([token_batch(k) for k in range(3)], batch_size=None, shuffle=False)
    with pytest.raises(RuntimeError, match=r"holds values of elsewhere\..*, which this model does not have"):
        quiet_trainer(max_steps=3, callbacks=[freeze()]).fit(module, loader, ckpt_path=path)


def test_a_second_training_chooses_anew():
    defense = freeze()
    first = train(tiny_lm(0), [defense])
    digest = defense.summary()["mask_digest"]
    train(tiny_lm(5), [defense])
    assert defense.summary()["mask_digest"] != digest
    defense.load_state_dict(defense.state_dict())  # as a resumed run does that then fails before its first step
    again = train(tiny_lm(0), [defense])
    assert defense.summary()["mask_digest"] == digest
    assert all(map(torch.equal, first.model.parameters(), again.model.parameters()))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("failing_call", [2, 6])
def test_an_exception_while_scoring_leaves_everything_as_found(lora, failing_call):
    """Weights, gradients, flags, modes, hooks and the random state are those of the moment before."""
    seen = {}

    def state(module):
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
        flags = [p.requires_grad for p in module.parameters()], [m.training for m in module.modules()], hooks
        none = [p.grad is None for p in module.parameters()]
        return [p.detach().clone() for p in module.parameters()], torch.get_rng_state(), flags, none

    class Before(Callback):
        def on_train_start(self, trainer, pl_module):
            calls, original = [], pl_module.loss
            seen["before"], seen["module"] = state(pl_module), pl_module

            def failing(batch):
                calls.append(None)
                torch.rand(3)
                if len(calls) == failing_call:
                    raise FloatingPointError("while scoring")
                return original(batch)

            pl_module.loss = failing

    with pytest.raises(FloatingPointError):
        train(tiny_lm(lora=lora, dropout=0.1), [Before(), freeze()])
    before, after = seen["before"], state(seen["module"])
    assert all(map(torch.equal, before[0], after[0]))
    assert torch.equal(before[1], after[1])
    assert before[2:] == after[2:]
    assert after[2][2] == 0


def test_scoring_draws_no_random_number_of_the_training():
    """With dropout on, the trained weights that are not held are those of a run that held the same mask for free."""
    model = tiny_lm(dropout=0.3)
    torch.manual_seed(7)
    first = freeze()
    one = train(copy.deepcopy(model), [first])

    class Known(Freeze):
        def _region(self, *args):
            return copy.deepcopy(known)

    known = None
    original = Freeze._region
    second = Known(0.4, 0.3, samples=4, streams=SIDE)

    class Keep(Freeze):
        def _region(self, *args):
            nonlocal known
            known = original(self, *args)
            return copy.deepcopy(known)

    train(copy.deepcopy(model), [Keep(0.4, 0.3, samples=4, streams=SIDE)])
    torch.manual_seed(7)
    two = train(copy.deepcopy(model), [second])
    assert all(map(torch.equal, one.model.parameters(), two.model.parameters()))


# Rewinding


def batches(stream):
    return iter(SIDE[stream])


def rewind(q=0.4, p=0.3, **options):
    return Freeze(q, p, mode="rewind", samples=6, **options)


def test_rewinding_an_adapter_makes_a_whole_model_with_aligned_entries():
    model = with_update(small_llama())
    was = copy.deepcopy(model)
    subject = Subject(model, batches=batches)
    rewind().apply(subject)
    assert subject.dense
    aligned = was.unload()
    updates = lora_updates(with_update(small_llama()))
    for name, p in ModelWeights.of(model).parameters.items():
        before = aligned.get_parameter(name)
        if name not in updates:
            assert torch.equal(p, before)
            continue
        s, u = (slow_scores(aligned, name[:-7], SIDE[k], 6) for k in ("refusals", "task"))
        mask = torch.tensor(sorted_region(s, u, 0.4, 0.3)).view_as(s)
        x = updates[name]
        assert torch.equal(p[mask], before[mask])
        assert torch.equal(p[~mask], (before + x.scale * x.b @ x.a)[~mask])
        row = subject.report["matrices"][name]
        assert row["kept"] == row["changed_entries"] == mask.sum()
    assert all(not u.b.any() for u in lora_updates(model).values())
    assert 0 < subject.report["realised_fraction"] < 0.4
    assert subject.report["changed_entries"] == subject.report["kept_entries"]


def test_rewinding_rows_of_an_adapter_leaves_an_adapter():
    model = with_update(small_llama())
    aligned = with_update(small_llama()).unload()
    before = {name: u.b.detach().clone() for name, u in lora_updates(model).items()}
    subject = Subject(model, batches=batches)
    rewind(unit="row").apply(subject)
    assert not subject.dense
    for name, u in lora_updates(model).items():
        s, v = (slow_scores(aligned, name[:-7], SIDE[k], 6).sum(dim=1) for k in ("refusals", "task"))
        rows = torch.tensor(sorted_region(s, v, 0.4, 0.3))
        assert not u.b[rows].any()
        assert torch.equal(u.b[~rows], before[name][~rows])
        assert subject.report["matrices"][name]["changed_entries"] == 4 * rows.sum()


@pytest.mark.parametrize("score", ["snip", "wanda"])
def test_rewinding_all_parameters_is_a_copy_of_the_aligned_values(score):
    aligned = small_llama()
    model = moved_model(aligned, 0.1, seed=1)
    was = copy.deepcopy(model)
    subject = Subject(model, ModelWeights.of(aligned), batches=batches)
    rewind(score=score).apply(subject)
    for name, p in model.named_parameters():
        if not name.endswith("_proj.weight"):
            assert torch.equal(p, was.get_parameter(name))
            continue
        s, u = (slow_scores(aligned, name[:-7], SIDE[k], 6, score) for k in ("refusals", "task"))
        mask = torch.tensor(sorted_region(s, u, 0.4, 0.3)).view_as(s)
        assert torch.equal(p, torch.where(mask, aligned.get_parameter(name), was.get_parameter(name)))
        assert subject.report["matrices"][name]["changed_entries"] == mask.sum()


def test_rows_to_rewind_by_come_from_the_whole_stream():
    """However the stream is cut into batches, and not just its first rows, which may be the shortest."""

    def cut(size):
        def read(stream):
            for k in range(0, 6, size):
                yield {name: t[k % 3 : k % 3 + size] for name, t in SIDE[stream][k // 3].items()}

        return read

    digests = []
    for samples, read in ((3, cut(3)), (3, cut(1)), (6, lambda stream: iter(SIDE[stream][:1]))):
        subject = Subject(with_update(small_llama()), batches=read)
        Freeze(0.4, 0.3, mode="rewind", samples=samples).apply(subject)
        digests.append(subject.report["mask_digest"])
    assert digests[0] == digests[1] != digests[2]


def test_training_and_rewinding_end_at_different_models():
    """The same mask is at its aligned values in both; the other entries of one adapted to that."""
    start = tiny_lm()
    held = train(copy.deepcopy(start), [freeze(samples=6)]).model
    free = train(copy.deepcopy(start), []).model
    subject = Subject(free, ModelWeights.of(start), batches=batches)
    rewind().apply(subject)
    same = {n: (p == start.get_parameter(n)) & n.endswith("_proj.weight") for n, p in held.named_parameters()}
    rewound = {n: (p == start.get_parameter(n)) & n.endswith("_proj.weight") for n, p in free.named_parameters()}
    assert all(torch.equal(same[n], rewound[n]) for n in same)
    assert any((p != free.get_parameter(n)).any() for n, p in held.named_parameters())


def actsvd(keep_s=3, keep_u=2):
    return Freeze(mode="rewind", score="actsvd", samples=6, keep_s=keep_s, keep_u=keep_u)


def slow_edit(model, name, keep_s, keep_u):
    """Return (I - Pi_u) Pi_s from singular vectors of the layer's outputs at response tokens, as dense matrices."""
    layer, projectors = model.get_submodule(name), []
    for stream, keep in (("refusals", keep_s), ("task", keep_u)):
        outputs = []
        handle = layer.register_forward_hook(lambda _, __, y, outputs=outputs: outputs.append(y))
        rows = [endless({k: t[i : i + 1] for k, t in batch.items()}) for batch in SIDE[stream] for i in range(3)]
        with torch.no_grad():
            for row in rows:
                model(input_ids=row["input_ids"], attention_mask=row["attention_mask"])
        handle.remove()
        h = torch.cat([y[row["labels"] != -100] for y, row in zip(outputs, rows, strict=True)])
        v = torch.linalg.svd(h, full_matrices=False)[2][:keep].T
        projectors.append(v @ v.T)
    return (torch.eye(len(projectors[0])).double() - projectors[1]) @ projectors[0]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_rewinding_directions_takes_them_out_of_the_update(lora):
    aligned = small_llama()
    if lora:
        model = with_update(small_llama())
        subject = Subject(model, batches=batches)
        names = list(lora_updates(model))
        update = {n: u.scale * u.b.detach() @ u.a.detach() for n, u in lora_updates(model).items()}
    else:
        model = moved_model(aligned, 0.1, seed=1)
        subject = Subject(model, ModelWeights.of(aligned), batches=batches)
        names = [n for n, _ in model.named_parameters() if n.endswith("_proj.weight")]
        update = {n: (model.get_parameter(n) - aligned.get_parameter(n)).detach() for n in names}
    actsvd().apply(subject)
    assert not subject.dense
    now = (
        {n: u.weight + u.scale * u.b @ u.a for n, u in lora_updates(model).items()}
        if lora
        else dict(model.named_parameters())
    )
    for name in names:
        edit = slow_edit(aligned, name[:-7], 3, 2)
        expected = aligned.get_parameter(name) + update[name] - edit @ update[name]
        assert_close(now[name], expected, rtol=0, atol=1e-9, msg=name)
        assert (edit @ update[name]).abs().max() > 1e-3
    assert subject.report["changed_entries"] > 0


def test_rank_factors_make_the_edit():
    generator = torch.Generator().manual_seed(0)
    s, u = (torch.linalg.qr(torch.randn(7, k, generator=generator).double()).Q for k in (3, 2))
    d, right = rank_factors(s, u)
    assert_close(d @ right.T, (torch.eye(7).double() - u @ u.T) @ s @ s.T, rtol=0, atol=1e-12)
    assert (u.T @ d).abs().max() < 1e-12


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_an_exception_while_rewinding_leaves_the_fine_tuned_model(lora):
    aligned = small_llama()
    model = with_update(small_llama()) if lora else moved_model(aligned, 0.1, seed=1)
    before = [p.detach().clone() for p in model.parameters()]

    def failing(stream):
        yield SIDE[stream][0]
        raise FloatingPointError("while reading")

    with pytest.raises(FloatingPointError):
        rewind().apply(Subject(model, None if lora else ModelWeights.of(aligned), batches=failing))
    assert all(map(torch.equal, before, model.parameters()))


def test_rewinding_needs_to_know_the_aligned_weights():
    with pytest.raises(RuntimeError, match=r"needs the aligned model, .*give aligned=\.\.\."):
        rewind().apply(Subject(moved_model(small_llama(), 0.1, seed=1), batches=batches))
    with pytest.raises(RuntimeError, match=r"needs the aligned model"):
        rewind().apply(Subject(with_update(small_llama()), batches=batches, dense=True))


def test_rewinding_after_a_repair_that_left_no_adapter():
    """Weights were written under the adapter by an earlier repair: then aligned values come from the aligned model."""
    aligned = small_llama()
    model = with_update(moved_model(aligned, 0.1, seed=1))
    with torch.no_grad():
        for u in lora_updates(model).values():
            u.b.zero_()
    plain = moved_model(aligned, 0.1, seed=1)
    subject = Subject(model, ModelWeights.of(aligned), batches=batches, dense=True)
    rewind().apply(subject)
    other = Subject(plain, ModelWeights.of(aligned), batches=batches)
    rewind().apply(other)
    for name, p in ModelWeights.of(model).parameters.items():
        if name in lora_updates(model):
            assert torch.equal(p, plain.get_parameter(name)), name


def test_a_finished_model_is_not_what_training_mode_works_on():
    with pytest.raises(RuntimeError, match=r"use mode='rewind' on a finished model"):
        freeze().apply(Subject(with_update(small_llama()), batches=batches))


def test_rewinding_nothing_says_why():
    subject = Subject(with_update(small_llama()), batches=lambda stream: iter(SIDE["refusals"]))
    with pytest.warns(UserWarning, match="Freeze changed no weight: no weight is among the top 0.3 of safety"):
        rewind(0.3, 0.3).apply(subject)


def test_on_a_trainer_of_ones_own_rewinding_writes_a_model_and_training_does_not(tmp_path):
    from transformers import AutoModelForCausalLM

    start = with_update(small_llama()).train()
    with torch.no_grad():
        for u in lora_updates(start).values():
            u.b.zero_()
    defense = rewind(streams=SIDE, output=str(tmp_path / "rewound"))
    module = train(start, [defense], lr=0.05)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "rewound", dtype=torch.float64)
    aligned = small_llama()
    for name, p in ModelWeights.of(module.model).parameters.items():
        assert torch.equal(written.get_parameter(name), p)
        if name in defense.report["matrices"]:
            assert (p == aligned.get_parameter(name)).sum() >= defense.report["matrices"][name]["kept"] > 0
    assert defense.applied
    assert isinstance(defense, Defense)
