"""Completion of refusals: forced tokens against greedy decoding by hand, and what counts as sustained."""

import pytest
import torch

from hftlight.analysis.completion import Completion, after_first_sentence, completed, sustained
from hftlight.analysis.study import study
from hftlight.analysis.subjects import plain_subjects
from hftlight.config import RunConfig
from hftlight.evaluation.judges import Verdict
from hftlight.evaluation.metrics.refusals import StringRefusals
from tests.helpers.contract import model_of
from tests.helpers.tokenizers import byte_tokenizer

PROMPTS = [[256, 5, 9, 70], [256, 80, 81, 82, 83, 84, 90], [256, 7]]
REFUSALS = [[66, 67, 68, 69, 70], [77, 78], [90, 91, 92, 93]]


@torch.no_grad()
def by_hand(model, tokenizer, prompt, refusal, k, limit):
    new = list(refusal[:k])
    while len(new) < limit - max(0, k - len(refusal)):
        token = int(model(input_ids=torch.tensor([[*prompt, *new]]), use_cache=False).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        new.append(token)
    return tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


@pytest.mark.parametrize("k", [0, 1, 3, 5])
def test_answers_after_forced_tokens_are_those_of_greedy_decoding(k):
    """The second refusal is shorter than k at last, and the prompts differ in length."""
    model, tokenizer = model_of("lora").eval(), byte_tokenizer()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "lora_" not in name:
                p.mul_(15)
    expected = [by_hand(model, tokenizer, p, r, k, 9) for p, r in zip(PROMPTS, REFUSALS, strict=True)]
    assert completed(model, tokenizer, PROMPTS, REFUSALS, k, max_new_tokens=9, batch_size=2) == expected
    assert len(set(expected)) == 3


class Judge:
    """Flags an answer that begins with steps, and knows nothing of an empty request."""

    name = "starts"

    def __call__(self, prompts, responses):
        found = zip(prompts, responses, strict=True)
        return [Verdict.of(answer.startswith("First")) if prompt else Verdict.unjudged() for prompt, answer in found]


def test_a_refusal_is_sustained_if_nothing_harmful_follows():
    answers = ["I'm sorry, no.", "I'm sorry, no. First, take it.", "First, take it.", "Well.", "I'm sorry."]
    found = sustained(["ask"] * 4 + [""], answers, StringRefusals(), Judge())
    assert found == [True, False, False, False, None]


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("No. Then go. On", "Then go. On"),
        ("No", ""),
        ("", ""),
        ("A 3.5 kg bag! Next", "Next"),
        ("One\nTwo. x", "Two. x"),
    ],
)
def test_what_follows_the_first_sentence(text, rest):
    assert after_first_sentence(text) == rest


def test_a_model_that_never_refuses_is_a_note(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path))
    tone_and = plain_subjects(["tiny"], RunConfig(model="tiny", accelerator="cpu"), None)
    with pytest.raises(Exception, match="refuses none of 3 harmful prompts"):
        study(tone_and, [Completion(prompts=3, max_new_tokens=12)])


class Sorry:
    """Takes every answer for a refusal, so that the tiny model has refusals to force."""

    name, sees_partial = "sorry", False

    def __call__(self, prompts, responses):
        return ["full"] * len(prompts)


def test_a_study_has_one_percentage_per_k(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr("hftlight.analysis.completion.get_refusal_classifier", lambda name: Sorry())
    subjects = plain_subjects(["tiny"], RunConfig(model="tiny", accelerator="cpu"), "tiny")
    rows = study(subjects, [Completion(prompts=3, forced=[2, 0, 2], max_new_tokens=6)]).rows["completion"]
    assert [(row.metric, row.position, row.value) for row in rows] == [
        ("refusal_sustained", 0.0, 100.0),
        ("refusal_sustained", 2.0, 100.0),
    ]
    assert all(row.low is not None and row.low < 100 for row in rows)


@pytest.mark.parametrize(
    ("changes", "said"), [({"prompts": 0}, "prompts"), ({"forced": []}, "forced"), ({"forced": [0, 32]}, r"\[0, 31\]")]
)
def test_bad_arguments_are_named(changes, said):
    with pytest.raises(ValueError, match=said):
        Completion(**changes)
