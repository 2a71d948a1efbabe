"""`sl.sparsified`: the layouts of outputs, each with a sparsifier; bad input."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import sparse_layouts as sl
from tests.sparse_layouts.sparsified_forms import F64, blocks, largest, largest_blocks, pattern_of
from tests.sparse_layouts.user_csc import CscTensor

Check = Callable[..., None]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(24, 40, dtype=F64, requires_grad=True)


@pytest.fixture
def y() -> Tensor:
    return torch.randn(24, 40, dtype=F64, requires_grad=True)


# --- outputs --------------------------------------------------------------------------------------


# name -> (pair from x + y, what is kept of the sum, class of the result)
FORMS = {
    "factory with keep": (
        lambda s: (sl.Magnitude(0.25), blocks),
        lambda s: largest_blocks(s, 0.25),
        sl.BSRTensor,
    ),
    "factory that keeps by itself": (lambda s: (None, blocks), lambda s: s, sl.BSRTensor),
    "partial with its own keep": (
        lambda s: (None, functools.partial(blocks, keep=sl.Magnitude(0.25))),
        lambda s: largest_blocks(s, 0.25),
        sl.BSRTensor,
    ),
    "factory without keep": (
        lambda s: (sl.Magnitude(0.25), lambda dense: blocks(dense)),
        lambda s: largest(s, 0.25),
        sl.BSRTensor,
    ),
    "layout class": (
        lambda s: (sl.Magnitude(0.25), CscTensor),
        lambda s: largest(s, 0.25),
        CscTensor,
    ),
    "csr": (
        lambda s: (sl.Magnitude(0.25), sl.csr),
        lambda s: largest(s, 0.25),
        sl.CSRTensor,
    ),
    "csc, of n:m": (
        lambda s: (sl.NM(2, 4), sl.csc),
        lambda s: sl.nm(s, 2, 4).to_dense(),
        sl.CSCTensor,
    ),
    "n:m": (
        lambda s: (None, functools.partial(sl.nm, n=2, m=4)),
        lambda s: sl.nm(s, 2, 4).to_dense(),
        sl.NMTensor,
    ),
    "n:m:g": (
        lambda s: (None, functools.partial(sl.grouped_nm, n=1, m=2, g=4)),
        lambda s: sl.grouped_nm(s, 1, 2, 4).to_dense(),
        sl.GroupedNMTensor,
    ),
    "dense": (lambda s: (sl.Magnitude(0.25), None), lambda s: largest(s, 0.25), Tensor),
    "pattern of a mask": (
        lambda s: (None, pattern_of(s)),
        lambda s: largest_blocks(s, 0.25),
        sl.BSRTensor,
    ),
    "pattern of a layout": (
        lambda s: (None, torch.randn_like(s).sparse_mask(pattern_of(s))),
        lambda s: largest_blocks(s, 0.25),
        sl.BSRTensor,
    ),
    "part of a pattern": (
        lambda s: (sl.Magnitude(0.25), pattern_of(s)),
        lambda s: torch.where(pattern_of(s).to_dense(), largest(s, 0.25), 0),
        sl.BSRTensor,
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_outputs(name: str, x: Tensor, y: Tensor) -> None:
    pair, kept, cls = FORMS[name]
    total = (x + y).detach()
    out = sl.sparsified(torch.add, out=pair(total))(x, y)
    assert type(out) is cls
    assert torch.equal(out.to_dense() if cls is not Tensor else out, kept(total))
    seed = torch.randn(24, 40, dtype=F64)
    with sl.fallback("allow"):
        (out * seed).sum().backward(retain_graph=True)  # of a layout: in that layout
        out.backward(seed)  # dense
    expected = torch.where(kept(total) != 0, 2 * seed, 0)  # no entry of the sum itself is zero
    assert torch.equal(x.grad, expected)
    assert torch.equal(y.grad, expected)


@pytest.mark.parametrize("name", FORMS)
def test_outputs_without_gradient(name: str, x: Tensor, y: Tensor) -> None:
    pair, kept, cls = FORMS[name]
    total = (x + y).detach()
    with torch.no_grad():
        out = sl.sparsified(torch.add, out=pair(total))(x, y)
    assert not out.requires_grad
    assert torch.equal(out.to_dense() if cls is not Tensor else out, kept(total))


@pytest.mark.parametrize("name", FORMS)
def test_outputs_gradcheck(name: str) -> None:
    x = torch.randn(8, 16, dtype=F64, requires_grad=True)
    y = torch.randn(8, 16, dtype=F64)
    pair, _, cls = FORMS[name]
    multiply = sl.sparsified(torch.mul, out=pair((x * y).detach()))

    def squared(x: Tensor) -> Tensor:
        out = multiply(x, y)
        return (out if cls is Tensor else out.to_dense()).square()

    assert torch.autograd.gradcheck(squared, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(squared, x, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype: torch.dtype, x: Tensor, y: Tensor) -> None:
    x, y = x.detach().to(dtype).requires_grad_(), y.detach().to(dtype)
    pairs = (sl.Magnitude(0.25), blocks)
    out = sl.sparsified(torch.add, out=pairs, grad=pairs)(x, y)
    assert out.dtype == dtype
    assert torch.equal(out.to_dense(), largest_blocks(x + y, 0.25))
    out.sum().backward()
    assert (type(x.grad), x.grad.dtype) == (sl.BSRTensor, dtype)


@pytest.mark.parametrize("shape", [(0, 40), (24, 0), (0, 24, 40), (2, 24, 40)])
def test_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=F64, requires_grad=True)
    pair = (sl.Magnitude(0.5), blocks)
    out = sl.sparsified(torch.neg, out=pair, grad=pair)(x)
    assert out.shape == x.shape
    assert torch.equal(out.to_dense(), -largest_blocks(x, 0.5))
    out.to_dense().sum().backward()
    assert x.grad.shape == x.shape


def test_operands_need_not_be_contiguous(x: Tensor, y: Tensor) -> None:
    add = sl.sparsified(
        torch.add, out=(sl.Magnitude(0.25), functools.partial(sl.bsr, block_size=4))
    )
    out = add(x.mT[:, ::2], y.mT[:, ::2])
    expected = sl.bsr((x + y).detach().mT[:, ::2], 4, keep=sl.Magnitude(0.25))
    assert torch.equal(out.to_dense(), expected.to_dense())


def test_several_outputs(x: Tensor) -> None:
    find = sl.sparsified(torch.sort, out=((sl.Magnitude(0.5), blocks), None))
    found = find(x, descending=True)
    assert type(found) is torch.return_types.sort
    values, indices = torch.sort(x.detach(), descending=True)
    assert torch.equal(found.values.to_dense(), largest_blocks(values, 0.5))
    assert type(found.indices) is Tensor
    assert torch.equal(found.indices, indices)
    found.values.to_dense().sum().backward()
    assert int((x.grad != 0).sum()) == x.numel() // 2


def test_outputs_of_ones_own_function(x: Tensor) -> None:
    def both(x: Tensor) -> list[object]:
        return [x.exp(), x.tanh(), "done"]

    pair = (sl.Magnitude(0.25), blocks)
    made = sl.sparsified(
        both, out=(None, pair, None), grad=[(sl.Magnitude(0.5), None), None, None]
    )(x)
    assert type(made) is list
    assert torch.equal(made[0], x.exp())
    assert torch.equal(made[1].to_dense(), largest_blocks(x.tanh(), 0.25))
    assert made[2] == "done"
    seed = torch.randn(24, 40, dtype=F64)
    made[0].backward(seed)
    torch.testing.assert_close(x.grad, largest(seed, 0.5) * x.exp())


def test_bool_outputs_become_masks(x: Tensor) -> None:
    positive = sl.sparsified(torch.gt, out=(None, functools.partial(sl.mask_from, block_size=8)))
    mask = positive(x, 0)
    assert mask.dtype == torch.bool
    assert torch.equal(mask.to_dense(), x > 0)


def test_a_layout_that_is_in_its_form_stays_it(x: Tensor) -> None:
    w = CscTensor.from_dense(largest(x, 0.5))
    assert sl.sparsified(torch.positive, out=(None, CscTensor))(w) is not None
    same = sl.sparsified(lambda w: w, out=(None, CscTensor))
    assert same(w) is w
    b = blocks(x.detach(), keep=sl.Magnitude(0.5))
    assert sl.sparsified(lambda w: w, out=(None, b.pattern))(b) is not None
    other = sl.sparsified(lambda w: w, out=(None, b.detach()))
    assert other(b) is b


def test_one_layout_becomes_another(x: Tensor) -> None:
    w = blocks(x.detach(), keep=sl.Magnitude(0.5)).requires_grad_()
    made = sl.sparsified(torch.neg, out=(sl.Magnitude(0.1), CscTensor))(w)
    assert type(made) is CscTensor
    assert torch.equal(made.to_dense(), -largest(w.to_dense(), 0.1))
    with sl.fallback("allow"):
        made.sum().backward()
    assert type(w.grad) is sl.BSRTensor
    assert torch.equal(w.grad.to_dense(), -(made.detach().to_dense() != 0).double())


# --- explain, compiled code -----------------------------------------------------------------------


def test_a_function_keeps_its_name_and_its_explanation() -> None:
    made = sl.sparsified(torch.mm, out=(None, blocks))
    assert made.__name__ == "mm"
    w = sl.bsr(torch.eye(64), 16)
    assert sl.explain(made, w, torch.ones(64, 2)).kernel == "cpu"
    assert sl.explain(sl.sparsified(torch.cumsum, out=(None, blocks)), w, 0).kernel == (
        "dense fallback"
    )


def test_compiled_with_a_pattern(x: Tensor, y: Tensor, assert_close: Check) -> None:
    like = blocks(x.detach(), keep=sl.Magnitude(0.5))
    add = sl.sparsified(torch.add, out=(None, like))
    compiled = torch.compile(lambda x, y: add(x, y) * 2, fullgraph=True, backend="aot_eager")
    out = compiled(x, y)
    assert_close(out, 2 * (x + y).detach().sparse_mask(like))
    out.sum().backward()
    assert_close(x.grad, 2 * like.pattern.to_dense().double())


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: sl.sparsified(torch.add), ValueError, "got neither"),
        (lambda: sl.sparsified("add", out=(None, blocks)), TypeError, "a function or a module"),
        (
            lambda: sl.sparsified(torch.add, out=blocks),
            TypeError,
            r"expected out as a pair \(sparsifier, layout\)",
        ),
        (
            lambda: sl.sparsified(torch.add, grad=(None, blocks, None)),
            TypeError,
            r"expected grad as a pair",
        ),
        (lambda: sl.sparsified(torch.add, out=()), TypeError, r"expected out as a pair"),
        (
            lambda: sl.sparsified(torch.sort, out=(None, (None, blocks, 3))),
            TypeError,
            r"expected out\[1\] as a pair",
        ),
        (
            lambda: sl.sparsified(torch.add, out=(0.5, blocks)),
            TypeError,
            r"sparsified: keep is a sparsifier such as sl\.Magnitude",
        ),
        (
            lambda: sl.sparsified(torch.add, out=(sl.Magnitude, blocks)),
            TypeError,
            r"call it: Magnitude\(\.\.\.\)",
        ),
        (
            lambda: sl.sparsified(torch.add, out=(None, "csr")),
            TypeError,
            r"expected a layout for out .*'csr'",
        ),
        (
            lambda: sl.sparsified(torch.add, out=(None, torch.ones(2, 2))),
            TypeError,
            r"expected a layout for out .*Tensor of shape \(2, 2\)",
        ),
        (
            lambda: sl.sparsified(torch.add, out=(None, sl.BSRTensor)),
            TypeError,
            r"class BSRTensor, which has no from_dense.*functools\.partial",
        ),
        (
            lambda: sl.sparsified(torch.add, out=(None, Tensor)),
            TypeError,
            r"class Tensor, which has no from_dense.*None for a dense tensor",
        ),
        (
            lambda: sl.sparsified(
                torch.add, out=(sl.Magnitude(0.1), functools.partial(blocks, keep=sl.KeepAll()))
            ),
            ValueError,
            r"out names two sparsifiers, Magnitude.*leave one of them out",
        ),
        (
            lambda: sl.sparsified(torch.sort, out=((None, blocks), None), grad=(None, blocks)),
            ValueError,
            "as many pairs in out as in grad, got 2 and 1",
        ),
    ],
)
def test_wrong_arguments(make: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


X = torch.ones(24, 40, dtype=F64)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: sl.sparsified(torch.sort, out=(None, blocks))(X),
            ValueError,
            r"one tensor from torch\.sort, got 2 \(Tensor, Tensor\).*for each",
        ),
        (
            lambda: sl.sparsified(torch.sort, out=((None, blocks), None, None))(X),
            ValueError,
            r"expected 3 outputs from torch\.sort, one for each pair, got 2",
        ),
        (
            lambda: sl.sparsified(torch.neg, out=((None, blocks), None))(X),
            ValueError,
            r"expected 2 outputs from torch\.neg.*got one Tensor",
        ),
        (
            lambda: sl.sparsified(lambda x: "text", out=(None, blocks))(X),
            TypeError,
            r"expected a tensor as the output of .*, got str",
        ),
        (
            lambda: sl.sparsified(lambda x: (x, 3), out=(None, (None, blocks)))(X),
            TypeError,
            r"expected a tensor as output 1 of .*, got int; .*None in place of its pair",
        ),
        (
            lambda: sl.sparsified(torch.neg, out=(None, lambda x: x))(X),
            TypeError,
            r"expected .*lambda.* to return a layout, got Tensor.*give None",
        ),
        (
            lambda: sl.sparsified(torch.neg, out=(None, lambda x: blocks(x[:4])))(X),
            ValueError,
            r"shape \(24, 40\) and torch\.float64, as it was given, got BSRTensor\(\[4, 40\]",
        ),
        (
            lambda: sl.sparsified(torch.neg, out=(None, lambda x: blocks(x.float())))(X),
            ValueError,
            r"torch\.float64, as it was given, got BSRTensor.*float32",
        ),
        (
            lambda: sl.sparsified(torch.neg, out=(None, sl.causal(24, block_size=8)))(X),
            ValueError,
            r"expected a tensor of the shape of BSRTensor\(\[24, 24\].*got shape \(24, 40\)",
        ),
        (
            lambda: sl.sparsified(torch.neg, out=(None, functools.partial(sl.bsr, block_size=7)))(
                X
            ),
            ValueError,
            r"block \(7, 7\) does not divide",
        ),
        (
            lambda: sl.sparsified(torch.div, out=(sl.Magnitude(0.5), blocks))(X * 0, 0.0),
            ValueError,
            "NaN",
        ),
    ],
)
def test_wrong_calls(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


class Finite(sl.Sparsifier):
    """Keeps what is finite."""

    def choose(self, magnitudes: Tensor) -> Tensor:
        return magnitudes < torch.inf


def test_infinity_is_not_multiplied_by_zero() -> None:
    x = torch.tensor([[1.0, -torch.inf], [torch.inf, 2.0]], requires_grad=True)
    out = sl.sparsified(torch.positive, out=(Finite(), None))(x)
    assert torch.equal(out, torch.tensor([[1.0, 0.0], [0.0, 2.0]]))


def test_a_pair_of_nones_changes_nothing(x: Tensor) -> None:
    out = sl.sparsified(torch.neg, out=(None, None), grad=(sl.Magnitude(0.5), None))(x)
    assert type(out) is Tensor
    assert torch.equal(out, -x)
