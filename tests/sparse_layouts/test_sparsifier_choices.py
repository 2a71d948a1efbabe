"""What each sparsifier keeps, compared with sorted lists of Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts.sparsifiers import random_keys
from tests.sparse_layouts.sparsifier_cases import (
    DTYPES,
    FLOATS,
    largest,
    numbers,
    seeded,
    size_of,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.001, 0.25, 0.5, 0.999, 1.0])
def test_magnitude_keeps_the_largest_and_the_first_of_equals(
    dtype: torch.dtype, density: float
) -> None:
    for dense in (numbers(7, 19, dtype=dtype), torch.zeros(3, 5, dtype=dtype)):
        expected = largest(size_of(dense), round(density * dense.numel()))
        assert torch.equal(sl.Magnitude(density).keep(dense), expected)
        if dtype in FLOATS:
            assert torch.equal(sl.Magnitude(density).choose(dense.abs()), expected)


@given(
    st.lists(st.floats(width=32, allow_nan=False), max_size=40),
    st.floats(min_value=0, max_value=1),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_magnitude_of_any_numbers(values: list[float], density: float, dtype: torch.dtype) -> None:
    dense = torch.tensor(values, dtype=dtype)
    expected = largest(size_of(dense), round(density * len(values)))
    assert torch.equal(sl.Magnitude(density).keep(dense), expected)


def test_magnitude_over_many_chunks() -> None:
    dense = torch.randn(700, 1000)  # six chunks
    dense[100:200] = dense[300:400]
    kept = sl.Magnitude(0.1).keep(dense)
    at_least = dense.abs().flatten().sort(descending=True).values[69_999]
    assert kept.sum() == 70_000
    assert dense[kept].abs().min() == at_least
    assert dense[~kept].abs().max() <= at_least
    assert torch.equal(sl.Magnitude(0.1).choose(dense.abs()), kept)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_threshold_is_torchs_comparison(dtype: torch.dtype) -> None:
    dense = torch.tensor([[-0.1, 0.1, 0.2, -0.3, 0.0]], dtype=dtype)
    assert torch.equal(sl.Threshold(0.1).keep(dense), dense.abs() > 0.1)
    assert torch.equal(sl.Threshold(0).keep(dense), dense != 0)


def test_random_keeps_an_exact_count_and_others_every_time() -> None:
    dense, sparsifier = torch.zeros(100, 70), sl.Random(0.37)
    first, second = sparsifier.keep(dense), sparsifier.keep(dense)
    assert first.sum() == second.sum() == round(0.37 * 7000)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    again = sl.Random(0.37).keep(dense)
    torch.manual_seed(0)
    assert torch.equal(sl.Random(0.37).keep(dense), again)
    assert sl.Random(0.0).keep(dense).sum() == 0
    assert sl.Random(1.0).keep(dense).all()


@pytest.mark.parametrize("number", [1000, 100_000])  # sorted; by histograms, in chunks
def test_random_keeps_the_largest_of_its_numbers(number: int) -> None:
    generator = torch.Generator().manual_seed(7)
    seed = torch.randint(-(2**63), 2**63 - 1, (), generator=generator)
    keys = random_keys(0, number, seed)
    assert torch.equal(torch.cat([random_keys(0, 10, seed), random_keys(10, 5, seed)]), keys[:15])
    assert keys.unique().numel() > 0.99 * number
    assert keys.min() >= 0
    expected = largest(keys, number // 10)
    assert torch.equal(seeded(0.1).keep(torch.zeros(number)), expected)
    parts = seeded(0.1).chunks(torch.zeros(number // 10, 10), rows=7)
    assert torch.equal(torch.cat([part for _, part in parts]).flatten(), expected)


def test_random_by_a_generator_leaves_the_default_one_alone() -> None:
    dense = torch.zeros(100, 70)
    state = torch.random.get_rng_state()
    kept = seeded(0.1).keep(dense)
    assert torch.equal(seeded(0.1).choose(dense), kept)
    assert torch.equal(seeded(0.1).keep(dense.mT.contiguous().mT), kept)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_random_is_fair() -> None:
    """Of 1000 draws of 8 among 32 every entry has about a quarter, and every pair about its share:
    six standard deviations of a binomial count, which a fair draw exceeds once in 1e9.
    """
    draws, number, taken = 1000, 32, 8
    generator = torch.Generator().manual_seed(3)
    sparsifier = sl.Random(taken / number, generator=generator)
    kept = torch.stack([sparsifier.keep(torch.zeros(number)) for _ in range(draws)]).double()
    together = kept.T @ kept
    for share, counts in (
        (taken / number, together.diagonal()),
        (
            taken * (taken - 1) / (number * (number - 1)),
            together[~torch.eye(number, dtype=torch.bool)],
        ),
    ):
        spread = 6 * math.sqrt(draws * share * (1 - share))
        assert (counts - draws * share).abs().max() < spread


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 2), (2, 4), (4, 4), (3, 8), (8, 16), (5, 48)])
def test_nm_keeps_n_of_every_m_and_the_first_of_equals(n: int, m: int) -> None:
    for dense in (numbers(9, 3 * m), torch.zeros(4, m), torch.randn(2, 5, 2 * m)):
        groups = dense.abs().reshape(-1, m)
        expected = torch.stack([largest(group, n) for group in groups]).view(dense.shape)
        assert torch.equal(sl.NM(n, m).keep(dense), expected)


def test_nm_says_how_to_pad() -> None:
    dense = torch.randn(3, 10)
    with pytest.raises(ValueError, match=r"m=4 does not divide.* 10 .*pad\(x, \(0, 2\)\)"):
        sl.NM(2, 4).keep(dense)
    with pytest.raises(ValueError, match="m=4 does not divide"):
        list(sl.NM(2, 4).chunks(dense))
    assert sl.NM(2, 4).keep(torch.nn.functional.pad(dense, (0, 2)))[:, 8:].sum() == 6


@pytest.mark.parametrize("norm", [0, 0.5, 1, 2, 3, math.inf])
def test_blockwise_ranks_by_the_norm(norm: float) -> None:
    dense = torch.randn(2, 12, 16, dtype=torch.float64)
    blocks = dense.view(2, 4, 3, 4, 4).transpose(2, 3)
    norms = torch.tensor(
        [
            torch.linalg.vector_norm(block, norm).item()
            for block in blocks.reshape(-1, 3, 4).unbind()
        ],
        dtype=torch.float64,
    ).view(2, 4, 4)
    by_block = largest(norms, 10)
    keep = sl.Blockwise(sl.Magnitude(10 / 32), (3, 4), norm=norm)
    entries = by_block.repeat_interleave(3, 1).repeat_interleave(4, 2)
    assert torch.equal(keep.keep(dense), entries)
    assert torch.equal(keep.choose(dense.abs()), entries)
    assert torch.equal(keep.keep_blocks(dense, (3, 4)), by_block)
    finer = keep.keep_blocks(dense, (1, 2))
    assert torch.equal(finer, entries[:, :, ::2])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_norms_of_huge_and_tiny_entries_keep_their_order(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    for size in (limits.max / 8, limits.tiny * 8):
        dense = torch.zeros(4, 16, dtype=dtype)
        dense[:2, :8] = size * torch.tensor([1, 1.5, 2, 4]).repeat_interleave(2).to(dtype)
        kept = sl.Magnitude(1 / 16).keep_blocks(dense, (2, 2))
        assert kept.nonzero().tolist() == [[0, 3]]
        assert sl.Threshold(0).keep_blocks(dense, (2, 2)).sum() == 4


def test_blockwise_needs_its_blocks() -> None:
    keep = sl.Blockwise(sl.Magnitude(0.5), (4, 8))
    with pytest.raises(ValueError, match=r"\(4, 8\) does not divide.*\(6, 8\).*\(8, 8\)"):
        keep.keep(torch.zeros(6, 8))
    with pytest.raises(ValueError, match=r"expected \(\*lead, M, N\), got shape \(8,\)"):
        keep.keep(torch.zeros(8))
    with pytest.raises(ValueError, match=r"blocks that divide its own \(4, 8\), got \(8, 8\)"):
        sl.bsr(torch.zeros(8, 8), 8, keep=keep)
    with pytest.raises(ValueError, match="rows is a multiple of the block's 4, got 6"):
        sl.Blockwise(sl.KeepAll(), (4, 8)).chunks(torch.zeros(8, 8), rows=6)


def stored(layout: sl.LayoutTensor) -> Tensor:
    """bool: what a layout stores, by densifying ones."""
    if layout.dtype == torch.bool:
        return layout.to_dense()
    assert layout.stored_values is not None
    ones = layout.like_self(torch.ones_like(layout.stored_values))
    ones.clear_unstored()
    return ones.to_dense() != 0


def test_same_pattern_as_any_layout(layout: sl.LayoutTensor) -> None:
    check_same_pattern(layout, stored(layout))


def test_same_pattern_as_any_mask(mask: sl.LayoutTensor) -> None:
    check_same_pattern(mask, stored(mask))


def check_same_pattern(like: sl.LayoutTensor, expected: Tensor) -> None:
    dense = torch.full(like.shape, math.nan)
    keep = sl.SamePattern(like)
    assert torch.equal(keep.keep(dense), expected)
    assert torch.equal(keep.keep(torch.stack([dense, dense])), torch.stack([expected, expected]))
    parts = [part for _, part in keep.chunks(dense, rows=5)]
    none = expected[..., :0, :].flatten(0, -2)
    assert torch.equal(torch.cat([*parts, none]).view_as(expected), expected)
    (m, n) = like.shape[-2:]
    for block in {(m or 1, n or 1), (3 if m % 3 == 0 else 1, 2 if n % 2 == 0 else 1)}:
        bm, bn = block
        grid = expected.reshape(*like.shape[:-2], m // bm, bm, n // bn, bn).any(-1).any(-2)
        assert torch.equal(keep.keep_blocks(dense, block), grid)


def test_same_pattern_keeps_the_blocks_of_a_block_layout(block_layout: sl.BSRTensor) -> None:
    block, dense = block_layout.block_size, torch.randn(block_layout.shape)
    if dense.shape[-2] % block[0] or dense.shape[-1] % block[1]:
        with pytest.raises(ValueError, match="does not divide"):
            sl.bsr(dense, block, keep=sl.SamePattern(block_layout))
        return
    made = sl.bsr(dense, block, keep=sl.SamePattern(block_layout))
    entries = stored(block_layout)
    bm, bn = block
    grid = entries.unflatten(-1, (-1, bn)).unflatten(-3, (-1, bm)).any(-1).any(-2)
    whole = grid.repeat_interleave(bm, -2).repeat_interleave(bn, -1)
    assert torch.equal(made.to_dense(), dense.where(whole, 0))


@pytest.mark.parametrize(
    "kind", ["sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc"]
)
@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state")
def test_same_pattern_as_a_sparse_matrix_of_torch(kind: str) -> None:
    pattern = torch.zeros(6, 8)
    pattern[[0, 1, 4, 4], [3, 0, 7, 6]] = 1
    blocks = kind in ("sparse_bsr", "sparse_bsc")
    like = getattr(pattern, "to_" + kind)(*([(2, 2)] if blocks else []))
    expected = pattern != 0
    if blocks:
        expected = expected.view(3, 2, 4, 2).any(3).any(1)
        expected = expected.repeat_interleave(2, 0).repeat_interleave(2, 1)
    stored_zeros = like.clone()
    (stored_zeros._values() if kind == "sparse_coo" else stored_zeros.values()).zero_()
    for each in (like, stored_zeros):
        assert torch.equal(sl.SamePattern(each).keep(torch.randn(6, 8)), expected)


def test_same_pattern_as_a_bool_tensor_of_entries_or_of_blocks() -> None:
    dense, blocks = torch.randn(2, 8, 8), torch.rand(4, 2) < 0.5
    entries = blocks.repeat_interleave(2, 0).repeat_interleave(4, 1)
    by_entries = sl.bsr(dense, (2, 4), keep=sl.SamePattern(entries))
    assert torch.equal(by_entries.to_dense(), dense.where(entries, 0))
    both = torch.stack([blocks, ~blocks])
    made = sl.bsr(dense, (2, 4), keep=sl.SamePattern(both))
    assert torch.equal(made[0].to_dense(), by_entries[0].to_dense())
    others = sl.bsr(dense, (2, 4), keep=sl.SamePattern(~both))
    assert torch.equal(made.to_dense() + others.to_dense(), dense)
