"""`sl.csr` and `sl.csc`: from dense matrices and lists; sizes, views, round trips."""

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


# --- views and devices --------------------------------------------------------------------------


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
