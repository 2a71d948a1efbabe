"""`w[...]` of CSR and CSC layouts: values, batches, memory, gradients; and masks combined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

import sparse_layouts as sl

Make = Callable[..., Any]
BOTH = pytest.mark.parametrize("make", [sl.csr, sl.csc])


@pytest.fixture
def dense() -> Tensor:
    made = torch.randn(7, 9, dtype=torch.float64) * (torch.rand(7, 9) < 0.5)
    made[3] = made[:, 4] = 0
    return made


INDICES = [
    np.s_[2:5],
    np.s_[:],
    np.s_[3:4],
    np.s_[5:2],
    np.s_[:, 2:6],
    np.s_[1:6, 2:6],
    np.s_[-3:, :-2],
    np.s_[::2],
    np.s_[1::3, ::2],
    np.s_[6::2],
    np.s_[..., 4:],
    np.s_[2:, ...],
    np.s_[0:100],
]


@BOTH
@pytest.mark.parametrize("index", INDICES, ids=str)
def test_slices(index: Any, make: Make, dense: Tensor) -> None:
    w = make(dense)
    with sl.fallback("error"):
        cut, mask = w[index], w.pattern[index]
    assert type(cut) is type(mask) is type(w)
    cut.validate()
    mask.validate()
    assert torch.equal(cut.to_dense(), dense[index])
    assert torch.equal(mask.to_dense(), dense[index] != 0)
    assert cut.lists[0].dtype == w.lists[0].dtype


@BOTH
@pytest.mark.parametrize("index", [2, -1, 3, np.s_[:, 0], np.s_[:, -1], (2, 5), (1, np.s_[3:])])
def test_integers_leave_dense_vectors(index: Any, make: Make, dense: Tensor) -> None:
    w = make(dense)
    with sl.fallback("error"):
        cut = w[index]
    assert type(cut) is Tensor
    assert torch.equal(cut, dense[index])
    assert torch.equal(w.pattern[index], dense[index] != 0)


@BOTH
@pytest.mark.parametrize(
    "index", [0, -1, np.s_[1:], (1, np.s_[2:5]), (np.s_[:], 2), (0, 2), (1, 2, 3), np.s_[..., 3:]]
)
def test_batches(index: Any, make: Make, dense: Tensor) -> None:
    w = torch.randn(3, 7, 9, dtype=torch.float64).sparse_mask(make(dense).pattern)
    with sl.fallback("error"):
        cut = w[index]
    assert torch.equal(cut.to_dense(), w.to_dense()[index])


@BOTH
@pytest.mark.parametrize("index", [np.s_[2:5], 3, np.s_[::2, 1:], np.s_[:, 0]], ids=str)
def test_the_gradient_comes_back(index: Any, make: Make, dense: Tensor) -> None:
    w = make(dense).requires_grad_()
    weight = torch.randn_like(dense[index])
    (w[index] * weight).sum().backward()
    expected = torch.zeros_like(dense)
    expected[index] = weight
    assert type(w.grad) is type(w)
    assert torch.equal(w.grad.to_dense(), expected * (dense != 0))


def test_consecutive_rows_share_memory(dense: Tensor) -> None:
    w = sl.csr(dense)
    cut = w[2:5]
    start = int(w.crow_indices()[2])
    assert cut.stored_values.data_ptr() == w.stored_values[start:].data_ptr()
    assert cut.col_indices().data_ptr() == w.col_indices()[start:].data_ptr()
    cut.mul_(2.0)
    expected = dense.clone()
    expected[2:5] *= 2
    assert torch.equal(w.to_dense(), expected)
    columns = sl.csc(dense)[:, 2:5]
    assert columns.stored_values.untyped_storage().data_ptr() != 0
    assert torch.equal(columns.to_dense(), dense[:, 2:5])


def test_what_wants_a_gradient_is_copied(dense: Tensor) -> None:
    w = sl.csr(dense).requires_grad_()
    cut = w[2:5]
    with torch.no_grad():
        cut.mul_(2.0)
    assert torch.equal(w.to_dense(), dense)


@BOTH
def test_a_product_of_rows(make: Make, dense: Tensor) -> None:
    w, x = make(dense), torch.randn(9, 4, dtype=torch.float64)
    torch.testing.assert_close(w[2:6] @ x, dense[2:6] @ x)
    torch.testing.assert_close(w[:, 3:].mT @ x[:7], dense[:, 3:].T @ x[:7])


@BOTH
@pytest.mark.parametrize("index", [[0, 2], torch.tensor([1, 1]), (None, 2), np.s_[[True] * 7]])
def test_other_indices_are_dense_and_say_so(index: Any, make: Make, dense: Tensor) -> None:
    with pytest.warns(sl.DenseFallbackWarning, match=r"Tensor\.__getitem__"):
        cut = make(dense)[index]
    assert torch.equal(cut, dense[index])


SIZE = st.integers(-9, 9) | st.none()


@given(
    hnp.arrays(
        np.float64,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=8),
        elements=st.sampled_from([0.0, 0.0, 1.0, -2.5]),
    ),
    st.sampled_from([sl.csr, sl.csc]),
    st.tuples(SIZE, SIZE, st.integers(1, 3)),
    st.tuples(SIZE, SIZE, st.integers(1, 3)),
)
def test_any_slices(dense: np.ndarray, make: Make, rows: Any, columns: Any) -> None:
    index = (slice(*rows), slice(*columns))
    cut = make(dense)[index]
    cut.validate()
    assert np.array_equal(cut.to_dense().numpy(), dense[index])


# --- masks combined -------------------------------------------------------------------------------


@given(
    hnp.arrays(
        np.bool_,
        st.tuples(st.just(2), st.integers(0, 6), st.integers(0, 6)),
        elements=st.booleans(),
    ),
    st.sampled_from([sl.csr, sl.csc]),
    st.sampled_from([sl.csr, sl.csc]),
)
def test_masks_combine(stored: np.ndarray, make: Make, other: Make) -> None:
    a, b = make(stored[0].astype(float)).pattern, other(stored[1].astype(float)).pattern
    with sl.fallback("error"):
        found = [a & b, a | b, ~a, a & ~a, a | ~a]
    first, second = stored
    everything = np.ones_like(first)
    expected = [first & second, first | second, ~first, ~everything, everything]
    for mask, dense in zip(found, expected, strict=True):
        mask.validate()
        assert type(mask) is type(a)
        assert mask.lists[0].dtype == a.lists[0].dtype
        assert np.array_equal(mask.to_dense().numpy(), dense)


def test_masks_of_two_shapes_do_not_combine() -> None:
    a, b = sl.csr(torch.eye(3)).pattern, sl.csr(torch.eye(4)).pattern
    with pytest.raises(ValueError, match=r"a & b: expected masks of one shape, got \(3, 3\) and"):
        a & b
    values = sl.csr(torch.eye(3))
    for call in (lambda: a | values, lambda: ~values):
        with pytest.raises(
            TypeError, match=r"expected masks, got torch\.float32 values; w\.pattern"
        ):
            call()
