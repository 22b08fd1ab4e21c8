"""Regions by hand."""

import torch

from hftlight.engine.weights.masks import minus
from hftlight.engine.weights.regions import top


def test_the_region_is_the_top_of_safety_without_the_top_of_utility():
    safety = torch.tensor([[5.0, 4.0, 3.0], [2.0, 1.0, 0.0]])
    utility = torch.tensor([[9.0, 0.0, 8.0], [0.0, 0.0, 7.0]])
    assert minus(top(safety, 0.5), top(utility, 0.5)).tolist() == [[False, True, False], [False] * 3]
    assert not minus(top(safety, 0.5), top(safety, 0.5)).any()
    assert minus(top(safety, 0.5), top(5 - safety, 0.5)).tolist() == [[True] * 3, [False] * 3]
    assert [int(top(safety, ratio).sum()) for ratio in (0, 0.1, 0.2, 0.5, 0.99, 1)] == [0, 0, 1, 3, 5, 6]
