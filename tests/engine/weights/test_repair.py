"""The base of every repair: weights by name and by rows, adapters' factors, one edit, one artifact."""

import copy
import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from hftlight import SafetyModule
from hftlight.defenses import Booster
from hftlight.defenses.post_finetuning import Antidote, SafeLoRA
from hftlight.engine.weights import stored as engine_weights
from hftlight.engine.weights.lora import lora_updates
from hftlight.engine.weights.lowrank import LowRank, combined, reduced
from hftlight.engine.weights.repair import Repair, linear_weights
from hftlight.engine.weights.save import MARKER, repairs_of, save_repaired
from hftlight.engine.weights.stored import (
    Adapted,
    Difference,
    FileWeights,
    ModelWeights,
    displacement,
    plain_name,
    stored,
    stored_updates,
)
from hftlight.engine.weights.subject import Subject
from tests.helpers.quadratic import quiet_trainer
from tests.helpers.repairs import batch_of, moved_model, small_llama, with_update

IDS = torch.tensor([[3, 5, 7, 11, 13, 2]])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


class Half(Repair):
    """Scales the update by ``share``. A share of 1 is neutral."""

    def __init__(self, share=0.5, streams=None, output=None, aligned=None, base=None):
        super().__init__(streams, output, aligned, base)
        self.share = share
        self.seen = []

    @property
    def neutral(self):
        return self.share == 1

    def edit(self, subject):
        self.seen.append(
            (subject.model.training, torch.is_grad_enabled(), [m.training for m in subject.model.modules()])
        )
        changed = 0
        for update in lora_updates(subject.model).values():
            before = update.b.clone()
            update.b.mul_(self.share)
            changed += int((update.b != before).sum())
        subject.report["changed_entries"] = changed


# Low rank and displacement


def test_low_rank_is_the_dense_matrix():
    m = LowRank(normal(9, 3), normal(3, 7, seed=1), 0.5)
    dense = 0.5 * m.b @ m.a
    x, t = normal(4, 2, seed=2), normal(7, 2, seed=3)
    assert m.shape == (9, 7)
    assert_close(m.rows(2, 6), dense[2:6], rtol=0, atol=1e-12)
    assert_close(m.back(x, 5)[0], dense[5:9].T @ x, rtol=0, atol=1e-12)
    assert_close(m.back(x, 5)[1], torch.stack([dense[5:9].square().sum(), torch.zeros(())]), rtol=1e-12, atol=0)
    assert_close(m.forth(t, 2, 6), dense[2:6] @ t, rtol=0, atol=1e-12)
    u, s, vh = m.svd()
    assert_close(u * s @ vh, dense, rtol=0, atol=1e-12)
    assert_close(s, torch.linalg.svdvals(dense)[:3], rtol=0, atol=1e-12)
    wide = LowRank(normal(2, 5), normal(5, 7, seed=1))
    assert_close((lambda u, s, vh: u * s @ vh)(*wide.svd()), wide.b @ wide.a, rtol=0, atol=1e-12)


def test_adapters_are_added_without_cross_terms():
    one, two = (
        LowRank(normal(9, 3), normal(3, 7, seed=1), 0.5),
        LowRank(normal(9, 2, seed=2), normal(2, 7, seed=3), 3.0),
    )
    total = combined([(0.8, one), (-0.2, two)])
    assert total.scale == 1
    assert_close(total.rows(), 0.8 * one.rows() - 0.2 * two.rows(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 5, 9])
def test_a_reduced_sum_is_the_nearest_matrix_of_its_rank(rank):
    """Eckart and Young: the error is the root of the discarded squared singular values, here of a signed sum."""
    one, two = LowRank(normal(9, 3), normal(3, 7, seed=1), 0.5), LowRank(normal(9, 2, seed=2), normal(2, 7, seed=3))
    total = combined([(1.0, one), (-0.4, two)])
    small, left_out = reduced(total, rank)
    s = torch.linalg.svdvals(total.rows())
    assert small.b.shape[1] == min(rank, 5)
    assert_close((small.rows() - total.rows()).square().sum(), s[rank:].square().sum(), rtol=0, atol=1e-12)
    assert_close(left_out, float(s[rank:].square().sum() / s.square().sum()), rtol=0, atol=1e-12)


def test_a_reduction_to_rank_zero_is_refused():
    with pytest.raises(ValueError, match="rank must be >= 1, got 0"):
        reduced(LowRank(normal(4, 2), normal(2, 3)), 0)


def test_a_difference_is_read_by_blocks(monkeypatch, tmp_path):
    monkeypatch.setattr(engine_weights, "BLOCK", 2 * 16)
    base, aligned = small_llama(), moved_model(small_llama(), 0.1, seed=1)
    aligned.save_pretrained(tmp_path / "aligned", max_shard_size="5KB")
    assert (tmp_path / "aligned" / "model.safetensors.index.json").is_file()
    files, name = FileWeights(tmp_path / "aligned"), "model.layers.1.mlp.gate_proj.weight"
    v = displacement(files, ModelWeights.of(base), name)
    dense = aligned.state_dict()[name] - base.state_dict()[name]
    x, t = normal(9, 3), normal(16, 3)
    assert v.shape == (32, 16)
    assert_close(v.back(x, 7)[0], dense[7:16].T @ x, rtol=0, atol=1e-12)
    assert_close(v.back(x, 7)[1][0], dense[7:16].square().sum(), rtol=1e-12, atol=0)
    assert_close(v.forth(t, 7, 12), dense[7:12] @ t, rtol=0, atol=1e-12)
    assert_close(v.forth(t), dense @ t, rtol=0, atol=1e-12)
    nothing, squares = v.back(x[:0], 7)
    assert not nothing.any()
    assert not squares.any()


@pytest.mark.parametrize(
    ("dtype", "size", "relative"),
    [
        (torch.bfloat16, 1e-3, 0.047),
        (torch.bfloat16, 1e-4, 0.46),
        (torch.bfloat16, 3e-5, 1.55),
        (torch.float16, 1e-3, 0.006),
        (torch.float16, 1e-4, 0.059),
    ],
)
def test_the_rounding_noise_of_stored_weights(dtype, size, relative):
    """Known digits for weights of rms 0.02. Far below the rounding step, the estimate is an upper bound."""
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(512, 512, generator=generator)
    moved = size * torch.randn(512, 512, generator=generator)
    pair = [ModelWeights({"w": w.to(dtype)}) for w in (base + moved, base)]
    squares = Difference(*pair, "w").back(torch.ones(512, 1))[1]
    estimated = float(squares[1].sqrt() / moved.norm())
    real = float(((base + moved).to(dtype).float() - base.to(dtype).float() - moved).norm() / moved.norm())
    assert estimated == pytest.approx(relative, rel=0.05)
    if size > 1e-4:
        assert real == pytest.approx(estimated, rel=0.05)


def test_displacement_is_thin_where_that_is_known():
    base = ModelWeights({"w": normal(6, 5), "x": normal(6, 5, seed=9)})
    one, two = LowRank(normal(6, 2), normal(2, 5, seed=1)), LowRank(normal(6, 1, seed=2), normal(1, 5, seed=3), 2.0)
    assert displacement(Adapted(base, {"w": one}), base, "w") is one
    assert displacement(Adapted(base, {"w": one}), base, "x") is None
    both = displacement(Adapted(base, {"w": one}), Adapted(base, {"w": two}), "w")
    assert_close(both.rows(), one.rows() - two.rows(), rtol=0, atol=1e-12)
    other = ModelWeights({"w": normal(6, 5, seed=4)})
    v = displacement(Adapted(base, {"w": one}), other, "w")
    expected = base.parameters["w"] + one.rows() - other.parameters["w"]
    assert_close(v.forth(torch.eye(5, dtype=torch.float64)), expected, rtol=0, atol=1e-12)
    for wrong in (ModelWeights({}), ModelWeights({"w": normal(6, 4)}), ModelWeights({"w": torch.ones(6, 5).int()})):
        with pytest.raises(ValueError, match="one shape"):
            displacement(base, wrong, "w")
    with pytest.raises(RuntimeError, match="needs the aligned and the base"):
        Subject(torch.nn.Module(), base).alignment("w")


# Folders


def test_stored_adapters_carry_their_own_scale(tmp_path):
    base = small_llama()
    base.save_pretrained(tmp_path / "base")
    settings = {"alpha_pattern": {"v_proj": 3}, "rank_pattern": {"o_proj": 2}, "use_rslora": True}
    model = with_update(base, **settings)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    updates = stored_updates(tmp_path / "adapter")
    live = lora_updates(model)
    assert updates.keys() == live.keys()
    for name, update in live.items():
        assert updates[name].scale == pytest.approx(update.scale)
        assert torch.equal(updates[name].b, update.b)
    weights = stored(tmp_path / "adapter")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    assert weights.under == stored(tmp_path / "base") == stored(tmp_path / "link")
    merged = model.merge_and_unload().state_dict()
    for name in ("model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.gate_proj.weight", "model.norm.weight"):
        assert_close(weights.rows(name), merged[name], rtol=0, atol=1e-12)
    assert weights.shape("nothing") is None


def test_odd_adapters_and_folders_without_safetensors_are_refused(tmp_path):
    with_update(small_llama(), use_dora=True).save_pretrained(tmp_path / "dora")
    with_update(small_llama(), modules_to_save=["lm_head"]).save_pretrained(tmp_path / "head")
    for kind, text in (("dora", "DoRA"), ("head", "lm_head")):
        with pytest.raises(ValueError, match=text):
            stored_updates(tmp_path / kind)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="safetensors files only"):
        FileWeights(tmp_path / "empty")


def test_files_that_leave_the_prefix_out(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    model.transformer.save_pretrained(tmp_path / "inner")
    name = "transformer.h.0.attn.c_attn.weight"
    assert torch.equal(FileWeights(tmp_path / "inner").rows(name, 2, 5), model.state_dict()[name][2:5])


def test_plain_names():
    wrapped = "base_model.model.model.layers.0._fsdp_wrapped_module.self_attn._orig_mod.q_proj.base_layer.weight"
    assert plain_name(wrapped) == "model.layers.0.self_attn.q_proj.weight"
    assert plain_name("model.layers.0._checkpoint_wrapped_module.mlp") == "model.layers.0.mlp"


# Adapters


def test_updates_are_what_the_adapter_adds():
    base = small_llama(bias=True)
    model = with_update(copy.deepcopy(base), use_rslora=True, r=16)
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    updates = lora_updates(model)
    assert len(updates) == 10
    for name, update in updates.items():
        assert_close(base.state_dict()[name] + update.factors().rows(), merged[name], rtol=0, atol=1e-12)
        assert torch.equal(update.weight, base.state_dict()[name])
    model = with_update(small_llama(), seed=1)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj"]))
    assert len(lora_updates(model)) == 10
    model.set_adapter("other")
    assert list(lora_updates(model)) == [f"model.layers.{i}.self_attn.k_proj.weight" for i in range(2)]


def merged_model():
    model = with_update(small_llama())
    model.merge_adapter()
    return model


def two_active():
    model = with_update(small_llama())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    return model


def switched_off():
    model = with_update(small_llama())
    model.base_model.disable_adapter_layers()
    return model


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: with_update(small_llama(), use_dora=True), "variant|DoRA"),
        (lambda: with_update(small_llama(), modules_to_save=["lm_head"]), "modules_to_save"),
        (lambda: with_update(small_llama(), target_modules=["q_proj", "embed_tokens"]), "not a linear layer"),
        (lambda: with_update(small_llama(), lora_bias=True), "has a bias"),
        (lambda: get_peft_model(small_llama(), IA3Config(task_type="CAUSAL_LM")), "its adapter is"),
        (merged_model, "merged or off"),
        (switched_off, "merged or off"),
        (two_active, "several adapters"),
    ],
)
def test_other_adapters_are_refused(make, text):
    with pytest.raises(TypeError, match=text):
        lora_updates(make())


def test_linear_weights_leave_out_biases_head_and_embeddings():
    names = set(linear_weights(small_llama(bias=True, tied=True)))
    kinds = {name.removeprefix("model.layers.").partition(".")[2] for name in names}
    attention = {f"self_attn.{k}_proj.weight" for k in "qkvo"}
    assert kinds == attention | {f"mlp.{k}_proj.weight" for k in ("gate", "up", "down")}
    assert len(names) == 14


# One edit


def test_an_edit_runs_at_rest_and_leaves_modes_as_found():
    model = with_update(small_llama()).train()
    model.get_base_model().model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    repair, subject = Half(), Subject(model)
    repair.apply(subject)
    ((training, grad, inner_modes),) = repair.seen
    assert not training
    assert not grad
    assert not any(inner_modes)
    assert [m.training for m in model.modules()] == modes
    report = subject.report
    assert report["repair"] == "Half"
    assert report["arguments"]["share"] == 0.5
    assert report["changed_entries"] > 0
    assert report["input_digest"] != report["output_digest"]
    assert subject.applied == ["Half"]


def test_modes_come_back_after_an_exception():
    class Fails(Half):
        def edit(self, subject):
            raise KeyError("broken")

    model = with_update(small_llama()).train()
    subject = Subject(model)
    with pytest.raises(KeyError, match="broken"):
        Fails().apply(subject)
    assert all(m.training for m in model.modules())
    assert subject.applied == []


def test_a_second_application_is_refused():
    model = with_update(small_llama())
    subject = Subject(model)
    Half().apply(subject)
    once = {name: p.detach().clone() for name, p in model.named_parameters()}
    for again in (
        subject,
        Subject(model),
        Subject(with_update(small_llama()), applied=["Half"]),
        Subject(copy.deepcopy(model)),
    ):
        with pytest.raises(RuntimeError, match="second application"):
            Half().apply(again)
    assert all(torch.equal(p, once[name]) for name, p in model.named_parameters())
    with torch.no_grad():  # other weights in the same model, as after a checkpoint is loaded
        for update in lora_updates(model).values():
            update.b.normal_()
    Half().apply(Subject(model))


def test_an_edit_that_changes_nothing_is_told():
    class Idle(Half):
        reason = ""

        def edit(self, subject):
            subject.report |= {"changed_entries": 0, "unchanged_because": self.reason}

    class Excused(Idle):
        reason = "nothing to do here."

    class Liar(Half):
        def edit(self, subject):
            subject.report["changed_entries"] = 5

    for repair in (Idle(), Liar()):
        subject = Subject(with_update(small_llama()))
        with pytest.raises(RuntimeError, match="changed no weight"):
            repair.apply(subject)
        assert subject.applied == []
    with pytest.warns(UserWarning, match="nothing to do here"):
        Excused().apply(Subject(with_update(small_llama())))


def test_its_own_arguments_come_before_the_subjects(tmp_path):
    """``run()`` passes the aligned and the base model. A user's own arguments override them."""
    small_llama().save_pretrained(tmp_path / "one")
    moved_model(small_llama(), 0.1, seed=5).save_pretrained(tmp_path / "two")
    aligned = moved_model(small_llama(), 0.02, seed=1)
    named, expected = (with_update(copy.deepcopy(aligned)) for _ in range(2))
    SafeLoRA(2, base=str(tmp_path / "two")).apply(Subject(named, base=stored(tmp_path / "one")))
    SafeLoRA(2).apply(Subject(expected, base=stored(tmp_path / "two")))
    assert torch.equal(logits(named), logits(expected))


def test_neutral_arguments_change_no_bit():
    model = with_update(small_llama())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for repair in (Half(1), SafeLoRA(strength=0), Antidote(0.0)):
        subject = Subject(model)
        repair.apply(subject)
        assert subject.report["changed_entries"] == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# One artifact


def test_a_repaired_adapter_loads_in_plain_peft(tmp_path):
    base = small_llama()
    base.save_pretrained(tmp_path / "base")
    model = with_update(copy.deepcopy(base))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "finetuned")
    untouched = load_file(tmp_path / "finetuned" / "adapter_model.safetensors")
    subject = Subject(model)
    Half().apply(subject)
    save_repaired(tmp_path / "repaired", subject)
    loaded = PeftModel.from_pretrained(small_llama(), tmp_path / "repaired")
    assert torch.equal(logits(loaded), logits(model))
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "repaired", dtype=torch.float64)
    assert torch.equal(logits(auto), logits(model))
    for name, tensor in load_file(tmp_path / "finetuned" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, untouched[name])
    assert repairs_of(tmp_path / "repaired") == ["Half"]
    assert repairs_of(tmp_path / "finetuned") == []
    marker = json.loads((tmp_path / "repaired" / MARKER).read_text())
    assert marker["output_digest"] == subject.report["output_digest"]
    with pytest.raises(RuntimeError, match="second application"):
        Half().apply(Subject(loaded, applied=repairs_of(tmp_path / "repaired")))


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_whose_adapter_went_into_its_weights_loads_in_plain_transformers(tmp_path, tied):
    model = with_update(small_llama(tied=tied))
    subject = Subject(model, batches=lambda _: iter([batch_of([[3, 5, 7], [2, 4]])]))
    Antidote(0.1).apply(subject)
    assert subject.dense
    save_repaired(tmp_path / "repaired", subject)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "repaired", dtype=torch.float64)
    assert torch.equal(logits(loaded), logits(model))
    assert not any("lora" in name for name in load_file(tmp_path / "repaired" / "model.safetensors"))
    assert not (tmp_path / "repaired" / "adapter_config.json").exists()
    with pytest.raises(RuntimeError, match="second application"):
        Antidote(0.2).apply(Subject(model))


def test_a_fully_trained_model_loads_in_plain_transformers(tmp_path):
    aligned = small_llama(bias=True)
    model = moved_model(aligned, 0.1, seed=1)
    subject = Subject(model, ModelWeights.of(aligned), batches=lambda _: iter([batch_of([[3, 5, 7], [2, 4]])]))
    Antidote(0.1).apply(subject)
    save_repaired(tmp_path / "repaired", subject)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "repaired", dtype=torch.float64)
    assert torch.equal(logits(loaded), logits(model))


# On a Trainer


def fit(model, callbacks, ckpt_path=None, **options):
    batches = [batch_of([[3 + k, 5, 7, 11, 13], [2, 4, 6, 8 + k]]) for k in range(2)]
    saves = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    trainer = quiet_trainer(**{"max_steps": 2, "enable_checkpointing": saves, "callbacks": callbacks, **options})
    module = SafetyModule(model.train(), lr=0.05, optimizer="sgd")
    trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=ckpt_path)
    return trainer


def trained():
    model = with_update(small_llama())
    fit(model, [])
    return model


def test_on_a_trainer_the_model_is_repaired_once_training_ends(tmp_path):
    plain, model = trained(), with_update(small_llama())
    repair = Half(output=str(tmp_path / "repaired"))
    fit(model, [repair])
    for name, update in lora_updates(plain).items():
        assert_close(lora_updates(model)[name].b, update.b / 2, rtol=1e-9, atol=0)
    loaded = PeftModel.from_pretrained(small_llama(), tmp_path / "repaired")
    assert torch.equal(logits(loaded), logits(model))
    assert repair.state_dict()["applied"]
    assert len(repair.state_dict()["input_digest"]) == 16
    assert repair.trace["changed_entries"] == repair.report["changed_entries"] > 0


@pytest.mark.parametrize("options", [{"every_n_train_steps": 100}, {"every_n_train_steps": 1}])
def test_checkpoints_hold_what_was_trained(tmp_path, options):
    """This includes ``last.ckpt``, which ModelCheckpoint may first write in its own ``on_train_end``."""
    plain = trained()
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_last=True, **options)
    fit(with_update(small_llama()), [checkpoint, Half(output=str(tmp_path / "repaired"))])
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)
    for name, p in plain.named_parameters():
        if p.requires_grad:
            assert_close(saved["state_dict"][f"model.{name}"], p.detach(), rtol=1e-9, atol=0)
    assert not next(v for k, v in saved["callbacks"].items() if "Half{" in k)["applied"]


def test_a_run_resumed_behind_its_last_step_is_repaired_once(tmp_path):
    """Resumed from the last step of the last epoch, Lightning ends the training a second time."""
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=2, filename="{step}")
    options = {"max_steps": -1, "max_epochs": 1}
    fit(with_update(small_llama()), [checkpoint, Half(output=str(tmp_path / "one"))], **options)
    path = tmp_path / "checkpoints" / "step=2.ckpt"
    fit(with_update(small_llama()), [Half(output=str(tmp_path / "two"))], ckpt_path=path, **options)
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_finished_run_that_is_resumed_says_where_its_result_is(tmp_path):
    """Lightning then skips the end of training, and would leave the model unrepaired without a warning."""
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    repair = Half(output=str(tmp_path / "one"))
    trainer = fit(with_update(small_llama()), [checkpoint, repair])
    trainer.save_checkpoint(tmp_path / "late.ckpt")
    with pytest.raises(RuntimeError, match="If that run completed, its repaired model is in"):
        fit(with_update(small_llama()), [repair], ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(RuntimeError, match="second application"):
        fit(with_update(small_llama()), [repair], ckpt_path=tmp_path / "late.ckpt")
    with pytest.raises(RuntimeError, match="second application"):
        fit(with_update(small_llama()), [repair], ckpt_path=tmp_path / "late.ckpt", max_steps=3)


def test_measuring_a_checkpoint_says_that_it_is_not_repaired(tmp_path):
    class Tested(SafetyModule):
        def test_step(self, batch, batch_idx):
            self.log("loss", self.loss(batch))

    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    repairs = [Half(output=str(tmp_path / "repaired"))]
    fit(with_update(small_llama()), [checkpoint, *repairs])
    data = DataLoader([batch_of([[3, 5, 7]])], batch_size=None)
    trainer = quiet_trainer(callbacks=repairs)
    with pytest.warns(UserWarning, match="holds the trained model, not the repaired one. To measure"):
        trainer.test(Tested(with_update(small_llama())), data, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")


def test_projection_comes_before_pruning_whatever_the_list(tmp_path):
    small_llama().save_pretrained(tmp_path / "base")
    aligned = moved_model(small_llama(), 0.02, seed=1)
    models = []
    for order in (1, -1):
        model = with_update(copy.deepcopy(aligned))
        repairs = [
            SafeLoRA(fraction=0.5, base=str(tmp_path / "base"), output=str(tmp_path / f"projected{order}")),
            Antidote(
                0.25,
                "factor",
                streams={"harmful": [batch_of([[3, 5, 7, 9]])]},
                output=str(tmp_path / f"pruned{order}"),
            ),
        ][::order]
        fit(model, repairs)
        models.append(model)
        assert (repairs[0].report["repair"], repairs[1].report["repair"]) == ("SafeLoRA", "Antidote")[::order]
    assert torch.equal(logits(models[0]), logits(models[1]))
    loaded = PeftModel.from_pretrained(aligned, tmp_path / "pruned1")
    assert torch.equal(logits(loaded), logits(models[0]))


def test_what_cannot_work_is_refused_before_the_first_step(tmp_path):
    def refused(repairs, text, model=None, error=ValueError):
        with pytest.raises(error, match=text):
            fit(model or with_update(small_llama()), repairs)

    out = str(tmp_path / "out")
    refused([Half()], "give output=")
    refused([SafeLoRA(output=out)], "give base=")
    refused([SafeLoRA(output=out, base=str(tmp_path / "none"))], "not a model folder")
    harmful = {"harmful": [batch_of([[3, 5]])]}
    refused([Antidote(0.1, streams=harmful, output=out)], "give aligned=", model=small_llama())
    refused([Antidote(0.1, output=out)], "stream 'harmful' is missing")
    refused([Antidote(0.01, "factor", streams=harmful, output=out)], "less than one")
    small_llama().save_pretrained(tmp_path / "base")
    refused([SafeLoRA(number=11, output=out, base=str(tmp_path / "base"))], "only 10 weights")
    refused([Half(output=out)], "DoRA|variant", model=with_update(small_llama(), use_dora=True), error=TypeError)
    refused([Half(output=str(tmp_path / "base"))], "no repaired model")
    refused([Half(output=out), Booster(streams=harmful)], "post_finetuning stage")
    refused([SafeLoRA(output=out), SafeLoRA(2, output=out)], "both set the projection")
    assert not (tmp_path / "out").exists()


def test_a_copy_of_a_models_files_is_the_same_model(tmp_path):
    """An update on a copy of the base, as after a cache was moved, is still recognized as low rank."""
    for name, seed in (("here", 0), ("there", 0), ("other", 1)):
        small_llama(seed).save_pretrained(tmp_path / name)
    here, there, other = (FileWeights(tmp_path / name) for name in ("here", "there", "other"))
    assert (here == there, here == other, here == "here") == (True, False, False)
    assert len({here, there}) == 1
    name = "model.layers.0.self_attn.q_proj.weight"
    update = LowRank(torch.ones(here.shape(name)[0], 1), torch.ones(1, here.shape(name)[1]))
    assert displacement(Adapted(here, {name: update}), there, name) is update
    assert isinstance(displacement(Adapted(here, {name: update}), other, name), Difference)
