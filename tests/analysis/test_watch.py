"""Watch: right values, no effect on training, no hook left, and no step repeated or skipped after a resume."""

import json

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn import functional as F

from hftlight import SafetyModule
from hftlight.analysis.states import last_states
from hftlight.analysis.watch import Watch
from hftlight.defenses import Booster
from hftlight.engine import Stage
from hftlight.errors import InputError
from hftlight.runs.logging.rows import RowsLogger
from tests.helpers.contract import data_module, model_of, train
from tests.helpers.quadratic import Quadratic, quiet_trainer
from tests.helpers.tokenizers import CHATML, byte_tokenizer

TOKENIZER = byte_tokenizer(chat_template=CHATML)
HARMFUL, ORDINARY, REFUSALS = ["pick it", "break all of it", "never used"], ["sing", "tell a tale"], ["No.", "Sorry"]


def watch(**options):
    return Watch(HARMFUL, ORDINARY, TOKENIZER, REFUSALS, **{"every": 2, "prompts": 2, **options})


def model():
    torch.manual_seed(1)
    return model_of("lora", dropout=0.3)


def go(*callbacks, model=model, **options):
    settings = {"steps": 6, "accumulate": 2, "stage": Stage.ALIGNMENT, "optimizer": "adamw", "lr": 0.05, **options}
    return train([Booster(lam=1.0, alpha=0.1)], model=model(), callbacks=list(callbacks), **settings)


def states_of(model):
    prompts = [f"[user]{text}[/][assistant]" for text in (*HARMFUL[:2], *ORDINARY)]
    ids = [[256, *TOKENIZER(text, add_special_tokens=False)["input_ids"]] for text in prompts]
    return last_states(model, ids, batch_size=1).double(), ids


def test_values_are_those_of_the_weights_at_that_step():
    """The last measured step is the end of the training, so the finished model has the same values."""
    callback = watch(every=3)
    there, ids = states_of(model())
    module = go(callback)
    here, _ = states_of(module.model)
    assert [row["step"] for row in callback.results if row["metric"] == "relative_drift"] == [3, 6]
    last = {row["metric"]: row["value"] for row in callback.results if row["step"] == 6}
    assert len(last) == 2 * (1 + 2) + 1
    for layer in range(2):
        a, b = here[layer], there[layer]
        assert last[f"relative_drift/{layer}"] == pytest.approx(float((a - b).square().sum() / b.square().sum()))
        directions = [x[:2].mean(0) - x[2:].mean(0) for x in (a, b)]
        assert last[f"direction_cosine/{layer}"] == pytest.approx(float(F.cosine_similarity(*directions, dim=0)))
    mean = sum(last[f"relative_drift/{layer}"] for layer in range(2)) / 2
    assert last["relative_drift"] == pytest.approx(mean)
    assert mean > 1e-4
    odds = []
    with torch.no_grad():
        for row in ids[:2]:
            p = module.model.eval()(torch.tensor([row])).logits[0, -1].softmax(-1)
            refusing = p[[TOKENIZER("N")["input_ids"][-1], TOKENIZER("S")["input_ids"][-1]]].sum()
            odds.append((refusing / (1 - refusing)).log())
    assert last["refusal_log_odds"] == pytest.approx(float(sum(odds) / 2), rel=1e-4)


class Hooks(Callback):
    """Counts the hooks on the model at the start of each micro-batch."""

    def __init__(self):
        self.counts = set()

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.counts.add(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pl_module.model.modules()))


def test_training_does_not_notice_and_no_hook_stays():
    hooks, plain_hooks = Hooks(), Hooks()
    plain, watched = go(plain_hooks), go(watch(every=1), hooks)
    assert hooks.counts == plain_hooks.counts
    assert watched.model.training == plain.model.training
    after = dict(watched.named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in plain.named_parameters())


class Stop(Callback):
    """Saves a checkpoint and stops at a step, before the step is watched."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise InterruptedError


@pytest.mark.filterwarnings("ignore:.*resuming")
@pytest.mark.parametrize("step", [2, 3])
def test_a_resumed_training_repeats_no_step_and_keeps_its_first_reference(tmp_path, step):
    whole = watch()
    train([], model=model(), callbacks=[whole], steps=6, lr=0.05, stage=Stage.ALIGNMENT)
    with pytest.raises(InterruptedError):
        train(
            [], model=model(), callbacks=[watch(), Stop(tmp_path / "a.ckpt", step)], steps=6, lr=0.05,
            stage=Stage.ALIGNMENT,
        )  # fmt: skip
    after = watch()
    trainer = quiet_trainer(max_steps=6, max_epochs=-1, callbacks=[after], use_distributed_sampler=False)
    module = SafetyModule(model(), lr=0.05, optimizer="sgd")
    trainer.fit(module, data_module(Stage.ALIGNMENT), ckpt_path=str(tmp_path / "a.ckpt"), weights_only=False)
    assert [row["step"] for row in after.results if "/" not in row["metric"]] == [2, 2, 2, 4, 4, 4, 6, 6, 6]
    assert after._start is not None
    assert torch.equal(after._start, whole._start)
    assert [row["metric"] for row in after.results] == [row["metric"] for row in whole.results]


def test_values_are_logged_at_their_steps(tmp_path):
    callback, logger = watch(every=4, steps=[1]), RowsLogger(tmp_path / "curves.jsonl", 0)
    go(callback, logger=[logger], log_every_n_steps=50)
    logger.file.close()
    rows = [json.loads(line) for line in (tmp_path / "curves.jsonl").read_text().splitlines()]
    logged = {(row["step"], row["name"]): row["value"] for row in rows if row["name"].startswith("eval/")}
    assert logged == {(row["step"], f"eval/{row['metric']}"): row["value"] for row in callback.results}
    assert {step for step, _ in logged} == {1, 4}


def test_a_new_fit_has_a_new_reference():
    callback, fresh = watch(every=6), watch(every=6)
    go(callback)
    first = list(callback.results)
    go(callback, model=lambda: model_of("full"))
    go(fresh, model=lambda: model_of("full"))
    assert callback.results == fresh.results
    assert callback.results != first


def test_without_refusals_there_are_no_log_odds():
    callback = Watch(HARMFUL, ORDINARY, TOKENIZER, every=6)
    go(callback)
    assert "refusal_log_odds" not in {row["metric"] for row in callback.results}


def test_what_cannot_be_watched_is_named():
    with pytest.raises(ValueError, match="got 0, 2 and prompts=2"):
        Watch([], ORDINARY, TOKENIZER)
    with pytest.raises(ValueError, match="every"):
        watch(every=0)
    module = Quadratic(torch.zeros(2), 0.1)
    with pytest.raises(InputError, match="Watch: Quadratic needs a causal LM"):
        watch().setup(quiet_trainer(max_steps=1), module, "fit")
