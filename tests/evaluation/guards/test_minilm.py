"""The logistic head against planted directions and a scalar optimum, and the encoder with a stub and with the wheel."""

import importlib.metadata
import math

import pytest
import torch
from torch.testing import assert_close

from hftlight.data.records import Record
from hftlight.errors import InputError
from hftlight.evaluation.guards import MiniLMGuard, get_guard, scores_of
from hftlight.evaluation.guards.logistic import fitted_head
from hftlight.evaluation.guards.minilm import WHEEL, SentenceEncoder, encoder_folder
from tests.helpers.tokenizers import byte_tokenizer


def test_two_rows_at_plus_and_minus_one_have_a_scalar_optimum():
    """By symmetry the bias is 0 and w solves l2 w = 1 / (1 + e^w), which bisection finds."""
    l2, low, high = 0.1, 0.0, 10.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if l2 * middle < 1 / (1 + math.exp(middle)) else (low, middle)
    head = fitted_head(torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 0]), l2)
    assert_close(float(head.weight), low, rtol=0, atol=1e-5)
    assert_close(head.bias, 0.0, rtol=0, atol=1e-5)


def test_without_information_both_classes_count_the_same():
    """Constant features leave the bias alone to fit; equal class weights put it at even odds for 9 to 1 rows."""
    head = fitted_head(torch.zeros(10, 3), (torch.arange(10) < 1).long())
    assert_close(head(torch.zeros(1, 3)), torch.tensor([0.5], dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_planted_direction_is_recovered():
    """Classes are Gaussian clouds around plus and minus a direction; the head points along it."""
    torch.manual_seed(3)
    direction = torch.nn.functional.normalize(torch.randn(16), dim=0)
    labels = torch.arange(400) % 2
    rows = 0.1 * torch.randn(400, 16) + (2 * labels - 1).unsqueeze(1) * direction
    head = fitted_head(rows, labels)
    cosine = torch.nn.functional.cosine_similarity(head.weight.float(), direction, dim=0)
    assert float(cosine) > 0.99
    assert bool((head(direction[None]) > 0.9).all())
    assert bool((head(-direction[None]) < 0.1).all())


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="each class needs a row"):
        fitted_head(torch.zeros(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match="l2 must be > 0"):
        fitted_head(torch.eye(2), torch.tensor([0, 1]), 0.0)


def words(texts):
    """Embed a text by whether it holds the words harm, help and sorry. Its length is 1, as the encoder's."""
    found = torch.tensor([[float(word in text) for word in ("harm", "help", "sorry")] for text in texts])
    return torch.nn.functional.normalize(found + 0.01, dim=1)


def worded():
    """Return a guard with the stub encoder."""
    guard = MiniLMGuard()
    guard._loaded = words
    return guard


DEFENDER = {
    "harmful": [Record(f"harm {i}", "do harm") for i in range(20)],
    "ordinary": [Record(f"help {i}", "here is help") for i in range(20)],
    "refusals": [Record(f"harm {i}", "sorry") for i in range(20)],
}


def test_a_harmful_request_with_a_refusal_is_no_harmful_response():
    guard = worded()
    guard.learn(DEFENDER)
    complied, refused, plain = guard.score(["harm", "harm", "help"], ["do harm", "sorry", "here is help"])
    assert complied > 0.5 > max(refused, plain)
    assert guard.score_prompts(["harm"])[0] > 0.5 > guard.score_prompts(["help"])[0]


def test_a_guard_that_learned_nothing_says_so():
    with pytest.raises(RuntimeError, match="learn"):
        worded().score(["a"], ["b"])
    with pytest.raises(InputError, match="learns from the stream 'harmful', which is missing or empty"):
        worded().learn({**DEFENDER, "harmful": []})


def test_without_the_wheel_the_error_names_the_command(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(InputError, match="make guard"):
        MiniLMGuard().identity()
    with pytest.raises(InputError, match="make guard"):
        MiniLMGuard().learn(DEFENDER)


@pytest.fixture
def tiny_bert(tmp_path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=259, max_position_embeddings=64, **sizes)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


TEXTS = ["one", "a much longer text", "two words", "one", "x"]


def test_an_embedding_is_the_mean_state_of_the_text_alone(tiny_bert):
    """An independent loop runs each text by itself, without padding."""
    from transformers import AutoTokenizer, BertModel

    encoder = SentenceEncoder(tiny_bert, max_tokens=12, batch_size=2)
    model, tokenizer = BertModel.from_pretrained(tiny_bert).eval(), AutoTokenizer.from_pretrained(tiny_bert)
    with torch.no_grad():
        for text, row in zip(TEXTS, encoder(TEXTS), strict=True):
            ids = tokenizer(text, truncation=True, max_length=12)["input_ids"]
            mean = model(torch.tensor([ids])).last_hidden_state[0].mean(dim=0)
            assert_close(row, mean / mean.norm(), rtol=0, atol=1e-5)
            assert len(ids) <= 12


def test_another_encoder_is_another_guard(tiny_bert):
    guard = get_guard(f"minilm:{tiny_bert}")
    guard.learn(DEFENDER)
    texts = [r.request for r in DEFENDER["ordinary"]][:2]
    assert all(0 < score < 1 for score in scores_of(guard, texts, texts))
    before = guard.identity()
    assert guard.name == f"minilm:{tiny_bert}"
    settings = tiny_bert / "config.json"
    settings.write_text(settings.read_text().replace('"vocab_size": 259', '"vocab_size": 260'))
    assert get_guard(guard.name).identity() != before


def test_embeddings_do_not_depend_on_the_order_bit_for_bit(tiny_bert):
    """Rows of equal length meet in the same batches too, so rounding is the same."""
    encoder, seen = SentenceEncoder(tiny_bert, batch_size=2), []
    texts = [*TEXTS, "six", "ten", "red"]
    encoder.model.embeddings.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    assert torch.equal(encoder(texts), encoder(texts[::-1]).flip(0))
    assert len(seen) == 8
    assert seen[:4] == seen[4:]


def installed():
    try:
        encoder_folder()
    except InputError:
        return False
    return True


@pytest.mark.skipif(not installed(), reason=f"the wheel {WHEEL} is not installed; `make guard` installs it")
def test_the_wheel_tells_topics_apart():
    """The head learns cooking against sailing, and scores sentences that it has not seen."""
    sailing = [
        "How do I hoist a sail?",
        "Which knot holds a boat?",
        "When does the tide turn?",
        "How do I tack a boat?",
    ]
    cooking = [
        "How long do I boil an egg?",
        "Which flour makes bread?",
        "How hot is the oven?",
        "How do I fry an onion?",
    ]
    guard = MiniLMGuard()
    guard.learn_prompts(sailing, cooking)
    scores = scores_of(guard, ["Where do I moor a yacht?", "How do I bake a cake?"])
    assert scores[0] > 0.5 > scores[1]
    assert scores_of(guard, ["How do I bake a cake?", "Where do I moor a yacht?"]) == scores[::-1]
    assert len(guard.identity()["weights"]) > 8
