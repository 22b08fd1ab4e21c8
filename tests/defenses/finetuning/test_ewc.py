"""EWC on logistic regression and quadratics with a known Fisher matrix, and on a random language model."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader

from hftlight import SafetyModule
from hftlight.defenses.finetuning.ewc import EWC, ewc_term, examples
from hftlight.engine import trainable
from tests.helpers.quadratic import OneBatch, Quadratic, quiet_trainer
from tests.helpers.tiny_lm import tiny_lm, token_batch

START = torch.tensor([1.0, -2.0], dtype=torch.float64)
TASK = torch.tensor([2.0, 0.5], dtype=torch.float64)  # curvature of the user's loss
CENTRE = torch.tensor([3.0, 1.0], dtype=torch.float64)
ROOMS = torch.tensor([[0.0, 0.0], [2.0, 1.0], [1.0, -1.0]], dtype=torch.float64)  # centres of three alignment rows
ALIGNMENT = torch.tensor([1.0, 3.0], dtype=torch.float64)
LR, LAM = 0.01, 0.7


def fit(defenses, steps, micro_batches=1, resume=None, **options):
    model = Quadratic(START, LR)
    loader = DataLoader(OneBatch((torch.diag(TASK), CENTRE), steps * micro_batches), batch_size=None)
    trainer = quiet_trainer(max_steps=steps, accumulate_grad_batches=micro_batches, callbacks=defenses, **options)
    trainer.fit(model, loader, ckpt_path=resume)
    return model.w


def three_rows(samples=3, **options):
    """Return EWC on three alignment losses (w - c_k)' A (w - c_k) / 2.

    A batch that is no dictionary is one row.
    """
    rows = [(torch.diag(ALIGNMENT), centre) for centre in ROOMS]
    return EWC(LAM, samples, **options, streams={"alignment": rows})


def after(steps, fisher):
    slope = TASK + 2 * LAM * fisher
    rest = (TASK * CENTRE + 2 * LAM * fisher * START) / slope
    return rest + (1 - LR * slope) ** steps * (START - rest)


def diagonal(defense):
    return torch.cat([defense._diagonal["first"], defense._diagonal["rest"]])


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_two_quadratic_tasks(steps, micro_batches):
    """F_i is the mean of a_i^2 (w_0 - c_k)_i^2.

    The weights follow the path of a quadratic with curvature b_i + 2 lam F_i.
    """
    fisher = (ALIGNMENT**2 * (START - ROOMS) ** 2).mean(dim=0)
    defense = three_rows()
    assert_close(fit([defense], steps, micro_batches), after(steps, fisher), rtol=0, atol=1e-12)
    assert_close(diagonal(defense), fisher, rtol=0, atol=1e-12)
    trace = defense.summary()
    assert (trace["calls"], trace["fisher_sum"]) == (steps, pytest.approx(float(fisher.sum()), abs=1e-12))


def test_it_is_the_gradient_of_the_unhalved_penalty():
    w = START.clone().requires_grad_()
    (expected,) = torch.autograd.grad(LAM * (TASK * (w - CENTRE) ** 2).sum(), [w])
    term = ewc_term({"a": START}, {"a": CENTRE}, {"a": TASK}, LAM)["a"]
    assert_close(term, expected, rtol=0, atol=1e-15)


class Logistic(LightningModule):
    """Logistic regression with the mean negative log-likelihood over the rows of a batch."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def loss(self, batch):
        return F.binary_cross_entropy_with_logits(batch["x"] @ self.w, batch["y"])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LR)


def test_fisher_of_logistic_regression():
    """If label frequencies equal the model's probabilities, F is the diagonal of X' diag(p (1 - p)) X / n.

    Each x occurs four times, and one, two or three of its rows have the label 1. The weights w give x the matching
    probabilities 1/4, 1/2 and 3/4.
    """
    x = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    p = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    w = torch.linalg.solve(x, torch.logit(p))
    y = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.float64).flatten()
    rows = {"x": x.repeat_interleave(4, dim=0), "y": y}
    mixed = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    batches = [{name: t[mixed][start : start + 5] for name, t in rows.items()} for start in (0, 5, 10)]
    defense = EWC(1.0, samples=12, streams={"alignment": batches})
    quiet_trainer(max_steps=1, callbacks=[defense]).fit(Logistic(w), DataLoader([batches[0]], batch_size=None))
    expected = (x.T @ torch.diag(p * (1 - p)) @ x).diagonal() / 3
    assert_close(defense._diagonal["w"], expected, rtol=0, atol=1e-12)


def opposed():
    """Return a batch of two rows whose gradients at w = (0, 0) are (-1/2, -1) and (1/2, 1)."""
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0]], dtype=torch.float64)
    return {"x": x, "y": torch.tensor([1.0, 0.0], dtype=torch.float64)}


@pytest.mark.parametrize(("fisher", "expected"), [("example", [0.25, 1.0]), ("batch", [0.0, 0.0])])
def test_a_sum_of_squares_is_not_the_square_of_a_sum(fisher, expected):
    w = torch.zeros(2, dtype=torch.float64)
    defense = EWC(1.0, samples=2, fisher=fisher, streams={"alignment": [opposed()]})
    quiet_trainer(max_steps=1, callbacks=[defense]).fit(Logistic(w), DataLoader([opposed()], batch_size=None))
    assert defense._diagonal["w"].tolist() == expected


def test_by_batch_it_is_the_unnormalized_sum_over_batches():
    """EWC reads whole batches until they have enough rows: five rows in batches of two are three batches."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, 2, generator=generator, dtype=torch.float64)
    batches = [{"x": each, "y": torch.tensor([1.0, 0.0], dtype=torch.float64)} for each in x]
    w = torch.tensor([0.3, -0.2], dtype=torch.float64)
    defense = EWC(1.0, samples=5, fisher="batch", streams={"alignment": batches})
    quiet_trainer(max_steps=1, callbacks=[defense]).fit(Logistic(w.clone()), DataLoader([opposed()], batch_size=None))
    residuals = torch.sigmoid(x @ w) - torch.tensor([1.0, 0.0], dtype=torch.float64)
    gradients = (residuals[..., None] * x).mean(dim=1)
    assert_close(defense._diagonal["w"], (gradients[:3] ** 2).sum(dim=0), rtol=0, atol=1e-12)


def test_only_so_many_rows_count():
    """With two samples of three rows, the mean is over two. With five samples, the stream starts again."""
    squares = ALIGNMENT**2 * (START - ROOMS) ** 2
    for samples, expected in ((2, squares[:2].mean(dim=0)), (5, (squares.sum(dim=0) + squares[:2].sum(dim=0)) / 5)):
        defense = three_rows(samples)
        fit([defense], 1)
        assert_close(diagonal(defense), expected, rtol=0, atol=1e-12)


def test_a_batch_is_cut_where_enough_rows_are_seen():
    """At w = 0 a row has the gradient (1/2 - y) x. Three of the four rows in two batches count."""
    x = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 4.0], [9.0, 9.0]], dtype=torch.float64)
    batches = [{"x": x[k : k + 2], "y": torch.ones(2, dtype=torch.float64)} for k in (0, 2)]
    defense = EWC(1.0, samples=3, streams={"alignment": batches})
    quiet_trainer(max_steps=1, callbacks=[defense]).fit(
        Logistic(torch.zeros(2, dtype=torch.float64)), DataLoader([opposed()], batch_size=None)
    )
    assert_close(defense._diagonal["w"], (x[:3] ** 2).sum(dim=0) / 4 / 3, rtol=0, atol=1e-12)


def test_rows_of_a_batch():
    batch = {"input_ids": torch.arange(6).view(3, 2), "id": ["a", "b", "c"], "scale": 2.0, "name": "abc"}
    rows = examples({**batch, "one": torch.tensor(5)})
    assert [row["input_ids"].tolist() for row in rows] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert [row["id"] for row in rows] == [["a"], ["b"], ["c"]]
    assert all((row["scale"], row["name"], int(row["one"])) == (2.0, "abc", 5) for row in rows)
    assert examples((1, 2)) == [(1, 2)]


class Before(Callback):
    """Set distinctive modes and gradients before the measurement, and record the state."""

    def __init__(self):
        self.state = None

    def on_train_start(self, trainer, pl_module):
        pl_module.model.base_model.model.model.layers[0].eval()  # one part is not in train mode
        for p in trainable(pl_module).values():
            p.grad = torch.full_like(p, 2.0)
        self.state = state(pl_module)


def state(module):
    return (
        {name: p.detach().clone() for name, p in module.named_parameters()},
        {name: p.grad.clone() for name, p in trainable(module).items()},
        {name: m.training for name, m in module.named_modules()},
        torch.get_rng_state(),
    )


def same(left, right):
    for a, b in zip(left[:2], right[:2], strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert left[2] == right[2]
    assert torch.equal(left[3], right[3])


class Stop(Exception):
    """End a fit at once."""


class After(Callback):
    def on_train_start(self, trainer, pl_module):
        self.state = state(pl_module)
        raise Stop


def test_the_measurement_leaves_everything_as_found():
    """Weights, ``.grad``, modes and the random state stay the same.

    Dropout is off in the measurement, so its rate does not change the diagonal.
    """
    diagonals = []
    for dropout in (0.0, 0.5):
        torch.manual_seed(2)
        module = SafetyModule(tiny_lm(lora=True, dropout=dropout), lr=LR)
        defense = EWC(1.0, 4, streams={"alignment": [token_batch(5)]})
        before, behind = Before(), After()
        with pytest.raises(Stop):
            quiet_trainer(max_steps=1, callbacks=[before, defense, behind]).fit(
                module, DataLoader([token_batch(0)], batch_size=None)
            )
        same(before.state, behind.state)
        diagonals.append(dict(defense._diagonal))
    assert all(torch.equal(diagonals[0][name], diagonals[1][name]) for name in diagonals[0])
    assert all(f.min() >= 0 and f.max() > 0 for f in diagonals[0].values())


def test_an_exception_in_the_measurement_leaves_everything_as_found():
    class Failing(SafetyModule):
        def loss(self, batch):
            torch.rand(3)
            if batch["input_ids"].sum() == last["input_ids"].sum():
                raise FloatingPointError("inside the pass")
            return super().loss(batch)

    last = {name: t[2:3] for name, t in token_batch(5).items()}
    module, before = Failing(tiny_lm(lora=True, dropout=0.1), lr=LR), Before()
    defense = EWC(1.0, 3, streams={"alignment": [token_batch(5)]})
    with pytest.raises(FloatingPointError):
        quiet_trainer(max_steps=1, callbacks=[before, defense]).fit(
            module, DataLoader([token_batch(0)], batch_size=None)
        )
    same(before.state, state(module))


def test_resumed_after_any_step_neither_measures_nor_draws_again(tmp_path):
    def run(folder, resume=None):
        checkpoints = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
        defense = three_rows()
        weights = fit([defense, checkpoints], 5, 2, resume, enable_checkpointing=True)
        return weights, defense.state_dict()

    expected, before = run(tmp_path / "whole")
    for step in range(1, 5):
        resumed, again = run(tmp_path / f"from {step}", tmp_path / "whole" / f"step={step}.ckpt")
        assert torch.equal(resumed, expected), step
        assert (again["drawn"], again["trace"]) == (before["drawn"], before["trace"]), step
        for part in ("start", "diagonal"):
            assert all(torch.equal(again[part][name], before[part][name]) for name in before[part])


def test_a_fresh_adapter_is_held_in_b_only():
    """While B is 0 the loss does not depend on A, so the Fisher of A is 0."""
    model = tiny_lm(lora=True)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(p)
    defense = EWC(1.0, 4, streams={"alignment": [token_batch(5)]})
    quiet_trainer(max_steps=1, callbacks=[defense]).fit(
        SafetyModule(model, lr=LR), DataLoader([token_batch(0)], batch_size=None)
    )
    for name, fisher in defense._diagonal.items():
        assert (fisher.max() > 0) == ("lora_B" in name)


def test_gradients_that_overflow_are_named():
    batch = {"x": torch.full((1, 2), 1e200, dtype=torch.float64), "y": torch.ones(1, dtype=torch.float64)}
    defense = EWC(1.0, 1, streams={"alignment": [batch]})
    with pytest.raises(RuntimeError, match="EWC: a squared gradient of the alignment data is not finite"):
        quiet_trainer(max_steps=1, callbacks=[defense]).fit(
            Logistic(torch.zeros(2, dtype=torch.float64)), DataLoader([opposed()], batch_size=None)
        )


@pytest.mark.parametrize(("rows", "expected"), [(2, 2.0), (4, 0.5)])
def test_the_sum_over_batches_is_m_over_b_times_the_mean_over_rows(rows, expected):
    """Each of eight rows has a gradient on its own coordinate: m = 4 batches of b = 2 rows, or 2 of 4."""
    x = torch.diag(torch.arange(1.0, 9.0, dtype=torch.float64))
    batches = [{"x": part, "y": torch.ones(len(part), dtype=torch.float64)} for part in x.split(rows)]
    diagonals = []
    for fisher in ("example", "batch"):
        defense = EWC(1.0, samples=8, fisher=fisher, streams={"alignment": batches})
        quiet_trainer(max_steps=1, callbacks=[defense]).fit(
            Logistic(torch.zeros(8, dtype=torch.float64)), DataLoader([batches[0]], batch_size=None)
        )
        diagonals.append(defense._diagonal["w"])
    assert_close(diagonals[1] / diagonals[0], torch.full((8,), expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_published_setting():
    """Every script sets ``lamb`` to 1e9, on the unnormalized sum. The parser's default of 1e-3 is never used."""
    repo = EWC(**EWC.presets["repo"])
    assert (repo.lam, repo.samples, repo.fisher) == (1e9, 2000, "batch")
