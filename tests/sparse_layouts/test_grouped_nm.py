"""`sl.grouped_nm`: the assignment, the layout's fields, products and their gradients, bad input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparse_layouts as sl

F64 = torch.float64
Check = Callable[..., None]


def greedy(dense: Tensor, n: int, m: int, g: int) -> list[list[int]]:
    """The columns of every chunk by choice, as the definition says it: pair after pair."""
    choices = list(itertools.combinations(range(m), n))
    chunk = len(choices) * g
    rows, cols = (
        -(-size // unit) * unit for size, unit in zip(dense.shape, (m, chunk), strict=True)
    )
    padded = dense.new_zeros(rows, cols)
    padded[: dense.shape[0], : dense.shape[1]] = dense.abs()
    found = []
    for top in range(0, rows, m):
        line: list[int] = []
        for left in range(0, cols, chunk):
            block = padded[top : top + m, left : left + chunk]
            pairs = [
                (-float(block[list(rows), column].sum()), column, choice)
                for column in range(chunk)
                for choice, rows in enumerate(choices)
            ]
            taken: set[int] = set()
            members: list[list[int]] = [[] for _ in choices]
            for _, column, choice in sorted(pairs):
                if column not in taken and len(members[choice]) < g:
                    taken.add(column)
                    members[choice].append(column)
            line.extend(itertools.chain(*members))
        found.append(line)
    return found


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 11),
    st.integers(0, 40),
    st.booleans(),
)
def test_columns_are_assigned_by_descending_magnitude(
    n: int, more: int, g: int, rows: int, cols: int, with_ties: bool
) -> None:
    m = n + more
    dense = torch.randn(rows, cols, dtype=F64)
    if with_ties:  # small integers: their sums are exact, and many are equal
        dense = dense.mul(2).round()
    w = sl.grouped_nm(dense, n, m, g)
    w.validate()
    assert w.inner_columns.tolist() == greedy(dense, n, m, g)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 9), st.integers(0, 30)
)
def test_round_trip(n: int, more: int, g: int, rows: int, cols: int) -> None:
    dense = torch.randn(rows, cols, dtype=F64)
    w = sl.grouped_nm(dense, n, n + more, g)
    kept = w.to_dense()
    assert torch.equal(kept, dense * (kept != 0))
    assert w.nnz == int((kept != 0).sum())
    assert torch.equal(kept.sparse_mask(w).to_dense(), kept)
    assert torch.equal(w.mT.to_dense(), kept.mT)
    assert torch.equal(w.pattern.to_dense(), kept != 0)


def test_every_choice_is_that_of_g_columns() -> None:
    n, m, g = 2, 4, 3
    w = sl.grouped_nm(torch.randn(8, 36, dtype=F64), n, m, g)
    for block in w.pattern.to_dense().view(2, m, 2, 18).permute(0, 2, 3, 1).flatten(0, 1):
        kinds = block.unique(dim=0, return_counts=True)
        assert kinds[0].sum(1).tolist() == [n] * math.comb(m, n)
        assert kinds[1].tolist() == [g] * math.comb(m, n)


def test_bytes() -> None:
    w = sl.grouped_nm(torch.randn(64, 96).bfloat16(), 2, 4, 4)
    assert w.nbytes == 64 * 96 * 2 * 2 // 4 + 2 * 64 * 96 // 4
    assert repr(w) == "GroupedNMTensor([64, 96], bfloat16, cpu, 2:4:4, density 50.00%)"


@pytest.fixture
def w() -> sl.GroupedNMTensor:
    return sl.grouped_nm(torch.randn(10, 29, dtype=F64), 2, 4, 2).requires_grad_()


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda w, x: w @ x,
    "vector": lambda w, x: w @ x[:, 0],
    "from the left": lambda w, x: x.mT @ w.mT,
    "vector from the left": lambda w, x: x[:, 0] @ w.mT,
    "mm": torch.mm,
    "linear": lambda w, x: F.linear(x.mT, w),
    "linear with bias": lambda w, x: F.linear(x.mT, w, x.new_ones(w.shape[0])),
    "batched": lambda w, x: w @ x.expand(3, *x.shape),
    "batched from the left": lambda w, x: x.mT.expand(2, 3, *x.mT.shape) @ w.mT,
    "einsum": lambda w, x: torch.einsum("mk,kn->mn", w, x),
    "twice transposed": lambda w, x: w.mT.mT @ x,
    "step": lambda w, x: w @ x[:, ::2],
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_and_gradients_equal_dense(
    name: str, w: sl.GroupedNMTensor, assert_close: Check
) -> None:
    x = torch.randn(29, 6, dtype=F64, requires_grad=True)
    dense = w.detach().to_dense().requires_grad_()
    y = x.detach().clone().requires_grad_()
    with sl.fallback("error"):
        out = PRODUCTS[name](w, x)
        expected = PRODUCTS[name](dense, y)
        grad = torch.randn_like(expected)
        out.backward(grad)
    expected.backward(grad)
    assert_close(out, expected)
    assert_close(x.grad, y.grad)
    assert isinstance(w.grad, sl.GroupedNMTensor)
    assert_close(w.grad, dense.grad.sparse_mask(w))


def test_second_derivatives(w: sl.GroupedNMTensor, assert_close: Check) -> None:
    x = torch.randn(29, 3, dtype=F64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    dense = w.detach().to_dense().requires_grad_()
    (dx,) = torch.autograd.grad((w @ x).square().sum(), x, create_graph=True)
    (dy,) = torch.autograd.grad((dense @ y).square().sum(), y, create_graph=True)
    dx.square().sum().backward()
    dy.square().sum().backward()
    assert_close(x.grad, y.grad)
    assert_close(w.grad, dense.grad.sparse_mask(w))


def test_the_factory_is_differentiable(assert_close: Check) -> None:
    dense = torch.randn(8, 24, dtype=F64, requires_grad=True)
    w = sl.grouped_nm(dense, 2, 4, 2)
    grad = torch.randn(8, 24, dtype=F64)
    (w.to_dense() * grad).sum().backward()
    assert_close(dense.grad, grad * w.pattern.to_dense())


@pytest.mark.parametrize("flip", [False, True])
def test_sampled_product(flip: bool, w: sl.GroupedNMTensor, assert_close: Check) -> None:
    mask = w.detach().mT if flip else w.detach()
    m, n = mask.shape
    a = torch.randn(2, m, 5, dtype=F64, requires_grad=True)
    b = torch.randn(5, n, dtype=F64, requires_grad=True)
    with sl.fallback("error"):
        scores = sl.sddmm(a, b, mask.pattern)
        assert_close(scores, (a @ b) * mask.pattern.to_dense())
        grad = torch.randn(2, m, n, dtype=F64)
        got = torch.autograd.grad((scores * grad).sum(), (a, b))
    expected = torch.autograd.grad(((a @ b) * mask.pattern.to_dense() * grad).sum(), (a, b))
    for mine, its in zip(got, expected, strict=True):
        assert_close(mine, its)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_explain_and_trace_name_the_kernel(dtype: torch.dtype) -> None:
    w = sl.grouped_nm(torch.randn(8, 24, dtype=dtype), 2, 4, 4)
    x = torch.randn(24, 3, dtype=dtype)
    assert sl.explain(torch.matmul, w, x).kernel == "cpu"
    with sl.trace() as steps:
        w @ x
    assert [step.what for step in steps] == ["grouped_nm_matmul"]


def test_a_softmax_is_dense_and_explain_says_so(assert_close: Check) -> None:
    w = sl.grouped_nm(torch.randn(8, 24, dtype=F64), 2, 4, 4)
    assert sl.explain(torch.softmax, w, -1).kernel == "dense fallback"
    with pytest.warns(sl.DenseFallbackWarning, match="softmax of a GroupedNMTensor"):
        out = torch.softmax(w, -1)
    dense = w.to_dense()
    assert_close(out, dense.masked_fill(dense == 0, -math.inf).softmax(-1).nan_to_num(0.0))


def test_a_sparse_argument_is_taken_too(assert_close: Check) -> None:
    dense = torch.randn(8, 24, dtype=F64)
    assert_close(sl.grouped_nm(sl.bsr(dense, 8), 2, 4, 4), sl.grouped_nm(dense, 2, 4, 4))
    on_meta = sl.grouped_nm(dense, 2, 4, 4).to("meta")
    assert (on_meta @ torch.empty(24, 2, dtype=F64, device="meta")).shape == (8, 2)


BAD = {
    "n": (lambda: sl.grouped_nm(torch.ones(4, 4), 4, 4, 1), ValueError, "1 <= n < m <= 16.*n=4"),
    "m": (lambda: sl.grouped_nm(torch.ones(4, 4), 2, 17, 1), ValueError, "m=17"),
    "g": (lambda: sl.grouped_nm(torch.ones(4, 4), 2, 4, 0), ValueError, "g of at least 1, got 0"),
    "kind": (lambda: sl.grouped_nm(torch.ones(4, 4), 2.0, 4, 1), TypeError, "n is an int, got 2.0"),
    "chunk": (
        lambda: sl.grouped_nm(torch.ones(4, 4), 8, 16, 3),
        ValueError,
        r"C\(16, 8\) \* 3 = 38610 columns is over.*smaller g",
    ),
    "no tensor": (
        lambda: sl.grouped_nm([1.0], 2, 4, 1),
        TypeError,
        "expected a tensor, .* got list",
    ),
    "integers": (
        lambda: sl.grouped_nm(torch.ones(4, 4).int(), 2, 4, 1),
        TypeError,
        "floating tensor, got torch.int32",
    ),
    "3-D": (
        lambda: sl.grouped_nm(torch.ones(2, 4, 4), 2, 4, 1),
        ValueError,
        r"matrix \(M, K\), got shape \(2, 4, 4\)",
    ),
    "NaN": (
        lambda: sl.grouped_nm(torch.full((4, 4), math.nan), 2, 4, 1),
        ValueError,
        "has NaN",
    ),
    "shapes": (
        lambda: sl.grouped_nm(torch.ones(4, 6), 2, 4, 1) @ torch.ones(5, 2),
        ValueError,
        r"\(4, 6\) \(layout\) and \(5, 2\) do not fit",
    ),
    "dtypes": (
        lambda: sl.grouped_nm(torch.ones(4, 6), 2, 4, 1) @ torch.ones(6, 2).double(),
        TypeError,
        "expected one dtype",
    ),
    "mask": (
        lambda: sl.grouped_nm(torch.ones(4, 6), 2, 4, 1).pattern @ torch.ones(6, 2),
        TypeError,
        "a mask layout has no values",
    ),
    "values of a mask": (
        lambda: sl.grouped_nm(torch.ones(4, 6), 2, 4, 1).pattern.values(),
        TypeError,
        "a mask layout has none",
    ),
    "sddmm": (
        lambda: sl.sddmm(
            torch.ones(4, 2), torch.ones(2, 5), sl.grouped_nm(torch.ones(4, 6), 2, 4, 1)
        ),
        ValueError,
        r"a \(\.\.\., 4, K\) and b \(\.\.\., K, 6\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()


def broken(**changes: object) -> sl.GroupedNMTensor:
    w = sl.grouped_nm(torch.randn(6, 10, dtype=F64), 2, 4, 2)
    parts = {"values": w.inner_values, "columns": w.inner_columns, **w.static(), **changes}
    inner = (parts.pop("values"), parts.pop("columns"))
    return sl.GroupedNMTensor(*inner, shape=parts.pop("shape", w.shape), **parts)


BROKEN = {
    "n:m": ({"n": 5}, "1 <= n < m"),
    "axis": ({"axis": 0}, "axis: expected -1 or -2"),
    "shape": ({"axis": -1}, "shape: expected"),
    "columns' size": ({"g": 4}, "columns: expected int16 of shape"),
    "columns' order": ({"columns": torch.zeros(2, 12, dtype=torch.int16)}, "permutation"),
    "values' size": ({"values": torch.zeros(2, 12, 1)}, "values: expected"),
    "over the edge": ({"values": torch.ones(2, 12, 2)}, "over the matrix's edge is not 0"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_validate_names_what_is_broken(name: str) -> None:
    changes, message = BROKEN[name]
    with pytest.raises(ValueError, match=message):
        broken(**changes).validate()
