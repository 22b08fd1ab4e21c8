"""KL in closed form, against torch's own divergence on full logits, and in blocks of a few rows."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from hftlight.data.records import Record
from hftlight.data.templates import get_template
from hftlight.defenses.finetuning import kl
from hftlight.defenses.finetuning.constrained_sft import ConstrainedSFT
from hftlight.defenses.finetuning.kl import KL, divergence
from hftlight.defenses.finetuning.ldifs import LDIFS
from hftlight.engine import Stage, count_passes
from tests.defenses.rows.kl import response_logits
from tests.helpers.contract import FixedOrder, Slow, distance, model_of, train, weights_of
from tests.helpers.tokenizers import CHATML, byte_tokenizer


def logits(seed, rows=6, outcomes=5, dtype=torch.float64):
    return torch.randn(rows, outcomes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_two_outcomes():
    """For q = (4/5, 1/5) and p = (1/2, 1/2): 0.8 ln 1.6 + 0.2 ln 0.4, and 0.5 ln(5/8) + 0.5 ln(5/2)."""
    p, q = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0.8, 0.2]], dtype=torch.float64).log()
    forward = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    reverse = 0.5 * math.log(0.625) + 0.5 * math.log(2.5)
    assert float(divergence(p, q)) == pytest.approx(forward, abs=1e-14)
    assert float(divergence(p, q, "reverse")) == pytest.approx(reverse, abs=1e-14)


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float64, 1e-15), (torch.float32, 1e-7)])
def test_the_gradient_is_p_minus_q(dtype, precision):
    p, q = logits(0, dtype=dtype).requires_grad_(), logits(1, dtype=dtype)
    (3 * divergence(p, q)).backward()
    expected = 3 * (p.detach().double().softmax(-1) - q.double().softmax(-1))
    assert_close(p.grad.double(), expected, rtol=0, atol=3 * precision)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_both_gradients_are_those_of_the_value(direction):
    p, q = logits(0).requires_grad_(), logits(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda each: divergence(each, q, direction), [p])
    divergence(p, q, direction).backward()
    assert q.grad is None


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_aligned_model_value_and_gradient_are_exactly_zero(direction, dtype):
    p = (30 * logits(0, dtype=dtype)).requires_grad_()
    value = divergence(p, p.detach().clone(), direction)
    value.backward()
    assert float(value) == 0
    assert not p.grad.any()


class Sizes(TorchDispatchMode):
    """Record the size of the largest tensor that an operation creates, views excluded."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("entries", [1, 11, 25])
def test_a_few_rows_at_a_time_give_the_same(direction, entries, monkeypatch):
    p, q = logits(0).requires_grad_(), logits(1)
    whole = divergence(p, q, direction)
    (expected,) = torch.autograd.grad(whole, p)
    monkeypatch.setattr(kl, "ENTRIES", entries)
    with Sizes() as sizes:
        parts = divergence(p, q, direction)
    assert sizes.largest <= max(entries, q.shape[1])  # no softmax is larger than ENTRIES or one row
    assert_close(parts, whole, rtol=0, atol=1e-14)
    (gradient,) = torch.autograd.grad(parts, p)
    assert torch.equal(gradient, expected)


class SlowReverse(Slow):
    def begin(self):
        self.aligned = copy.deepcopy(self.model).eval()

    def loss(self, batch):
        with torch.no_grad():
            q = torch.softmax(response_logits(self.aligned, batch), -1)
        p = torch.softmax(response_logits(self.model, batch), -1)
        return super().loss(batch) + 3.0 * (p * (p / q).log()).sum(-1).mean()


class SlowSequence(SlowReverse):
    """The authors' own code of the baseline, on all positions of the padded batch."""

    def loss(self, batch):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            teacher = self.aligned(**inputs).logits
        student = self.model(**inputs).logits
        term = torch.nn.KLDivLoss(reduction="batchmean")(F.log_softmax(student, dim=1), F.softmax(teacher, dim=1))
        return Slow.loss(self, batch) + 3.0 * term


@pytest.mark.parametrize(
    ("options", "slow"),
    [({"direction": "reverse"}, SlowReverse), ({"axis": "sequence"}, SlowSequence)],
    ids=["reverse", "sequence"],
)
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_other_modes_equal_a_slow_loop(options, slow, tuning):
    defense = KL(3.0, **options)
    fast = weights_of(train([defense], tuning, accumulate=2))
    expected = slow(model_of(tuning), Stage.FINETUNING, accumulate=2).run()
    assert distance(fast, expected) <= 1e-10
    assert distance(fast, weights_of(train([KL(3.0)], tuning, accumulate=2))) > 1e-7
    assert distance(fast, weights_of(train([defense], tuning, accumulate=2, checkpointing=True))) <= 1e-10


def fresh_adapter(dropout=0.3):
    """Return a model with a fresh adapter: B is zero, and dropout acts on its input in training."""
    model = model_of("lora", dropout)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.zero_()
    return model


@pytest.mark.parametrize("options", [{}, {"direction": "reverse"}, {"axis": "sequence"}], ids=str)
def test_the_first_step_is_that_of_plain_fine_tuning(options):
    """The divergence has a zero gradient at the aligned model. Only the second step differs from plain fine-tuning."""
    for steps in (1, 2):
        torch.manual_seed(0)
        plain = weights_of(train([], model=fresh_adapter(), steps=steps))
        torch.manual_seed(0)
        defended = weights_of(train([KL(50.0, **options)], model=fresh_adapter(), steps=steps))
        assert (distance(defended, plain) <= 1e-14) == (steps == 1)


def test_a_large_weight_keeps_the_aligned_model():
    drift = []
    for lam in (1e-6, 10.0, 100.0):
        defense = KL(lam)
        train([defense], lr=0.01, steps=40)
        drift.append(defense.summary()["divergence"])
    assert drift[2] < 0.5 * drift[1] < 0.25 * drift[0]


class Uneven(FixedOrder):
    """Rows whose responses have from one to eight letters."""

    def __init__(self, rows_per_batch, **options):
        tokenizer = byte_tokenizer(chat_template=CHATML)
        rows = [Record(f"ask {i:02d}", "xyzabcde"[: 1 + i % 8], role="task") for i in range(16)]
        super().__init__(tokenizer, get_template("chat", tokenizer), "task", rows_per_batch, task=rows, **options)


def test_over_a_window_every_token_counts_alike():
    model = model_of("lora")
    whole = train([KL(3.0)], model=copy.deepcopy(model), data=Uneven(4))
    for average, equal in (("window", True), ("micro", False)):
        cut = train([KL(3.0)], model=copy.deepcopy(model), data=Uneven(1, average=average), accumulate=4)
        gap = distance(weights_of(cut), weights_of(whole))
        assert gap <= 1e-12 if equal else gap > 1e-6


def test_one_pass_of_the_aligned_model_serves_all():
    defenses = [KL(1.0), LDIFS(1.0), ConstrainedSFT(online=True)]
    model, calls = model_of("lora"), []
    handle = model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    train(defenses, model=model, steps=3, accumulate=2)
    handle.remove()
    assert count_passes(defenses, accumulate=2) == (4, 2)
    assert calls == [True, False] * 6


def test_the_published_settings():
    paper, repo = (KL(**KL.presets[name]) for name in ("paper", "repo"))
    assert (paper.lam, paper.axis) == (1e-3, "vocabulary")
    assert (repo.lam, repo.axis, repo.direction) == (0.1, "sequence", "forward")
