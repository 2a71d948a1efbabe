"""What torch's functions mean on a layout: those that STen tests on its wrapped tensors.

Source of the list: https://github.com/spcl/sten, tests/test_dispatch.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sparse_layouts as sl
from tests.sparse_layouts.sten_layouts import F64, LAYOUTS, as_dense, stored

Check = Callable[..., None]


@pytest.fixture(params=LAYOUTS)
def make(request: pytest.FixtureRequest) -> Callable[[Tensor], sl.LayoutTensor]:
    """A layout of half of a dense matrix."""
    return LAYOUTS[request.param]


@pytest.fixture
def w(make: Callable[[Tensor], sl.LayoutTensor]) -> sl.LayoutTensor:
    return make(torch.randn(24, 40, dtype=F64)).requires_grad_()


@pytest.fixture
def dense(w: sl.LayoutTensor) -> Tensor:
    return w.detach().to_dense().requires_grad_()


def both(function: Callable[..., Tensor], w: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    with sl.fallback("allow"):
        return function(w), function(dense)


def test_clone(w: sl.LayoutTensor, dense: Tensor, assert_close: Check) -> None:
    for clone in (torch.clone, Tensor.clone):
        w.grad = dense.grad = None
        made = clone(w)
        assert type(made) is type(w)
        assert made.same_pattern(w)
        seed = torch.randn(24, 40, dtype=F64)
        with sl.fallback("allow"):
            (made * seed).sum().backward()
        assert type(w.grad) is type(w)
        assert_close(w.grad, seed * stored(w))


def test_detach(w: sl.LayoutTensor) -> None:
    detached = w.detach()
    assert not detached.requires_grad
    detached.requires_grad_()
    (detached * 2).sum().backward()
    assert w.grad is None
    assert torch.equal(detached.grad.to_dense(), 2 * stored(w).double())
    assert detached.stored_values.data_ptr() == w.stored_values.data_ptr()


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_std_mean(dim: int, w: sl.LayoutTensor, dense: Tensor, assert_close: Check) -> None:
    results = []
    for each in (w, dense):
        with sl.fallback("allow"):
            std, mean = torch.std_mean(each, dim=dim)
        (std + 2 * mean).sum().backward()
        results.append((std, mean))
    for found, expected in zip(*results, strict=True):
        assert type(found) is Tensor
        assert torch.equal(found, expected)
    assert type(w.grad) is type(w)
    assert_close(w.grad, dense.grad * stored(w))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_stack(dim: int, make: Callable[[Tensor], sl.LayoutTensor], assert_close: Check) -> None:
    layouts = [make(torch.randn(24, 40, dtype=F64)).requires_grad_() for _ in range(4)]
    plain = [w.detach().to_dense().requires_grad_() for w in layouts]
    found, expected = both(lambda ws: torch.stack(list(ws), dim=dim), layouts, plain)
    assert torch.equal(as_dense(found), expected)
    seed = torch.randn_like(expected)
    with sl.fallback("allow"):
        (found * seed).sum().backward()
    (expected * seed).sum().backward()
    for w, p in zip(layouts, plain, strict=True):
        assert type(w.grad) is type(w)
        assert_close(w.grad, p.grad * stored(w))


def test_eq(w: sl.LayoutTensor, dense: Tensor) -> None:
    other = dense.detach().clone()
    other[0] = 1.0
    with sl.fallback("allow"):
        for found in (w == other, w.eq(other), torch.eq(w, other)):
            assert torch.equal(as_dense(found), dense == other)
        assert torch.equal(as_dense(other == w), other == dense)
        assert torch.equal(as_dense(w == 0.0), dense == 0.0)
        assert bool(as_dense(w == w.detach().clone()).all())
        assert torch.equal(w, w.clone())
        assert not torch.equal(w, other)


def test_hash(w: sl.LayoutTensor) -> None:
    copies = [w.detach().clone() for _ in range(3)]
    assert len({copies[1], copies[2], copies[0], copies[1]}) == 3
    assert {w: "found"}[w] == "found"
    assert hash(w) == hash(w)


def test_repr(w: sl.LayoutTensor) -> None:
    name = type(w).__name__
    assert repr(w).startswith(f"{name}([24, 40], float64, cpu")
    assert name in repr(nn.Parameter(w.detach()))
    assert name in str([w])
    assert name in f"{w}"
    assert "24" in repr(nn.ParameterList([w.detach()]))


def test_size(w: sl.LayoutTensor, dense: Tensor) -> None:
    assert w.ndim == w.dim() == dense.ndim
    assert w.shape == w.size() == dense.size()
    assert (w.size(0), w.size(-1)) == (24, 40)
    assert w.numel() == dense.numel()
    assert len(w) == 24
    assert w.is_floating_point()
    assert w.nnz == int(stored(w).sum())


def test_scalar_mul(w: sl.LayoutTensor, dense: Tensor) -> None:
    with sl.fallback("error"):
        for found in (5 * w, w * 5, torch.mul(w, 5.0)):
            assert type(found) is type(w)
            assert torch.equal(found.to_dense(), 5 * dense)


def test_add_with_a_dense_tensor(w: sl.LayoutTensor, dense: Tensor, assert_close: Check) -> None:
    other = torch.randn(24, 40, dtype=F64)
    for add in (lambda t: torch.add(t, other), lambda t: other + t):
        found, expected = both(add, w, dense)
        assert torch.equal(found, expected)
        seed = torch.randn(24, 40, dtype=F64)
        w.grad = None
        found.backward(seed)
        assert type(w.grad) is type(w)
        assert_close(w.grad, seed * stored(w))


def test_in_place_addition_cannot_store_more(w: sl.LayoutTensor) -> None:
    w = w.detach()
    identity = id(w)
    before = w.to_dense()
    with pytest.raises(TypeError, match=r"sparse_mask|same entries|different entries"):
        w.add_(torch.ones(24, 40, dtype=F64))
    assert torch.equal(w.to_dense(), before)
    same = w.add_(torch.ones(24, 40, dtype=F64).sparse_mask(w))
    assert id(same) == identity
    assert torch.equal(w.to_dense(), before + stored(w))
    plain = torch.ones(24, 40, dtype=F64)
    with sl.fallback("allow"):
        plain.add_(w)
    assert torch.equal(plain, 1 + w.to_dense())


def test_likes(w: sl.LayoutTensor, dense: Tensor) -> None:
    ones, expected = both(torch.ones_like, w, dense)
    assert type(ones) is Tensor
    assert torch.equal(ones, expected)
    full, expected = both(lambda t: torch.full_like(t, 3.0), w, dense)
    assert torch.equal(full, expected)
    zeros = torch.zeros_like(w)
    assert type(zeros) is type(w)
    assert zeros.same_pattern(w)
    assert not zeros.to_dense().any()
    assert torch.zeros_like(w, dtype=torch.float32).dtype == torch.float32


def test_to(w: sl.LayoutTensor, dense: Tensor) -> None:
    assert w.to(F64) is w
    assert w.to("cpu") is w
    assert w.to(torch.ones(1, dtype=F64)) is w
    for same in (w.to(dense, copy=True), w.to(F64, copy=True)):
        assert same is not w
        assert same.stored_values.data_ptr() != w.stored_values.data_ptr()
        assert torch.equal(same.to_dense(), dense)
    for single in (
        w.to(torch.float32),
        w.float(),
        w.to("cpu", torch.float32),
        w.to(torch.ones(1)),
        w.type_as(torch.ones(1)),
    ):
        assert type(single) is type(w)
        assert (single.dtype, single.stored_values.dtype) == (torch.float32, torch.float32)
        assert torch.equal(single.to_dense(), dense.float())
    w.float().sum().backward()
    assert type(w.grad) is type(w)
    assert w.grad.dtype == F64
    assert torch.equal(w.grad.to_dense(), stored(w).double())
