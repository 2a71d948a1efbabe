"""`sl.csr` and `sl.csc` of scipy's and torch's matrices and of other layouts, and back: what is
stored, and what shares memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor

import sparse_layouts as sl

Make = Callable[..., Any]
Check = Callable[..., None]

# torch's own sparse tensors say so once a process
pytestmark = pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta:UserWarning")

BOTH = pytest.mark.parametrize("make", [sl.csr, sl.csc])
OTHER = {sl.csr: sl.csc, sl.csc: sl.csr}
CLASS = {sl.csr: sl.CSRTensor, sl.csc: sl.CSCTensor}


def matrix(rows: int = 6, cols: int = 9, density: float = 0.4) -> Tensor:
    """float32, one row and one column empty."""
    dense = torch.randn(rows, cols) * (torch.rand(rows, cols) < density)
    dense[rows // 2] = 0
    dense[:, 1] = 0
    return dense


def address(t: Tensor | np.ndarray) -> int:
    return t.data_ptr() if isinstance(t, Tensor) else t.__array_interface__["data"][0]


def addresses(w: Any) -> list[int]:
    return [t.data_ptr() for t in w.inner_tensors()]


# --- scipy ----------------------------------------------------------------------------------------

FORMATS = ["csr", "csc", "coo", "bsr", "dia", "dok", "lil"]


@BOTH
@pytest.mark.parametrize("kind", ["array", "matrix"])
@pytest.mark.parametrize("form", FORMATS)
def test_from_scipy(make: Make, form: str, kind: str) -> None:
    dense = matrix()
    source = getattr(scipy.sparse, f"{form}_{kind}")(dense.numpy())
    w = make(source)
    w.validate()
    assert w.dtype == torch.float32
    assert torch.equal(w.to_dense(), dense)
    if form == make.__name__:
        shared = (source.data, source.indptr, source.indices)
        assert addresses(w) == [address(t) for t in shared]


@BOTH
@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_scipy_there_and_back_shares_memory(make: Make, index: Any) -> None:
    source = getattr(scipy.sparse, f"{make.__name__}_array")(matrix().numpy())
    source.indptr, source.indices = source.indptr.astype(index), source.indices.astype(index)
    back = make(source).to_scipy()
    assert type(back) is type(source)
    for name in ("data", "indptr", "indices"):
        mine, its = getattr(back, name), getattr(source, name)
        assert mine.dtype == its.dtype
        assert address(mine) == address(its)
    assert (back != source).nnz == 0


@BOTH
def test_read_only_scipy_arrays_are_taken_without_a_warning(make: Make) -> None:
    source = getattr(scipy.sparse, f"{make.__name__}_array")(matrix().numpy())
    for name in ("data", "indptr", "indices"):
        getattr(source, name).flags.writeable = False
    for w in (make(source), make(source.indptr, source.indices, source.data, shape=source.shape)):
        assert addresses(w)[1:] == [address(t) for t in (source.indptr, source.indices)]
        w.zero_()  # the values are a copy: an optimizer writes to them
    assert source.data.any()


def test_duplicates_of_scipy_are_added_up_and_sorted() -> None:
    rows, cols = [0, 0, 0, 1], [2, 0, 2, 1]
    coo = scipy.sparse.coo_array((np.array([1.0, 2.0, 4.0, 8.0]), (rows, cols)), shape=(2, 3))
    expected = torch.tensor([[2.0, 0, 5], [0, 8, 0]], dtype=torch.float64)
    assert torch.equal(sl.csr(coo).to_dense(), expected)
    unsorted = scipy.sparse.csr_array(
        (np.array([1.0, 2.0, 4.0, 8.0]), np.array(cols), np.array([0, 3, 4])), shape=(2, 3)
    )
    w = sl.csr(unsorted)
    w.validate()
    assert torch.equal(w.to_dense(), expected)
    assert unsorted.nnz == 4  # the source is as it was


def test_explicit_zeros_of_scipy_stay_stored() -> None:
    source = scipy.sparse.csr_array(np.eye(3))
    source.data[1] = 0.0
    assert sl.csr(source).nnz == 3


def test_scipy_room_that_is_not_used() -> None:
    source = scipy.sparse.csr_array(matrix().numpy())
    source.data = np.append(source.data, 7.0).astype(np.float32)
    source.indices = np.append(source.indices, 0).astype(source.indices.dtype)
    assert torch.equal(sl.csr(source).to_dense(), torch.from_numpy(source.toarray()))


@BOTH
def test_bfloat16_becomes_float32_in_scipy(make: Make) -> None:
    w = make(matrix().bfloat16())
    assert w.to_scipy().dtype == np.float32
    assert np.array_equal(w.to_scipy().toarray(), w.to_dense().float().numpy())


@BOTH
def test_masks_and_batches_in_other_forms(make: Make) -> None:
    w = make(matrix())
    assert np.array_equal(w.pattern.to_scipy().toarray(), (w.to_dense() != 0).numpy())
    assert torch.equal(w.pattern.to_torch_sparse().to_dense(), w.to_dense() != 0)
    batch = torch.randn(2, 6, 9).sparse_mask(w.pattern)
    for one, dense in zip(batch.to_scipy(), batch.to_dense(), strict=True):
        assert np.array_equal(one.toarray(), dense.numpy())
    for one, dense in zip(batch.to_torch_sparse(), batch.to_dense(), strict=True):
        assert torch.equal(one.to_dense(), dense)


# --- torch.sparse and other layouts ---------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("form", ["coo", "csr", "csc", "bsr", "bsc"])
def test_from_torch_sparse(make: Make, form: str) -> None:
    dense = matrix()
    block = ((2, 3),) if form in ("bsr", "bsc") else ()
    source = getattr(dense, "to_sparse" + ("" if form == "coo" else f"_{form}"))(*block)
    w = make(source)
    w.validate()
    assert torch.equal(w.to_dense(), dense)
    if form == make.__name__:
        assert w.stored_values.data_ptr() == source.values().data_ptr()
        assert w.lists[0].data_ptr() == getattr(source, w.fields[1])().data_ptr()
        assert w.lists[0].dtype == torch.int64


@BOTH
def test_torch_sparse_there_and_back_shares_memory(make: Make) -> None:
    w = make(matrix())
    back = w.to_torch_sparse()
    assert back.layout == getattr(torch, f"sparse_{make.__name__}")
    assert back.values().data_ptr() == w.stored_values.data_ptr()
    assert torch.equal(back.to_dense(), w.to_dense())
    assert addresses(make(back)) == addresses(w)


def test_a_coo_tensor_with_duplicates() -> None:
    where = [[0, 0, 1], [1, 1, 0]]
    coo = torch.sparse_coo_tensor(where, [1.0, 2.0, 3.0], (2, 2), check_invariants=True)
    assert torch.equal(sl.csr(coo).to_dense(), torch.tensor([[0.0, 3.0], [3.0, 0.0]]))


@BOTH
def test_from_layouts(make: Make, assert_close: Check) -> None:
    dense = torch.randn(24, 40, dtype=torch.float64)
    blocks = sl.bsr(dense, (4, 8), keep=sl.Magnitude(0.4)).requires_grad_()
    w = make(blocks)
    w.validate()
    assert torch.equal(w.to_dense(), blocks.to_dense())
    assert w.nnz == blocks.nnz
    weight = torch.randn_like(dense)
    (w * weight).sum().backward()
    assert type(blocks.grad) is sl.BSRTensor
    assert_close(blocks.grad, weight * blocks.pattern.to_dense())
    assert make(w) is w
    causal = sl.causal(30, block_size=8)
    assert torch.equal(make(causal).to_dense(), causal.to_dense())  # a mask stays a mask
    assert torch.equal(make(blocks.mT).to_dense(), blocks.to_dense().mT)


@BOTH
def test_the_other_compression(make: Make, assert_close: Check) -> None:
    w = torch.randn(2, 6, 9, dtype=torch.float64).sparse_mask(make(matrix()).pattern)
    w.requires_grad_()
    other = OTHER[make](w)
    other.validate()
    assert type(other) is CLASS[OTHER[make]]
    assert torch.equal(other.to_dense(), w.to_dense())
    weight = torch.randn(2, 6, 9, dtype=torch.float64)
    (other * weight).sum().backward()
    assert type(w.grad) is type(w)
    assert_close(w.grad, weight * w.pattern.to_dense())
    assert torch.equal(OTHER[make](w.pattern).to_dense(), w.pattern.to_dense())
