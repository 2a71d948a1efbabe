"""How masks are built: lists by formula equal lists by sorting; operations, memory, host syncs."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_layouts as sl
from sparse_layouts import dense_blocks
from sparse_layouts.block_pattern import (
    TENSOR_FIELDS,
    BlockPattern,
    _columns_by_sorting,
    column_lists,
    interval_tiles,
    pack_tiles,
    send_together,
)
from sparse_layouts.closed_forms import Progression, Stripe, closed_form

CPU = torch.device("cpu")
Make = Callable[..., sl.BSRTensor]

# Lengths that the block does not divide, one block, none; windows and sinks off the block's edge.
LOCAL_STRIDES: dict[str, dict[str, Any]] = {
    "heads": {"local_blocks": 2, "vert_stride": 3, "num_heads": 4},
    "homo_head": {"local_blocks": 2, "vert_stride": 4, "num_heads": 4, "homo_head": True},
    "head_offset": {"local_blocks": 1, "vert_stride": 5, "num_heads": 2, "head_offset": 3},
    "dense heads": {"local_blocks": 1, "vert_stride": 4, "num_heads": 4, "num_dense_heads": 2},
    "not causal": {"local_blocks": 2, "vert_stride": 3, "num_heads": 2, "causal": False},
    "no window": {"local_blocks": 0, "vert_stride": 3, "num_heads": 2},
    "no window, not causal": {"local_blocks": 0, "vert_stride": 2, "causal": False},
    "not causal, dense": {
        "local_blocks": 1,
        "vert_stride": 3,
        "num_heads": 4,
        "num_dense_heads": 1,
        "causal": False,
    },
    "long stride": {"local_blocks": 1, "vert_stride": 10**12, "num_heads": 2, "head_offset": 5},
    "wide window": {"local_blocks": 10**12, "vert_stride": 2, "num_heads": 2},
}
FORMULAS: dict[str, Make] = {
    "causal": lambda n, **on: sl.causal(n, block_size=8, **on),
    "window": lambda n, **on: sl.sliding_window(n, block_size=8, window=21, **on),
    "window of a block": lambda n, **on: sl.sliding_window(n, block_size=8, window=8, **on),
    "both sides": lambda n, **on: sl.sliding_window(n, block_size=8, window=19, causal=False, **on),
    "short, both sides": lambda n, **on: sl.sliding_window(
        n, block_size=8, window=3, causal=False, **on
    ),
    "sinks": lambda n, **on: sl.sink_window(n, block_size=8, window=13, sinks=11, **on),
    "whole sinks": lambda n, **on: sl.sink_window(n, block_size=8, window=5, sinks=16, **on),
    "bigbird": lambda n, **on: sl.bigbird(
        max(n // 8, 4) * 8, block_size=8, source="hf-eval", num_heads=2, **on
    ),
} | {
    f"local stride, {name}": lambda n, o=options, **on: sl.local_stride(n, block_size=8, **o, **on)
    for name, options in LOCAL_STRIDES.items()
}
DATA: dict[str, Make] = {
    "drawn bigbird": lambda n, **on: sl.bigbird(
        max(n // 8, 14) * 8, block_size=8, num_heads=3, **on
    ),
    "documents": lambda n, **on: sl.document([0, n // 3, n // 2, n], block_size=8, **on),
    "documents, not causal": lambda n, **on: sl.document(
        [0, n // 3, n // 3, n], block_size=8, causal=False, **on
    ),
    "samples": lambda n, **on: sl.document(
        [[0, n // 3, n // 2, n], [0, 0, n, n]], block_size=8, **on
    ),
    "blocks": lambda n, **on: sl.bsr_mask(torch.rand(3, n // 8, n // 9) < 0.4, (8, 4), **on),
    "causal blocks": lambda n, **on: sl.bsr_mask(
        torch.rand(2, n // 8, n // 9) < 0.7, (8, 4), causal=True, **on
    ),
    "counts": lambda n, **on: sl.bsr_mask(torch.randint(3, (2, n // 8, n // 9)), 8, **on),
    "equal heads": lambda n, **on: sl.bsr_mask(
        (torch.rand(2, n // 8, n // 8) < 0.4)[[0, 1, 0]], 8, **on
    ),
    "from entries": lambda n, **on: sl.mask_from(torch.rand(2, n, n + 3) < 0.05, 8, **on),
}


def assert_same(a: BlockPattern, b: BlockPattern) -> None:
    for name, x, y in zip(TENSOR_FIELDS, a, b, strict=False):
        assert (x is None) == (y is None), name
        assert x is None or (x.dtype == y.dtype and torch.equal(x.cpu(), y.cpu())), name
    assert a[len(TENSOR_FIELDS) :] == b[len(TENSOR_FIELDS) :]


def columns_of(p: BlockPattern) -> tuple[Tensor, Tensor, Tensor]:
    assert p.col_slots is not None
    return p.ccol_indices, p.row_indices, p.col_slots


# --- lists by column ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 5, 64, 125, 200])
@pytest.mark.parametrize("name", FORMULAS | DATA)
def test_column_lists_are_those_that_row_lists_give(name: str, n: int) -> None:
    p = (FORMULAS | DATA)[name](n).block_pattern
    for derive in (column_lists, _columns_by_sorting):
        for found, expected in zip(
            columns_of(p), derive(p.crow_indices, p.col_indices, p.grid[1]), strict=True
        ):
            assert found.dtype == torch.int32
            assert torch.equal(found, expected)


@given(
    st.integers(0, 90),
    st.sampled_from([1, 3, 8]),
    st.integers(0, 5),
    st.integers(1, 7),
    st.sampled_from([(1, 1), (4, 2), (4, 4), (6, 3)]),
    st.integers(0, 8),
    st.booleans(),
    st.booleans(),
)
def test_column_lists_of_any_local_stride(
    n: int,
    block: int,
    local: int,
    stride: int,
    heads: tuple[int, int],
    offset: int,
    homo: bool,
    causal: bool,
) -> None:
    p = sl.local_stride(
        n,
        block_size=block,
        local_blocks=local,
        vert_stride=stride,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        num_dense_heads=heads[1] // 2,
        head_offset=offset,
        homo_head=homo,
        causal=causal,
    ).block_pattern
    for found, expected in zip(
        columns_of(p), column_lists(p.crow_indices, p.col_indices, p.grid[1]), strict=True
    ):
        assert torch.equal(found, expected)


def test_stripes_of_any_steps() -> None:
    """Every third column of every second row below row 4, and above all of every row."""
    i, j = np.arange(10), np.arange(11)
    below, above = (i > 4) & (i % 2 == 1), i < 5
    stripes = [
        Stripe(Progression(1, 4 * below, 3), Progression(5, 3 * (j % 3 == 1), 2)),
        Stripe(Progression(0, 11 * above), Progression(0, 5), tile=i % 2),
    ]
    tiles = interval_tiles(np.zeros((1, 4), int), np.full((1, 4), 2), 4)
    p = closed_form(stripes, patterns=1, shape=(40, 44), block_size=(4, 4), device=CPU, tiles=tiles)
    mask = sl.BSRTensor.on_pattern(None, p)
    mask.validate()
    expected = torch.zeros(10, 4, 11, 4, dtype=torch.bool)
    expected[5::2, :, 1::3] = expected[:5] = True
    expected[1:5:2, :, :, 2:] = False
    assert torch.equal(mask.to_dense(), expected.view(40, 44))


def test_more_blocks_than_lists_can_number() -> None:
    with pytest.raises(ValueError, match=r"would store 8590000128 blocks.*take a larger block"):
        sl.causal(2**17, block_size=1)


# --- tiles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 5, 31, 32, 33, 64, 100])
def test_interval_tiles(columns: int) -> None:
    starts = np.random.randint(0, columns + 1, (6, 4))  # noqa: NPY002 - seeded by the fixture
    stops = np.minimum(starts + np.random.randint(0, columns + 1, (6, 4)), columns)  # noqa: NPY002
    c = torch.arange(columns)
    bits = (torch.from_numpy(starts)[..., None] <= c) & (c < torch.from_numpy(stops)[..., None])
    assert torch.equal(torch.from_numpy(interval_tiles(starts, stops, columns)), pack_tiles(bits))


@pytest.mark.parametrize("n", [20, 125])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_makes_the_tiles_that_it_uses(name: str, n: int) -> None:
    p = FORMULAS[name](n).block_pattern
    if p.tiles is not None:
        assert len(torch.unique(p.tiles, dim=0)) == len(p.tiles)
        used = torch.unique(p.block_tiles).tolist()
        assert [t for t in used if t] == list(range(1, len(p.tiles) + 1))


@pytest.mark.parametrize("causal", [True, False])
def test_a_document_mask_keeps_each_different_tile_once(causal: bool) -> None:
    torch.manual_seed(1)
    for _ in range(20):
        bounds = [0, *torch.randint(0, 90, (6,)).sort().values.tolist(), 90]
        made = sl.document(bounds, block_size=8, causal=causal)
        again = sl.mask_from(made.to_dense(), 8).block_pattern.tiles
        tiles = made.block_pattern.tiles
        assert (tiles is None) == (again is None)
        if tiles is not None and again is not None:
            assert len(torch.unique(tiles, dim=0)) == len(tiles)
            used = torch.unique(made.block_pattern.block_tiles)
            assert used[used > 0].numel() == len(tiles)


# --- equal heads ----------------------------------------------------------------------------------


def test_heads_of_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_blocks, "HASH_FACTOR", 0)  # all hashes are equal
    blocks = torch.rand(4, 6, 5) < 0.5
    blocks = blocks[[0, 1, 0, 2]]
    mask = sl.bsr_mask(blocks, 4)
    assert torch.equal(mask.to_dense(), blocks.repeat_interleave(4, 1).repeat_interleave(4, 2))
    assert mask.block_pattern.head_map is not None
    assert mask.block_pattern.head_map.tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (1, 7), (9, 8)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int64])
def test_equal_heads_of_any_alignment(shape: tuple[int, int], dtype: torch.dtype) -> None:
    kinds = torch.randint(1, 100, (3, *shape)).to(dtype)
    kinds[1, 0, 0] = 0
    if dtype != torch.bool:
        kinds[2] = kinds[0]
        kinds[2, -1, -1] += 1  # another count is another head
    else:
        kinds[2, -1, -1] = False
    order = [0, 0, 1, 2, 1, 0]
    wide = torch.zeros(1 + len(order) * kinds[0].numel(), dtype=dtype)
    blocks = wide[1:].view(len(order), *shape).copy_(kinds[order])
    own = sl.bsr_mask(blocks, 4).block_pattern
    assert own.num_patterns == 3
    assert own.head_map is not None
    assert own.head_map.tolist() == order


# --- what building costs --------------------------------------------------------------------------


class Cost(TorchDispatchMode):
    """Counts operations by name, those that return as much as `large` bytes, and the bytes that
    tensors hold at once.
    """

    def __init__(self, large: int = 0) -> None:
        super().__init__()
        self.large, self.names, self.large_names = large, Counter[str](), Counter[str]()
        self.held = self.peak = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, is_view = func.overloadpacket.__name__, func.is_view
        if not is_view:
            self.names[name] += 1
        for made in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(made, Tensor):
                storage = made.untyped_storage()
                if not is_view and storage.nbytes() >= self.large:
                    self.large_names[name] += 1
                if storage._cdata not in self.storages:
                    self.storages.add(storage._cdata)
                    self.held += storage.nbytes()
                    self.peak = max(self.peak, self.held)
                    weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return out

    def free(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.held -= size


def long_local_stride(n: int = 131072, num_heads: int = 32, device: str = "meta") -> sl.BSRTensor:
    """On the meta device every operation is the one that a GPU would get."""
    return sl.local_stride(
        n, block_size=64, local_blocks=16, vert_stride=16, num_heads=num_heads, device=device
    )


def test_local_stride_takes_few_operations_of_what_it_stores() -> None:
    """Four lists of a number a block: columns, tiles, rows, slots. Each takes at most four
    operations a block: which part it belongs to, and that part's numbers gathered and applied.
    """
    stored = long_local_stride().block_pattern.num_blocks
    with Cost(large=4 * stored) as cost:
        long_local_stride()
    assert cost.large_names.total() <= 4 * 4
    with Cost(large=4 * stored) as cost:  # the count is not of nothing
        torch.zeros(stored, dtype=torch.int32, device="meta").add_(1)
    assert cost.large_names.total() == 2


def test_operations_do_not_grow() -> None:
    """Two to send, at most two for each of nine tables, sixteen a block, eight a part, and four
    results: nothing is done once for a head, a row or a residue, and nothing is sorted.
    """
    with Cost() as short:
        long_local_stride(4096, 32)
    with Cost() as long:
        long_local_stride(131072, 64)
    assert short.names == long.names
    assert long.names.total() <= 2 + 2 * 9 + 16 + 8 + 4
    assert not {name for name in long.names if "sort" in name or "unique" in name}


def test_peak_memory_is_near_what_is_stored() -> None:
    """Rows, columns and tiles, and three numbers a block while its slot is looked up."""
    stored = long_local_stride(device="cpu").nbytes
    with Cost() as cost:
        made = long_local_stride()
    assert made.block_pattern.num_blocks == 2587896
    assert stored < cost.peak < 1.7 * stored


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_read_nothing_back(name: str) -> None:
    """On the meta device nothing can be read: building there needs no host sync."""
    on_meta = FORMULAS[name](125, device="meta").block_pattern
    built = FORMULAS[name](125).block_pattern
    for field, there, here in zip(TENSOR_FIELDS, on_meta, built, strict=False):
        assert (there is None) == (here is None), field
        assert here is None or (there.shape, there.dtype) == (here.shape, here.dtype), field


@pytest.mark.parametrize("name", FORMULAS | DATA)
def test_every_list_has_memory_of_its_own(name: str) -> None:
    """A list that is moved, saved or freed takes no other one with it."""
    p = (FORMULAS | DATA)[name](125).block_pattern
    lists = [t for t in p[: len(TENSOR_FIELDS)] if t is not None]
    assert len({t.untyped_storage().data_ptr() for t in lists}) == len(lists)
    for t in lists:
        assert t.is_contiguous()
        assert t.untyped_storage().nbytes() == t.nbytes


def test_arrays_are_sent_in_one_copy() -> None:
    first, second = np.arange(6).reshape(2, 3), np.array([7])
    with Cost() as cost:
        a, nothing, b = send_together([first, None, second], torch.device("meta"))
    assert (a.shape, nothing, b.shape) == ((2, 3), None, (1,))
    assert cost.names["_to_copy"] == 1
    a, nothing, b = send_together([first, None, second], CPU)
    assert nothing is None
    assert a.dtype == torch.int32
    assert (a.tolist(), b.tolist()) == (first.tolist(), [7])


# --- in compiled code -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_is_a_constant_of_a_graph(name: str) -> None:
    make = FORMULAS[name]
    *heads, n, _ = make(40).shape
    q, k, v = torch.randn(3, 1, *(heads or [1]), n, 4)
    torch.compiler.reset()

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=make(40))

    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    with sl.fallback("error"):
        assert torch.equal(compiled(q, k, v), attention(q, k, v))


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (sl.document, lambda: torch.tensor([0, *torch.randint(0, 40, (2,)).sort().values, 40])),
        (sl.bsr_mask, lambda: torch.rand(5, 5) < 0.7),
        (sl.mask_from, lambda: torch.rand(40, 40) < 0.7),
    ],
    ids=["document", "bsr_mask", "mask_from"],
)
def test_a_mask_of_data_is_made_between_graphs(make: Make, draw: Callable[[], Tensor]) -> None:
    """Every time, of the data that there is; in one graph it is an error that says so."""
    x = torch.randn(40, 40)

    def masked(data: Tensor) -> Tensor:
        return x * make(data, block_size=8)

    torch.compiler.reset()
    compiled = torch.compile(masked, backend="eager")
    for data in (draw(), draw(), draw()):
        assert torch.equal(compiled(data).to_dense(), masked(data).to_dense())
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="computes on the host"):
        torch.compile(masked, backend="eager", fullgraph=True)(draw())


# --- on a GPU -------------------------------------------------------------------------------------


@contextmanager
def no_sync() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [0, 5, 125, 2048])
@pytest.mark.parametrize("name", FORMULAS | DATA)
def test_a_gpu_builds_what_the_cpu_builds(name: str, n: int) -> None:
    torch.manual_seed(0)
    here = (FORMULAS | DATA)[name](n)
    torch.manual_seed(0)
    there = (FORMULAS | DATA)[name](n, device="cuda")
    assert there.device.type == "cuda"
    assert_same(there.block_pattern, here.block_pattern)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*FORMULAS, "drawn bigbird"])
def test_a_gpu_is_not_waited_for(name: str) -> None:
    make = (FORMULAS | DATA)[name]
    make(2048, device="cuda")
    with no_sync():
        make(2048, device="cuda")
    with no_sync(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(2, device="cuda").sum().item()


@pytest.mark.gpu
def test_peak_memory_on_a_gpu() -> None:
    long_local_stride(device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    made = long_local_stride(device="cuda")
    assert torch.cuda.max_memory_allocated() - before < 2 * made.nbytes
