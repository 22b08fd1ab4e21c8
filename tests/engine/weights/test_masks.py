"""Masks: exact counts, ties, set differences, bits, and rows that are spread over ranks."""

import pytest
import torch

from hftlight.engine.weights.masks import (
    Overlap,
    chance_overlap,
    count_of,
    digest,
    largest,
    minus,
    overlap,
    pack,
    unpack,
)
from hftlight.engine.weights.shards import Share
from tests.helpers.repairs import on_shards


@pytest.mark.parametrize(
    ("fraction", "entries", "count"),
    [(0.29, 100, 29), (0.1, 30, 3), (0.7, 10, 7), (0.57, 100, 57), (0.099, 10, 0), (1.0, 7, 7), (0.0, 7, 0)],
)
def test_a_fraction_of_entries_is_rounded_down_after_the_products_own_rounding(fraction, entries, count):
    """0.29 * 100 is 28.999999999999996 and 0.57 * 100 is 56.99999999999999 in floating point."""
    assert count_of(fraction, entries) == count


@pytest.mark.parametrize("count", [0, 1, 5, 34, 35])
def test_exactly_as_many_as_asked_for(count):
    scores = torch.rand(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = largest(scores, count)
    assert mask.sum() == count
    if 0 < count < 35:
        assert scores[mask].min() > scores[~mask].max()


def test_ties_go_to_the_first_entry_in_the_order_of_the_matrix():
    scores = torch.tensor([[1.0, 3.0, 1.0], [1.0, 0.0, 3.0]])
    assert largest(scores, 4).tolist() == [[True, True, True], [False, False, True]]
    assert largest(torch.zeros(2, 3), 4).tolist() == [[True] * 3, [True, False, False]]


def test_the_whole_matrix_is_one_group():
    """A mask per row would select two entries in each row."""
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, 2.0, 3.0, 4.0]])
    assert largest(scores, 4).sum(dim=1).tolist() == [4, 0]


def test_permuting_rows_permutes_the_mask():
    scores = torch.rand(6, 4, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert torch.equal(largest(scores[order], 9), largest(scores, 9)[order])


@pytest.mark.parametrize("sizes", [[3, 2], [1, 4], [5, 0]])
def test_rows_on_several_ranks_give_the_same_mask(sizes):
    scores = torch.randint(0, 4, (5, 7), generator=torch.Generator().manual_seed(2)).float()
    other = torch.randint(0, 4, (5, 7), generator=torch.Generator().manual_seed(3)).float()
    for count in (1, 11, 20):
        whole, against = largest(scores, count), largest(other, 9)

        def work(rows, count=count):
            mine = slice(rows.start, rows.stop)
            s, u = largest(scores[mine], count, rows), largest(other[mine], 9, rows)
            return s, overlap(s, u, rows, 7)

        parts = on_shards(sizes, work)
        assert torch.equal(torch.cat([mask for mask, _ in parts]), whole)
        both = int((whole & against).sum())
        assert all(counts == Overlap(count, 9, both, 35) for _, counts in parts)


def test_the_difference_of_sets():
    s = torch.tensor([[True, True, False, False]])
    u = torch.tensor([[True, False, True, False]])
    assert minus(s, u).tolist() == [[False, True, False, False]]
    assert not minus(s, s).any()
    assert torch.equal(minus(s, ~s), s)
    assert minus(s, None) is s


def test_overlap_counts_entries_also_of_row_masks():
    s, u = torch.tensor([[True], [True], [False], [False]]), torch.tensor([[True], [False], [True], [False]])
    result = overlap(s, u, Share(0, 4, 4), columns=5)
    assert result == Overlap(10, 10, 5, 20)
    assert result.jaccard == pytest.approx(1 / 3)
    assert result.fraction == 0.25
    assert overlap(s, None, Share(0, 4, 4), columns=5) == Overlap(10, 0, 0, 20)
    assert Overlap(0, 0, 0, 8).jaccard == 0


def test_random_sets_overlap_as_expected():
    generator = torch.Generator().manual_seed(4)
    s, u = (largest(torch.rand(400, 400, generator=generator), count_of(f, 160_000)) for f in (0.3, 0.2))
    assert overlap(s, u, Share(0, 400, 400), 400).jaccard == pytest.approx(chance_overlap(0.3, 0.2), abs=0.005)
    assert chance_overlap(0.2, 0.3) == pytest.approx(0.06 / 0.44)
    assert chance_overlap(0.0, 0.0) == 0.0


@pytest.mark.parametrize("shape", [(3, 7), (1, 1), (4, 8), (2, 1), (0, 3)])
def test_bits_and_back(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.5
    bits = pack(mask)
    assert bits.dtype == torch.uint8
    assert len(bits) == -(-mask.numel() // 8)
    assert torch.equal(unpack(bits, shape), mask)


def test_bits_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"shape \[5, 8\] needs 5 bytes, got 3"):
        unpack(pack(torch.ones(3, 8, dtype=torch.bool)), (5, 8))


def test_a_digest_names_masks_and_their_places():
    mask = torch.tensor([[True, False]])
    assert digest({"a": pack(mask), "b": pack(~mask)}) == digest({"b": pack(~mask), "a": pack(mask)})
    assert digest({"a": pack(mask)}) != digest({"a": pack(~mask)})
    assert digest({"a": pack(mask)}) != digest({"b": pack(mask)})
