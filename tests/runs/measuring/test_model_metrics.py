"""Losses by hand. Another text, other rows or another reference model is a new measurement."""

from dataclasses import replace

import pytest

from hftlight.config import Evaluation
from hftlight.data.records import Record
from hftlight.data.templates import SystemSlot, get_template
from hftlight.data.tokens import collate, encode
from hftlight.evaluation.stats.intervals import ratio
from hftlight.models.load import load_model, load_tokenizer
from hftlight.models.serving import Artifact
from hftlight.runs.measuring.model_metrics import Reference, model_metrics
from hftlight.runs.prepare import test_sets as sets_of
from hftlight.runs.sources import Sources
from tests.runs.test_run import EVALUATION, config


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))


def measured(settings, reference=None):
    tests = sets_of(settings, None, Sources(settings.data))
    rows = model_metrics(Artifact.of("tiny"), settings, tests, SystemSlot(None), reference)
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
    """The model's drift from itself is 0, from a model with other weights above 0.1."""
    folder = tmp_path / "reference"
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    settings = config(tmp_path, evaluation=EVALUATION)
    results = []
    for factor in (1.0, 2.0):
        for p in model.parameters():
            p.data.mul_(factor)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        results.append(measured(settings, Reference("aligned", Artifact.of(folder))))
    assert results[0]["embedding_drift"] == pytest.approx(0, abs=1e-5)
    assert results[1]["embedding_drift"] > 0.1


def losses_of(settings, **rows):
    tests = replace(sets_of(settings, None, Sources(settings.data)), **rows)
    metrics = model_metrics(Artifact.of("tiny"), settings, tests, SystemSlot("be kind"))
    return {row["metric"]: row for row in metrics}


def test_losses_are_per_response_token_with_rows_as_the_unit(tmp_path):
    """The losses equal the model's own, row by row, with the serving system text. A too long row is dropped."""
    settings = config(tmp_path, max_tokens=200)
    rows = [Record(f"ask {i}", "say " * (1 + 3 * i), role="alignment") for i in range(4)]
    too_long = Record("ask", "say " * 300, role="alignment")
    losses = losses_of(settings, alignment_rows=[*rows, too_long], validation_rows=rows[:1])
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    template = get_template(settings.template, tokenizer)
    sums, counts = [], []
    for record in rows:
        example = encode(record, template, tokenizer, 10**9, system="be kind")
        batch = collate([example], 0)
        counts.append(len(example.input_ids) - example.prompt_length)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        sums.append(float(model(**inputs).loss.detach()) * counts[-1])
    loss, validation = losses["alignment_loss"], losses["harmful_validation_loss"]
    assert (loss["value"], loss["count"]) == (pytest.approx(sum(sums) / sum(counts), rel=1e-4), 4)
    assert (loss["low"], loss["high"]) == pytest.approx(ratio(sums, counts), rel=1e-3)
    assert loss["unit"] == "nats per token"
    assert validation["value"] == pytest.approx(sums[0] / counts[0], rel=1e-4)
    assert validation["low"] is None


def test_a_loss_without_rows_is_absent_and_other_rows_are_measured_anew(tmp_path):
    settings = config(tmp_path)
    assert losses_of(settings) == {}
    one, other = ([Record("ask", text, role="alignment")] for text in ("say it", "never say it"))
    assert set(losses_of(settings, alignment_rows=one)) == {"alignment_loss"}
    assert losses_of(settings, alignment_rows=one) != losses_of(settings, alignment_rows=other)
    short = replace(settings, max_tokens=1)
    assert losses_of(short, alignment_rows=one) == {}
