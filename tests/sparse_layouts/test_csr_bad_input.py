"""Every wrong argument of `sl.csr` and `sl.csc`, and of what CSR and CSC layouts are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

import sparse_layouts as sl

pytestmark = pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta:UserWarning")

ONES = torch.ones(3)
INT = torch.tensor

LISTS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type, str]] = {
    "no shape": (
        ([0, 2, 3], [0, 2, 1], ONES),
        {},
        TypeError,
        r"csr: lists come as .*shape=\(M, K\)",
    ),
    "no values": (([0, 2, 3], [0, 2, 1]), {"shape": (2, 3)}, TypeError, r"torch\.ones\(S\)"),
    "negative shape": (
        ([0, 2, 3], [0, 2, 1], ONES),
        {"shape": (2, -3)},
        ValueError,
        r"two numbers from 0, got \(2, -3\)",
    ),
    "three sizes": (
        ([0, 2, 3], [0, 2, 1], ONES),
        {"shape": (2, 3, 4)},
        ValueError,
        r"shape is \(M, K\)",
    ),
    "float offsets": (
        (INT([0.0, 2, 3]), INT([0, 2, 1]), ONES),
        {"shape": (2, 3)},
        TypeError,
        r"crow_indices are int32 or int64, got torch\.float32; convert with",
    ),
    "short offsets": (
        (INT([0, 3]), INT([0, 2, 1]), ONES),
        {"shape": (2, 3)},
        ValueError,
        r"csr: crow_indices: expected 3 offsets for a matrix of \(2, 3\), got 2",
    ),
    "two integer kinds": (
        (INT([0, 2, 3]).int(), INT([0, 2, 1]), ONES),
        {"shape": (2, 3)},
        ValueError,
        r"both int32 or both int64, got torch\.int32 and torch\.int64; convert",
    ),
    "first offset": (
        ([1, 2, 3], [0, 2, 1], ONES),
        {"shape": (2, 3)},
        ValueError,
        r"expected the first offset to be 0, got 1",
    ),
    "last offset": (
        ([0, 2, 2], [0, 2, 1], ONES),
        {"shape": (2, 3)},
        ValueError,
        r"expected the last offset to be 3, the number of col_indices, got 2",
    ),
    "falling offsets": (
        ([0, 3, 2, 3], [0, 1, 2], ONES),
        {"shape": (3, 3)},
        ValueError,
        r"offsets that never fall",
    ),
    "column out of range": (
        ([0, 2, 3], [0, 3, 1], ONES),
        {"shape": (2, 3)},
        ValueError,
        r"col_indices: expected columns from 0 to 2, got 0 to 3",
    ),
    "negative column": (
        ([0, 2, 3], [-1, 2, 1], ONES),
        {"shape": (2, 3)},
        ValueError,
        r"got -1 to 2",
    ),
    "not sorted": (
        ([0, 2, 3], [2, 0, 1], ONES),
        {"shape": (2, 3)},
        ValueError,
        r"ascending columns within every row.*sort",
    ),
    "twice": (
        ([0, 2, 3], [2, 2, 1], ONES),
        {"shape": (2, 3)},
        ValueError,
        r"every column once in a row, got one twice.*sum_duplicates",
    ),
    "too few values": (
        ([0, 2, 3], [0, 2, 1], torch.ones(2)),
        {"shape": (2, 3)},
        ValueError,
        r"values: expected \(\*batch, 3\), one for each of col_indices, got \(2,\)",
    ),
    "one value": (([0, 2, 3], [0, 2, 1], 1.0), {"shape": (2, 3)}, TypeError, r"got float"),
    "bool values": (
        ([0, 2, 3], [0, 2, 1], torch.ones(3, dtype=torch.bool)),
        {"shape": (2, 3)},
        TypeError,
        r"expected values, got bool.*\.pattern",
    ),
    "matrix of offsets": (
        (INT([[0, 2, 3]]), INT([0, 2, 1]), ONES),
        {"shape": (2, 3)},
        ValueError,
        r"crow_indices: expected one dimension",
    ),
    "a sparsifier": (
        ([0, 2, 3], [0, 2, 1], ONES),
        {"shape": (2, 3), "keep": sl.Magnitude(0.5)},
        ValueError,
        r"lists have chosen",
    ),
    "sparse values": (
        ([0, 2, 3], [0, 2, 1], ONES.to_sparse()),
        {"shape": (2, 3)},
        TypeError,
        r"strided tensor",
    ),
}


@pytest.mark.parametrize("case", LISTS.values(), ids=LISTS)
def test_wrong_lists(case: tuple[tuple[Any, ...], dict[str, Any], type, str]) -> None:
    args, kwargs, error, text = case
    with pytest.raises(error, match=text):
        sl.csr(*args, **kwargs)


def test_wrong_lists_of_columns_speak_of_columns() -> None:
    with pytest.raises(
        ValueError, match=r"csc: row_indices: expected rows from 0 to 1, got 0 to 2"
    ):
        sl.csc([0, 2, 3, 3], [0, 2, 1], ONES, shape=(2, 3))
    with pytest.raises(ValueError, match=r"csc: ccol_indices: expected 4 offsets .* got 3"):
        sl.csc([0, 2, 3], [0, 1, 1], ONES, shape=(2, 3))
    with pytest.raises(ValueError, match=r"ascending rows within every column"):
        sl.csc([0, 2, 3], [1, 0, 1], ONES, shape=(2, 2))


MATRICES: dict[str, tuple[Any, dict[str, Any], type, str]] = {
    "a vector": (ONES, {}, ValueError, r"expected a matrix \(M, K\), got shape \(3,\); x\[None\]"),
    "a batch": (torch.ones(2, 3, 4), {}, ValueError, r"got shape \(2, 3, 4\); one pattern for all"),
    "bool": (torch.ones(2, 3, dtype=torch.bool), {}, TypeError, r"expected values, got bool"),
    "numpy bool": (np.ones((2, 3), dtype=bool), {}, TypeError, r"expected values, got bool"),
    "scipy bool": (scipy.sparse.eye_array(3, dtype=bool), {}, TypeError, r"got bool.*\.pattern"),
    "torch bool": (lambda: torch.eye(3).bool().to_sparse_csr(), {}, TypeError, r"got bool"),
    "scipy vector": (
        scipy.sparse.coo_array(np.ones(3)),
        {},
        ValueError,
        r"expected a matrix, got shape \(3,\)",
    ),
    "scipy long double": (
        scipy.sparse.csr_array(np.eye(3, dtype=np.longdouble)),
        {},
        TypeError,
        r"numpy's .*convert it with x\.astype",
    ),
    "a list": (
        [[1.0]],
        {},
        TypeError,
        r"expected a dense, scipy or torch\.sparse matrix, got list",
    ),
    "None": (None, {}, TypeError, r"got NoneType"),
    "shape of a matrix": (torch.eye(3), {"shape": (3, 3)}, TypeError, r"shape= goes with lists"),
    "keep of scipy": (
        scipy.sparse.eye_array(3),
        {"keep": sl.Magnitude(0.5)},
        ValueError,
        r"has chosen already \(densify it first\)",
    ),
    "keep of a layout": (
        sl.bsr(torch.eye(4), 2),
        {"keep": sl.Magnitude(0.5)},
        ValueError,
        r"BSRTensor.* has chosen already",
    ),
    "keep of torch": (
        torch.eye(3).to_sparse(),
        {"keep": sl.Magnitude(0.5)},
        ValueError,
        r"has chosen already",
    ),
    "keep that is none": (torch.eye(3), {"keep": 0.5}, TypeError, r"csr: keep is a sparsifier"),
    "NaN to compare": (
        torch.full((2, 2), torch.nan),
        {"keep": sl.Magnitude(0.5)},
        ValueError,
        r"NaN",
    ),
    "torch batch": (
        lambda: torch.ones(2, 3, 4).to_sparse_csr(),
        {},
        ValueError,
        r"expected a sparse matrix, got shape \(2, 3, 4\)",
    ),
    "torch hybrid": (
        lambda: torch.ones(2, 3, 4).to_sparse(2),
        {},
        ValueError,
        r"1 dense dimensions",
    ),
    "torch gradient": (
        lambda: torch.eye(3).to_sparse_csr().requires_grad_(),
        {},
        ValueError,
        r"cannot be followed; pass the dense tensor",
    ),
    "layouts with heads": (
        sl.bsr(torch.ones(2, 4, 4), 2),
        {},
        ValueError,
        r"expected a matrix.*convert each one",
    ),
}


@pytest.mark.parametrize("case", MATRICES.values(), ids=MATRICES)
def test_wrong_matrices(case: tuple[Any, dict[str, Any], type, str]) -> None:
    source, kwargs, error, text = case
    if callable(source):
        source = source()
    with pytest.raises(error, match=text):
        sl.csr(source, **kwargs)


def test_validate_sees_what_was_broken_later() -> None:
    offsets, columns = INT([0, 2, 3]), INT([0, 2, 1])
    w = sl.csr(offsets, columns, torch.ones(3), shape=(2, 3))
    columns[0] = 7
    with pytest.raises(ValueError, match="columns from 0 to 2, got 1 to 7"):
        w.validate()
    stretched = sl.CSRTensor.on_lists(torch.ones(4), *w.lists, (2, 3))
    with pytest.raises(ValueError, match=r"values: expected \(\*batch, 3\)"):
        stretched.validate()


W = sl.csr(torch.eye(3))
PRODUCTS: dict[str, tuple[Any, type, str]] = {
    "shape": (lambda: W @ torch.ones(4, 2), ValueError, r"3 and 4 must be equal"),
    "shape from the left": (lambda: torch.ones(2, 4) @ W, ValueError, r"must be equal"),
    "dtype": (lambda: W @ torch.ones(3, 2).double(), TypeError, r"one dtype"),
    "mask": (lambda: W.pattern @ torch.ones(3, 2), TypeError, r"no values to multiply"),
    "linear": (lambda: torch.nn.functional.linear(torch.ones(2, 4), W), ValueError, "linear"),
    "samples": (
        lambda: torch.ones(2, 3, 3).sparse_mask(W.pattern) @ torch.ones(5, 3, 2),
        ValueError,
        r"do not broadcast",
    ),
    "sddmm shape": (
        lambda: sl.sddmm(torch.ones(3, 2), torch.ones(2, 4), W),
        ValueError,
        r"expected a \(\.\.\., 3, K\) and b \(\.\.\., K, 3\)",
    ),
    "sddmm dtypes": (
        lambda: sl.sddmm(torch.ones(3, 2), torch.ones(2, 3).double(), W),
        TypeError,
        r"one dtype",
    ),
    "sddmm integers": (
        lambda: sl.sddmm(torch.ones(3, 2).long(), torch.ones(2, 3).long(), W),
        TypeError,
        r"a is floating",
    ),
    "sddmm vector": (lambda: sl.sddmm(torch.ones(3), torch.ones(2, 3), W), ValueError, r"2-D"),
    "softmax of a mask": (lambda: torch.softmax(W.pattern, -1), TypeError, r"sl\.sddmm"),
    "softmax of a dimension": (lambda: torch.softmax(W, 2), IndexError, r"dimension of 2, got 2"),
    "softmax of the batch": (
        lambda: torch.softmax(torch.ones(2, 3, 3).sparse_mask(W.pattern), 0),
        NotImplementedError,
        r"torch\.softmax\(w\.values\(\), 0\)",
    ),
    "row": (lambda: W[3], IndexError, r"index 3 is out of range for dimension 0 of 3"),
    "too many": (lambda: W[0, 1, 2], IndexError, r"too many indices"),
    "sparse_mask": (lambda: torch.ones(3, 4).sparse_mask(W), ValueError, r"3, 3"),
    "other pattern": (lambda: W.clone().add_(sl.csr(torch.ones(3, 3))), TypeError, "different"),
}


@pytest.mark.parametrize("case", PRODUCTS.values(), ids=PRODUCTS)
def test_wrong_operands(case: tuple[Any, type, str]) -> None:
    call, error, text = case
    with pytest.raises(error, match=text):
        call()
