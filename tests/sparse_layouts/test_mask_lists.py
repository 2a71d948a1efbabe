"""Every list of every mask against lists that loops make of its dense definition."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts.block_pattern import WORD_BITS, BlockPattern, dense_counts
from tests.sparse_layouts.test_masks import local_stride_formula, same_document, tokens

LENGTHS = st.integers(0, 70)
BLOCKS = st.sampled_from([1, 2, 3, 8, 16, 33, 40])
SHORT = st.integers(1, 80)


def bits_of(words: Tensor, columns: int) -> list[list[bool]]:
    return [
        [bool(row[c // WORD_BITS] >> (c % WORD_BITS) & 1) for c in range(columns)]
        for row in words.tolist()
    ]


def check_lists(mask: sl.BSRTensor, dense: Tensor) -> None:
    """Of a mask whose values are stored row by row. `dense` (*lead, M, N) is what it should be."""
    p = mask.block_pattern
    assert tuple(mask.shape) == tuple(dense.shape)
    assert p.row_slots is None
    heads = dense.reshape(math.prod(dense.shape[:-2]), *dense.shape[-2:])
    own = list(range(len(heads))) if p.head_map is None else p.head_map.tolist()
    assert len(own) == len(heads)
    assert sorted(set(own)) == list(range(p.num_patterns))
    # every pattern begins where the one before ends
    assert p.crow_indices[:, 0].tolist() == [0, *p.crow_indices[:-1, -1].tolist()]
    assert p.crow_indices[-1, -1] == p.num_blocks
    for head, pattern in zip(heads, own, strict=True):
        check_pattern_lists(p, pattern, head)


def check_pattern_lists(p: BlockPattern, pattern: int, dense: Tensor) -> None:
    (bm, bn), (mb, nb) = p.block_size, p.grid

    def block(i: int, j: int) -> Tensor:
        return dense[i * bm : (i + 1) * bm, j * bn : (j + 1) * bn]

    stored = [(i, j) for i in range(mb) for j in range(nb) if bool(block(i, j).any())]
    slot_of = {place: t for t, place in enumerate(stored)}
    crow, ccol = p.crow_indices[pattern].tolist(), p.ccol_indices[pattern].tolist()
    first, last = crow[0], crow[-1]
    assert (ccol[0], ccol[-1]) == (first, last)
    columns, rows = p.col_indices.tolist(), p.row_indices.tolist()
    slots = list(range(len(rows))) if p.col_slots is None else p.col_slots.tolist()
    for i, (start, stop) in enumerate(pairwise(crow)):
        assert columns[start:stop] == [j for j in range(nb) if (i, j) in slot_of]
    for j, (start, stop) in enumerate(pairwise(ccol)):
        expected = [i for i in range(mb) if (i, j) in slot_of]
        assert rows[start:stop] == expected
        assert slots[start:stop] == [first + slot_of[i, j] for i in expected]
    tiles = [0] * len(columns) if p.block_tiles is None else p.block_tiles.tolist()
    for (i, j), t in slot_of.items():
        tile, whole = tiles[first + t], block(i, j)
        if tile:
            assert p.tiles is not None
            bits = bits_of(p.tiles[tile - 1], bn)
            cut = [row[: whole.shape[1]] for row in bits[: whole.shape[0]]]
            assert cut == whole.tolist()
            assert not all(map(all, bits))  # a block that is all stored needs no tile
        else:
            assert bool(whole.all())


@given(LENGTHS, BLOCKS)
def test_causal(n: int, block: int) -> None:
    i, j = tokens(n)
    check_lists(sl.causal(n, block_size=block), j <= i)


@given(LENGTHS, BLOCKS, SHORT, st.booleans())
def test_sliding_window(n: int, block: int, window: int, causal: bool) -> None:
    i, j = tokens(n)
    stored = (i - j < window) & (j <= i) if causal else (i - j).abs() < window
    check_lists(sl.sliding_window(n, block_size=block, window=window, causal=causal), stored)


@given(LENGTHS, BLOCKS, SHORT, st.integers(0, 80))
def test_sink_window(n: int, block: int, window: int, sinks: int) -> None:
    i, j = tokens(n)
    stored = (j <= i) & ((i - j < window) | (j < sinks))
    check_lists(sl.sink_window(n, block_size=block, window=window, sinks=sinks), stored)


@given(
    LENGTHS,
    st.sampled_from([1, 3, 8]),
    st.fixed_dictionaries(
        {
            "local_blocks": st.integers(0, 12),
            "vert_stride": st.integers(1, 12),
            "homo_head": st.booleans(),
            "head_offset": st.integers(0, 15),
            "causal": st.booleans(),
        }
    ),
    st.sampled_from([(1, 1), (4, 2), (4, 4), (6, 3), (5, 1)]),
    st.data(),
)
def test_local_stride(
    n: int, block: int, options: dict[str, Any], heads: tuple[int, int], data: st.DataObject
) -> None:
    options |= {"num_heads": heads[0], "num_kv_heads": heads[1]}
    options["num_dense_heads"] = data.draw(st.integers(0, heads[1]), "num_dense_heads")
    expected = local_stride_formula(n, block, **options)
    mask = sl.local_stride(n, block_size=block, **options)
    check_lists(mask, expected)
    different = {head.numpy().tobytes() for head in expected.reshape(heads[0], n, n)}
    # heads whose residues differ are stored apart, though a short mask may not show it
    assert len(different) <= mask.block_pattern.num_patterns
    assert mask.block_pattern.num_patterns <= min(options["vert_stride"] + 1, heads[1])


@given(st.integers(4, 12), st.sampled_from([1, 3, 8]), st.integers(0, 4), st.integers(1, 3))
def test_bigbird_in_evaluation(nb: int, block: int, random_blocks: int, heads: int) -> None:
    counts = torch.zeros(nb, nb, dtype=torch.int32)
    for i in range(nb):
        counts[i, [0, max(i - 1, 0), i, min(i + 1, nb - 1), nb - 1]] = 1
    counts[1:-1, 0] += random_blocks
    counts[0] = counts[-1] = 1
    expected = counts.repeat_interleave(block, 0).repeat_interleave(block, 1)
    expected = expected if heads == 1 else expected.expand(heads, -1, -1)
    mask = sl.bigbird(
        nb * block,
        block_size=block,
        num_random_blocks=random_blocks,
        num_heads=heads,
        source="hf-eval",
    )
    check_lists(mask, expected > 0)
    assert mask.block_pattern.num_patterns == 1
    assert torch.equal(dense_counts(mask.block_pattern), expected)


@given(st.integers(16, 40), st.integers(1, 4), st.integers(0, 99))
def test_drawn_bigbird(nb: int, heads: int, seed: int) -> None:
    """The draws are held to the sources elsewhere; here the lists to each other."""
    mask = sl.bigbird(nb, block_size=1, num_random_blocks=3, num_heads=heads, seed=seed)
    counts = dense_counts(mask.block_pattern)
    check_lists(mask, counts > 0)
    inner = counts.reshape(heads, nb, nb)[:, 1:-1]
    beside = torch.ones(nb - 2, dtype=torch.int64) * 5
    beside[0] = beside[-1] = 4
    assert torch.equal(inner.sum(-1), (beside + 3).expand(heads, -1))


@given(
    st.integers(0, 70),
    BLOCKS,
    st.lists(st.lists(st.integers(0, 70), min_size=5, max_size=5), min_size=1, max_size=3),
    st.booleans(),
)
def test_document(n: int, block: int, inner: list[list[int]], causal: bool) -> None:
    bounds = [[0, *sorted(min(t, n) for t in each), n] for each in inner]
    expected = torch.stack([same_document(each, causal) for each in bounds])[:, None]
    check_lists(sl.document(bounds, block_size=block, causal=causal), expected)
    check_lists(sl.document(bounds[0], block_size=block, causal=causal), expected[0, 0])


@given(
    st.tuples(st.integers(1, 5), st.integers(0, 6), st.integers(0, 6)),
    st.sampled_from([(1, 1), (3, 5), (8, 8), (4, 33), (7, 2)]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_bsr_mask(
    shape: tuple[int, int, int], block: tuple[int, int], causal: bool, counted: bool, seed: int
) -> None:
    (heads, mb, nb), (bm, bn) = shape, block
    draw = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 3, (2, mb, nb), generator=draw)
    blocks = kinds[torch.randint(0, 2, (heads,), generator=draw)]
    m, n = max(mb * bm - seed % bm, 0), max(nb * bn - seed % bn, 0)
    i, j = tokens(m, n)
    expected = blocks.repeat_interleave(bm, 1).repeat_interleave(bn, 2)[:, :m, :n]
    expected = expected * ((j <= i) | (not causal))
    given_blocks = blocks if counted else blocks > 0
    mask = sl.bsr_mask(given_blocks, block, shape=(m, n), causal=causal)
    check_lists(mask, expected > 0)
    if counted:
        assert torch.equal(dense_counts(mask.block_pattern), expected.int())


@given(
    st.tuples(st.integers(1, 4), st.integers(0, 40), st.integers(0, 40)),
    st.sampled_from([(1, 1), (3, 5), (8, 8), (4, 33)]),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
)
def test_mask_from(
    shape: tuple[int, int, int], block: tuple[int, int], chance: float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    kinds = torch.rand(2, *shape[1:], generator=draw) < chance
    dense = kinds[torch.randint(0, 2, shape[:1], generator=draw)]
    check_lists(sl.mask_from(dense, block), dense)
