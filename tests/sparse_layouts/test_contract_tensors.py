"""What every layout does as an operand and as an object: products under all their names, indexing,
iteration, printing, hashing; with a kernel or densely, the result is the dense one.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_layouts as sl

Check = Callable[..., None]


@pytest.fixture(autouse=True)
def dense_where_need_be() -> Any:
    """Some layouts have no kernel for some of this."""
    with sl.fallback("allow"):
        yield


def dense_of(value: Any) -> Any:
    return value.to_dense() if isinstance(value, sl.LayoutTensor) else value


# --- products -------------------------------------------------------------------------------------

# `w` is a matrix (M, N), a (K, M), b (N, K), v (N,)
PRODUCTS: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "w @ b": lambda w, a, b, v: w @ b,
    "a @ w": lambda w, a, b, v: a @ w,
    "w @ v": lambda w, a, b, v: w @ v,
    "mT": lambda w, a, b, v: w.mT @ a.mT,
    "mm": lambda w, a, b, v: torch.mm(w, b),
    "mv": lambda w, a, b, v: torch.mv(w, v),
    "linear": lambda w, a, b, v: F.linear(b.mT, w),
    "addmm": lambda w, a, b, v: torch.addmm(torch.ones_like(dense_of(w) @ b), w, b, alpha=2),
    "mn,nk->mk": lambda w, a, b, v: torch.einsum("mn,nk->mk", w, b),
    "mn,nk->km": lambda w, a, b, v: torch.einsum("mn,nk->km", w, b),
    "km,mn->kn": lambda w, a, b, v: torch.einsum("km,mn->kn", a, w),
    "mn,n->m": lambda w, a, b, v: torch.einsum("mn,n->m", w, v),
    "mn,bnk->bmk": lambda w, a, b, v: torch.einsum("mn,bnk->bmk", w, b.expand(2, *b.shape)),
    "bkn,mn->bkm": lambda w, a, b, v: torch.einsum("bkn,mn->bkm", b.mT.expand(2, -1, -1), w),
    "mn,nk": lambda w, a, b, v: torch.einsum("mn,nk", w, b),
}


@pytest.mark.contract("products and einsum")
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, one_layout: sl.LayoutTensor, assert_close: Check) -> None:
    m, n = one_layout.shape
    operands = [torch.randn(*s, dtype=one_layout.dtype) for s in ((3, m), (n, 3), (n,))]
    dense = one_layout.to_dense().requires_grad_()
    leaf = one_layout.clone().requires_grad_()
    of_dense = [t.clone().requires_grad_() for t in operands]
    of_leaf = [t.clone().requires_grad_() for t in operands]
    expected, found = PRODUCTS[name](dense, *of_dense), PRODUCTS[name](leaf, *of_leaf)
    assert type(found) is Tensor
    assert_close(found, expected)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    assert type(leaf.grad) is type(one_layout)
    assert_close(leaf.grad, dense.grad.sparse_mask(one_layout), scale=dense.grad.norm().item())
    for a, b in zip(of_leaf, of_dense, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if b.grad is not None:
            assert_close(a.grad, b.grad)


# --- indexing -------------------------------------------------------------------------------------

INDICES: dict[str, Any] = {
    "row": 3,
    "last row": -1,
    "rows": slice(8, 16),
    "off the block": slice(3, 10),
    "steps": slice(None, None, 2),
    "columns": (slice(None), slice(0, 8)),
    "entry": (2, 5),
    "list": [0, 5, 5],
    "new axis": None,
    "ellipsis": (..., slice(8, 24)),
    "nothing": slice(4, 4),
}


@pytest.mark.contract("indexing and rows")
@pytest.mark.parametrize("name", INDICES)
def test_indexing(name: str, one_layout: sl.LayoutTensor) -> None:
    found = one_layout[INDICES[name]]
    if isinstance(found, sl.LayoutTensor):
        found.validate()
    assert torch.equal(dense_of(found), one_layout.to_dense()[INDICES[name]])


@pytest.mark.contract("indexing and rows")
def test_indexing_by_tensors(one_layout: sl.LayoutTensor) -> None:
    dense = one_layout.to_dense()
    rows, chosen = torch.tensor([5, 0, 2]), dense > 0.5
    assert torch.equal(dense_of(one_layout[rows]), dense[rows])
    assert torch.equal(dense_of(one_layout[chosen]), dense[chosen])
    assert torch.equal(dense_of(one_layout.index_select(1, rows)), dense.index_select(1, rows))


@pytest.mark.contract("indexing and rows")
def test_rows_one_by_one(one_layout: sl.LayoutTensor) -> None:
    dense = one_layout.to_dense()
    rows = list(one_layout)
    assert len(rows) == len(one_layout) == dense.shape[0]
    assert all(torch.equal(dense_of(a), b) for a, b in zip(rows, dense, strict=True))
    first, *_ = one_layout.unbind(0)
    assert torch.equal(dense_of(first), dense[0])
    assert torch.equal(torch.stack([dense_of(r) for r in one_layout.split(7)[0]]), dense[:7])


@pytest.mark.contract("indexing and rows")
def test_writing_through_an_index_raises(one_layout: sl.LayoutTensor) -> None:
    before = one_layout.to_dense()
    with pytest.raises(TypeError, match="sparse_mask"):
        one_layout[0, 0] = 5.0
    with pytest.raises(TypeError, match="sparse_mask"):
        one_layout[before > 0] = 5.0
    assert torch.equal(one_layout.to_dense(), before)


def test_writing_through_a_bool_layout(small: sl.BSRTensor) -> None:
    chosen = (small * 1).abs_()
    mask = small.pattern  # all that is stored
    chosen[mask] = 2.0
    assert torch.equal(chosen.to_dense(), mask.to_dense().to(chosen.dtype) * 2)
    with pytest.raises(TypeError, match="sparse_mask"):
        chosen[sl.causal(24, block_size=4)] = 1.0


# --- what it says of itself -----------------------------------------------------------------------


@pytest.mark.contract("printing and hashing")
def test_printing(one_layout: sl.LayoutTensor) -> None:
    kind = type(one_layout).__name__
    with sl.fallback("error"):
        for text in (repr(one_layout), str(one_layout), f"{one_layout}", f"{[one_layout]}"):
            assert kind in text
            assert len(text) < 250
        module = torch.nn.ParameterList([one_layout])
        assert kind in repr(module[0])
        assert "Parameter" in repr(module)
        leaf = one_layout.clone().requires_grad_()
        assert "requires_grad" in repr(leaf)


@pytest.mark.contract("printing and hashing")
def test_hashing_is_by_identity(one_layout: sl.LayoutTensor) -> None:
    other = one_layout.clone()
    with sl.fallback("error"):
        assert hash(one_layout) == hash(one_layout) == id(one_layout)
        assert len({one_layout, other, one_layout}) == 2
        named = {one_layout: "first", other: "second"}
        assert named[one_layout] == "first"
    assert any(one_layout is t for t in [other, one_layout])


@pytest.mark.contract("printing and hashing")
def test_truth_and_length(one_layout: sl.LayoutTensor) -> None:
    with pytest.raises((RuntimeError, ValueError), match="ambiguous"):
        bool(one_layout)
    with sl.fallback("error"):
        assert len(one_layout) == one_layout.shape[0]
        assert one_layout.numel() == one_layout.shape.numel()
        assert one_layout.dim() == one_layout.ndim == 2
        assert one_layout.is_floating_point()
        assert not one_layout.is_sparse
        assert one_layout.layout == torch.strided


# --- tensors made from its shape ------------------------------------------------------------------


@pytest.mark.contract("dense form")
def test_tensors_of_its_kind(one_layout: sl.LayoutTensor) -> None:
    """Plain ones, without densifying."""
    w, size = one_layout, one_layout.numel()
    with sl.fallback("error"):
        made = [w.new_zeros(2, 3), w.new_ones((2, 3)), w.new_full((2, 3), 7.0), w.new_empty(2, 3)]
        data = w.new_tensor([1, 2])
        flat = torch.arange(size, dtype=w.dtype)
        shaped = flat.view_as(w), flat.reshape_as(w), torch.zeros(1, 1).expand_as(w)
    for tensor in (*made, data):
        assert type(tensor) is Tensor
        assert (tensor.dtype, tensor.device) == (w.dtype, w.device)
    assert [t.shape for t in made] == [(2, 3)] * 4
    assert all(t.shape == w.shape for t in shaped)
    assert w.new_zeros(2, dtype=torch.int32).dtype == torch.int32


@pytest.mark.contract("dense form")
def test_zeros_and_ones(one_layout: sl.LayoutTensor) -> None:
    dense = one_layout.to_dense()
    with sl.fallback("error"):
        zeros = torch.zeros_like(one_layout)
    assert type(zeros) is type(one_layout)
    assert not zeros.to_dense().any()
    for function in (torch.ones_like, lambda w: torch.full_like(w, 3.0)):
        found = function(one_layout)
        assert type(found) is Tensor  # an entry that is not stored is 0
        assert torch.equal(found, function(dense))


@pytest.mark.contract("copies")
def test_copies(one_layout: sl.LayoutTensor) -> None:
    shallow, deep = copy.copy(one_layout), copy.deepcopy(one_layout)
    again = pickle.loads(pickle.dumps(one_layout))
    for made in (shallow, deep, again, one_layout.detach(), one_layout.clone()):
        assert type(made) is type(one_layout)
        assert made is not one_layout
        assert torch.equal(made.to_dense(), one_layout.to_dense())
    both = copy.deepcopy([one_layout, one_layout])
    assert both[0] is both[1]
