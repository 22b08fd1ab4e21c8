"""Leading directions of outputs, stored whole and as a sketch."""

import pytest
import torch
from torch.testing import assert_close

from hftlight.engine.weights import moment
from hftlight.engine.weights.moment import Moment, principal


def outputs(size=24, count=400):
    """Return vectors whose variances along a random basis fall by a factor of four per direction."""
    rng = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size, generator=rng, dtype=torch.float64)).Q
    strengths = 2.0 ** -torch.arange(size, dtype=torch.float64)
    return torch.randn(count, size, generator=rng, dtype=torch.float64) * strengths @ basis.T


def gap(found, expected):
    """Return the largest sine of an angle between two subspaces."""
    return float((found - expected @ (expected.T @ found)).norm(dim=0).max())


@pytest.mark.parametrize("exact", [24, 4], ids=["whole", "sketch"])
def test_the_directions_are_those_of_the_singular_value_decomposition(exact, monkeypatch):
    monkeypatch.setattr(moment, "EXACT", exact)
    monkeypatch.setattr(moment, "SPARE", 6)
    vectors = outputs()
    summed = Moment(24, 3)
    for part in vectors.split(37):
        summed.add(part)
    found, expected = summed.directions(), torch.linalg.svd(vectors).Vh[:3].T
    assert summed.vectors == 400
    assert_close(found.T @ found, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert gap(found, expected) <= (1e-10 if exact == 24 else 1e-3)


def test_a_sketch_holds_a_few_columns(monkeypatch):
    monkeypatch.setattr(moment, "EXACT", 4)
    assert Moment(24, 3)._sum.shape == (24, 3 + moment.SPARE)
    monkeypatch.setattr(moment, "EXACT", 24)
    assert Moment(24, 3)._sum.shape == (24, 24)


@pytest.mark.parametrize("exact", [24, 4], ids=["exact", "randomised"])
@pytest.mark.parametrize("transposed", [False, True])
def test_singular_triplets(exact, transposed, monkeypatch):
    monkeypatch.setattr(moment, "EXACT", exact)
    matrix = outputs(count=60).T if transposed else outputs(count=60)
    before = torch.random.get_rng_state()
    u, s, v = principal(matrix, 3)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    assert_close(s, values[:3], rtol=1e-9, atol=0)
    assert_close(u * s @ v.T, left[:, :3] * values[:3] @ right[:3], rtol=0, atol=1e-9)
    assert torch.equal(torch.random.get_rng_state(), before)
