"""`sl.csr` and `sl.csc`: construction from everything, shared memory, errors, and the way out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
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


def lists_of(dense: Tensor, make: Make, index: torch.dtype = torch.int32) -> tuple[Tensor, ...]:
    """Offsets, indices and values of the non-zeros, made by numpy's own means."""
    lines = dense if make is sl.csr else dense.T
    offsets = torch.tensor([0, *np.cumsum((lines != 0).sum(1).numpy())], dtype=index)
    return offsets, lines.nonzero()[:, 1].to(index), lines[lines != 0]


def address(t: Tensor | np.ndarray) -> int:
    return t.data_ptr() if isinstance(t, Tensor) else t.__array_interface__["data"][0]


def addresses(w: Any) -> list[int]:
    return [t.data_ptr() for t in w.inner_tensors()]


# --- what is stored, and where --------------------------------------------------------------------


def test_the_docstrings_examples() -> None:
    dense = torch.tensor([[1.0, 0, 2, 0], [0, 0, 0, 0], [0, 3, 0, 0], [4, 0, 0, 5]])
    w = sl.csr(dense)
    assert w.crow_indices().tolist() == [0, 2, 2, 3, 5]
    assert w.col_indices().tolist() == [0, 2, 1, 0, 3]
    assert w.values().tolist() == [1, 2, 3, 4, 5]
    w = sl.csc(dense)
    assert w.ccol_indices().tolist() == [0, 2, 3, 4, 5]
    assert w.row_indices().tolist() == [0, 3, 2, 0, 3]
    assert w.values().tolist() == [1, 4, 3, 2, 5]


def test_sizes_and_bytes() -> None:
    w = sl.csr(matrix())
    entries = int((w.to_dense() != 0).sum())
    assert w.nnz == entries
    assert w.density == entries / 54
    assert w.nbytes == entries * (4 + 4) + 7 * 4
    assert w.density_of_causal == entries / 21
    batch = torch.randn(3, 6, 9).sparse_mask(w.pattern)
    assert batch.nnz == 3 * entries
    assert batch.density == w.density
    assert w.cached_bytes == 0
    w.mT @ torch.ones(6, 2)
    assert w.cached_bytes >= entries * 8  # the other compression
    assert w.mT.cached_bytes == w.cached_bytes  # kept once for both


def test_what_it_says_of_itself() -> None:
    assert (
        repr(sl.csr(torch.eye(4))) == "CSRTensor([4, 4], float32, cpu, 4 entries, density 25.00%)"
    )
    assert repr(sl.csc(torch.eye(4)).pattern).startswith("CSCTensor([4, 4], bool, cpu")


# --- dense ----------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("shape", [(6, 9), (0, 9), (6, 0), (0, 0), (1, 1), (700, 300)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_from_dense(make: Make, shape: tuple[int, int], dtype: torch.dtype) -> None:
    dense = (torch.randn(shape) * (torch.rand(shape) < 0.3)).to(dtype)
    for source in (dense, dense.T.contiguous().T, torch.cat([dense, dense], 1)[:, : shape[1]]):
        w = make(source)
        w.validate()
        assert type(w) is CLASS[make]
        assert w.dtype == dtype
        assert w.lists[0].dtype == torch.int32
        assert w.nnz == int((dense != 0).sum())
        assert torch.equal(w.to_dense(), dense)


@BOTH
def test_nan_is_stored_and_minus_zero_is_not(make: Make) -> None:
    w = make(torch.tensor([[0.0, float("nan")], [-0.0, float("inf")]]))
    assert w.nnz == 2
    assert w.to_dense().isnan().sum() == 1


@BOTH
def test_from_numpy_and_read_only_memory(make: Make, tmp_path: Any) -> None:
    dense = matrix().numpy()
    assert torch.equal(make(dense).to_dense(), torch.from_numpy(dense))
    path = tmp_path / "dense.npy"
    np.save(path, dense)
    mapped = np.load(path, mmap_mode="r")
    assert torch.equal(make(mapped).to_dense(), torch.from_numpy(dense))


@BOTH
@pytest.mark.parametrize(
    "keep",
    [sl.Magnitude(0.25), sl.Threshold(0.8), sl.KeepAll(), sl.Random(0.5), sl.NM(2, 3)],
    ids=repr,
)
def test_a_sparsifier_chooses(make: Make, keep: Any) -> None:
    dense = torch.randn(60, 90)
    torch.manual_seed(1)
    w = make(dense, keep=keep)
    w.validate()
    torch.manual_seed(1)
    kept = keep.keep(dense)
    assert torch.equal(w.pattern.to_dense(), kept)
    assert torch.equal(w.to_dense(), dense * kept)


@BOTH
def test_the_dense_matrix_gets_a_gradient(make: Make, assert_close: Check) -> None:
    dense = matrix().double().requires_grad_()
    weight = torch.randn(6, 9, dtype=torch.float64)
    (make(dense) * weight).sum().backward()
    assert_close(dense.grad, weight * (dense != 0))


# --- lists ----------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_from_lists_shares_all_three(make: Make, index: torch.dtype) -> None:
    dense = matrix()
    given = lists_of(dense, make, index)
    w = make(*given, shape=dense.shape)
    assert torch.equal(w.to_dense(), dense)
    assert addresses(w) == [t.data_ptr() for t in (given[2], given[0], given[1])]
    assert w.lists[0].dtype == index
    given[2].mul_(2.0)  # as promised: it shows
    assert torch.equal(w.to_dense(), 2 * dense)


@BOTH
def test_from_arrays_and_python_lists(make: Make) -> None:
    dense = matrix()
    given = lists_of(dense, make)
    arrays = [t.numpy() for t in given]
    w = make(*arrays, shape=dense.shape)
    assert addresses(w) == [address(t) for t in (arrays[2], arrays[0], arrays[1])]
    again = make(*(t.tolist() for t in given), shape=(6, 9))
    assert torch.equal(again.to_dense(), dense)
    empty = make([0, 0, 0], [], [], shape=(2, 2))
    assert empty.nnz == 0


@BOTH
def test_values_of_a_batch(make: Make) -> None:
    offsets, indices, values = lists_of(matrix(), make)
    w = make(offsets, indices, values.expand(3, -1), shape=(6, 9))
    assert w.shape == (3, 6, 9)
    assert torch.equal(w.to_dense(), matrix_again(make, offsets, indices, values).expand(3, -1, -1))


def matrix_again(make: Make, *lists: Tensor) -> Tensor:
    return make(*lists, shape=(6, 9)).to_dense()


@BOTH
def test_given_values_get_a_gradient(make: Make, assert_close: Check) -> None:
    offsets, indices, values = lists_of(matrix().double(), make)
    values.requires_grad_()
    weight = torch.randn(6, 9, dtype=torch.float64)
    w = make(offsets, indices, values, shape=(6, 9))
    (w * weight).sum().backward()
    assert_close(
        values.grad,
        make(*(offsets, indices, values.detach()), shape=(6, 9))
        .like_self(weight.sparse_mask(w.pattern).values())
        .values(),
    )
    # of values that want one the layout has a copy
    assert w.stored_values.data_ptr() != values.data_ptr()


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
    w = make(source)
    assert addresses(w) == [address(t) for t in (source.data, source.indptr, source.indices)]


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


@BOTH
def test_the_transpose_is_the_other_class_on_the_same_tensors(make: Make) -> None:
    w = make(matrix())
    flipped = w.mT
    assert type(flipped) is CLASS[OTHER[make]]
    assert all(a is b for a, b in zip(flipped.inner_tensors(), w.inner_tensors(), strict=True))
    assert type(flipped.mT) is type(w)
    assert flipped.mT.same_pattern(w)


@BOTH
def test_the_meta_device(make: Make) -> None:
    w = make(matrix(), device="meta")
    assert w.device.type == "meta"
    assert w.shape == (6, 9)


# --- hypothesis -----------------------------------------------------------------------------------


@given(
    hnp.arrays(
        np.float64,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=12),
        elements=st.sampled_from([0.0, 0.0, 0.0, 1.0, -2.5]),
    ),
    st.sampled_from([sl.csr, sl.csc]),
)
def test_round_trips(dense: np.ndarray, make: Make) -> None:
    w = make(dense)
    w.validate()
    expected = getattr(scipy.sparse, f"{make.__name__}_array")(dense)
    assert np.array_equal(w.lists[0].numpy(), expected.indptr)
    assert np.array_equal(w.lists[1].numpy(), expected.indices)
    assert np.array_equal(w.to_scipy().toarray(), dense)
    assert torch.equal(make(w.to_scipy()).to_dense(), torch.from_numpy(dense))
    assert torch.equal(OTHER[make](w).to_dense(), w.to_dense())
    assert torch.equal(make(OTHER[make](w)).lists[1], w.lists[1])
    product = w @ torch.from_numpy(dense).T
    np.testing.assert_array_equal(product.numpy(), dense @ dense.T)  # small whole halves: exact


@given(st.data())
def test_lists_are_valid_where_scipy_finds_them_canonical(data: st.DataObject) -> None:
    rows, cols, size = (data.draw(st.integers(0, 4)) for _ in range(3))
    offsets = data.draw(st.lists(st.integers(-1, size + 1), min_size=rows + 1, max_size=rows + 1))
    columns = data.draw(st.lists(st.integers(-1, cols), min_size=size, max_size=size))

    def fits() -> bool:
        if offsets[0] != 0 or offsets[-1] != size or sorted(offsets) != offsets:
            return False
        if any(not 0 <= c < cols for c in columns):
            return False
        lines = [columns[a:b] for a, b in itertools.pairwise(offsets)]
        return all(sorted(set(line)) == line for line in lines)

    if fits():
        sl.csr(offsets, columns, torch.ones(size), shape=(rows, cols)).validate()
    else:
        with pytest.raises(ValueError, match=r"csr: (crow|col)_indices: expected"):
            sl.csr(offsets, columns, torch.ones(size), shape=(rows, cols))
