"""Arithmetic on layouts: what keeps the layout, what falls back, what an in-place operation may do.

Out of place, every result equals the dense one. In place only stored entries change.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts.block_pattern import dense_counts, expand_heads

Check = Callable[..., None]
Function = Callable[..., Tensor]

KEEPS: dict[str, Function] = {
    "w * 2": lambda w: w * 2,
    "2 * w": lambda w: 2 * w,
    "w * tensor": lambda w: w * torch.tensor(1.5, dtype=w.dtype),
    "mul": lambda w: torch.mul(w, 0.5),
    "w * w": lambda w: w * w,
    "w / 3": lambda w: w / 3,
    "div": lambda w: torch.div(w, 0.3, rounding_mode="floor"),
    "-w": operator.neg,
    "+w": operator.pos,
    "w + w": lambda w: w + w,
    "add alpha": lambda w: torch.add(w, w, alpha=2),
    "w - w * 2": lambda w: w - w * 2,
    "sub alpha": lambda w: torch.sub(w, w, alpha=3),
    "abs": abs,
    "relu": F.relu,
    "Tensor.relu": lambda w: w.relu(),
    "tanh": torch.tanh,
    "sin": torch.sin,
    "square": torch.square,
    "sqrt": lambda w: torch.sqrt(torch.abs(w)),
    "sign": torch.sign,
    "expm1": torch.expm1,
    "log1p": lambda w: torch.log1p(w.abs()),
    "erf": torch.erf,
    "trunc": torch.trunc,
    "zeros_like": torch.zeros_like,
    "clone": torch.clone,
}
FALLS_BACK: dict[str, Function] = {
    "w + 1": lambda w: w + 1,
    "1 - w": lambda w: 1 - w,
    "w + dense": lambda w: w + torch.ones(w.shape, dtype=w.dtype),
    "w * inf": lambda w: w * float("inf"),
    "w * nan": lambda w: w * float("nan"),
    "w / 0": lambda w: w / 0,
    "1 / w": lambda w: 1 / w,
    "w / dense": lambda w: w / torch.ones(w.shape, dtype=w.dtype),
    "w ** 0": lambda w: w**0,
    "exp": torch.exp,
    "cos": torch.cos,
    "sigmoid": torch.sigmoid,
    "w > 0": lambda w: w > 0,
    "w == w": lambda w: w == w,
    "clamp": lambda w: w.clamp(min=0.5),
    "ones_like": torch.ones_like,
    "full_like": lambda w: torch.full_like(w, 2.0),
    "cumsum": lambda w: w.cumsum(-1),
    "cat": lambda w: torch.cat([w, w], -1),
    "stack": lambda w: torch.stack([w, w]),
    "where": lambda w: torch.where(torch.ones(w.shape, dtype=torch.bool), w, 1.0),
    "max": lambda w: w.max() if w.numel() else w.sum(-1),
    "flatten": lambda w: w.flatten(),
}


@pytest.mark.parametrize("name", KEEPS)
def test_keeps_the_layout(name: str, layout: sl.LayoutTensor, assert_close: Check) -> None:
    with sl.fallback("error"):
        result = KEEPS[name](layout)
    assert type(result) is type(layout)
    assert result.same_pattern(layout)
    result.validate()
    assert_close(result, KEEPS[name](layout.to_dense()))


@pytest.mark.parametrize("name", FALLS_BACK)
def test_falls_back(name: str, small: sl.BSRTensor) -> None:
    with pytest.warns(sl.DenseFallbackWarning, match="has no sparse implementation"):
        result = FALLS_BACK[name](small)
    assert type(result) is Tensor
    expected = FALLS_BACK[name](small.to_dense())
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def test_every_layout_falls_back(layout: sl.LayoutTensor) -> None:
    with sl.fallback("error"), pytest.raises(sl.DenseFallbackError, match="no sparse impl"):
        _ = layout + 1
    with sl.fallback("allow"):
        for name, function in FALLS_BACK.items():
            expected = function(layout.to_dense())
            result = function(layout)
            assert type(result) is Tensor, name
            torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def test_two_patterns_fall_back(small: sl.BSRTensor, random_blocks: Function) -> None:
    other = sl.bsr(random_blocks(), (4, 8))
    for function in (operator.add, operator.sub, operator.mul):
        with pytest.warns(sl.DenseFallbackWarning):
            result = function(small, other)
        assert torch.equal(result, function(small.to_dense(), other.to_dense()))


def test_times_a_dense_tensor_samples_it(layout: sl.LayoutTensor, assert_close: Check) -> None:
    dense = torch.randn(layout.shape, dtype=layout.dtype)
    for factor in (dense, dense[..., :1], dense[..., :1, :]):
        with sl.fallback("error"):
            left, right = layout * factor, factor * layout
        assert left.same_pattern(layout)
        assert_close(left, layout.to_dense() * factor)
        assert_close(right, layout.to_dense() * factor)


def test_mask_times_a_dense_tensor_samples_it(mask: sl.BSRTensor) -> None:
    dense = torch.randn(mask.shape)
    with sl.fallback("error"):
        sampled, right, left = dense.sparse_mask(mask), dense * mask, mask * dense
    for made in (sampled, right, left):
        made.validate()
        assert torch.equal(made.to_dense(), dense * mask.to_dense())


def test_dtype_promotion_is_torchs(small: sl.BSRTensor) -> None:
    half = small.half()
    assert (half * torch.tensor(2.0, dtype=torch.float64)).dtype == torch.float16
    assert (half + small).dtype == torch.float64
    assert torch.equal((half + small).to_dense(), half.to_dense() + small.to_dense())


@pytest.mark.parametrize("name", ["w * 2", "w * w", "w / 3", "-w", "w + w", "relu", "tanh"])
def test_gradients_come_in_the_layout(
    name: str, layout: sl.LayoutTensor, assert_close: Check
) -> None:
    dense = layout.to_dense().requires_grad_()
    layout.requires_grad_()
    upstream = torch.randn(layout.shape, dtype=layout.dtype)
    KEEPS[name](dense).backward(upstream)
    (KEEPS[name](layout).to_dense() * upstream).sum().backward()
    assert type(layout.grad) is type(layout)
    assert layout.grad.same_pattern(layout)
    assert_close(layout.grad, dense.grad.sparse_mask(layout.detach()))


def test_gradients_through_a_fallback_come_in_the_layout(
    layout: sl.LayoutTensor, assert_close: Check
) -> None:
    dense = layout.to_dense().requires_grad_()
    torch.exp(dense).sum().backward()
    with sl.fallback("allow"):
        torch.exp(layout.requires_grad_()).sum().backward()
    assert type(layout.grad) is type(layout)
    assert_close(layout.grad, dense.grad.sparse_mask(layout.detach()))


def test_both_factors_get_gradients(small: sl.BSRTensor, assert_close: Check) -> None:
    dense = torch.randn(24, 40, dtype=small.dtype, requires_grad=True)
    own = small.to_dense().requires_grad_()
    (own * dense).square().sum().backward()
    expected, dense.grad = dense.grad, None
    (small.requires_grad_() * dense).square().sum().backward()
    assert_close(dense.grad, expected)
    assert_close(small.grad, own.grad.sparse_mask(small.detach()))


# --- sums, norms, dropout -------------------------------------------------------------------------


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dim", [None, -1, -2])
def test_sum(
    dim: int | None, keepdim: bool, block_layout: sl.BSRTensor, assert_close: Check
) -> None:
    dense = block_layout.to_dense().requires_grad_()
    expected = dense.sum() if dim is None else dense.sum(dim, keepdim)
    upstream = torch.randn(expected.shape, dtype=expected.dtype)
    expected.backward(upstream)
    block_layout.requires_grad_()
    with sl.fallback("error"):
        result = block_layout.sum() if dim is None else block_layout.sum(dim, keepdim)
        result.backward(upstream)
    scale = dense.norm().item()
    assert_close(result, expected, scale=scale)
    assert_close(block_layout.grad, dense.grad.sparse_mask(block_layout.detach()))


def test_sum_in_another_dtype(small: sl.BSRTensor, assert_close: Check) -> None:
    low = small.half()
    with sl.fallback("error"):
        total, rows = low.sum(dtype=torch.float64), low.sum(-1, dtype=torch.float64)
    assert_close(total, low.to_dense().sum(dtype=torch.float64), scale=low.to_dense().norm().item())
    assert_close(
        rows, low.to_dense().sum(-1, dtype=torch.float64), scale=low.to_dense().norm().item()
    )


@pytest.mark.parametrize("order", [1, 2, 3, float("inf")])
def test_norm(order: float, layout: sl.LayoutTensor, assert_close: Check) -> None:
    if layout.numel() == 0 and order == float("inf"):
        pytest.skip("torch has no largest entry of an empty tensor")
    expected = torch.linalg.vector_norm(layout.to_dense(), order)
    with sl.fallback("error"):
        assert_close(torch.linalg.vector_norm(layout, order), expected)
        assert_close(layout.norm(order), expected)


def test_frobenius_norm(layout: sl.LayoutTensor, assert_close: Check) -> None:
    with sl.fallback("error"):
        for result in (layout.norm(), torch.norm(layout), torch.linalg.norm(layout)):
            assert_close(result, layout.to_dense().norm())


def test_other_norms_fall_back(small: sl.BSRTensor) -> None:
    with pytest.warns(sl.DenseFallbackWarning):
        result = torch.linalg.vector_norm(small, 2, dim=-1)
    assert torch.equal(result, torch.linalg.vector_norm(small.to_dense(), 2, dim=-1))
    with pytest.warns(sl.DenseFallbackWarning):
        assert torch.linalg.vector_norm(small, 0) == (small.to_dense() != 0).sum()


def test_dropout(layout: sl.LayoutTensor, assert_close: Check) -> None:
    with sl.fallback("error"):
        half = F.dropout(layout, 0.5)
        assert torch.equal(F.dropout(layout, 0.5, training=False).to_dense(), layout.to_dense())
        assert not F.dropout(layout, 1.0).to_dense().any()
    half.validate()
    assert half.same_pattern(layout)
    kept = half.to_dense() != 0
    assert_close(half, torch.where(kept, layout.to_dense() * 2, 0))
    if layout.to_dense().any():
        assert 0 < kept.sum() < (layout.to_dense() != 0).sum()


# --- in place -------------------------------------------------------------------------------------

IN_PLACE: dict[str, Function] = {
    "add_": lambda w: w.add_(1.5),
    "+=": lambda w: operator.iadd(w, 1.5),
    "sub_": lambda w: w.sub_(0.5),
    "mul_": lambda w: w.mul_(3.0),
    "*=": lambda w: operator.imul(w, 2.0),
    "div_": lambda w: w.div_(4.0),
    "**=": lambda w: operator.ipow(w, 2),
    "exp_": lambda w: w.exp_(),
    "clamp_": lambda w: w.clamp_(min=0.5),
    "fill_": lambda w: w.fill_(2.0),
    "zero_": lambda w: w.zero_(),
    "add_ same": lambda w: w.add_(w * 2, alpha=0.5),
    "addcmul_": lambda w: w.addcmul_(w * 2, w * 3, value=0.1),
    "lerp_": lambda w: w.lerp_(w * 2, 0.25),
    "copy_": lambda w: w.copy_(w * 2),
    "copy_ scalar": lambda w: w.copy_(torch.tensor(2.0)),
    "masked_fill_": lambda w: w.masked_fill_(torch.ones(w.shape, dtype=torch.bool), 5.0),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_acts_on_stored_entries(
    name: str, layout: sl.LayoutTensor, assert_close: Check
) -> None:
    dense, before = layout.to_dense(), layout.clone()
    stored = torch.ones(layout.shape).sparse_mask(layout).to_dense() != 0
    expected = torch.where(stored, IN_PLACE[name](dense), 0.0)
    with sl.fallback("error"):
        result = IN_PLACE[name](layout)
    assert result is layout
    assert layout.same_pattern(before)
    layout.validate()  # nothing was written where nothing is stored
    assert_close(layout, expected)


@pytest.mark.parametrize("name", ["normal_", "uniform_"])
def test_random_filling_acts_on_stored_entries(name: str, layout: sl.LayoutTensor) -> None:
    before = layout.zero_().to_dense()
    getattr(layout, name)()
    layout.validate()
    assert torch.equal(
        layout.to_dense() != 0, torch.ones_like(before).sparse_mask(layout).to_dense() != 0
    )


def test_mask_layouts_have_no_values_to_change(mask: sl.BSRTensor) -> None:
    for change in (lambda m: m.zero_(), lambda m: m.fill_(True), torch.zeros_like):
        with pytest.raises(TypeError, match="mask layout has no values"):
            change(mask)


DENSE_OPERANDS: dict[str, Function] = {
    "add_": lambda w, x: w.add_(x),
    "sub_": lambda w, x: w.sub_(x),
    "mul_": lambda w, x: w.mul_(x),
    "+=": operator.iadd,
    "-=": operator.isub,
    "*=": operator.imul,
    "/=": operator.itruediv,
    "addcmul_": lambda w, x: w.addcmul_(x, x),
    "lerp_": lambda w, x: w.lerp_(x, 0.5),
}


@pytest.mark.parametrize("name", DENSE_OPERANDS)
@pytest.mark.parametrize("policy", ["warn", "allow"])
def test_in_place_with_other_entries_raises(
    name: str, policy: str, small: sl.BSRTensor, random_blocks: Function
) -> None:
    before = small.to_dense()
    others = (torch.randn(24, 40, dtype=small.dtype), sl.bsr(random_blocks(), (4, 8)))
    for other in others:
        with sl.fallback(policy), pytest.raises(TypeError, match="sparse_mask"):
            DENSE_OPERANDS[name](small, other)
    assert torch.equal(small.to_dense(), before)


@pytest.mark.parametrize(
    "write",
    [
        lambda w, x: operator.setitem(w, 0, 1.0),
        lambda w, x: w.cumsum_(0),
        lambda w, x: torch.matmul(x, x.mT, out=w),
        lambda w, x: F.dropout(w, 0.5, inplace=True),
        lambda w, x: operator.ifloordiv(w, 2),
        lambda w, x: operator.imod(w, 2),
    ],
    ids=["setitem", "cumsum_", "out", "inplace", "//=", "%="],
)
def test_other_writes_raise(write: Function, small: sl.BSRTensor) -> None:
    before = small.to_dense()
    dense = torch.randn(24, 40, dtype=small.dtype)
    with sl.fallback("allow"), pytest.raises(TypeError, match="sparse_mask"):
        write(small, dense)
    assert torch.equal(small.to_dense(), before)


def test_copy_takes_dense_entries_that_are_stored(layout: sl.LayoutTensor) -> None:
    source = torch.randn(layout.shape, dtype=layout.dtype).sparse_mask(layout).to_dense()
    layout.copy_(source)
    assert torch.equal(layout.to_dense(), source)


def test_copy_raises_rather_than_drop_an_entry(small: sl.BSRTensor) -> None:
    before = small.to_dense()
    with pytest.raises(ValueError, match=r"non-zero entries.*does not store.*sparse_mask"):
        small.copy_(torch.ones(24, 40, dtype=small.dtype))
    assert torch.equal(small.to_dense(), before)
    small.copy_(torch.ones(24, 40, dtype=small.dtype).sparse_mask(small))
    assert small.to_dense().sum() == small.nnz


def test_copy_of_another_pattern_raises(small: sl.BSRTensor, random_blocks: Function) -> None:
    with pytest.raises(ValueError, match=r"stores other entries.*assign=True.*sparse_mask"):
        small.copy_(sl.bsr(random_blocks(), (4, 8)))


def test_a_leaf_that_needs_a_gradient_is_not_written(layout: sl.LayoutTensor) -> None:
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        layout.requires_grad_().mul_(2.0)


# --- softmax --------------------------------------------------------------------------------------


def softmax_of_stored(layout: sl.BSRTensor, dense: Tensor, dim: int, log: bool) -> Tensor:
    """By definition: what is not stored is -inf, a block that counts c times has log c more; rows
    without entries give 0.
    """
    stored = layout.pattern.to_dense().expand(layout.shape)
    counts = dense_counts(expand_heads(layout.block_pattern)).expand(layout.shape)
    scores = (dense + counts.clamp(min=1).to(dense.dtype).log()).masked_fill(~stored, -torch.inf)
    empty = ~stored.any(dim, keepdim=True)
    function = torch.log_softmax if log else torch.softmax
    return function(scores.masked_fill(empty, 0.0), dim).masked_fill(~stored, 0.0)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dim", [-1, -2])
def test_softmax(
    dim: int,
    log: bool,
    block_layout: sl.BSRTensor,
    assert_close: Check,
) -> None:
    dense = block_layout.to_dense().requires_grad_()
    upstream = torch.randn(dense.shape, dtype=dense.dtype)
    expected = softmax_of_stored(block_layout, dense, dim, log)
    expected.backward(upstream)
    function = torch.log_softmax if log else torch.softmax
    block_layout.requires_grad_()
    with sl.fallback("error"):
        result = function(block_layout, dim)
        (result * upstream).sum().backward()
    assert torch.equal(result.pattern.to_dense(), block_layout.pattern.to_dense())
    assert dim == -2 or result.same_pattern(block_layout)
    result.validate()
    scale = max(expected.norm().item(), 1.0) * 2
    assert_close(result, expected, scale=scale)
    assert_close(block_layout.grad, dense.grad, scale=scale * upstream.norm().item())


def test_faces_of_softmax(small: sl.BSRTensor) -> None:
    expected = torch.softmax(small, -1).to_dense()
    with sl.fallback("error"):
        for result in (
            small.softmax(-1),
            F.softmax(small, -1),
            F.softmax(small, dim=1),
            torch.special.softmax(small, -1),
            torch.nn.Softmax(dim=-1)(small),
        ):
            assert torch.equal(result.to_dense(), expected)
        logs = torch.log_softmax(small, -1).to_dense()
        assert torch.equal(F.log_softmax(small, -1).to_dense(), logs)
        assert torch.equal(small.log_softmax(-1).to_dense(), logs)
        double = torch.softmax(small.float(), -1, dtype=torch.float64)
    assert double.dtype == torch.float64


def test_counts_enter_a_softmax_as_equal_entries(assert_close: Check) -> None:
    counts = torch.tensor([[3, 1, 0], [1, 0, 2]])
    scores = torch.randn(8, 12, dtype=torch.float64).sparse_mask(sl.bsr_mask(counts, 4))
    each = counts.repeat_interleave(4, 0).repeat_interleave(4, 1)
    powers = each * scores.to_dense().exp()
    assert_close(torch.softmax(scores, -1), powers / powers.sum(-1, keepdim=True))
