"""Block rows cut into items: every stored block in one item, in the order of its row; counters that
every launch leaves as it found them.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import sparse_layouts as sl
from sparse_layouts.block_pattern import BlockPattern
from sparse_layouts.kernels.block_matmul.row_cuts import (
    GRAPHS,
    Counters,
    cut_rows,
    most_items,
    row_counters,
)
from tests.kernels.cases import Stored, make_pattern, random_source

PATTERNS = {
    "some": Stored((160, 300), (16, 16), 3),
    "power": Stored((160, 1040), (16, 16), 2, blocks="power"),
    "none": Stored((80, 300), (16, 16), blocks="none"),
    "all": Stored((48, 1600), (16, 16), blocks="all"),
    "gaps": Stored((160, 300), (16, 16), 2, blocks="gaps"),
    "transposed": Stored((300, 1040), (16, 16), 2, blocks="power", transposed=True),
}


def pattern_of(name: str) -> BlockPattern:
    return make_pattern(PATTERNS[name], random_source(name))


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 64, 1000])
@pytest.mark.parametrize("name", PATTERNS)
def test_items_are_the_rows_in_pieces(name: str, limit: int) -> None:
    p = pattern_of(name)
    crow = p.crow_indices.tolist()
    rows = [(a, b) for of_one in crow for a, b in itertools.pairwise(of_one)]
    items = cut_rows(p, limit).tolist()
    assert len(items) == most_items(p, limit)
    at = 0
    for row, (start, end) in enumerate(rows):
        pieces = max(1, (end - start + limit // 2) // limit)
        pieces = min(pieces, 1 + math.isqrt(max(0, end - start - 1)))
        own = items[at : at + pieces]
        assert [item[0] for item in own] == [row] * pieces
        assert {(item[3], item[4]) for item in own} == {(at, pieces)}
        assert [own[0][1], *(item[2] for item in own)] == [*(item[1] for item in own), end]
        assert own[0][1] == start
        sizes = [item[2] - item[1] for item in own]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= max(1.5 * limit, math.ceil(math.sqrt(end - start)))
        at += pieces
    assert all(item[0] == len(rows) for item in items[at:])


def test_items_are_made_once() -> None:
    p = pattern_of("power")
    assert cut_rows(p, 3) is cut_rows(p, 3)
    assert cut_rows(p, 3) is not cut_rows(p, 4)


def test_items_without_a_host_sync() -> None:
    p = pattern_of("power")
    on_meta = BlockPattern._make((*(None if t is None else t.to("meta") for t in p[:10]), *p[10:]))
    assert cut_rows(on_meta, 3).shape == cut_rows(p, 3).shape


@pytest.mark.interpreter
def test_counters_are_left_as_zeros() -> None:
    from sparse_layouts.derived import _derived
    from sparse_layouts.kernels.block_matmul.triton_few_columns import block_matmul

    p = pattern_of("power")
    values, x = torch.randn(1, p.num_blocks, 16, 16), torch.randn(1, 2, 1040, 3)
    block_matmul(values, p, x)
    kept = [v for v, _ in _derived[p.crow_indices].values() if isinstance(v, Counters)]
    assert len(kept) == 1
    counters = kept[0].by_stream[0]
    assert counters.numel() == 2 * 10
    assert not counters.any()


# --- on a GPU -------------------------------------------------------------------------------------


rows_of_x = pytest.mark.parametrize("rows", [9, 64])  # by Triton and, on Hopper, by Gluon


def on_gpu(rows: int) -> tuple[sl.BSRTensor, torch.Tensor, torch.Tensor]:
    """A weight whose rows are cut, an input and a bias."""
    dense = torch.randn(512, 8192, device="cuda", dtype=torch.bfloat16)
    w = sl.bsr(dense, 64, keep=sl.Magnitude(0.5))
    x = torch.randn(rows, 8192, device="cuda", dtype=torch.bfloat16)
    return w, x, torch.randn(512, device="cuda", dtype=torch.bfloat16)


@pytest.mark.gpu
@rows_of_x
def test_captured_products_run_beside_others(rows: int) -> None:
    w, x, bias = on_gpu(rows)
    wanted = torch.nn.functional.linear(x, w, bias)
    graphs = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # more of them than there are counters set aside
            found = [torch.nn.functional.linear(x, w, bias) for _ in range(GRAPHS)]
        graphs.append((graph, found))
    streams = [torch.cuda.Stream() for _ in range(3)]
    for _ in range(10):
        for stream, (graph, _) in zip(streams, graphs, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            own = [torch.nn.functional.linear(x, w, bias) for _ in range(4)]
    torch.cuda.synchronize()
    for found in (own, *(found for _, found in graphs)):
        assert all(torch.equal(out, wanted) for out in found)


@pytest.mark.gpu
@rows_of_x
def test_a_product_that_is_captured_first(rows: int) -> None:
    w, x, bias = on_gpu(rows)
    graph = torch.cuda.CUDAGraph()
    torch.nn.functional.linear(x, sl.bsr(w.to_dense(), 64), bias)  # compiles
    with torch.cuda.graph(graph):
        found = torch.nn.functional.linear(x, w, bias)
    wanted = torch.nn.functional.linear(x, w, bias)
    for _ in range(3):
        graph.replay()
    assert torch.equal(found, wanted)
    graph.reset()  # what the pattern keeps is not the graph's
    assert torch.equal(torch.nn.functional.linear(x, w, bias), wanted)


@pytest.mark.gpu
def test_counters_of_captures_differ() -> None:
    p = on_gpu(9)[0].block_pattern
    eager = row_counters(p, 8)
    assert eager is row_counters(p, 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [row_counters(p, 8) for _ in range(GRAPHS + 2)]
    assert len({t.data_ptr() for t in (eager, *captured)}) == GRAPHS + 3


@pytest.mark.parametrize("blocks", [1, 2, 5, 64, 500])
def test_long_rows_are_cut_into_no_more_pieces_than_each_has_blocks(blocks: int) -> None:
    rows = torch.zeros(40, blocks, dtype=torch.bool)
    rows[3] = True  # the others are empty: what counts is the row's own length
    items = cut_rows(sl.bsr_mask(rows, 64).block_pattern, 1)
    (pieces,) = set(items[items[:, 0] == 3, 4].tolist())
    assert pieces == (items[:, 0] == 3).sum()
    assert pieces <= math.ceil(blocks / pieces) + 1
    assert pieces >= math.isqrt(blocks)
