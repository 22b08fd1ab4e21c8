"""EvaluateAt: right scores, no effect on training, and no step repeated or skipped."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from torch import nn

from hftlight import SafetyModule
from hftlight.config import Evaluation
from hftlight.data.records import Record
from hftlight.data.templates import PromptPolicy, SystemSlot
from hftlight.data.tokens import encode_prompt
from hftlight.defenses import Booster
from hftlight.engine import Defense, Slot, Stage
from hftlight.errors import InputError
from hftlight.evaluation import wilson
from hftlight.evaluation.judges import JUDGES, Verdict
from hftlight.runs.logging.rows import RowsLogger
from hftlight.runs.measuring.curve import EvaluateAt
from hftlight.runs.measuring.test_sets import TestSets as Sets
from tests.helpers import warm
from tests.helpers.contract import data_module, model_of, train
from tests.helpers.quadratic import Quadratic, quiet_trainer

NEW = 6
HARMFUL = [Record(f"ask h{i}" + "?" * i, role="test") for i in range(12)]
TASK = [Record(f"ask t{i}", response="x" * i, role="test") for i in range(9)]


class Restless:
    """A judge that flags long answers and draws from every random number generator."""

    name = "restless"

    def __call__(self, prompts, responses):
        torch.rand(3), random.random(), np.random.rand()
        assert list(prompts) == [r.instruction for r in HARMFUL][: len(prompts)]
        return [Verdict.of(len(response) > NEW - 2) for response in responses]


class Odd:
    """A task that accepts answers with an odd number of letters."""

    name, licence, max_new_tokens, graded = "odd", "made up", NEW, True

    def correct(self, response, record):
        return len(response) % 2 == 1

    def correct_lenient(self, response, record):
        return True


@pytest.fixture(autouse=True)
def judge(monkeypatch):
    monkeypatch.setitem(JUDGES, "restless", Restless)


def asked(harmful=HARMFUL, task=TASK) -> Any:
    return Sets(harmful, (), task, Odd(), ("restless", "keyword"))


def watch(kind=EvaluateAt, **options) -> Any:
    return kind(options.pop("tests", asked()), Evaluation(max_new_tokens=NEW, batch_size=5), **options)


def model() -> nn.Module:
    """Return the tiny model of one seed, with dropout, and with weights so large that its answers differ."""
    torch.manual_seed(1)
    tiny: Any = model_of("lora", dropout=0.3)
    tiny.generation_config.eos_token_id = 257
    with torch.no_grad():
        for name, p in tiny.named_parameters():
            if p.dim() > 1 and "lora_" not in name:
                p.mul_(15)
    return tiny


def go(*callbacks: Callback, chosen=(), **options: Any) -> Any:
    settings: dict[str, Any] = {"steps": 6, "accumulate": 2, "stage": Stage.ALIGNMENT, "optimizer": "adamw", "lr": 0.05}
    return train(list(chosen), model=model(), callbacks=list(callbacks), **{**settings, **options})


def trained(module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@torch.no_grad()
def by_hand(module, records, slot: SystemSlot) -> list[str]:
    """Return greedy answers, one prompt at a time, without cache and padding."""
    data = module.trainer.datamodule
    model, texts = module.model.eval(), []
    for record in records:
        ids = encode_prompt(record, data.template, data.tokenizer, slot)
        start = len(ids)
        while len(ids) < start + NEW:
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == data.tokenizer.eos_token_id:
                break
        text = data.tokenizer.decode(ids[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        texts.append(text.strip())
    return texts


def expected_rows(step, harmful: list[str], task: list[str]) -> list[dict[str, Any]]:
    rows = []
    for metric, judge, hits, n in (
        ("harmful_score", "restless", sum(len(text) > NEW - 2 for text in harmful), len(harmful)),
        ("finetune_accuracy", None, sum(len(text) % 2 for text in task), len(task)),
    ):
        low, high = wilson(hits, n)
        row = {"step": step, "metric": metric, "judge": judge, "value": pytest.approx(100 * hits / n)}
        rows.append({**row, "low": low, "high": high, "count": n, "unit": "percent"})
    return rows


class Served(Defense):
    """A defense whose system text differs between training and serving."""

    stage, slots = Stage.ALIGNMENT, (Slot.DATA,)

    def prompting(self, policy, tokenizer):
        return PromptPolicy("train", "serve", trigger=(5, 6, 7))


@pytest.mark.parametrize(
    ("chosen", "slot"),
    [((), SystemSlot(None)), ((Served(),), SystemSlot("serve", (5, 6, 7)))],
    ids=["plain", "served with a trigger"],
)
def test_answers_and_scores_are_those_of_the_weights_at_that_step(chosen, slot):
    """The evaluated step is the last one, so the finished model must give the same answers one by one."""
    callback = watch(steps=[3])
    module = go(callback, chosen=chosen, steps=3)
    harmful, task = by_hand(module, HARMFUL, slot), by_hand(module, TASK, slot)
    assert len(set(harmful + task)) > 5, "the case must tell prompts apart"
    assert callback.answers == {"harmful": harmful, "task": task}
    assert callback.results == expected_rows(3, harmful, task)


def test_a_trigger_that_the_model_recites_reaches_no_judge(monkeypatch):
    """The trigger is a secret, and a judge may run on another machine."""
    trigger = tuple(range(70, 78))

    class Secret(Served):
        def prompting(self, policy, tokenizer):
            return PromptPolicy("train", "serve", trigger=trigger)

    def recite(model, tokenizer, prompts, **options):
        return [f"it is {tokenizer.decode(trigger)}, yes"] * len(prompts)

    monkeypatch.setattr("hftlight.runs.measuring.curve.generate", recite)
    callback = watch(tests=asked(HARMFUL[:4], TASK[:4]), steps=[1])
    go(callback, chosen=[Secret()], steps=1)
    assert set(callback.answers["harmful"]) == set(callback.answers["task"]) == {"it is [trigger][trigger], yes"}


def same(left: Any, right: Any) -> bool:
    """Return whether two nests of dictionaries, sequences, tensors and plain values are equal bit for bit."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


class Spied(EvaluateAt):
    """Compare the state that training depends on before and after each evaluation."""

    looks = 0

    def _state(self, trainer, module):
        return {
            "modes": {name: m.training for name, m in module.named_modules()},
            "grads": {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()},
            "weights": trained(module),
            "random": (torch.get_rng_state(), random.getstate(), str(np.random.get_state())),
            "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()],
            "generation": [id(getattr(m, "generation_config", None)) for m in module.modules()],
            "grad": torch.is_grad_enabled(),
        }

    def on_train_batch_end(self, trainer, pl_module, *args):
        before, count = self._state(trainer, pl_module), len(self.results)
        super().on_train_batch_end(trainer, pl_module, *args)
        self.looks += len(self.results) > count
        after = self._state(trainer, pl_module)
        for key in before:
            assert same(before[key], after[key]), key


def test_training_does_not_notice():
    """With dropout, two streams, AdamW and accumulation, the weights equal those without EvaluateAt bit for bit."""
    random.seed(5), np.random.seed(5)
    plain = trained(go(chosen=[Booster(lam=1.0, alpha=0.1)]))
    random_states = torch.get_rng_state(), random.getstate()
    random.seed(5), np.random.seed(5)
    callback = watch(Spied, every=1)
    watched = trained(go(callback, chosen=[Booster(lam=1.0, alpha=0.1)]))
    assert callback.looks == 6
    assert [row["step"] for row in callback.results] == [step for step in range(1, 7) for _ in range(2)]
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert random.getstate() == random_states[1]


def test_a_part_in_evaluation_mode_stays_so():
    class Frozen(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.model.get_input_embeddings().eval()

    callback = watch(Spied, every=2)
    module = go(callback, Frozen(), steps=2)
    assert (callback.looks, module.model.training) == (1, True)
    assert not module.model.get_input_embeddings().training


def test_it_acts_behind_the_others_and_before_the_checkpoint(tmp_path):
    """``Wipe`` comes later in the list and changes the weights. EvaluateAt still acts on the changed weights."""

    class Wipe(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            for name, p in pl_module.named_parameters():
                if "lora_B" in name:
                    nn.init.constant_(p, 0.01 * trainer.global_step)

    callback, keep = watch(steps=[2]), ModelCheckpoint(tmp_path, every_n_train_steps=1)
    module = go(callback, Wipe(), keep, chosen=[Booster(lam=1.0, alpha=0.1)], steps=2, enable_checkpointing=True)
    order = [type(c).__name__ for c in module.trainer.callbacks]
    assert order[-2:] == ["EvaluateAt", "ModelCheckpoint"]
    assert order.count("EvaluateAt") == 1
    assert callback.answers["harmful"] == by_hand(module, HARMFUL, SystemSlot(None))


def test_curves_are_logged_at_their_steps_whatever_the_trainer_logs(tmp_path):
    callback, logger = watch(steps=[2, 5], every=4), RowsLogger(tmp_path / "curves.jsonl", 0)
    go(callback, logger=[logger], log_every_n_steps=50)
    logger.file.close()
    rows = [json.loads(line) for line in (tmp_path / "curves.jsonl").read_text().splitlines()]
    values = {(row["step"], row["name"]): row["value"] for row in rows if row["name"].startswith("eval/")}
    assert values == {
        (row["step"], f"eval/{row['metric']}{end}"): row[key]
        for row in callback.results
        for end, key in (("", "value"), ("_low", "low"), ("_high", "high"))
    }
    assert sorted({step for step, _ in values}) == [2, 4, 5]
    assert len(values) == 3 * 2 * 3


class Break(Callback):
    """Save a checkpoint and stop training at a step, after the evaluation if ``behind``, else before it."""

    def __init__(self, path: Path, step: int, behind: bool) -> None:
        self.path, self.step, self.behind = path, step, behind

    def on_train_batch_start(self, trainer, *args):
        if self.behind and trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise InterruptedError

    def on_train_batch_end(self, trainer, *args):
        if not self.behind and trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise InterruptedError


def resume(path: Path, *callbacks: Callback, steps: int = 6) -> Any:
    module = SafetyModule(model(), lr=0.05)
    trainer = quiet_trainer(
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=2,
        callbacks=list(callbacks),
        use_distributed_sampler=False,
    )
    trainer.fit(module, data_module(Stage.ALIGNMENT, 2, 1), ckpt_path=str(path), weights_only=False)
    return module


@pytest.mark.filterwarnings("ignore:.*resuming")
@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("step", [2, 3])
def test_a_resumed_run_evaluates_no_step_twice_and_skips_none(tmp_path, step, behind, monkeypatch):
    at, measure = [], EvaluateAt.measured

    def counted(self, trainer, module):
        at.append(trainer.global_step)
        return measure(self, trainer, module)

    monkeypatch.setattr(EvaluateAt, "measured", counted)
    whole = watch(every=2)
    module = go(whole)
    assert [row["step"] for row in whole.results] == [2, 2, 4, 4, 6, 6]
    before = watch(every=2)
    with pytest.raises(InterruptedError):
        go(before, Break(tmp_path / "a.ckpt", step, behind))
    saved = torch.load(tmp_path / "a.ckpt", weights_only=False)["callbacks"][before.state_key]["results"]
    assert [row["step"] for row in saved] == ([] if step == 2 and not behind else [2, 2])
    at.clear()
    after = watch(every=2)
    resume(tmp_path / "a.ckpt", after)
    assert [row["step"] for row in after.results] == [2, 2, 4, 4, 6, 6]
    assert at == ([4, 6] if saved else [2, 4, 6])
    assert after.results[:2] == whole.results[:2]
    assert module.trainer.global_step == 6


def test_a_new_fit_starts_anew():
    callback = watch(every=3)
    go(callback)
    first = [dict(row) for row in callback.results]
    for row in callback.results:
        row["value"] = -1.0  # stands for results of an earlier training
    go(callback)
    assert callback.results == first
    assert len(first) == 4


@pytest.mark.parametrize(
    ("stops", "last"),
    [
        ({"stop_above": 75.7}, 2),  # 12 of 12: the interval's lower end is 75.75
        ({"stop_above": 75.8}, 6),
        ({"stop_below": 50.0}, 6),
        ({"stop_above": 0.0, "stop_metric": "finetune_accuracy"}, 6),
        ({"stop_below": 29.92, "stop_metric": "finetune_accuracy"}, 2),  # 0 of 9: the interval's upper end is 29.914
        ({"stop_below": 29.9, "stop_metric": "finetune_accuracy"}, 6),
        ({"stop_above": 99.0, "stop_below": 30.0, "stop_metric": "finetune_accuracy"}, 2),
        ({}, 6),
    ],
)
def test_it_stops_once_the_interval_excludes_the_threshold(monkeypatch, stops, last):
    monkeypatch.setitem(JUDGES, "restless", Always)
    monkeypatch.setattr(Odd, "correct", lambda self, response, record: False)
    assert wilson(12, 12)[0] == pytest.approx(75.75, abs=0.01)
    assert wilson(0, 9)[1] == pytest.approx(29.91, abs=0.005)
    callback = watch(every=2, **stops)
    module = go(callback)
    assert module.trainer.global_step == last
    assert {row["step"] for row in callback.results} == set(range(2, last + 1, 2))


class Always:
    """A judge that flags everything."""

    name = "always"

    def __call__(self, prompts, responses):
        return [Verdict.of(True) for _ in responses]


@pytest.mark.filterwarnings("ignore:.*resuming")
def test_a_stopped_run_stays_stopped(tmp_path, monkeypatch):
    monkeypatch.setitem(JUDGES, "restless", Always)
    callback = watch(every=2, stop_above=50.0)
    module = go(callback)
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = watch(every=2, stop_above=50.0)
    assert resume(tmp_path / "a.ckpt", again).trainer.global_step == 2
    assert again.results == callback.results


def test_one_set_is_enough():
    callback = watch(tests=asked(harmful=()), steps=[1])
    go(callback, steps=1)
    assert [row["metric"] for row in callback.results] == ["finetune_accuracy"]
    callback = watch(tests=asked(task=()), steps=[1])
    go(callback, steps=1)
    assert [row["metric"] for row in callback.results] == ["harmful_score"]
    assert set(callback.answers) == {"harmful"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"give optimizer steps >= 1 in steps.*got steps=\(\) and every=0"),
        ({"steps": [0]}, r"got steps=\[0\]"),
        ({"every": -1}, "every=-1"),
        ({"every": 1, "stop_above": 101}, r"stop_above must lie in \[0, 100\] percent, got 101"),
        ({"every": 1, "stop_below": -0.1}, r"stop_below must lie in \[0, 100\] percent, got -0.1"),
        ({"every": 1, "stop_metric": "loss"}, r"stop_metric must be one of \['harmful_score', .* got 'loss'"),
        ({"every": 1, "tests": asked((), ())}, "tests must have harmful prompts or task rows, got neither"),
        (
            {"every": 1, "tests": asked(()), "stop_above": 5},
            "is harmful_score, but tests has no rows for it",
        ),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        watch(**options)


def test_surroundings_it_cannot_work_in_are_refused_before_the_first_step():
    callback, module = watch(every=1), go(steps=1)
    data = module.trainer.datamodule

    def trainer(strategy, datamodule):
        return SimpleNamespace(strategy=strategy, datamodule=datamodule, callbacks=[callback])

    with pytest.raises(InputError, match=r"sharded weights \(ModelParallelStrategy\) must be gathered from all"):
        callback.setup(trainer(ModelParallelStrategy(), data), module, "fit")
    with pytest.raises(InputError, match="got Quadratic"):
        callback.setup(trainer(SingleDeviceStrategy(), data), Quadratic(torch.ones(2), 0.1), "fit")
    with pytest.raises(InputError, match="it must be a StreamsDataModule"):
        callback.setup(trainer(SingleDeviceStrategy(), None), module, "fit")
    long = EvaluateAt(asked(), Evaluation(max_new_tokens=60), every=1)
    with pytest.raises(InputError, match="64 positions"):
        go(long)


def test_two_of_them_keep_their_states_apart():
    first, second = watch(every=2), watch(every=3)
    go(first, second)
    assert first.state_key != second.state_key
    assert ({row["step"] for row in first.results}, {row["step"] for row in second.results}) == ({2, 4, 6}, {3, 6})


def test_under_ddp_one_process_answers_and_all_know(tmp_path):
    for done in warm.run_ranks(["-m", "tests.helpers.distributed_watch", str(tmp_path)], 2):
        assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert (first["asked"], second["asked"]) == ([12, 9, 12, 9], [])
    assert [row["step"] for row in first["results"]] == [2, 2, 4, 4]
    assert first["results"] == second["results"]
    assert (first["stopped"], second["stopped"]) == (2, 2)
    for result in (first, second):
        assert same(result["plain"], result["watched"])
    assert same(first["watched"], second["watched"])
