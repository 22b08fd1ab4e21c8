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
from hftlight.defenses.finetuning.freeze import Freeze
from hftlight.engine import Slot, Stage
from hftlight.engine.weights.lora import lora_updates
from hftlight.engine.weights.masks import unpack
from hftlight.engine.weights.repair import Repair
from tests.helpers.contract import data_module, model_of
from tests.helpers.quadratic import OneBatch, quiet_trainer
from tests.helpers.regions import SIDE, endless, slow_scores, sorted_region, train
from tests.helpers.tiny_lm import tiny_lm, token_batch


class Net(nn.Module):
    """A list of layers that counts as decoder layers, and a head that does not."""

    def __init__(self, layers, head):
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=len(layers))
        self.layers, self.head = nn.ModuleList(layers), head

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Regression(LightningModule):
    """Squared residuals of the outputs with a target, summed over outputs and averaged over rows."""

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
# The output depends mostly on weight 0 in FIRST, and on weight 1 in SECOND.
FIRST, SECOND = data([1.0, 0.1], target=5.0), data([0.1, 1.0], target=5.0)
UPLOAD = data([1.0, 0.5], [0.5, 1.0], [-0.3, 0.8], target=1.0)


def held_first(**options):
    return Freeze(0.5, 0.5, samples=1, streams={"refusals": [FIRST], "task": [SECOND]}, **options)


def test_training_with_one_weight_held_and_rewinding_it_give_different_solutions():
    """The loss is w'Hw/2 - b'w + c with H12 != 0.

    With w1 frozen, the free weight ends at (b2 - H21 w1)/H22. Rewinding w1 leaves the free weight of H^-1 b.
    """
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.2)  # noqa: E731
    x, y = UPLOAD["x"], UPLOAD["y"]
    h, b = 2 * x.T @ x / len(x), 2 * x.T @ y[:, 0] / len(x)
    frozen = fit(regression(W0, sgd), UPLOAD, [held_first()], 500)
    free = fit(regression(W0, sgd), UPLOAD, [], 500)
    assert frozen[0, 0] == W0[0, 0]
    assert_close(frozen[0, 1], (b[1] - h[1, 0] * W0[0, 0]) / h[1, 1], rtol=0, atol=1e-10)
    assert_close(free[0], torch.linalg.solve(h, b), rtol=0, atol=1e-10)
    assert (free[0, 1] - frozen[0, 1]).abs() > 0.1


class Naive(Freeze):
    """Freeze that masks gradients and restores no weight."""

    def on_train_batch_end(self, *args):
        pass


def stale_adamw(parameters):
    """Return AdamW without decay, after one step with a gradient of one.

    The weights are reset, so only the optimizer state of that step remains.
    """
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
    """In one step decay moves 1.0 to 0.99, and momentum moves it by lr m/(1-b1^2) / sqrt(v/(1-b2^2)) = 0.067."""
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
    """Units 0 and 1 feed only the refusal, 2 and 3 only the task, 4 and 5 both. The head is not scored."""
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
    with pytest.warns(UserWarning, match="Freeze freezes no weight"):
        defended = train(tiny_lm(), [defense], steps=2)
    assert defense.state_dict()["masks"] == {}
    plain = train(tiny_lm(), [], steps=2)
    assert all(map(torch.equal, defended.model.parameters(), plain.model.parameters()))


def freeze(q=0.4, p=0.3, **options):
    return Freeze(q, p, samples=options.pop("samples", 4), streams=SIDE, **options)


def test_the_end_token_counts_only_if_it_is_asked_for():
    """By default the end token's label does not enter the scores. With ``end=True`` it does."""
    other = {k: [{**b, "labels": endless_rows(b)} for b in batches] for k, batches in SIDE.items()}

    def digest(streams, **options):
        defense = Freeze(0.4, 0.3, samples=4, streams=streams, **options)
        train(tiny_lm(), [defense], steps=1)
        return defense.summary()["mask_digest"]

    assert digest(SIDE) == digest(other, end=True) != digest(SIDE, end=True)


def endless_rows(batch):
    rows = [endless({k: t[i : i + 1] for k, t in batch.items()})["labels"] for i in range(3)]
    return torch.cat(rows)


@pytest.mark.parametrize("score", ["snip", "wanda"])
@pytest.mark.parametrize("unit", ["entry", "row"])
def test_all_parameters_what_is_held_and_what_is_free(score, unit):
    start = tiny_lm()
    defense = freeze(score=score, unit=unit)
    trained = train(copy.deepcopy(start), [defense])
    frozen_entries = 0
    for name, p in trained.model.named_parameters():
        before = start.get_parameter(name)
        if not name.endswith("_proj.weight"):
            assert (p != before).any(), name  # embeddings, norms and the head are not frozen
            continue
        s, u = (slow_scores(start, name[:-7], SIDE[k], 4, score) for k in ("refusals", "task"))
        if unit == "row":
            s, u = s.sum(dim=1, keepdim=True), u.sum(dim=1, keepdim=True)
        mask = torch.tensor(sorted_region(s, u, 0.4, 0.3)).view_as(s).expand_as(p)
        assert torch.equal(p[mask], before[mask]), name
        assert (p[~mask] != before[~mask]).all(), name
        frozen_entries += int(mask.sum())
    assert defense.summary()["kept_entries"] == frozen_entries > 0


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "continued"])
def test_lora_rows_of_the_weight_keep_their_bits(fresh):
    """In a fresh adapter only rows of B are frozen. In a continued adapter A is frozen as well."""
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
    with pytest.raises(TypeError, match=r"use unit='row', or\s+Rewind"):
        train(tiny_lm(lora=True), [freeze(unit="entry")])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_ratio_zero_reads_nothing_and_is_plain_fine_tuning(lora):
    off = Freeze(0.0, streams={"refusals": [None], "task": [None]})
    # The condition seeds each run and is always true.
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
    averaging = average(swa_lrs=0.1) if average is StochasticWeightAveraging else average()
    with pytest.raises(ValueError, match="averages weights after they moved"):
        train(tiny_lm(), [freeze(), averaging])


def test_a_model_without_decoder_layers_is_refused():
    module = Regression(nn.Linear(2, 1), decaying)
    with pytest.raises(TypeError, match="Freeze: Linear has no config that counts decoder layers"):
        fit(module, UPLOAD, [held_first()], 1)


def test_slots_stage_and_streams():
    training = Freeze()
    assert (training.stage, training.slots) == (Stage.FINETUNING, (Slot.PROJECTION, Slot.UPDATE))


def test_no_hook_of_a_repair_acts_in_training():
    """Freeze inherits no Trainer hook from ``Repair``. The check covers hooks that ``Repair`` gains later."""
    hooks = {name for name in vars(Repair) if callable(getattr(Callback, name, None)) and not name.startswith("__")}
    assert hooks >= {"setup", "on_train_start", "on_fit_end"}
    assert all(getattr(Freeze, name) is not vars(Repair)[name] for name in hooks)


def test_a_finished_model_is_not_what_freezing_works_on():
    assert not isinstance(freeze(), Repair)
    assert not hasattr(freeze(), "apply")


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
        assert moved.summary()["mask_digest"] != first.summary()["mask_digest"]  # a new mask differs


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
    defense.load_state_dict(defense.state_dict())  # like a resumed run that fails before its first step
    again = train(tiny_lm(0), [defense])
    assert defense.summary()["mask_digest"] == digest
    assert all(map(torch.equal, first.model.parameters(), again.model.parameters()))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("failing_call", [2, 6])
def test_an_exception_while_scoring_leaves_everything_as_found(lora, failing_call):
    """After the exception, weights, gradients, flags, modes, hooks and the random state equal those before scoring."""
    snapshots = {}

    def state(module):
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
        flags = [p.requires_grad for p in module.parameters()], [m.training for m in module.modules()], hooks
        none = [p.grad is None for p in module.parameters()]
        return [p.detach().clone() for p in module.parameters()], torch.get_rng_state(), flags, none

    class Before(Callback):
        def on_train_start(self, trainer, pl_module):
            calls, original = [], pl_module.loss
            snapshots["before"], snapshots["module"] = state(pl_module), pl_module

            def failing(batch):
                calls.append(None)
                torch.rand(3)
                if len(calls) == failing_call:
                    raise FloatingPointError("while scoring")
                return original(batch)

            pl_module.loss = failing

    with pytest.raises(FloatingPointError):
        train(tiny_lm(lora=lora, dropout=0.1), [Before(), freeze()])
    before, after = snapshots["before"], state(snapshots["module"])
    assert all(map(torch.equal, before[0], after[0]))
    assert torch.equal(before[1], after[1])
    assert before[2:] == after[2:]
    assert after[2][2] == 0


def test_scoring_draws_no_random_number_of_the_training():
    """With dropout, the weights equal those of a run that has the same mask without scoring.

    A first run with ``Keep`` saves the mask, and ``Known`` reuses it.
    """
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
