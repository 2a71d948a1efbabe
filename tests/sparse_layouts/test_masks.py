"""Masks: exact by token against dense formulas; algebra, invariants, what building costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_layouts as sl
from sparse_layouts.block_pattern import BlockPattern, dense_counts

LENGTHS = [1, 7, 16, 30, 33]


def tokens(m: int, n: int | None = None) -> tuple[Tensor, Tensor]:
    return torch.arange(m)[:, None], torch.arange(m if n is None else n)[None, :]


def expanded(blocks: Tensor, bm: int, bn: int) -> Tensor:
    return blocks.repeat_interleave(bm, -2).repeat_interleave(bn, -1)


def check(mask: sl.BSRTensor, expected: Tensor) -> None:
    mask.validate()
    assert mask.dtype == torch.bool
    assert torch.equal(mask.to_dense(), expected)
    assert mask.nnz == int(expected.sum())


# --- factories ------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 8, 16, 64])
@pytest.mark.parametrize("n", LENGTHS)
def test_causal(n: int, block: int) -> None:
    i, j = tokens(n)
    check(sl.causal(n, block_size=block), j <= i)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 2, 7, 8, 9, 16, 20, 1000])
@pytest.mark.parametrize("n", LENGTHS)
def test_sliding_window(n: int, window: int, causal: bool) -> None:
    i, j = tokens(n)
    stored = (i - j < window) & (j <= i) if causal else (i - j).abs() < window
    check(sl.sliding_window(n, block_size=8, window=window, causal=causal), stored)


@pytest.mark.parametrize("sinks", [0, 1, 7, 8, 9, 17, 100])
@pytest.mark.parametrize("window", [1, 5, 8, 12, 100])
@pytest.mark.parametrize("n", [7, 33])
def test_sink_window(n: int, window: int, sinks: int) -> None:
    i, j = tokens(n)
    stored = (j <= i) & ((i - j < window) | (j < sinks))
    check(sl.sink_window(n, block_size=8, window=window, sinks=sinks), stored)


def same_document(bounds: list[int], causal: bool) -> Tensor:
    i, j = tokens(bounds[-1])
    inner = torch.tensor(bounds[1:])
    document = (torch.arange(bounds[-1])[:, None] >= inner).sum(1)
    same = document[:, None] == document[None, :]
    return same & (j <= i) if causal else same


BOUNDS = [
    [0, 30],
    [0, 7, 30],
    [0, 8, 16, 24],
    [0, 0, 5, 5, 5, 21, 30, 30],
    [0, 1, 2, 3, 4, 30],
    [0, 29, 30],
    [0],
    [0, 0],
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_document(bounds: list[int], causal: bool) -> None:
    expected = same_document(bounds, causal)
    for given_as in (bounds, tuple(bounds), torch.tensor(bounds), torch.tensor(bounds).int()):
        check(sl.document(given_as, block_size=8, causal=causal), expected)


@pytest.mark.parametrize("causal", [True, False])
def test_document_of_a_batch(causal: bool) -> None:
    bounds = [[0, 7, 30, 30], [0, 0, 16, 30], [0, 30, 30, 30]]
    mask = sl.document(torch.tensor(bounds), block_size=8, causal=causal)
    expected = torch.stack([same_document(b, causal) for b in bounds])[:, None]
    assert mask.shape == (3, 1, 30, 30)
    check(mask, expected)


def test_document_of_no_sample() -> None:
    mask = sl.document(torch.zeros(0, 3, dtype=torch.long), block_size=8)
    assert mask.shape == (0, 1, 0, 0)
    assert mask.nnz == 0


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("block", [(4, 8), (8, 4), (5, 3), (16, 16)])
def test_bsr_mask(block: tuple[int, int], lead: tuple[int, ...]) -> None:
    blocks = torch.rand(*lead, 6, 5) < 0.5
    check(sl.bsr_mask(blocks, block), expanded(blocks, *block))


@pytest.mark.parametrize("block", [(4, 8), (8, 4), (5, 3), (6, 6)])
def test_bsr_mask_causal_is_by_token(block: tuple[int, int]) -> None:
    blocks = torch.rand(2, 6, 5) < 0.7
    i, j = tokens(6 * block[0], 5 * block[1])
    check(sl.bsr_mask(blocks, block, causal=True), expanded(blocks, *block) & (j <= i))


@pytest.mark.parametrize("causal", [False, True])
def test_bsr_mask_of_a_cut_shape(causal: bool) -> None:
    blocks = torch.rand(6, 5) < 0.7
    i, j = tokens(22, 37)
    expected = expanded(blocks, 4, 8)[:22, :37] & ((j <= i) | (not causal))
    check(sl.bsr_mask(blocks, (4, 8), shape=(22, 37), causal=causal), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_bsr_mask_counts(causal: bool) -> None:
    counts = torch.randint(4, (2, 6, 5))
    mask = sl.bsr_mask(counts, 4, causal=causal)
    i, j = tokens(24, 20)
    check(mask, (expanded(counts, 4, 4) > 0) & ((j <= i) | (not causal)))
    expected = expanded(counts, 4, 4) * ((j <= i) | (not causal))
    assert torch.equal(dense_counts(mask.block_pattern), expected.int())
    without = sl.without_counts(mask)
    assert without.block_counts() is None
    check(without, expected > 0)


@pytest.mark.parametrize("shape", [(21, 30), (24, 40), (3, 7, 9), (2, 3, 9, 4), (0, 4), (4, 0)])
def test_mask_from(shape: tuple[int, ...]) -> None:
    for chance in (0.0, 0.05, 0.5, 1.0):
        dense = torch.rand(shape) < chance
        check(sl.mask_from(dense, (4, 8)), dense)


def test_mask_from_keeps_each_different_tile_once() -> None:
    i, j = tokens(64)
    causal = sl.mask_from(j <= i, 8).block_pattern
    assert causal.tiles.shape[0] == 1
    window = sl.mask_from((j <= i) & (i - j < 20), 8).block_pattern
    assert window.tiles.shape[0] == 3  # the diagonal, and the two that the window's edge cuts
    assert sl.sliding_window(64, block_size=8, window=20).block_pattern.tiles.shape[0] == 3
    full = sl.mask_from(torch.ones(64, 64, dtype=torch.bool), 8).block_pattern
    assert full.tiles is None
    # of a block that the edge cuts only what is inside counts
    assert sl.mask_from(torch.ones(61, 61, dtype=torch.bool), 8).block_pattern.tiles is None


LOCAL_STRIDES = [
    {"local_blocks": local, "vert_stride": stride, "num_heads": heads, **more}
    for local, stride, heads in [(1, 2, 1), (2, 4, 4), (3, 3, 8), (1, 8, 2), (4, 1, 2), (9, 5, 4)]
    for more in (
        {},
        {"head_offset": 1},
        {"homo_head": True, "head_offset": 2},
        {"causal": False},
        {"num_dense_heads": 1},
    )
] + [
    {"local_blocks": 2, "vert_stride": 8, "num_heads": 8, "num_kv_heads": 2},
    {"local_blocks": 2, "vert_stride": 8, "num_heads": 8, "num_kv_heads": 4, "num_dense_heads": 2},
    {"local_blocks": 1, "vert_stride": 6, "num_heads": 4, "num_kv_heads": 4, "num_dense_heads": 4},
    {"local_blocks": 0, "vert_stride": 3, "num_heads": 4},
    {"local_blocks": 0, "vert_stride": 3, "num_heads": 2, "causal": False},
    {"local_blocks": 0, "vert_stride": 1, "num_heads": 1, "causal": False},
    {"local_blocks": 0, "vert_stride": 2, "num_heads": 1, "causal": False},
]


def local_stride_formula(
    n: int,
    block: int,
    *,
    local_blocks: int,
    vert_stride: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    homo_head: bool = False,
    num_dense_heads: int = 0,
    head_offset: int = 0,
    causal: bool = True,
) -> Tensor:
    """Token by token, as the page that defines the pattern writes it."""
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    step = max(1, vert_stride // num_heads)
    i, j = tokens(-(-n // block))
    heads = []
    for head in range(num_heads):
        own = head // (num_heads // kv_heads)
        h = 0 if homo_head else own
        near = i - j < local_blocks
        strided = (j + h * step + head_offset) % vert_stride == 0
        stored = (j <= i) & (near | strided)
        if not causal:
            far = (i - j - local_blocks + 1).clamp(min=0) + (j - i - local_blocks + 1).clamp(min=0)
            stored = far % vert_stride == 0
        if own >= kv_heads - num_dense_heads:
            stored = j <= i if causal else torch.ones_like(stored)
        heads.append(stored)
    dense = expanded(torch.stack(heads), block, block)[:, :n, :n]
    rows, columns = tokens(n)
    dense = dense & (columns <= rows) if causal else dense
    return dense[0] if num_heads == 1 else dense


@pytest.mark.parametrize("n", [64, 45])
@pytest.mark.parametrize("options", LOCAL_STRIDES, ids=str)
def test_local_stride(options: dict[str, Any], n: int) -> None:
    mask = sl.local_stride(n, block_size=4, **options)
    assert type(mask) is sl.LocalStrideTensor
    check(mask, local_stride_formula(n, 4, **options))


# --- equal heads, and what building costs ---------------------------------------------------------


def test_equal_heads_are_stored_once() -> None:
    mask = sl.local_stride(256, block_size=16, local_blocks=2, vert_stride=4, num_heads=32)
    assert mask.block_pattern.num_patterns == 4
    one = sl.local_stride(256, block_size=16, local_blocks=2, vert_stride=4, num_heads=4)
    assert mask.block_pattern.num_blocks == one.block_pattern.num_blocks
    same = sl.local_stride(
        256, block_size=16, local_blocks=2, vert_stride=4, num_heads=8, homo_head=True
    )
    assert same.block_pattern.num_patterns == 1
    blocks = (torch.rand(2, 6, 5) < 0.5)[[0, 1, 1, 0]]
    assert sl.bsr_mask(blocks, 4).block_pattern.num_patterns == 2
    assert sl.mask_from(expanded(blocks, 3, 3), 4).block_pattern.num_patterns == 2


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(made, Tensor):
                self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return out


def largest_tensor(make: Callable[[], Any]) -> tuple[Any, int]:
    with LargestTensor() as seen:
        made = make()
    return made, seen.bytes


def test_the_largest_tensor_is_seen() -> None:
    _, size = largest_tensor(lambda: (torch.ones(300, 100) + 1).sum())
    assert size == 300 * 100 * 4


def test_long_local_stride_costs_what_it_stores() -> None:
    mask, largest = largest_tensor(
        lambda: sl.local_stride(
            131072, block_size=64, local_blocks=16, vert_stride=16, num_heads=32
        )
    )
    pattern = mask.block_pattern
    assert mask.shape == (32, 131072, 131072)
    assert pattern.num_patterns == 16
    assert pattern.grid == (2048, 2048)
    assert largest <= 8 * pattern.num_blocks  # one int64 a stored block; a (H, Mb, Nb) bool: 60
    assert mask.nbytes <= 24 * pattern.num_blocks + 16 * 4 * 2 * 2049 + 4096
    assert mask.nbytes < mask.shape.numel() / 8 / 1000
    per_head = mask.nnz / 32
    assert 0.06 < per_head / (131072 * 131073 // 2) < 0.08


@pytest.mark.parametrize(
    "make",
    [
        lambda n: sl.sliding_window(n, block_size=64, window=100),
        lambda n: sl.sink_window(n, block_size=64, window=100, sinks=70),
        lambda n: sl.document(list(range(0, n + 1, 512)), block_size=64),
    ],
    ids=["window", "sinks", "documents"],
)
def test_long_masks_grow_with_what_they_store(make: Callable[[int], sl.BSRTensor]) -> None:
    short, first = largest_tensor(lambda: make(2**14))
    long, second = largest_tensor(lambda: make(2**17))
    assert 7 < long.nnz / short.nnz < 9
    assert second < 9 * first  # linear in the length, where a matrix of blocks would take 64


# --- algebra --------------------------------------------------------------------------------------

RAGGED: dict[str, Callable[[], sl.BSRTensor]] = {
    "causal": lambda: sl.causal(30, block_size=8),
    "window": lambda: sl.sliding_window(30, block_size=8, window=5, causal=False),
    "documents": lambda: sl.document([0, 7, 30], block_size=8),
    "random": lambda: sl.mask_from(torch.rand(30, 30) < 0.2, 8),
    "heads": lambda: sl.local_stride(30, block_size=8, local_blocks=1, vert_stride=2, num_heads=4),
    "one head": lambda: sl.mask_from(torch.rand(1, 30, 30) < 0.2, 8),
    "samples": lambda: sl.document([[0, 7, 30], [0, 16, 30]], block_size=8),
    "nothing": lambda: sl.mask_from(torch.zeros(30, 30, dtype=torch.bool), 8),
    "everything": lambda: sl.mask_from(torch.ones(30, 30, dtype=torch.bool), 8),
    "transposed": lambda: sl.mask_from(torch.rand(30, 30) < 0.2, 8).mT,
}


@pytest.mark.parametrize("second", RAGGED)
@pytest.mark.parametrize("first", RAGGED)
def test_and_or(first: str, second: str) -> None:
    a, b = RAGGED[first](), RAGGED[second]()
    check(a & b, a.to_dense() & b.to_dense())
    check(a | b, a.to_dense() | b.to_dense())


@pytest.mark.parametrize("name", RAGGED)
def test_not(name: str) -> None:
    mask = RAGGED[name]()
    check(~mask, ~mask.to_dense())
    check(~~mask, mask.to_dense())


def test_faces_of_the_algebra() -> None:
    a, b = RAGGED["causal"](), RAGGED["random"]()
    with sl.fallback("error"):
        for both in (torch.bitwise_and(a, b), torch.logical_and(a, b), a.bitwise_and(b)):
            check(both, a.to_dense() & b.to_dense())
        for either in (torch.bitwise_or(a, b), torch.logical_or(a, b), a.logical_or(b)):
            check(either, a.to_dense() | b.to_dense())
        for neither in (torch.bitwise_not(a), torch.logical_not(a), a.logical_not()):
            check(neither, ~a.to_dense())


def test_counts_in_the_algebra() -> None:
    counted = sl.bsr_mask(torch.tensor([[2, 0, 1], [3, 1, 0], [0, 4, 2]]), 8)
    plain = sl.causal(24, block_size=8)
    for both in (counted & plain, plain & counted):
        expected = dense_counts(counted.block_pattern) * plain.to_dense()
        assert torch.equal(dense_counts(both.block_pattern), expected.int())
    with pytest.raises(ValueError, match=r"both masks count.*without_counts"):
        _ = counted & counted
    with pytest.raises(ValueError, match=r"no meaning in a union.*without_counts"):
        _ = counted | plain
    with pytest.raises(ValueError, match=r"no meaning in a complement.*without_counts"):
        _ = ~counted
    check(sl.without_counts(counted) | plain, counted.to_dense() | plain.to_dense())


def test_equal_heads_stay_shared() -> None:
    heads = sl.local_stride(64, block_size=8, local_blocks=1, vert_stride=2, num_heads=8)
    window = sl.sliding_window(64, block_size=8, window=20)
    assert (heads & window).block_pattern.num_patterns == 2
    assert (~heads).block_pattern.num_patterns == 2
    assert (heads & window).shape == (8, 64, 64)


# --- invariants -----------------------------------------------------------------------------------


def pattern_with_everything() -> BlockPattern:
    """Two patterns for three heads, tiles, counts."""
    counts = torch.randint(1, 4, (2, 3, 3))[[0, 1, 0]]
    return sl.bsr_mask(counts, 4, causal=True).block_pattern


def changed(tensor: Tensor, at: Any, value: int) -> Tensor:
    out = tensor.clone()
    out[at] = value
    return out


BREAKS: dict[str, tuple[Callable[[BlockPattern], BlockPattern], str]] = {
    "dtype": (
        lambda p: p._replace(col_indices=p.col_indices.long()),
        "col_indices: expected int32",
    ),
    "device": (lambda p: p._replace(tiles=p.tiles.to("meta")), "tiles is on meta"),
    "rows": (
        lambda p: p._replace(crow_indices=p.crow_indices[:, :-1]),
        r"crow_indices: expected \(patterns, 4\)",
    ),
    "one dimension": (
        lambda p: p._replace(col_indices=p.col_indices[None]),
        "col_indices: expected one dimension",
    ),
    "first offset": (
        lambda p: p._replace(crow_indices=changed(p.crow_indices, (0, 0), 1)),
        "crow_indices: expected offsets from 0",
    ),
    "last offset": (
        lambda p: p._replace(crow_indices=changed(p.crow_indices, (-1, -1), 99)),
        "crow_indices: expected offsets from 0 to",
    ),
    "decreasing": (
        lambda p: p._replace(crow_indices=changed(p.crow_indices, (0, 1), 5)),
        "crow_indices: expected offsets that do not decrease",
    ),
    "gap": (
        lambda p: p._replace(crow_indices=changed(p.crow_indices, (1, 0), 5)),
        "crow_indices: expected every pattern to begin where",
    ),
    "range": (
        lambda p: p._replace(col_indices=changed(p.col_indices, -1, 3)),
        "col_indices: expected values from 0 to 2, got 0 to 3",
    ),
    "negative": (
        lambda p: p._replace(col_indices=changed(p.col_indices, 0, -1)),
        "col_indices: expected values from 0 to 2, got -1",
    ),
    "unsorted": (
        lambda p: p._replace(
            col_indices=changed(p.col_indices, [1, 2], torch.tensor([1, 0]).int())
        ),
        r"col_indices: expected strictly ascending",
    ),
    "twice": (
        lambda p: p._replace(col_indices=changed(p.col_indices, 2, 0)),
        "col_indices: expected strictly ascending",
    ),
    "column offsets": (
        lambda p: p._replace(ccol_indices=changed(p.ccol_indices, (0, 1), 9)),
        "ccol_indices: expected offsets that do not decrease",
    ),
    "column rows": (
        lambda p: p._replace(row_indices=changed(p.row_indices, 0, 7)),
        "row_indices: expected values from 0 to 2",
    ),
    "column lists": (
        lambda p: p._replace(col_slots=p.col_slots.flip(0)),
        "the column lists do not hold the blocks of the row lists",
    ),
    "slots": (
        lambda p: p._replace(col_slots=changed(p.col_slots, 0, 1)),
        r"col_slots: expected a permutation of 0\.\.11",
    ),
    "no head map": (
        lambda p: p._replace(head_map=None),
        r"expected 3 patterns for leading dimensions \(3,\), got 2",
    ),
    "head map length": (
        lambda p: p._replace(head_map=p.head_map[:2]),
        r"head_map: expected shape \(3,\), got \(2,\)",
    ),
    "head map range": (
        lambda p: p._replace(head_map=changed(p.head_map, 0, 2)),
        "head_map: expected values from 0 to 1",
    ),
    "tile ids": (
        lambda p: p._replace(block_tiles=p.block_tiles[:-1]),
        r"block_tiles: expected shape \(12,\)",
    ),
    "tile range": (
        lambda p: p._replace(block_tiles=changed(p.block_tiles, 0, 9)),
        "block_tiles: expected values from 0 to 1, got",
    ),
    "tile words": (
        lambda p: p._replace(tiles=p.tiles.repeat(1, 1, 2)),
        r"tiles: expected \(T, 4, 1\) words",
    ),
    "count shape": (
        lambda p: p._replace(block_counts=p.block_counts[:-1]),
        r"block_counts: expected shape \(12,\)",
    ),
    "count zero": (
        lambda p: p._replace(block_counts=changed(p.block_counts, 0, 0)),
        "block_counts: expected values from 1",
    ),
}


def test_a_whole_pattern_is_valid() -> None:
    pattern = pattern_with_everything()
    assert pattern.num_patterns == 2
    assert None not in (pattern.head_map, pattern.tiles, pattern.block_counts, pattern.col_slots)
    assert pattern.num_blocks == 12
    sl.BSRTensor.on_pattern(None, pattern).validate()


@pytest.mark.parametrize("name", BREAKS)
def test_validate_finds_a_broken_pattern(name: str) -> None:
    spoil, message = BREAKS[name]
    with pytest.raises(ValueError, match=message):
        sl.BSRTensor.on_pattern(None, spoil(pattern_with_everything())).validate()


def test_validate_finds_broken_values() -> None:
    mask = sl.causal(10, block_size=4)
    w = torch.randn(10, 10).sparse_mask(mask)
    w.validate()
    w.stored_values[0, 0, -1] = 1.0  # right of the diagonal
    with pytest.raises(ValueError, match="does not store is not 0"):
        w.validate()
    pattern = mask.block_pattern
    with pytest.raises(ValueError, match=r"values: expected \(\*batch, 6, 4, 4\), got \(5, 4, 4\)"):
        sl.BSRTensor.on_pattern(torch.zeros(5, 4, 4), pattern).validate()
    shared = sl.bsr_mask(torch.ones(2, 2, 2, dtype=torch.bool), 4).block_pattern
    broken = sl.BSRTensor(
        torch.zeros(4, 4, 4), *shared[:10], shape=(2, 8, 8), block_size=(4, 4), lead_dims=1
    )
    with pytest.raises(ValueError, match="pattern of their own for every head"):
        broken.validate()


# --- properties -----------------------------------------------------------------------------------


@st.composite
def dense_masks(draw: st.DrawFn) -> tuple[Tensor, tuple[int, int]]:
    lead = draw(st.sampled_from([(), (1,), (2,), (2, 2)]))
    m, n = draw(st.integers(0, 20)), draw(st.integers(0, 20))
    chance = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    seed = draw(st.integers(0, 2**16))
    drawn = np.random.default_rng(seed).random((*lead, m, n)) < chance
    return torch.from_numpy(drawn), (draw(st.integers(1, 7)), draw(st.integers(1, 40)))


@given(dense_masks())
def test_any_mask_makes_the_round_trip(drawn: tuple[Tensor, tuple[int, int]]) -> None:
    dense, block = drawn
    mask = sl.mask_from(dense, block)
    check(mask, dense)
    check(mask.mT, dense.mT)
    check(~mask, ~dense)
    assert (mask & ~mask).nnz == 0
    again = sl.mask_from(mask.to_dense(), block)
    assert again.same_pattern(mask)


@given(dense_masks(), st.integers(0, 2**16))
def test_any_values_make_the_round_trip(drawn: tuple[Tensor, tuple[int, int]], seed: int) -> None:
    dense, block = drawn
    mask = sl.mask_from(dense, block)
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal(dense.shape))
    w = x.sparse_mask(mask)
    w.validate()
    assert torch.equal(w.to_dense(), x * dense)
    assert torch.equal(w.mT.to_dense(), (x * dense).mT)


@given(
    st.integers(0, 60),
    st.integers(1, 20),
    st.integers(1, 70),
    st.integers(0, 70),
    st.booleans(),
)
def test_any_window(n: int, block: int, window: int, sinks: int, causal: bool) -> None:
    i, j = tokens(n)
    near = (i - j < window) & (j <= i) if causal else (i - j).abs() < window
    check(sl.sliding_window(n, block_size=block, window=window, causal=causal), near)
    sunk = (j <= i) & ((i - j < window) | (j < sinks))
    check(sl.sink_window(n, block_size=block, window=window, sinks=sinks), sunk)


@given(st.lists(st.integers(0, 20), max_size=6), st.integers(1, 12), st.booleans())
def test_any_documents(lengths: list[int], block: int, causal: bool) -> None:
    bounds = [0, *np.cumsum(lengths, dtype=int).tolist()]
    check(sl.document(bounds, block_size=block, causal=causal), same_document(bounds, causal))


@given(
    st.integers(0, 40),
    st.integers(1, 9),
    st.integers(0, 6),
    st.integers(1, 6),
    st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4), (6, 3)]),
    st.integers(0, 8),
    st.booleans(),
    st.booleans(),
)
def test_any_local_stride(
    n: int,
    block: int,
    local: int,
    stride: int,
    heads: tuple[int, int],
    offset: int,
    homo: bool,
    causal: bool,
) -> None:
    options = {
        "local_blocks": local,
        "vert_stride": stride,
        "num_heads": heads[0],
        "num_kv_heads": heads[1],
        "num_dense_heads": heads[1] // 2,
        "head_offset": offset,
        "homo_head": homo,
        "causal": causal,
    }
    mask = sl.local_stride(n, block_size=block, **options)
    check(mask, local_stride_formula(n, block, **options))
