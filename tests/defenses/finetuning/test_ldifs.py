"""LDIFS: the normalized axis, padding, and a zero penalty at the aligned weights."""

import pytest
import torch
from torch.testing import assert_close

from hftlight.defenses.finetuning.ldifs import LDIFS, feature_distance, quarters
from tests.helpers.contract import distance, model_of, train, weights_of


def features(seed, shape=(2, 5, 6)):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def test_each_tokens_vector_has_length_one():
    """The distance from unit vectors to zero features is their mean square: one over the hidden size."""
    gap = feature_distance(features(1), torch.zeros(2, 5, 6).double(), MASK)
    assert_close(gap, torch.tensor(1 / 6).double())


def test_on_the_other_axis_each_dimension_has_length_one_over_the_tokens():
    gap = feature_distance(features(1), torch.zeros(2, 5, 6).double(), MASK, axis="tokens")
    assert_close(gap, torch.tensor(2 * 6 / (8 * 6)).double())


def test_scaling_all_features_changes_nothing():
    one = feature_distance(features(1), features(2), MASK)
    assert_close(feature_distance(7 * features(1), 7 * features(2), MASK), one)


@pytest.mark.parametrize("axis", ["features", "tokens"])
def test_padding_changes_nothing(axis):
    other = features(1).clone()
    other[1, 3:] = 1e6
    assert torch.equal(
        feature_distance(other, features(2), MASK, axis), feature_distance(features(1), features(2), MASK, axis)
    )


def test_half_precision_is_summed_in_float32():
    assert feature_distance(features(1).half() * 3e4, features(2).half(), MASK).dtype == torch.float32


@pytest.mark.parametrize(("depth", "layers"), [(12, [2, 5, 8, 11]), (32, [7, 15, 23, 31]), (2, [0, 1]), (1, [0])])
def test_quarters_of_the_depth(depth, layers):
    assert quarters(depth) == layers


@pytest.mark.parametrize("variant", ["ldifs", "booster"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_first_step_is_plain_fine_tuning(tuning, variant):
    """At the aligned weights the penalty and its gradient are zero."""
    plain = weights_of(train([], tuning, steps=1, model=model_of(tuning)))
    defended = weights_of(train([LDIFS(1e3, variant=variant)], tuning, steps=1, model=model_of(tuning)))
    assert distance(defended, plain) <= 1e-12


def test_the_booster_variant_leaves_out_what_is_large():
    """The variant omits a layer's penalty above 0.1 nats. A huge weight omits all of them, so training is plain."""
    plain = weights_of(train([], steps=4))
    small = weights_of(train([LDIFS(1e-3, variant="booster")], steps=4))
    huge = weights_of(train([LDIFS(1e12, variant="booster")], steps=4))
    assert distance(small, plain) > 1e-9
    assert distance(huge, plain) <= 1e-12


def test_a_layer_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="layers 0 to 1, got"):
        train([LDIFS(layers=[2])])
