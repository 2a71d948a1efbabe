"""What a differential search over all layouts found: each case against dense torch, or by the
error that says the way out.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_layouts as sl

F64 = torch.float64
Check = Callable[..., None]


def has_values_and_pattern(layout: sl.LayoutTensor) -> bool:
    """Whether this is one of the library's own layouts, which have `pattern` and `values()`."""
    return hasattr(layout, "pattern") and hasattr(layout, "values")


@pytest.fixture
def own_layout(one_layout: sl.LayoutTensor) -> sl.LayoutTensor:
    """One matrix of each layout of the library."""
    if not has_values_and_pattern(one_layout):
        pytest.skip(f"{type(one_layout).__name__} has no pattern of its own")
    return one_layout


# --- a tensor and its own mask --------------------------------------------------------------------


@pytest.mark.parametrize("function", [torch.add, torch.sub, torch.mul])
def test_arithmetic_with_its_own_mask_is_that_of_the_dense_forms(
    own_layout: sl.LayoutTensor, assert_close: Check, function: Callable[..., Tensor]
) -> None:
    mask = own_layout.pattern
    if function is torch.sub:  # torch subtracts no bool tensor
        mask = mask.to(F64)
    with sl.fallback("allow"):
        found = function(own_layout, mask)
    assert_close(found, function(own_layout.to_dense(), mask.to_dense()))


def test_in_place_work_with_its_own_mask_names_the_way_out(own_layout: sl.LayoutTensor) -> None:
    mask = own_layout.pattern
    for write in (own_layout.add_, own_layout.mul_, own_layout.copy_):
        with pytest.raises(TypeError, match=r"no values to .*mask\.to\(torch\.float64\)"):
            write(mask)
    own_layout.masked_fill_(mask, 2.0)
    assert torch.equal(own_layout.to_dense(), mask.to_dense() * torch.tensor(2.0, dtype=F64))


# --- dimensions that are not there ----------------------------------------------------------------


@pytest.mark.parametrize("function", [torch.softmax, torch.log_softmax])
@pytest.mark.parametrize("dim", [2, 5, -3])
def test_softmax_over_a_dimension_that_is_not_there_raises(
    one_layout: sl.LayoutTensor, function: Callable[..., Tensor], dim: int
) -> None:
    with sl.fallback("allow"), pytest.raises(IndexError):
        function(one_layout, dim)


@pytest.mark.parametrize("dims", [(0, 5), (2, 1), (-3, -1)])
def test_transposing_dimensions_that_are_not_there_raises(
    one_layout: sl.LayoutTensor, dims: tuple[int, int]
) -> None:
    with sl.fallback("allow"):
        with pytest.raises(IndexError):
            one_layout.transpose(*dims)
        with pytest.raises(IndexError):
            one_layout.permute(*dims)


# --- products -------------------------------------------------------------------------------------


def test_a_matrix_is_no_vector_and_an_input_does_not_enlarge_a_product(
    one_layout: sl.LayoutTensor,
) -> None:
    rows, columns = one_layout.shape
    x = torch.randn(columns, 3, dtype=F64)
    with sl.fallback("allow"):
        with pytest.raises(RuntimeError, match="vector"):
            torch.mv(one_layout, x)
        with pytest.raises((ValueError, RuntimeError), match="expand"):
            torch.addmm(torch.zeros(2, rows, 3, dtype=F64), one_layout, x)


def test_torchs_own_sparse_tensors_are_refused_beside_a_layout(
    own_layout: sl.LayoutTensor,
) -> None:
    rows, columns = own_layout.shape
    x, y = torch.randn(columns, 3, dtype=F64), torch.randn(3, rows, dtype=F64)
    refused = pytest.raises(TypeError, match=r"torch\.sparse_.*x\.to_dense\(\)")
    for made in (Tensor.to_sparse, Tensor.to_sparse_csr):
        with refused:
            own_layout @ made(x)
        with refused:
            made(y) @ own_layout
        with refused:
            sl.sddmm(made(y.mT.contiguous()), x.mT, own_layout.pattern)


@pytest.mark.parametrize("make", [sl.csr, sl.csc, lambda d: sl.bsr(d, 8), lambda d: sl.nm(d, 2, 4)])
def test_gradients_of_a_product_with_nothing_summed_over_a_batch(
    make: Callable[[Tensor], sl.LayoutTensor],
) -> None:
    for rows, batch in ((0, 2), (16, 0)):
        w = make(torch.randn(rows, 24, dtype=F64)).requires_grad_()
        x = torch.randn(batch, 24, 3, dtype=F64, requires_grad=True)
        (w @ x).sum().backward()
        assert type(w.grad) is type(w)
        assert torch.equal(w.grad.to_dense(), torch.zeros(rows, 24, dtype=F64))
        assert torch.equal(x.grad, torch.zeros_like(x))


# --- other patterns, NaN, no head -----------------------------------------------------------------


def test_sparse_mask_of_a_layout_samples_its_dense_form(
    own_layout: sl.LayoutTensor, assert_close: Check
) -> None:
    mask = sl.csr((torch.rand(own_layout.shape) < 0.3).float()).pattern
    w = own_layout.detach().requires_grad_()
    with sl.fallback("error"), pytest.raises(sl.DenseFallbackError, match="sparse_mask"):
        w.sparse_mask(mask)
    with sl.fallback("allow"):
        found = w.sparse_mask(mask)
        found.sum().backward()
    assert type(found) is sl.CSRTensor
    assert_close(found, own_layout.to_dense() * mask.to_dense())
    assert type(w.grad) is type(w)
    assert_close(w.grad, mask.to_dense().double() * w.pattern.to_dense())
    with sl.fallback("error"):  # its own pattern needs nothing dense, and values are copied
        same = own_layout.sparse_mask(own_layout)
    assert_close(same, own_layout)
    same.zero_()
    assert own_layout.sum() != 0


def test_copying_from_dense_takes_nan_where_it_is_stored(own_layout: sl.LayoutTensor) -> None:
    stored = own_layout.pattern.to_dense()
    own_layout.copy_(torch.where(stored, torch.nan, 0.0).to(F64))
    assert torch.equal(own_layout.to_dense().isnan(), stored)
    with pytest.raises(ValueError, match="does not store"):
        own_layout.copy_(torch.where(stored, 0.0, torch.nan).to(F64))


def test_a_slice_without_heads_is_a_valid_layout() -> None:
    none = sl.bsr(torch.randn(3, 16, 16), 8)[5:]
    none.validate()
    assert none.shape == (0, 16, 16)
    assert none.to_dense().shape == (0, 16, 16)


# --- written to between forward and backward ------------------------------------------------------


def transpose_of(w: sl.LayoutTensor) -> None:
    w.mT.mul_(2)


def values_of(w: sl.LayoutTensor) -> None:
    w.values().mul_(2)


@pytest.mark.parametrize("write", [transpose_of, values_of])
def test_a_product_notices_writes_through_what_shares_its_values(
    own_layout: sl.LayoutTensor, write: Callable[[sl.LayoutTensor], None]
) -> None:
    x = torch.randn(own_layout.shape[1], 3, dtype=F64, requires_grad=True)
    for product in (lambda: own_layout @ x, lambda: F.linear(x.mT, own_layout)):
        out = product().sum()
        write(own_layout)
        with pytest.raises(RuntimeError, match=r"written to since|modified by an inplace"):
            out.backward()
        x.grad = None
        product().sum().backward()  # after the write it is as before
        assert x.grad is not None


def test_elementwise_work_notices_writes_to_the_layout(own_layout: sl.LayoutTensor) -> None:
    scales = torch.randn(own_layout.shape, dtype=F64, requires_grad=True)
    out = (own_layout * scales).sum()
    own_layout.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        out.backward()


def test_a_product_notices_writes_through_a_slice_that_shares_memory() -> None:
    w = sl.csr(torch.randn(16, 24, dtype=F64))
    x = torch.randn(24, 3, dtype=F64, requires_grad=True)
    out = (w @ x).sum()
    w[4:8].zero_()
    with pytest.raises(RuntimeError, match=r"CSRTensor.*w\.clone\(\)"):
        out.backward()


def test_a_product_with_a_frozen_layout_keeps_no_operand(
    own_layout: sl.LayoutTensor, assert_close: Check
) -> None:
    saved: list[Tensor] = []
    x = torch.randn(own_layout.shape[1], 3, dtype=F64, requires_grad=True) * 1

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    x.retain_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = own_layout @ x
    assert not any(t is x for t in saved)
    with torch.no_grad():
        x.zero_()
    out.sum().backward()
    assert_close(x.grad, own_layout.to_dense().sum(0)[:, None].expand(-1, 3).contiguous())
