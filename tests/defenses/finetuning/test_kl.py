"""KL against slow loops, with torch's own divergence on full logits."""

import copy

import pytest
import torch
from torch.nn import functional as F

from hftlight.data.records import Record
from hftlight.data.templates import get_template
from hftlight.defenses.finetuning.constrained_sft import ConstrainedSFT
from hftlight.defenses.finetuning.kl import KL
from hftlight.defenses.finetuning.ldifs import LDIFS
from hftlight.engine import Stage, count_passes
from tests.defenses.rows.kl import response_logits
from tests.helpers.contract import FixedOrder, Slow, distance, model_of, train, weights_of
from tests.helpers.tokenizers import CHATML, byte_tokenizer


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
