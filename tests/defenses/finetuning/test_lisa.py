"""Lisa on quadratics with a known fixed point and first ten steps, and on a random language model."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from hftlight import SafetyModule
from hftlight.defenses.finetuning.l2_sp import L2SP
from hftlight.defenses.finetuning.lisa import Lisa, fitted, update_pull
from hftlight.engine import Defense, Slot, Stage
from tests.defenses.rows.lisa import PHASES, RHO, SlowLisa
from tests.helpers.contract import LR, data_module, distance, model_of, records, train, weights_of
from tests.helpers.quadratic import OneBatch, Quadratic, quiet_trainer
from tests.helpers.tiny_lm import tiny_lm, token_batch

ONE = torch.ones(2, dtype=torch.float64)


class Quadratics(Quadratic):
    """Loss ``c / 2 |w - m|^2`` of a batch ``{"c": c, "m": m}``."""

    def loss(self, batch):
        return super().loss((batch["c"] * torch.eye(2, dtype=torch.float64), batch["m"] * ONE))


def batch(curvature, centre):
    return {"c": torch.tensor(curvature), "m": torch.tensor(centre)}


class Watch(Callback):
    """Record the first weight and its anchor after each optimizer step."""

    def __init__(self, lisa):
        self.lisa, self.weights, self.anchors = lisa, [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step > len(self.weights):
            self.weights.append(pl_module.w[0])
            self.anchors.append(self.lisa._anchor["first"][0].clone())


def alternate(lisa, task, start, lr, steps, micro_batches=1, **options):
    watch = Watch(lisa)
    loader = DataLoader(OneBatch(task, steps * micro_batches), batch_size=None)
    quiet_trainer(max_steps=steps, accumulate_grad_batches=micro_batches, callbacks=[lisa, watch], **options).fit(
        Quadratics(start * ONE, lr), loader
    )
    return watch


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_first_ten_steps(micro_batches):
    """The phases are A A F F F A A F F F. The pull is off in steps 0 and 1.

    Steps count optimizer steps, not micro-batches.
    """
    lisa = Lisa(2, 3, proximal=1.0, quiet=0.1, cycles=0, streams={"alignment": [batch(1.0, 0.0)]})
    watch = alternate(lisa, batch(1.0, 2.0), 1.0, 0.1, 10, micro_batches)
    weights = [0.9, 0.81, 0.929, 1.0242, 1.10036, 0.990324, 0.902295, 1.012066, 1.099882, 1.170135]
    anchors = [1.0, 1.0, 0.81, 0.81, 0.81, 1.10036, 1.10036, 0.902295, 0.902295, 0.902295]
    assert_close(torch.stack(watch.weights), torch.tensor(weights, dtype=torch.float64), rtol=0, atol=5.1e-7)
    assert_close(torch.stack(watch.anchors), torch.tensor(anchors, dtype=torch.float64), rtol=0, atol=5.1e-7)
    trace = lisa.summary()
    assert (trace["calls"], trace["alignment_steps"], trace["switches"], trace["pulls"]) == (10, 4, 3, 8)
    drift = 2**0.5 * (abs(0.81 - 1.0) + abs(1.10036 - 0.81) + abs(0.902295 - 1.10036))
    assert trace["drift"] == pytest.approx(drift, abs=2e-6)
    assert lisa.manifest()["phases"] == [2, 3]


@pytest.mark.parametrize(
    ("proximal", "align_steps", "cycles", "fixed"),
    [(1.0, 25, 12, (0.857143, 1.714286)), (10.0, 10, 50, (1.395349, 1.534884))],
    ids=["rho 1", "rho 10"],
)
def test_the_fixed_point(proximal, align_steps, cycles, fixed):
    """Alignment loss f = w^2 / 2, task loss h = 3 (w - 2)^2 / 2.

    Each phase solves its problem exactly, so the two phases end in two known points around 1.5.
    """
    lisa = Lisa(align_steps, 1, proximal, quiet=0.0, cycles=0, streams={"alignment": [batch(1.0, 0.0)]})
    watch = alternate(lisa, batch(3.0, 2.0), 0.3, 1 / (3.0 + proximal), (align_steps + 1) * cycles)
    assert [float(watch.anchors[-1]), float(watch.weights[-1])] == pytest.approx(fixed, abs=1e-6)


def test_the_quiet_period_is_measured_on_the_whole_run():
    lisa = Lisa(1, 1, proximal=1.0, quiet=0.5, cycles=0, streams={"alignment": [batch(1.0, 0.0)]})
    alternate(lisa, batch(1.0, 2.0), 1.0, 0.1, 10)
    assert lisa.summary()["pulls"] == 4  # steps 6 to 9
    assert lisa.manifest()["quiet_steps"] == 5


def scaled(init_scale=1024.0):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale))


def test_a_loss_scale_does_not_scale_the_pull():
    def ten(**options):
        lisa = Lisa(2, 3, proximal=1.0, quiet=0.1, cycles=0, streams={"alignment": [batch(1.0, 0.0)]})
        return torch.stack(alternate(lisa, batch(1.0, 2.0), 1.0, 0.1, 10, micro_batches=2, **options).weights)

    assert_close(ten(plugins=[scaled()]), ten(), rtol=0, atol=1e-12)


def test_a_step_that_the_loss_scaler_skips_shifts_no_phase():
    """The last alignment step overflows. The weights stay, and the next step still trains on the user's batch."""
    safe = [batch(1.0, 0.0), batch(float("inf"), 0.0)]
    lisa = Lisa(2, 3, proximal=1.0, quiet=0.0, cycles=0, streams={"alignment": safe})
    watch = alternate(lisa, batch(1.0, 2.0), 1.0, 0.1, 4, plugins=[scaled()])
    assert_close(torch.stack(watch.weights).tolist(), [0.9, 0.9, 1.01, 1.098], rtol=0, atol=1e-12)
    assert watch.anchors[-1] == pytest.approx(0.9)


def test_the_length_of_a_run_without_max_steps():
    lisa = Lisa(1, 1, proximal=1.0, quiet=0.5, cycles=0, streams={"alignment": [batch(1.0, 0.0)]})
    loader = DataLoader(OneBatch(batch(1.0, 2.0), 8), batch_size=None)
    trainer = quiet_trainer(max_epochs=3, accumulate_grad_batches=2, callbacks=[lisa])
    trainer.fit(Quadratics(ONE, 0.1), loader)
    assert lisa.manifest()["quiet_steps"] == 6


def test_without_pull_it_is_plain_alternation_bitwise():
    """Bi-state optimization equals plain training on the batches in hand-written order, with dropout and AdamW."""
    safe, task = [token_batch(100 + k) for k in range(4)], [token_batch(k) for k in range(10)]
    by_hand = [safe[0], safe[1], *task[2:5], safe[2], safe[3], *task[7:]]
    results = []
    for rows, defenses in ((task, [Lisa(2, 3, 0.0, cycles=0, streams={"alignment": safe})]), (by_hand, [])):
        module = SafetyModule(tiny_lm(lora=True, dropout=0.2), lr=0.01)
        torch.manual_seed(1)
        quiet_trainer(max_steps=10, callbacks=defenses).fit(module, DataLoader(rows, batch_size=None))
        results.append(weights_of(module))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[1])


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_without_alignment_steps_it_is_a_pull_to_the_aligned_model_bitwise(tuning):
    options = {"optimizer": "adamw", "lr": 0.01, "stage": Stage.FINETUNING}
    pulled = weights_of(train([Lisa(0, 900, proximal=0.7, quiet=0.0)], tuning, **options))
    expected = weights_of(train([L2SP(0.35)], tuning, **options))
    assert all(torch.equal(pulled[name], expected[name]) for name in expected)


def test_without_alignment_steps_no_alignment_data_is_asked_for():
    rows = {name: r for name, r in records().items() if name != "alignment"}
    module = SafetyModule(model_of("lora"), lr=LR, optimizer="sgd")
    lisa = Lisa(0, 900)
    data = data_module(Stage.FINETUNING, alignment=rows["task"])
    del data._given["alignment"]
    quiet_trainer(max_steps=2, max_epochs=-1, callbacks=[lisa]).fit(module, data)
    assert lisa.summary()["calls"] == 2
    with pytest.raises(ValueError, match="Lisa: stream 'alignment' is missing"):
        quiet_trainer(max_steps=2, max_epochs=-1, callbacks=[Lisa()]).fit(module, data)


def test_the_pull_on_the_product_is_the_gradient_of_the_dense_distance():
    generator = torch.Generator().manual_seed(0)
    b, b0 = (torch.randn(7, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    a, a0 = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    leaves = [b.clone().requires_grad_(), a.clone().requires_grad_()]
    expected = torch.autograd.grad(0.9 / 2 * ((leaves[0] @ leaves[1] - b0 @ a0) ** 2).sum(), leaves)
    assert_close(update_pull(b, a, b0, a0, 0.9), expected, rtol=0, atol=1e-12)
    for pull in update_pull(3 * b0, a0 / 3, b0, a0, 0.9):  # the same product
        assert pull.abs().max() < 1e-12


class SlowDelta(SlowLisa):
    """The distance between dense products B A, with the adapter's scale of 8 / 4.

    Weights outside the adapter enter with their plain distance.
    """

    def edit(self, step, grads):
        super().edit(step, grads)  # updates the anchors
        other = self.end_of["task" if PHASES[step] == "alignment" else "alignment"]
        now = {name: (p, anchor) for (name, p), anchor in zip(self.weights, other, strict=True)}
        total = 0
        for name, (p, anchor) in now.items():
            if "lora_A" in name:
                b, anchor_b = now[name.replace("lora_A", "lora_B")]
                total = total + ((2 * b @ p - 2 * anchor_b @ anchor) ** 2).sum()
            elif "lora_B" not in name:
                total = total + ((p - anchor) ** 2).sum()
        return [g + extra for g, extra in zip(grads, self.gradient_of(RHO / 2 * total), strict=True)]


@pytest.mark.parametrize("head", [False, True], ids=["adapter", "adapter and head"])
def test_delta_space_equals_a_slow_loop_on_dense_products(head):
    def model():
        adapted = model_of("lora")
        adapted.get_output_embeddings().weight.requires_grad_(head)
        return adapted

    fast = weights_of(train([Lisa(1, 2, RHO, quiet=0.0, cycles=0, space="delta")], model=model(), accumulate=2))
    assert distance(fast, SlowDelta(model(), Stage.FINETUNING, accumulate=2).run()) <= 1e-10
    factors = weights_of(train([Lisa(1, 2, RHO, quiet=0.0, cycles=0)], model=model(), accumulate=2))
    assert distance(fast, factors) > 1e-6


class Ids(Callback):
    """Record the row ids of every optimizer step."""

    def __init__(self):
        self.steps = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.steps.setdefault(trainer.global_step, []).extend(batch["id"])


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("mode", ["drop", "pause"])
def test_the_users_rows_are_lost_or_wait(mode, accumulate):
    """Of nine steps in phases of 1 and 2, six train on the user's rows.

    ``pause`` reads them without a gap. ``drop`` skips the batches that fall on alignment steps.
    """
    recorder, expected = Ids(), []
    train([Lisa(1, 2, cycles=0, mode=mode)], accumulate=accumulate, steps=9, callbacks=[recorder])
    rows = {name: [r.id for r in rows] for name, rows in records().items()}
    used = {"alignment": 0, "task": 0}
    # A window is 8 rows. In mode ``drop`` the task stream advances in alignment steps as well.
    for step in range(9):
        name = "task" if step % 3 else "alignment"
        window = step if name == "task" and mode == "drop" else used[name]
        expected.append([rows[name][(8 * window + k) % 16] for k in range(8)])
        used[name] += 1
    assert [recorder.steps[step] for step in range(9)] == expected
    assert used["task"] / 9 == 2 / (1 + 2)


def resumable(lisa, folder, accumulate, resume=None, steps=8):
    module = SafetyModule(model_of("lora"), lr=0.01)
    checkpoints = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False)
    trainer = quiet_trainer(
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        enable_checkpointing=True,
        callbacks=[lisa, checkpoints],
    )
    trainer.fit(module, data_module(Stage.FINETUNING, accumulate), ckpt_path=resume)
    return weights_of(module)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("mode", "space"), [("drop", "factors"), ("pause", "delta")])
def test_resumed_after_any_step_equals_uninterrupted(mode, space, accumulate, tmp_path):
    def make():
        return Lisa(2, 3, proximal=0.5, quiet=0.2, cycles=0, mode=mode, space=space)

    whole = make()
    expected = resumable(whole, tmp_path / "whole", accumulate)
    for step in range(1, 8):
        again = make()
        path = tmp_path / "whole" / f"step={step}.ckpt"
        resumed = resumable(again, tmp_path / f"from {step}", accumulate, path)
        assert all(torch.equal(resumed[name], expected[name]) for name in expected), step
        assert again.summary() == whole.summary(), step


def test_resumed_with_exchanged_batches(tmp_path):
    """Without a StreamsDataModule the callback keeps its own position in the alignment stream."""
    safe = [batch(1.0, 0.1 * k) for k in range(7)]

    def run(folder, resume=None):
        lisa = Lisa(2, 1, proximal=0.5, quiet=0.0, cycles=0, streams={"alignment": safe})
        checkpoints = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
        model = Quadratics(ONE, 0.1)
        trainer = quiet_trainer(
            max_steps=9, accumulate_grad_batches=2, enable_checkpointing=True, callbacks=[lisa, checkpoints]
        )
        trainer.fit(model, DataLoader(OneBatch(batch(3.0, 2.0), 18), batch_size=None), ckpt_path=resume)
        return model.w

    expected = run(tmp_path / "whole")
    for step in range(1, 9):
        assert torch.equal(run(tmp_path / f"from {step}", tmp_path / "whole" / f"step={step}.ckpt"), expected), step


def test_a_resumed_run_keeps_the_phases_it_was_planned_with(tmp_path):
    """Seven additional steps shift neither a phase switch nor the end of the quiet period."""
    resumable(Lisa(), tmp_path / "whole", 1)
    lisa = Lisa()
    resumable(lisa, tmp_path / "more", 1, tmp_path / "whole" / "step=8.ckpt", steps=15)
    assert lisa.manifest()["phases"] == [1, 2]
    assert lisa.manifest()["quiet_steps"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("total", "phases"),
    [(48, (2, 14)), (50, (2, 15)), (2000, (67, 600)), (2997, (100, 899)), (3000, (100, 900)), (20_000, (100, 900))],
)
def test_phases_shrink_to_three_cycles(total, phases):
    assert fitted(100, 900, total, cycles=3) == phases
    assert fitted(100, 900, total, cycles=0) == (100, 900)


def test_shrunk_phases_fill_every_run():
    for total in range(4, 3000, 7):
        align, finetune = fitted(100, 900, total, cycles=3)
        assert min(align, finetune) >= 1
        assert 0 <= 3 * (align + finetune) - total <= 2
    assert fitted(900, 100, 12, cycles=3) == (3, 1)
    assert fitted(0, 900, 12, cycles=3) == (0, 900)
    assert fitted(100, 0, 12, cycles=3) == (100, 0)


def test_the_presets_are_the_published_settings():
    paper, repo, booster = (Lisa(**Lisa.presets[name]) for name in ("paper", "repo", "booster"))
    assert all((d.align_steps, d.finetune_steps, d.cycles) == (100, 900, 0) for d in (paper, repo, booster))
    assert [(d.proximal, d.quiet) for d in (paper, repo, booster)] == [(1.0, 0.0), (1.0, 0.1), (0.01, 0.1)]


def test_exchanged_batches_are_whole_and_the_users_objects_stay():
    """An exchanged batch has the alignment batch's own shape.

    After the step, a batch object that the data set keeps has the user's content again.
    """
    ids_by_step = []

    class Look(SafetyModule):
        def training_step(self, batch, batch_idx):
            ids_by_step.append(batch["input_ids"].clone())
            return super().training_step(batch, batch_idx)

    task = [BatchEncoding(token_batch(k)) for k in range(3)]
    safe = [token_batch(100, rows=2, tokens=7)]
    lisa = Lisa(1, 2, cycles=0, streams={"alignment": safe})
    quiet_trainer(max_steps=6, max_epochs=-1, callbacks=[lisa]).fit(
        Look(tiny_lm(lora=True), lr=LR, optimizer="sgd"),
        DataLoader(task, batch_size=None, collate_fn=lambda encoding: encoding),
    )
    for step, ids in enumerate(ids_by_step):
        assert torch.equal(ids, (safe[0] if step % 3 == 0 else token_batch(step % 3))["input_ids"])
    assert all(torch.equal(encoding["input_ids"], token_batch(k)["input_ids"]) for k, encoding in enumerate(task))


def fails(error, words, callbacks, data=None, module=None, **options):
    module = module or SafetyModule(model_of("lora"), lr=LR, optimizer="sgd")
    with pytest.raises(error, match=words):
        quiet_trainer(**{"max_steps": 4, "max_epochs": -1, **options}, callbacks=callbacks).fit(
            module, data or data_module(Stage.FINETUNING)
        )


def test_what_cannot_work_is_refused_by_name():
    safe, rows = {"alignment": [token_batch(100)]}, DataLoader([token_batch(0)], batch_size=None)
    fails(
        ValueError,
        "Lisa: this list of defenses needs a StreamsDataModule .mode 'pause'",
        [Lisa(mode="pause", streams=safe)],
        rows,
    )
    fails(ValueError, "omit streams", [Lisa(streams=safe)])
    fails(ValueError, "must be 'task', the user's data, got 'alignment'", [Lisa()], data_module(Stage.ALIGNMENT))
    fails(ValueError, "4 steps ends within the first alignment phase of 100 steps", [Lisa(**Lisa.presets["paper"])])
    fails(ValueError, "4 steps ends within the first alignment phase of 4 steps", [Lisa(4, 1, cycles=0)])
    fails(ValueError, "length of the run, which is unknown", [Lisa(1, 1)], max_steps=-1, limit_train_batches=1)
    full = SafetyModule(model_of("full"), lr=LR, optimizer="sgd")
    fails(ValueError, "no plain LoRA adapter", [Lisa(space="delta")], module=full)
    half = SafetyModule(model_of("lora"), lr=LR, optimizer="sgd")
    for name, p in half.named_parameters():
        p.requires_grad_("lora_B" in name)
    fails(ValueError, "both factors of a layer trained", [Lisa(space="delta")], module=half)


def test_batches_that_cannot_be_exchanged_are_refused():
    lisa = Lisa(1, 2, streams={"alignment": [(torch.eye(2), ONE)]})
    loader = DataLoader(OneBatch((torch.eye(2, dtype=torch.float64), ONE), 4), batch_size=None)
    fails(TypeError, "must be a dictionary, got (list|tuple)", [lisa], loader, Quadratic(ONE, 0.1))


def test_a_probe_that_would_read_the_wrong_batch_is_refused():
    class Probe(Defense):
        stage, slots = Stage.FINETUNING, (Slot.FORWARD,)

    lisa = Lisa(1, 2, streams={"alignment": [token_batch(100)]})
    fails(ValueError, "Probe reads a batch before", [lisa, Probe()], DataLoader([token_batch(0)], batch_size=None))
    train([Lisa(1, 2), Probe()])


@pytest.mark.parametrize("off", [False, True])
def test_two_anchors_are_refused(off):
    if off:
        train([Lisa(1, 2, proximal=0.0), L2SP(0.1)])
    else:
        fails(ValueError, "Lisa and L2SP both set the anchor that weights are pulled to", [Lisa(1, 2), L2SP(0.1)])


def test_a_run_that_ends_inside_an_alignment_phase_is_warned_of():
    with pytest.warns(UserWarning, match="4 steps in phases of 1 and 2 end inside an alignment phase"):
        train([Lisa(1, 2, cycles=0)])
