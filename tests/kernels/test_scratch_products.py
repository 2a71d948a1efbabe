"""The n:m kernels that go through dense scratch memory: pieces of bounded size, and the result in
many pieces the same as in one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparse_layouts.kernels import scratch_products
from sparse_layouts.kernels.nm_matmul import reference
from sparse_layouts.kernels.scratch_products import (
    ROW_BYTES,
    ScratchMatrices,
    multiply_into,
    pieces,
    row_pitch,
)
from sparse_layouts.nm_packing import scatter_entries
from tests.kernels.accuracy import check_call
from tests.kernels.cases import Call
from tests.kernels.cases_nm import NMCase

MIB = 2**20


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("patterns", [1, 3, 40])
@pytest.mark.parametrize(("size", "each"), [(1, 8), (100, 2**14), (8192, 2**14), (7, 2**25)])
def test_pieces_cover_every_matrix_once_in_bounded_memory(
    batch: int, patterns: int, size: int, each: int
) -> None:
    seen = torch.zeros(batch, patterns, size, dtype=torch.int32)
    for piece in pieces(batch, patterns, size, each):
        part = seen[piece]
        part += 1
        assert 0 < part.numel() * each <= scratch_products.SCRATCH_BYTES
        assert piece.part.start % 16 == 0 or size < 16
    assert (seen == 1).all()


def test_pieces_are_as_large_as_they_may_be() -> None:
    whole = list(pieces(1, 1, 4096, 8192))
    assert [p.part for p in whole] == [slice(0, 4096)]
    halves = list(pieces(1, 1, 8192, 16384))
    assert [p.part for p in halves] == [slice(0, 4096), slice(4096, 8192)]
    assert len(list(pieces(4, 64, 128, 256))) == 1
    # a row that is larger than the scratch memory still has to be somewhere
    assert [p.part for p in pieces(1, 1, 2, 65 * MIB)] == [slice(0, 1), slice(1, 2)]


def test_scratch_matrices_are_aligned_and_share_one_buffer() -> None:
    scratch = ScratchMatrices(torch.empty(0, dtype=torch.bfloat16))
    first = scratch.take(1, 2, 5, 39)
    assert first.shape == (1, 2, 5, 39)
    assert first.stride() == (400, 200, 40, 1)
    assert scratch.take(1, 1, 5, 39).data_ptr() == first.data_ptr()
    assert [row_pitch(n, torch.float64) for n in (1, 2, 3)] == [2, 2, 4]


@pytest.mark.parametrize(("batch", "patterns"), [(1, 1), (2, 3), (3, 2), (1, 4), (4, 1)])
@pytest.mark.parametrize("shared", ["", "a", "b"])
def test_products_of_pieces(batch: int, patterns: int, shared: str) -> None:
    a = torch.randn(1 if shared == "a" else batch, patterns, 4, 6, dtype=torch.float64)
    b = torch.randn(1 if shared == "b" else batch, patterns, 5, 6, dtype=torch.float64).mT
    out = torch.empty(batch, patterns, 5, 4, dtype=torch.float64).fill_(torch.nan).mT
    multiply_into(out, a, b)
    assert torch.allclose(out, a @ b)


# --- the kernels, in Triton's interpreter ---------------------------------------------------------


CASES = {
    "rows": NMCase("rows", (70, 12), (2, 4), patterns=2, batch=2, width=20),
    "rows_shared": NMCase("rows_shared", (70, 12), (1, 8), batch=3, share=True, width=20),
    "rows_flipped": NMCase("rows_flipped", (77, 9), (3, 5), width=33, flip=True, dense="step"),
    "columns_of_two": NMCase("columns_of_two", (140, 35), (1, 2), width=20, transposed=True),
    "columns": NMCase("columns", (70, 24), (2, 4), width=20, transposed=True, batch=2),
    "columns_odd": NMCase("columns_odd", (20, 37), (3, 5), width=20, transposed=True, flip=True),
    "wide": NMCase("wide", (9, 130), (4, 8), width=18),
    "sixteen": NMCase("sixteen", (40, 9), (8, 16), width=18, share_x=True, batch=2),
}


def kernel(op: str) -> Callable[..., Tensor]:
    """The row that goes through scratch memory."""
    if op == "nm_matmul":
        from sparse_layouts.kernels.nm_matmul import triton_expand

        return triton_expand.nm_matmul_in_scratch_memory
    from sparse_layouts.kernels.nm_sddmm import triton_dense

    return triton_dense.nm_sddmm_in_scratch_memory


@functools.cache
def built(op: str, name: str, dtype: torch.dtype) -> Call:
    case = CASES[name]
    make = case.build_matmul if op == "nm_matmul" else case.build_sddmm
    return make(dtype, "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("op", ["nm_matmul", "nm_sddmm"])
def test_in_many_pieces(
    op: str,
    name: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    poisoned_empty: None,
) -> None:
    taken: list[int] = []
    take = ScratchMatrices.take

    def counted(self: ScratchMatrices, *shape: int) -> Tensor:
        made = take(self, *shape)
        taken.append(self.buffer.nbytes)
        return made

    budget = 3000 * dtype.itemsize
    monkeypatch.setattr(ScratchMatrices, "take", counted)
    monkeypatch.setattr(scratch_products, "SCRATCH_BYTES", budget)
    call = built(op, name, dtype)
    check_call(op, call, kernel(op)(*call.args, **call.kwargs))
    assert len(taken) > 1, "one piece"
    assert max(taken) <= budget + 2 * 140 * ROW_BYTES  # what aligns the rows of a part comes on top


@pytest.mark.interpreter
def test_what_is_not_stored_is_seen_as_by_a_dense_matrix() -> None:
    call = built("nm_matmul", "rows", torch.float32)
    values, indices, x = call.args
    x = x.clone()
    x[0, 0, 3, 1] = torch.nan
    values = values.clone()
    values[1, 1, 2, 5] = -torch.inf
    found = kernel("nm_matmul")(values, indices, x, n=2, m=4)
    expected = reference.nm_matmul(values, indices, x, n=2, m=4)
    assert torch.equal(found.isnan(), expected.isnan())
    assert found[0, 0, :, 1].isnan().all()


@pytest.mark.interpreter
@pytest.mark.parametrize("n_of_m", [(1, 4), (2, 4), (3, 4), (2, 8), (5, 16), (1, 2), (2, 3)])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_expanding_moves_the_bits(n_of_m: tuple[int, int], dtype: torch.dtype) -> None:
    from sparse_layouts.kernels.nm_matmul.triton_expand import expand_into

    n, m = n_of_m
    case = NMCase("bits", (21, 19), n_of_m, patterns=2)
    values, indices, _ = case.build_matmul(dtype, "cpu").args
    values[0, 1, 4, :2] = torch.tensor([-torch.inf, -0.0], dtype=dtype)
    for stored in (values, values.repeat_interleave(2, -1)[..., ::2]):
        w = ScratchMatrices(values).take(1, 2, 21, 19 * m)
        expand_into(w, stored, indices, (0, 19), n=n, m=m)
        exact = scatter_entries(values, indices, n, m, 19 * m)
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        assert torch.equal(w.contiguous().view(integer), exact.view(integer))
