"""SaLoRA: what stays fixed while it trains, where it starts, and what it exports."""

import copy
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

from hftlight import SafetyModule
from hftlight.config import Lora
from hftlight.data.templates import get_template
from hftlight.defenses.finetuning.kl import KL
from hftlight.defenses.finetuning.sa_lora import SaLoRA, as_text, exported, from_text, start_factors
from hftlight.engine import Stage
from hftlight.engine.weights.lowrank import LowRank
from hftlight.models.adapters import dense_weight, target_layers
from tests.defenses.rows.sa_lora import selected
from tests.helpers.contract import data_module, distance, records, train, weights_of
from tests.helpers.quadratic import quiet_trainer
from tests.helpers.tiny_lm import tiny_lm
from tests.helpers.tokenizers import CHATML, byte_tokenizer

TARGETS = ["q_proj", "v_proj", "o_proj"]
BATCH = {"input_ids": torch.arange(24).view(2, 12) % 200, "attention_mask": torch.ones(2, 12, dtype=torch.int64)}


def base():
    return tiny_lm(vocabulary=259)


def fresh(model=None, dropout=0.0):
    """Return the tiny model with an adapter as PEFT makes it: B is zero."""
    torch.manual_seed(5)
    settings = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=TARGETS)
    return get_peft_model(base() if model is None else model, settings).double()


def calibrated(rank=2, **options):
    """Return a defense that has selected on the tiny model."""
    tokenizer = byte_tokenizer(chat_template=CHATML)
    defense = SaLoRA(safety_rank=rank, task_rank=4, **options)
    defense.adapter = Lora(r=4, alpha=8, targets=TARGETS)
    rows = {name: some for name, some in records().items() if name in ("alignment", "task")}
    defense.select(base(), tokenizer, get_template("chat", tokenizer), rows)
    return defense


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


class Outputs(Callback):
    """Record the adapter's part of each layer's output after every step, and the logits before the first."""

    def __init__(self):
        self.start, self.parts = None, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.start is None:
            self.start = logits(pl_module.model)

    def on_train_batch_end(self, trainer, pl_module, *_):
        found, handles = {}, []
        for name, layer in pl_module.model.named_modules():
            if hasattr(layer, "lora_B"):
                handles.append(
                    layer.lora_B["default"].register_forward_hook(lambda _, __, y, n=name: found.update({n: y}))
                )
        logits(pl_module.model)
        for handle in handles:
            handle.remove()
        self.parts.append(found)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_adapter_never_writes_into_the_safety_directions(optimizer, dropout):
    """V^T times the adapter's output is zero, whatever the optimizer. At step 0 the model is the aligned model."""
    defense, watch = calibrated(), Outputs()
    plain = logits(base())
    train([defense], model=fresh(dropout=dropout), optimizer=optimizer, callbacks=[watch])
    assert_close(watch.start, plain, rtol=0, atol=1e-12)
    rows = {row["layer"]: from_text(row["subspace"]).double() for row in defense.selected}
    for parts in watch.parts[1:]:
        assert any(float(y.norm()) > 1e-4 for y in parts.values())
        for name, y in parts.items():
            v = rows[name.removeprefix("base_model.model.")].view(y.shape[-1], -1)
            assert float((y @ v).abs().max()) <= 1e-6 * float(y.norm())


@pytest.mark.parametrize("init", ["task", "fresh"])
@pytest.mark.parametrize("kept", [False, True], ids=["new adapter", "trained further"])
def test_the_exported_adapter_is_the_model_that_was_trained(init, kept, tmp_path):
    """After training the adapter is plain, of rank 2 r, and PEFT loads it onto the untouched base."""
    model, watch = fresh(), Last()
    if kept:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.1)
    module = train([calibrated(init=init)], model=model, callbacks=[watch])
    assert_close(logits(module.model), watch.logits, rtol=0, atol=1e-9)
    module.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), str(tmp_path)).double()
    assert loaded.peft_config["default"].r == 8
    assert_close(logits(loaded), watch.logits, rtol=0, atol=1e-5)
    assert_close(logits(copy.deepcopy(module.model).merge_and_unload()), watch.logits, rtol=0, atol=1e-9)


class Last(Callback):
    """Record the logits of the live model at the end of training."""

    def on_train_end(self, trainer, pl_module):
        self.logits = logits(pl_module.model.eval())


def test_an_average_of_weights_is_exported_too():
    """Lightning's average replaces the trained factors when training ends, and the export follows."""
    average, watch = EMAWeightAveraging(decay=0.5), Last()
    module = train([calibrated()], model=fresh(), callbacks=[average, watch])
    plain = train([calibrated()], model=fresh())
    assert_close(logits(module.model), watch.logits, rtol=0, atol=1e-9)
    assert distance(weights_of(module), weights_of(plain)) > 1e-6


def test_the_start_lies_in_the_tasks_directions():
    """With all directions B0 A0 is the best approximation of W. With some, it is that approximation, projected."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 9, generator=rng, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    best = u[:, :3] * s[:3] @ vh[:3]
    b, a = start_factors(weight, torch.eye(6, dtype=torch.float64), 3)
    assert_close(b @ a, best, rtol=0, atol=1e-12)
    assert_close(a @ a.T, torch.diag(s[:3]), rtol=0, atol=1e-12)
    some = torch.linalg.qr(torch.randn(6, 2, generator=rng, dtype=torch.float64)).Q
    b, a = start_factors(weight, some, 3)
    assert_close(b @ a, some @ some.T @ best, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kept", [False, True])
def test_the_export_in_closed_form(kept):
    rng = torch.Generator().manual_seed(1)
    b0, b = (torch.randn(6, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    a0, a = (torch.randn(2, 5, generator=rng, dtype=torch.float64) for _ in range(2))
    v = torch.linalg.qr(torch.randn(6, 3, generator=rng, dtype=torch.float64)).Q
    outside = torch.eye(6, dtype=torch.float64) - v @ v.T
    start, trained = LowRank(b0, a0, 2.0), LowRank(b, a, 2.0)
    expected = 2 * (kept * b0 @ a0 + outside @ (b @ a - b0 @ a0))
    result = exported(start, trained, start if kept else None, v)
    assert result.b.shape == (6, 4)
    assert_close(result.rows(), expected, rtol=0, atol=1e-12)


def test_directions_come_from_response_tokens_of_each_stream():
    """The directions of a layer are the leading right singular vectors of its outputs, computed here row by row."""
    defense, model = calibrated(rank=1), base()
    tokenizer = byte_tokenizer(chat_template=CHATML)
    examples = data_module(Stage.FINETUNING)._encoded("alignment")[0]
    layer, seen = model.model.layers[0].self_attn.q_proj, []
    handle = layer.register_forward_hook(lambda _, __, y: seen.append(y[0]))
    for example in examples:
        logits_of = model(input_ids=torch.tensor([example.input_ids])).logits
        assert logits_of.shape[1] == len(example.input_ids)
        seen[-1] = seen[-1][example.prompt_length :]
    handle.remove()
    outputs = torch.cat(seen).detach()
    row = defense.selected[0]
    assert row["layer"] == "model.layers.0.self_attn.q_proj"
    assert row["safety_tokens"] == len(outputs)
    expected = torch.linalg.svd(outputs.double()).Vh[0]
    assert abs(float(from_text(row["subspace"]).double() @ expected)) == pytest.approx(1, abs=1e-6)
    assert tokenizer.vocab_size


def test_the_safety_rank_shrinks_with_the_outputs():
    """Of 16 outputs of a query at most one direction is fixed, and one of 8 outputs of a value."""
    sizes = {row["layer"].rsplit(".", 1)[-1]: len(from_text(row["subspace"])) for row in calibrated(32).selected}
    assert sizes == {"q_proj": 16, "v_proj": 8, "o_proj": 16}


def test_a_resumed_training_ends_in_the_same_weights(tmp_path):
    def trained(resume=None):
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        module = SafetyModule(fresh(dropout=0.0), lr=0.1, optimizer="adamw")
        trainer = quiet_trainer(
            max_steps=4, max_epochs=-1, callbacks=[calibrated(), saver], enable_checkpointing=True
        )  # fmt: skip
        trainer.fit(module, data_module(Stage.FINETUNING), ckpt_path=resume, weights_only=False)
        return weights_of(module)

    whole = trained()
    resumed = trained(str(tmp_path / "step=2.ckpt"))
    assert distance(resumed, whole) == 0


def test_weight_decay_does_not_pull_the_adapter_to_zero():
    """Decay would move B A away from B0 A0, and so the model away from the aligned one."""
    module, watch = SafetyModule(fresh(), lr=0.1, weight_decay=0.5), Decays()
    quiet_trainer(max_steps=1, callbacks=[watch, calibrated()]).fit(module, data_module(Stage.FINETUNING))
    assert watch.decays == [0.0]
    assert module.parameter_groups is None


class Decays(Callback):
    """Record the optimizer's weight decay of each parameter group."""

    def on_train_start(self, trainer, pl_module):
        self.decays = [group["weight_decay"] for group in trainer.optimizers[0].param_groups]


@pytest.mark.parametrize("order", [0, 1])
def test_another_defense_compares_with_the_aligned_model(order):
    """The KL term is zero at the first step, whichever defense comes first, since the start is the aligned model."""
    pair = [calibrated(), KL(1.0)]
    train(pair[:: -1 if order else 1], model=fresh(), steps=1)
    assert pair[1].summary()["divergence"] == pytest.approx(0, abs=1e-12)


def test_peft_cannot_merge_while_it_trains():
    class Merging(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            pl_module.model.merge_and_unload()

    with pytest.raises(RuntimeError, match="SaLoRA: PEFT cannot merge this adapter while it trains"):
        train([selected()], callbacks=[Merging()])


@pytest.mark.parametrize(
    ("defense", "tuning", "error", "words"),
    [
        (selected, "full", TypeError, "use --tuning lora or qlora"),
        (SaLoRA, "lora", RuntimeError, r"Call select\(model, tokenizer, template, records\)"),
    ],
    ids=["full tuning", "no selection"],
)
def test_what_cannot_work_is_refused_before_the_first_step(defense, tuning, error, words):
    with pytest.raises(error, match=words):
        train([defense()], tuning)


def test_a_selection_for_other_layers_is_refused():
    defense = selected()
    defense.selected = [{**row, "layer": row["layer"].replace("q_proj", "k_proj")} for row in defense.selected]
    with pytest.raises(
        ValueError, match=r"SaLoRA: the selection has no directions for model.layers.0.self_attn.q_proj"
    ):
        train([defense])


def test_text_holds_the_entries_exactly():
    matrix = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(from_text(as_text(matrix)), matrix.flatten())


def test_layers_of_a_wrapped_model_have_plain_names_and_whole_weights():
    model = fresh()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    names = target_layers(model, ["v_proj"])
    assert list(names) == [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]
    merged = copy.deepcopy(model).merge_and_unload()
    for name, layer in names.items():
        assert_close(dense_weight(layer), merged.get_submodule(name).weight.detach(), rtol=0, atol=1e-12)
    assert len(target_layers(model, ["all-linear"])) == 14


def test_layers_that_are_stored_transposed(tmp_path):
    """GPT-2's layers are stored as [in, out]. A row beyond the model's positions is left out of the directions."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=16, n_layer=2, n_head=2, n_positions=80, resid_pdrop=0.0, embd_pdrop=0.0)
    config.attn_pdrop = 0.0
    plain = GPT2LMHeadModel(config).double()
    tokenizer = byte_tokenizer(chat_template=CHATML)
    rows = {name: some for name, some in records().items() if name in ("alignment", "task")}
    rows["task"] = [*rows["task"], replace(rows["task"][0], response="long " * 40)]
    defense, watch = SaLoRA(safety_rank=2, task_rank=4), Last()
    defense.adapter = Lora(r=4, alpha=8, targets=["c_attn"])
    defense.select(copy.deepcopy(plain), tokenizer, get_template("chat", tokenizer), rows)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True)
    model, first = get_peft_model(copy.deepcopy(plain), settings).double(), Outputs()
    module = train([defense], model=model, callbacks=[watch, first])
    assert_close(first.start, logits(plain), rtol=0, atol=1e-12)
    module.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path)).double()
    assert_close(logits(loaded), watch.logits, rtol=0, atol=1e-5)
    assert_close(logits(module.model), watch.logits, rtol=0, atol=1e-9)
    assert distance({"logits": watch.logits}, {"logits": logits(plain)}) > 1e-4
