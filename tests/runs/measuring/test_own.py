"""MeasureAt on a plain LightningModule: own prompts and judge, chosen steps, and no effect on training."""

import json

import pytest
import torch
from torch.utils.data import DataLoader

from hftlight import MeasureAt
from hftlight.defenses import Booster
from hftlight.errors import InputError
from hftlight.evaluation.judges import Verdict
from tests.helpers.quadratic import quiet_trainer
from tests.helpers.tiny_lm import PlainModule, tiny_lm, token_batch
from tests.helpers.tokenizers import CHATML, byte_tokenizer

TOKENIZER = byte_tokenizer(chat_template=CHATML)
BATCHES = [token_batch(seed) for seed in range(6)]


def own():
    return PlainModule(tiny_lm(vocabulary=259, dropout=0.1, dtype=torch.float32))


class Odd:
    """Flag every second answer."""

    name = "odd"

    def __call__(self, prompts, responses):
        assert len(prompts) == len(responses)
        return [Verdict.of(place % 2 == 1) for place in range(len(prompts))]


def fit(*callbacks, steps=4, **options):
    torch.manual_seed(0)
    module = own()
    quiet_trainer(max_steps=steps, callbacks=list(callbacks), **options).fit(
        module, DataLoader(BATCHES, batch_size=None)
    )
    return torch.cat([p.detach().flatten() for p in module.parameters()]), module


def of(results, metric):
    return [(row["step"], row["value"], row["judge"]) for row in results if row["metric"] == metric]


@pytest.mark.parametrize("beside", [[], [lambda: Booster(streams={"harmful": BATCHES[:2]})]], ids=["alone", "booster"])
def test_it_measures_at_the_steps_and_training_does_not_notice(beside):
    measure = MeasureAt(["ask a", "ask b", "ask c"], TOKENIZER, Odd(), steps=[1], every=2, max_new_tokens=4)
    weights, module = fit(*[make() for make in beside], measure)
    plain, _ = fit(*[make() for make in beside])
    assert torch.equal(weights, plain)
    assert module.training
    third = 100 / 3
    assert of(measure.results, "harmful_score") == [(step, pytest.approx(third), "odd") for step in (1, 2, 4)]
    assert {row["metric"] for row in measure.results} >= {"refusal_rate", "collapsed_answers", "answers_broken"}
    assert [row["prompt"] for row in measure.answers] == ["ask a", "ask b", "ask c"]


def test_a_judge_by_name_and_ordinary_prompts(tmp_path):
    (tmp_path / "ordinary.jsonl").write_text(json.dumps({"prompt": "hello"}) + "\n")
    measure = MeasureAt(["ask"], TOKENIZER, ordinary=tmp_path / "ordinary.jsonl", every=2, max_new_tokens=4)
    fit(measure, steps=2)
    assert [judge for *_, judge in of(measure.results, "harmful_score")] == ["keyword"]
    assert len(of(measure.results, "over_refusal")) == 1


def test_a_resumed_fit_measures_no_step_twice(tmp_path):
    def measure():
        return MeasureAt(["ask"], TOKENIZER, steps=[1, 3], max_new_tokens=2)

    first, second = measure(), measure()
    torch.manual_seed(0)
    trainer = quiet_trainer(max_steps=2, callbacks=[first])
    trainer.fit(own(), DataLoader(BATCHES, batch_size=None))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = quiet_trainer(max_steps=4, callbacks=[second])
    again.fit(own(), DataLoader(BATCHES, batch_size=None), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert [step for step, *_ in of(second.results, "harmful_score")] == [1, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give optimizer steps >= 1"),
        ({"steps": [0]}, "give optimizer steps >= 1"),
        ({"prompts": [], "every": 1}, "at least one harmful prompt, got none"),
        ({"every": 1, "max_new_tokens": 0}, "must be >= 1, got 0 and 16"),
        ({"every": 1, "template": "chatt"}, "Did you mean 'chat'"),
        ({"every": 1, "prompts": "nowhere.jsonl"}, r"no file nowhere\.jsonl"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(options, message):
    with pytest.raises((ValueError, InputError), match=message):
        MeasureAt(**{"prompts": ["ask"], "tokenizer": TOKENIZER, **options})


def test_a_module_without_a_model_and_a_long_prompt_are_refused_before_the_first_step():
    class Bare(PlainModule):
        def __init__(self):
            super().__init__(tiny_lm())
            self.net = self.model
            del self.model

    with pytest.raises(InputError, match="Bare needs a causal LM with generate"):
        quiet_trainer(max_steps=1, callbacks=[MeasureAt(["ask"], TOKENIZER, every=1)]).fit(
            Bare(), DataLoader(BATCHES, batch_size=None)
        )
    with pytest.raises(InputError, match="Lower max_new_tokens or remove the prompt"):
        fit(MeasureAt(["ask " * 40], TOKENIZER, every=1))
