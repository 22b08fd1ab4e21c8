"""SafetyModule: losses on response tokens alone, from logits at these positions alone."""

import copy

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.testing import assert_close
from torch.utils.data import DataLoader

from hftlight import SafetyModule
from hftlight.data.records import Record
from hftlight.data.templates import get_template
from hftlight.defenses import KL, LDIFS, Booster, ConstrainedSFT, Vaccine
from hftlight.engine import count_passes
from hftlight.models.module import cosine_factor
from tests.helpers.contract import FixedOrder, distance, model_of, train, weights_of
from tests.helpers.tiny_lm import VOCABULARY, reference_loss, tiny_lm, token_batch
from tests.helpers.tokenizers import CHATML, byte_tokenizer


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_loss_is_the_mean_over_response_tokens(lora):
    model, batch = tiny_lm(lora=lora), token_batch(1)
    module = SafetyModule(model)
    losses = module.token_losses(batch)
    assert len(losses) == (batch["labels"][:, 1:] != -100).sum()
    assert_close(module.loss(batch), reference_loss(model, batch), rtol=0, atol=1e-12)


def test_logits_are_formed_at_response_positions_only_and_the_hook_comes_off():
    model, batch, shapes = tiny_lm(), token_batch(1), []
    handle = model.lm_head.register_forward_hook(lambda *args: shapes.append(args[2].shape))
    SafetyModule(model).loss(batch)
    handle.remove()
    assert shapes == [((batch["labels"][:, 1:] != -100).sum(), VOCABULARY)]
    assert not model.lm_head._forward_pre_hooks


def test_padding_changes_nothing_whatever_its_id():
    module, batch = SafetyModule(tiny_lm()), token_batch(1)
    wider = {
        "input_ids": torch.cat([batch["input_ids"], torch.full((3, 4), 7)], dim=1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.zeros(3, 4, dtype=torch.long)], dim=1),
        "labels": torch.cat([batch["labels"], torch.full((3, 4), -100)], dim=1),
    }
    assert_close(module.loss(wider), module.loss(batch), rtol=0, atol=1e-12)


def test_a_batch_without_a_label_is_refused():
    batch = token_batch(1)
    batch["labels"][:] = -100
    with pytest.raises(ValueError, match="all labels of a batch of 3 rows are masked"):
        SafetyModule(tiny_lm()).loss(batch)


def test_checkpoints_hold_the_trained_parameters_alone():
    module = SafetyModule(tiny_lm(lora=True))
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"]
    assert all("lora_" in name for name in checkpoint["state_dict"])


def test_the_cosine_schedule_rises_and_falls_to_zero():
    factors = [cosine_factor(step, 10, 0.2) for step in range(11)]
    assert factors[:3] == [0.0, 0.5, 1.0]
    assert factors[-1] == pytest.approx(0.0)
    assert sorted(factors[2:], reverse=True) == factors[2:]


class Rates(Callback):
    """Records the learning rate of every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_a_constant_rate_decays_after_each_pass():
    """Three batches are a pass, so steps 0 to 2 have lr, 3 to 5 have .85 lr, and so on."""
    rates = Rates()
    trainer = Trainer(max_steps=7, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[rates],
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    module = SafetyModule(tiny_lm(), lr=0.1, betas=[0.8, 0.9], decay=0.85)
    trainer.fit(module, DataLoader([token_batch(seed) for seed in range(3)], batch_size=None))
    assert rates.seen == pytest.approx([0.1 * 0.85 ** (step // 3) for step in range(7)])
    assert trainer.optimizers[0].param_groups[0]["betas"] == (0.8, 0.9)
    with pytest.raises(ValueError, match=r"decay must lie in .* got 0.5 and 'cosine'"):
        SafetyModule(tiny_lm(), schedule="cosine", decay=0.5)


def test_rows_and_places_of_response_tokens():
    forward = SafetyModule(tiny_lm()).run(tiny_lm(), batch := token_batch(1))
    expected = [
        (row, place)
        for row, labels in enumerate(batch["labels"].tolist())
        for place in range(sum(label != -100 for label in labels[1:]))
    ]
    assert list(zip(forward.rows.tolist(), forward.places.tolist(), strict=True)) == expected


def moved_lora():
    model = tiny_lm(lora=True, dropout=0.3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.zero_()
    return model


@pytest.mark.parametrize("make", [moved_lora, lambda: tiny_lm(lora=True, dropout=0.3), lambda: tiny_lm(dropout=0.3)])
def test_the_reference_stays_where_training_started(make):
    """A new adapter is disabled, a trained one or a whole model copied. The reference has no dropout or gradient."""
    model, batch = make(), token_batch(2)
    module = SafetyModule(model)
    with torch.no_grad():
        before = module.eval().token_losses(batch)
    reference = module.reference()
    module.train()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.1)
    for _ in range(2):
        with reference.at_work() as aligned:
            losses = module.run(aligned, batch).token_losses
        assert torch.equal(losses, before)
        assert not losses.requires_grad
    assert all(m.training for m in module.modules())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    module.forget_reference()
    assert not any(".aligned." in name for name, _ in model.named_parameters())
    with pytest.raises(AssertionError):
        assert torch.equal(module.eval().token_losses(batch), before)


def test_a_reference_costs_no_second_model_under_lora():
    model = tiny_lm(lora=True)
    module = SafetyModule(model)
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    module.reference()
    assert sum(p.numel() for p in model.parameters()) == count + trained
    assert not module.reference().copies


class Uneven(FixedOrder):
    """Rows whose responses have from one to eight letters."""

    def __init__(self, rows_per_batch, **options):
        tokenizer = byte_tokenizer(chat_template=CHATML)
        rows = [Record(f"ask {i:02d}", "x" * (1 + i % 8), role="task") for i in range(16)]
        super().__init__(tokenizer, get_template("chat", tokenizer), "task", rows_per_batch, task=rows, **options)


def test_window_average_weighs_every_token_of_a_step_alike():
    """Four micro-batches of one row equal one micro-batch of four rows with responses of different lengths."""
    model = model_of("lora")
    whole = [train([], model=copy.deepcopy(model), data=Uneven(4, average=kind)) for kind in ("micro", "window")]
    assert distance(*map(weights_of, whole)) <= 1e-12
    cut = [
        train([], model=copy.deepcopy(model), data=Uneven(1, average=kind), accumulate=4)
        for kind in ("micro", "window")
    ]
    assert distance(weights_of(cut[1]), weights_of(whole[0])) <= 1e-12
    assert distance(weights_of(cut[0]), weights_of(whole[0])) > 1e-6


def test_a_loss_of_ones_own_is_what_trains():
    class Doubled(SafetyModule):
        def loss(self, batch):
            return 2 * super().loss(batch)

    batch = token_batch(1)
    assert_close(Doubled(tiny_lm()).loss(batch), 2 * SafetyModule(tiny_lm()).loss(batch))
    module = Doubled(tiny_lm(), lr=0.1, optimizer="sgd")
    module.log = lambda *args, **kwargs: None
    assert_close(module.training_step(batch, 0), module.loss(batch))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: [Vaccine(0.3), Booster()], (4, 4)),
        (lambda: [KL(1.0), LDIFS(1.0, layers=[1])], (2, 1)),
        (lambda: [KL(1.0), ConstrainedSFT(online=True)], (2, 1)),
        (lambda: [KL(1.0), ConstrainedSFT()], (2, 1)),
        (lambda: [ConstrainedSFT(), KL(1.0)], (2, 1)),
    ],
    ids=["vaccine+booster", "kl+ldifs", "kl+online", "kl+constrained_sft", "constrained_sft+kl"],
)
def test_shared_work_is_done_once(make, expected):
    """Booster adds to Vaccine's second pass. All defenses share one pass of the aligned model."""
    defenses, model, calls = make(), model_of("lora"), [0]
    handle = model.get_input_embeddings().register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    train(defenses, model=model, steps=3)
    handle.remove()
    assert count_passes(defenses) == expected
    assert calls[0] == 3 * expected[0]
