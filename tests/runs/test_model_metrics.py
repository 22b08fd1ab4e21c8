"""Perplexity and drift are kept by what they were taken of: another text or another reference is measured anew."""

import pytest

from hftlight.config import Evaluation
from hftlight.data.templates import SystemSlot
from hftlight.models import load_model, load_tokenizer, model_hash
from hftlight.runs.model_metrics import Reference, model_metrics
from hftlight.runs.prepare import test_sets as sets_of
from hftlight.runs.sources import Sources
from tests.runs.test_run import EVALUATION, config


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))


def measured(settings, reference=None):
    tests = sets_of(settings, None, Sources(settings.data))
    rows = model_metrics("tiny", model_hash("tiny"), settings, tests, SystemSlot(None), reference)
    return {row["metric"]: row["value"] for row in rows}


def test_a_text_that_changed_under_its_name_is_read_again(tmp_path):
    text = tmp_path / "text.txt"
    settings = config(tmp_path, evaluation=Evaluation(perplexity=str(text)))
    text.write_text("glimmers are turned twice " * 40)
    first = measured(settings)
    assert measured(settings) == first
    text.write_text("the tide clock stands still " * 40)
    assert measured(settings) != first


def test_drift_from_another_model_under_the_same_name_is_measured_again(tmp_path):
    """From itself the model has not drifted, from one with other weights it has."""
    folder = tmp_path / "reference"
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    settings = config(tmp_path, evaluation=EVALUATION)
    found = []
    for factor in (1.0, 2.0):
        for p in model.parameters():
            p.data.mul_(factor)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found.append(measured(settings, Reference("aligned", str(folder), model_hash(str(folder)))))
    assert found[0]["embedding_drift"] == pytest.approx(0, abs=1e-5)
    assert found[1]["embedding_drift"] > 0.1
