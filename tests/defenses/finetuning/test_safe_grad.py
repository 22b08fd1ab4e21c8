"""SafeGrad's surgery in closed form, and its place before other defenses."""

import pytest
import torch
from torch.testing import assert_close

from hftlight.defenses.finetuning.l2_sp import L2SP
from hftlight.defenses.finetuning.safe_grad import SafeGrad, surgery
from hftlight.engine.step.slots import in_order
from tests.helpers.contract import data_module, distance, model_of, train, weights_of
from tests.helpers.quadratic import Quadratic, quiet_trainer


def vector(*entries):
    """Return the entries as a vector of two tensors, so that a projection per tensor fails."""
    whole = torch.tensor(entries, dtype=torch.float64)
    return {"first": whole[:1], "rest": whole[1:]}


def joined(parts):
    return torch.cat([parts["first"], parts["rest"]])


def test_a_conflict_is_projected_away():
    """U = (1, -2) and a = (-1, 3) have the inner product -7, so u + 7/10 a = (0.3, 0.1) is orthogonal to a."""
    task, alignment = vector(1.0, -2.0), vector(-1.0, 3.0)
    term, removed = surgery(task, alignment, rho=0.0)
    assert_close(joined(task) + joined(term), torch.tensor([0.3, 0.1], dtype=torch.float64), rtol=0, atol=1e-15)
    assert float(joined(alignment) @ (joined(task) + joined(term))) == pytest.approx(0, abs=1e-14)
    assert float(removed) == pytest.approx(7 / 10**0.5)


def test_agreement_over_all_tensors_is_no_conflict():
    """U = (1, -2) and a = (3, 1) have the inner product 1, although the second entry alone conflicts."""
    term, removed = surgery(vector(1.0, -2.0), vector(3.0, 1.0), rho=0.5)
    assert_close(joined(term), torch.tensor([1.5, 0.5], dtype=torch.float64), rtol=0, atol=1e-15)
    assert float(removed) == 0


@pytest.mark.parametrize("seed", range(20))
def test_the_result_has_at_least_the_share_rho_of_the_alignment_gradient(seed):
    """<u', a> >= rho |a|^2, with equality in conflict."""
    rng = torch.Generator().manual_seed(seed)
    u, a = (torch.randn(7, generator=rng, dtype=torch.float64) for _ in range(2))
    term, removed = surgery(vector(*u), vector(*a), rho=0.3)
    along = float(a @ (u + joined(term)))
    least = 0.3 * float(a @ a)
    assert along == pytest.approx(least) if float(u @ a) < 0 else along > least
    assert (float(removed) > 0) == (float(u @ a) < 0)


def test_without_an_alignment_gradient_nothing_is_added():
    term, removed = surgery(vector(1.0, -2.0), vector(0.0, 0.0), rho=1.0)
    assert not joined(term).any()
    assert float(removed) == 0


def test_the_gradient_of_a_missing_parameter_counts_as_zero():
    """Parameters without a task gradient have no entry: a = (-1, 3) conflicts with u = (1, 0)."""
    term, _ = surgery({"first": torch.tensor([1.0], dtype=torch.float64)}, vector(-1.0, 3.0), rho=0.0)
    assert_close(joined(term), torch.tensor([-0.1, 0.3], dtype=torch.float64), rtol=0, atol=1e-15)


def test_the_projection_comes_before_the_pull_of_another_defense():
    """The pull of L2SP is not part of the user's gradient, wherever it stands in the list."""
    lists = [[SafeGrad(), L2SP(0.5)], [L2SP(0.5), SafeGrad()]]
    assert [[type(d) for d in in_order(some)] for some in lists] == [[SafeGrad, L2SP]] * 2
    first, second = (weights_of(train(some)) for some in lists)
    assert distance(first, second) == 0


def test_the_projection_alone_and_the_term_alone_differ():
    both, projected, added = (
        weights_of(train([d])) for d in (SafeGrad(4.0), SafeGrad(0.0), SafeGrad(4.0, project=False))
    )
    assert distance(both, projected) > 1e-6
    assert distance(both, added) > 1e-9


def test_the_first_step_is_plain_because_the_alignment_gradient_is_zero():
    plain, defended = (weights_of(train(some, steps=1)) for some in ([], [SafeGrad()]))
    plain_later, defended_later = (weights_of(train(some, steps=2)) for some in ([], [SafeGrad()]))
    assert distance(plain, defended) == 0
    assert distance(plain_later, defended_later) > 1e-9


def test_a_module_without_an_aligned_model_is_refused_by_name():
    module = Quadratic(torch.ones(2, dtype=torch.float64), lr=0.1)
    defense = SafeGrad(streams={"alignment": [torch.ones(2)]})
    with pytest.raises(TypeError, match=r"SafeGrad compares with the aligned model, which Quadratic does not offer"):
        quiet_trainer(max_steps=1, callbacks=[defense]).fit(module, [torch.ones(2)])


def test_the_summary_counts_conflicts():
    defense = SafeGrad()
    module = train([defense], model=model_of("lora"), data=data_module(defense.stage))
    assert module._aligned is None
    summary = defense.summary()
    assert summary["calls"] == 4
    assert 0 <= summary["conflicts"] <= 3
    assert summary["divergence"] > 0
