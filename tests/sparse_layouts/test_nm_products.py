"""Products with n:m layouts, their gradients, softmax, compiled code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts.layout_autograd import with_values

F64 = torch.float64
Check = Callable[..., None]


@pytest.fixture(params=["2:4", "3:5", "1:2", "2:4 transposed"])
def w(request: pytest.FixtureRequest) -> sl.NMTensor:
    """(10, 20), float64, with gradient."""
    n, m = map(int, request.param[:3].split(":"))
    if "transposed" in request.param:
        return sl.nm(torch.randn(20, 12, dtype=F64)[:, :8], n, m).mT[..., :8, :].requires_grad_()
    return sl.nm(torch.randn(10, 20, dtype=F64), n, m).requires_grad_()


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda w, x: w @ x,
    "Tensor.matmul": lambda w, x: w.matmul(x),
    "linalg": torch.linalg.matmul,
    "vector": lambda w, x: w @ x[:, 0],
    "mv": lambda w, x: torch.mv(w, x[:, 0]),
    "from the left": lambda w, x: x.mT @ w.mT,
    "vector from the left": lambda w, x: x[:, 0] @ w.mT,
    "mm": torch.mm,
    "linear": lambda w, x: F.linear(x.mT, w),
    "linear of a vector": lambda w, x: F.linear(x[:, 0], w),
    "linear with bias": lambda w, x: F.linear(x.mT, w, x.new_ones(w.shape[0])),
    "addmm": lambda w, x: torch.addmm(x.new_ones(w.shape[0], 1), w, x, beta=2, alpha=3),
    "batched": lambda w, x: w @ x.expand(3, *x.shape),
    "batched from the left": lambda w, x: x.mT.expand(2, 3, *x.mT.shape) @ w.mT,
    "einsum": lambda w, x: torch.einsum("mk,kn->mn", w, x),
    "einsum from the left": lambda w, x: torch.einsum("bnk,mk->bnm", x.mT[None], w),
    "twice transposed": lambda w, x: w.mT.mT @ x,
    "step": lambda w, x: w @ x[:, ::2],
    "no columns": lambda w, x: w @ x[:, :0],
    "no samples": lambda w, x: w @ x.expand(0, *x.shape),
    "wide": lambda w, x: w @ x.repeat(1, 12),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_and_gradients_equal_dense(name: str, w: sl.NMTensor, assert_close: Check) -> None:
    x = torch.randn(w.shape[1], 6, dtype=F64, requires_grad=True)
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
    assert isinstance(w.grad, sl.NMTensor)
    assert w.grad.same_pattern(w)
    assert_close(w.grad, dense.grad.sparse_mask(w))


def test_second_derivatives(w: sl.NMTensor, assert_close: Check) -> None:
    x = torch.randn(w.shape[1], 3, dtype=F64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    dense = w.detach().to_dense().requires_grad_()
    (dx,) = torch.autograd.grad((w @ x).square().sum(), x, create_graph=True)
    (dy,) = torch.autograd.grad((dense @ y).square().sum(), y, create_graph=True)
    dx.square().sum().backward()
    dy.square().sum().backward()
    assert_close(x.grad, y.grad)
    assert_close(w.grad, dense.grad.sparse_mask(w))


def test_gradcheck_of_products(w: sl.NMTensor) -> None:
    like, values = w.detach(), w.detach().values().clone().requires_grad_()
    x = torch.randn(w.shape[1], 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, x: with_values(like, v) @ x, (values, x))
    assert torch.autograd.gradgradcheck(lambda v, x: with_values(like, v) @ x, (values, x))


def test_gradcheck_of_scores() -> None:
    mask = sl.nm(torch.randn(6, 9), 2, 3).pattern
    q, v = torch.randn(6, 4, dtype=F64), torch.randn(9, 2, dtype=F64)
    k = torch.randn(9, 4, dtype=F64)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    for function in (torch.softmax, torch.log_softmax):
        assert torch.autograd.gradcheck(
            lambda q, k, v, f=function: f(sl.sddmm(q, k.mT, mask), -1) @ v, leaves
        )


LEADING: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    # batch and heads of the layout, leading dimensions of the dense operand
    "samples": ((3,), (), (3,)),
    "samples of one x": ((3,), (), ()),
    "heads": ((), (3,), (3,)),
    "heads of one x": ((), (3,), ()),
    "heads in a batch": ((), (3,), (2, 3)),
    "samples and heads": ((2,), (3,), (2, 3)),
    "one head": ((), (1,), (4, 2)),
    "two leading dimensions": ((), (2, 3), (2, 2, 3)),
    "no sample": ((0,), (), (0,)),
}


@pytest.mark.parametrize("name", LEADING)
@pytest.mark.parametrize("side", ["left", "right", "transposed"])
def test_leading_dimensions_broadcast(name: str, side: str, assert_close: Check) -> None:
    batch, heads, lead = LEADING[name]
    mask = sl.nm(torch.randn(*heads, 6, 8), 2, 4).pattern
    leaf = torch.randn(*batch, *heads, 6, 8, dtype=F64).sparse_mask(mask).requires_grad_()
    w = leaf.mT if side == "transposed" else leaf
    rows, columns = w.shape[-2:]
    size = (5, rows) if side == "right" else (columns, 5)
    x = torch.randn(*lead, *size, dtype=F64, requires_grad=True)
    dense = leaf.detach().to_dense().requires_grad_()
    v = dense.mT if side == "transposed" else dense
    y = x.detach().clone().requires_grad_()
    with sl.fallback("error"):
        out = x @ w if side == "right" else w @ x
        expected = y @ v if side == "right" else v @ y
        grad = torch.randn_like(expected)
        out.backward(grad)
    expected.backward(grad)
    assert_close(out, expected)
    assert_close(x.grad, y.grad)
    assert_close(leaf.grad, dense.grad.sparse_mask(mask))


def test_bmm(assert_close: Check) -> None:
    w = sl.nm(torch.randn(3, 6, 8, dtype=F64), 1, 4)
    x = torch.randn(3, 8, 5, dtype=F64)
    with sl.fallback("error"):
        assert_close(torch.bmm(w, x), torch.bmm(w.to_dense(), x))
        assert_close(torch.bmm(x.mT, w.mT), torch.bmm(x.mT, w.to_dense().mT))


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_sums_are_products(dim: int, w: sl.NMTensor, assert_close: Check) -> None:
    with sl.fallback("error"):
        assert_close(w.sum(dim), w.to_dense().sum(dim))
        assert_close(w.sum(dim, keepdim=True), w.to_dense().sum(dim, keepdim=True))
    (w.sum(dim) * 2).sum().backward()
    assert_close(w.grad, 2 * w.pattern.to(F64).to_dense())


@pytest.mark.parametrize("flip", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("heads", [(), (3,)], ids=["matrix", "heads"])
def test_sampled_product(flip: bool, heads: tuple[int, ...], assert_close: Check) -> None:
    w = sl.nm(torch.randn(*heads, 10, 8, dtype=F64), 2, 4)
    w = w.mT if flip else w
    rows, columns = w.shape[-2:]
    a = torch.randn(2, *heads, rows, 5, dtype=F64, requires_grad=True)
    b = torch.randn(*heads, 5, columns, dtype=F64, requires_grad=True)
    kept = w.pattern.to_dense()
    with sl.fallback("error"):
        scores = sl.sddmm(a, b, w.pattern)
        assert_close(scores, (a @ b) * kept)
        grad = torch.randn(2, *heads, rows, columns, dtype=F64)
        got = torch.autograd.grad((scores * grad).sum(), (a, b))
        added = torch.sparse.sampled_addmm(w, a[0], b, beta=0.5, alpha=2)
    assert_close(added, 0.5 * w.to_dense() + 2 * (a[0] @ b) * kept)
    expected = torch.autograd.grad(((a @ b) * kept * grad).sum(), (a, b))
    for mine, its in zip(got, expected, strict=True):
        assert_close(mine, its)


@pytest.mark.parametrize("flip", [False, True], ids=["rows", "columns"])
def test_attention_from_its_parts(flip: bool, assert_close: Check) -> None:
    q, k, v = (torch.randn(2, 3, size, 8, dtype=F64, requires_grad=True) for size in (12, 12, 12))
    mask = sl.nm(torch.randn(3, 12, 12), 2, 6).pattern
    kept, dim = mask.to_dense(), -1
    with sl.fallback("error"):
        scores = sl.sddmm(q, k.mT, mask) * 8**-0.5
        if flip:
            scores, kept, dim = scores.mT, kept.mT, -2
        out = torch.softmax(scores, dim) @ v
    dense = q @ k.mT * 8**-0.5
    dense = (dense.mT if flip else dense).masked_fill(~kept, -torch.inf)
    expected = torch.softmax(dense, dim) @ v
    assert_close(out, expected)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), grad)
    for mine, its in zip(got, torch.autograd.grad(expected, (q, k, v), grad), strict=True):
        assert_close(mine, its)


@pytest.mark.parametrize("function", [torch.softmax, torch.log_softmax])
def test_softmax_keeps_the_layout(
    function: Callable[..., Tensor], w: sl.NMTensor, assert_close: Check
) -> None:
    kept, along, other = w.pattern.to_dense(), w.axis, -3 - w.axis
    scores = w.detach().to_dense().masked_fill(~kept, -torch.inf)
    with sl.fallback("error"):
        found = function(w, along)
        low = function(w.float(), along, dtype=F64)
    expected = function(scores, along).masked_fill(~kept, 0)
    assert isinstance(found, sl.NMTensor)
    assert_close(found, expected)
    assert low.dtype == F64
    with sl.fallback("error"), pytest.raises(sl.DenseFallbackError, match="has no kernel"):
        function(w, other)
    with sl.fallback("allow"):
        across = function(w, other)
    scores = scores.masked_fill(~kept.any(other, keepdim=True), 0.0)
    assert_close(across, function(scores, other).masked_fill(~kept, 0))
    with pytest.raises(TypeError, match="a mask layout has no values"):
        function(w.pattern, along)


def test_softmax_of_nothing() -> None:
    assert torch.softmax(sl.nm(torch.zeros(3, 0), 2, 4), -1).shape == (3, 0)
    assert torch.softmax(sl.nm(torch.zeros(0, 4), 2, 4), -1).shape == (0, 4)


# --- bad input, compiled code ---------------------------------------------------------------------

W = sl.nm(torch.ones(4, 8), 2, 4)
BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "shapes": (lambda: W @ torch.ones(5, 2), ValueError, r"\(4, 8\) \(layout\) and \(5, 2\)"),
    "dtypes": (lambda: W @ torch.ones(8, 2).double(), TypeError, "expected one dtype"),
    "mask": (lambda: W.pattern @ torch.ones(8, 2), TypeError, "a mask layout has no values"),
    "heads": (
        lambda: sl.nm(torch.ones(3, 4, 8), 2, 4) @ torch.ones(2, 8, 2),
        ValueError,
        r"leading dimensions \(2,\) of the dense operand do not broadcast",
    ),
    "bias": (
        lambda: F.linear(torch.ones(2, 8), W, torch.ones(3)),
        ValueError,
        r"bias of shape \(4,\), got \(3,\)",
    ),
    "sddmm's shapes": (
        lambda: sl.sddmm(torch.ones(4, 2), torch.ones(2, 7), W),
        ValueError,
        r"a \(\.\.\., 4, K\) and b \(\.\.\., K, 8\)",
    ),
    "sddmm's dtypes": (
        lambda: sl.sddmm(torch.ones(4, 2), torch.ones(2, 8).double(), W),
        TypeError,
        "expected one dtype",
    ),
    "sddmm of integers": (
        lambda: sl.sddmm(torch.ones(4, 2).int(), torch.ones(2, 8), W),
        TypeError,
        "a is floating, got torch.int32",
    ),
    "sddmm of a vector": (
        lambda: sl.sddmm(torch.ones(4), torch.ones(2, 8), W),
        ValueError,
        r"a is at least 2-D, got shape \(4,\)",
    ),
    "sddmm's heads": (
        lambda: sl.sddmm(
            torch.ones(4, 4, 2), torch.ones(2, 8), sl.nm(torch.ones(1, 4, 8), 2, 4).pattern
        ),
        ValueError,
        r"leading dimensions \(4,\) do not fit the mask's \(1,\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()


# inductor imports parts of torch that use torch.jit
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_linear_forward_and_backward(backend: str, assert_close: Check) -> None:
    torch.compiler.reset()
    layer = torch.nn.Linear(24, 16, dtype=F64)
    layer.weight = torch.nn.Parameter(sl.nm(layer.weight.detach(), 2, 4))

    def step(x: Tensor) -> Tensor:
        return torch.relu(layer(x)).square().sum()

    x = torch.randn(5, 24, dtype=F64, requires_grad=True)
    expected = torch.autograd.grad(step(x), (x, layer.weight))
    with sl.fallback("error"):
        got = torch.autograd.grad(
            torch.compile(step, fullgraph=True, backend=backend)(x), (x, layer.weight)
        )
    assert isinstance(got[1], sl.NMTensor)
    for mine, its in zip(got, expected, strict=True):
        assert_close(mine, its)


def test_compiled_scores(assert_close: Check) -> None:
    torch.compiler.reset()
    mask = sl.nm(torch.randn(12, 12), 2, 6).pattern

    def attend(q: Tensor, mask: sl.NMTensor) -> Tensor:
        return torch.softmax(sl.sddmm(q, q.mT, mask), -1) @ q

    q = torch.randn(3, 12, 8, dtype=F64, requires_grad=True)
    (expected,) = torch.autograd.grad(attend(q, mask).sum(), q)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with sl.fallback("error"):
        (got,) = torch.autograd.grad(compiled(q, mask).sum(), q)
    assert_close(got, expected)
