"""Layouts where torch's own rules decide: `.data`, initialisers, views, version counters, norms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_layouts as sl

F64 = torch.float64


@pytest.fixture
def w() -> sl.BSRTensor:
    torch.manual_seed(0)
    dense = torch.randn(32, 48, dtype=F64)
    dense[:16, 16:] = 0
    return sl.bsr(dense, 16)


@pytest.fixture
def p(w: sl.BSRTensor) -> sl.BSRTensor:
    return w.clone().requires_grad_()


# --- .data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameter", [False, True])
def test_data_takes_the_tensors_of_a_layout(parameter: bool, w: sl.BSRTensor) -> None:
    target: Any = nn.Parameter(w.clone()) if parameter else w.clone()
    other = sl.bsr(torch.randn(32, 48, dtype=F64), 16)  # another pattern
    assert target.block_pattern is not None  # kept by the object
    target.data = other
    assert torch.equal(target.to_dense(), other.to_dense())
    assert target.inner_values.data_ptr() == other.inner_values.data_ptr()
    assert target.same_pattern(other)


def test_data_refuses_what_is_of_another_kind(w: sl.BSRTensor) -> None:
    for other in (w.to_dense(), w.float(), w.mT, w.pattern, sl.bsr(w.to_dense(), 8)):
        with pytest.raises(TypeError, match=r"data: expected(.|\n)*copy_") as caught:
            w.data = other
        assert len(str(caught.value)) < 600


# --- initialisers ---------------------------------------------------------------------------------

INITIALISERS: dict[str, Callable[[Any], Any]] = {
    "normal_": lambda t: nn.init.normal_(t, 3, 0.1),
    "uniform_": lambda t: nn.init.uniform_(t, 1, 2),
    "uniform_ by name": lambda t: nn.init.uniform_(tensor=t, a=1, b=2),
    "constant_": lambda t: nn.init.constant_(t, 7),
    "ones_": nn.init.ones_,
    "zeros_": nn.init.zeros_,
    "kaiming_uniform_": nn.init.kaiming_uniform_,
    "kaiming_normal_": nn.init.kaiming_normal_,
    "xavier_uniform_": nn.init.xavier_uniform_,
    "xavier_normal_": nn.init.xavier_normal_,
}


@pytest.mark.parametrize("name", INITIALISERS)
def test_initialisers_fill_the_stored_entries(name: str, w: sl.BSRTensor) -> None:
    parameter: Any = nn.Parameter(w.clone())
    assert INITIALISERS[name](parameter) is parameter
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert not (parameter.values() == w.values()).any()
    assert parameter.same_pattern(w)


def test_fan_in_is_of_the_matrix() -> None:
    parameter = nn.Parameter(sl.bsr(torch.ones(16, 64), 16))
    nn.init.kaiming_uniform_(parameter)
    bound = (6 / 64) ** 0.5
    assert bound * 0.9 < parameter.values().abs().max() <= bound


@pytest.mark.parametrize("name", ["orthogonal_", "eye_", "sparse_"])
def test_initialisers_that_write_elsewhere_raise(name: str, w: sl.BSRTensor) -> None:
    extra = (0.5,) if name == "sparse_" else ()
    with sl.fallback("allow"), pytest.raises(TypeError, match=r"sparse_mask"):
        getattr(nn.init, name)(nn.Parameter(w.clone()), *extra)


def test_dirac_raises() -> None:
    heads = nn.Parameter(sl.bsr(torch.ones(2, 16, 16), 16))
    with sl.fallback("allow"), pytest.raises(TypeError, match="BSRTensor"):
        nn.init.dirac_(heads)


# --- views ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [lambda w: w[1:9], lambda w: w.view(-1), lambda w: w.diagonal(), lambda w: w.unbind(0)],
    ids=["getitem", "view", "diagonal", "unbind"],
)
def test_a_view_says_that_it_is_a_copy(make: Callable[[Any], Any], w: sl.BSRTensor) -> None:
    with pytest.warns(sl.DenseFallbackWarning, match="copy: writing to it does not change"):
        make(w)


def test_in_place_on_a_transpose_under_grad_raises(p: sl.BSRTensor) -> None:
    y = p * 1
    t = y.mT
    for target in (t, y):
        with pytest.raises(RuntimeError, match=r"w\.mT\.clone\(\)"):
            target.mul_(2)
    with pytest.raises(RuntimeError, match="shares"):
        torch._foreach_mul_([t], 2.0)
    t.clone().mul_(2).to_dense().sum().backward()
    assert torch.equal(p.grad.values(), torch.full_like(p.values(), 2))
    with torch.no_grad():
        p.mT.mul_(2)


# --- version counters -----------------------------------------------------------------------------

WRITES: dict[str, Callable[[Any], Any]] = {
    "mul_": lambda p: p.mul_(2),
    "add_": lambda p: p.add_(p),
    "fill_": lambda p: p.fill_(1),
    "zero_": lambda p: p.zero_(),
    "normal_": lambda p: p.normal_(),
    "copy_": lambda p: p.copy_(p * 2),
    "masked_fill_": lambda p: p.masked_fill_(p.pattern, 0.0),
    "init": lambda p: nn.init.normal_(p),
    "_foreach_mul_": lambda p: torch._foreach_mul_([p], 2.0),
    "_foreach_add_": lambda p: torch._foreach_add_([p], [p * 2]),
    "_foreach_zero_": lambda p: torch._foreach_zero_([p]),
    "_fused_sgd_": lambda p: torch._fused_sgd_(
        [p], [p.clone()], [], weight_decay=0.0, momentum=0.0, lr=0.1, dampening=0.0,
        nesterov=False, maximize=False, is_first_step=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_a_stale_backward_raises(name: str, p: sl.BSRTensor) -> None:
    x = torch.randn(48, 3, dtype=F64, requires_grad=True)
    out = (p @ x).sum()
    before = p._version
    with torch.no_grad():
        WRITES[name](p)
    assert p._version == before + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


# --- norms and transposes -------------------------------------------------------------------------

NORMS: dict[str, Callable[[Any], Tensor]] = {
    **{
        f"linalg.norm {order}": lambda t, order=order: torch.linalg.norm(t, order)
        for order in (None, "fro", "nuc", 1, -1, 2, -2, float("inf"), -float("inf"))
    },
    **{
        f"norm {order}": lambda t, order=order: torch.norm(t, p=order)
        for order in ("fro", "nuc", 0, 0.5, 1, 2, 3, -1, float("inf"), -float("inf"))
    },
    **{
        f"vector_norm {order}": lambda t, order=order: torch.linalg.vector_norm(t, order)
        for order in (0, 0.5, 1, 2, 3, -1, float("inf"))
    },
    "linalg.norm by name": lambda t: torch.linalg.norm(t, ord=1),
    "vector_norm by name": lambda t: torch.linalg.vector_norm(t, ord=1),
    "Tensor.norm 1": lambda t: t.norm(1),
    "linalg.matrix_norm": lambda t: torch.linalg.matrix_norm(t, 1),
    "linalg.norm dim": lambda t: torch.linalg.norm(t, dim=0),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_the_dense_ones(name: str, w: sl.BSRTensor) -> None:
    with sl.fallback("allow"):
        torch.testing.assert_close(NORMS[name](w), NORMS[name](w.to_dense()))


CONJUGATES: dict[str, Callable[[Any], Any]] = {
    "mH": lambda t: t.mH,
    "H": lambda t: t.H,
    "adjoint": lambda t: t.adjoint(),
    "torch.adjoint": torch.adjoint,
    "mT": lambda t: t.mT,
}


@pytest.mark.parametrize("name", CONJUGATES)
def test_conjugate_transposes(name: str) -> None:
    w = sl.bsr(torch.randn(32, 32, dtype=torch.complex64), 16)
    with sl.fallback("allow"):
        found = CONJUGATES[name](w)
        assert torch.equal(found.to_dense(), CONJUGATES[name](w.to_dense()).resolve_conj())


@pytest.mark.parametrize("factor", [2j, 1 + 1j, complex(float("inf"), 0)])
def test_a_complex_factor(factor: complex, w: sl.BSRTensor) -> None:
    with sl.fallback("allow"):
        found = w * factor
        torch.testing.assert_close(found.to_dense(), w.to_dense() * factor, equal_nan=True)
        assert torch.equal((w / 2j).to_dense(), w.to_dense() / 2j)


# --- torch.sparse ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse")
def test_bsr_of_a_torch_sparse_tensor() -> None:
    source = torch.eye(32).to_sparse_bsr((16, 16))
    made = sl.bsr(source).clone()  # it shares the values
    made.fill_(3)
    assert torch.equal(source.to_dense(), torch.eye(32))
    with pytest.raises(ValueError, match=r"requires it(.|\n)*detach\(\)"):
        sl.bsr(torch.eye(32).requires_grad_().to_sparse_bsr((16, 16)))
    crow, col = source.crow_indices(), source.col_indices()
    masked = torch.sparse_bsr_tensor(crow, col, source.values().bool(), (32, 32))
    with pytest.raises(TypeError, match=r"bool tensor; sl\.mask_from"):
        sl.bsr(masked)


# --- a dense target -------------------------------------------------------------------------------

DENSE_TARGETS: dict[str, Callable[[Any, Any], Any]] = {
    "+=": lambda d, w: d.__iadd__(w),
    "add_": lambda d, w: d.add_(w),
    "sub_": lambda d, w: d.sub_(w, alpha=2),
    "mul_": lambda d, w: d.mul_(w),
    "addcmul_": lambda d, w: d.addcmul_(w, w),
    "copy_": lambda d, w: d.copy_(w),
    "_foreach_add_": lambda d, w: torch._foreach_add_([d], [w]),
    "masked_fill_": lambda d, w: d.masked_fill_(w != 0, 5.0),
}


@pytest.mark.parametrize("name", DENSE_TARGETS)
def test_a_dense_target_is_computed_densely(name: str, w: sl.BSRTensor) -> None:
    start = torch.randn(32, 48, dtype=F64)
    found, expected = start.clone(), start.clone()
    with sl.fallback("allow"):
        DENSE_TARGETS[name](found, w)
    DENSE_TARGETS[name](expected, w.to_dense())
    assert type(found) is Tensor
    assert torch.equal(found, expected)
    assert not torch.equal(found, start)


def test_masked_fill_by_a_mask_layout() -> None:
    mask = sl.causal(32, block_size=16)
    scores = torch.randn(2, 32, 32)
    expected = scores.masked_fill(~mask.to_dense(), -torch.inf)
    with sl.fallback("allow"):
        assert torch.equal(scores.masked_fill(~mask, -torch.inf), expected)
        assert torch.equal(scores.clone().masked_fill_(~mask, -torch.inf), expected)


def test_gradient_through_a_dense_target(p: sl.BSRTensor) -> None:
    with sl.fallback("allow"):
        (torch.zeros(32, 48, dtype=F64).add_(p).copy_(p * 2)).sum().backward()
    assert isinstance(p.grad, sl.BSRTensor)
    assert torch.equal(p.grad.values(), torch.full_like(p.values(), 2))


def test_messages_do_not_print_dense_tensors(w: sl.BSRTensor) -> None:
    for call in (lambda: w.add_(w.to_dense()), lambda: w.copy_(torch.ones(32, 48, dtype=F64))):
        with pytest.raises((TypeError, ValueError)) as caught:
            call()
        assert "tensor([" not in str(caught.value)


# --- torch's attention ----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_torch_attention_takes_a_mask(training: bool) -> None:
    mask = ~sl.causal(32, block_size=16)
    x = torch.randn(2, 32, 8)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).train(training)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(training)
    with sl.fallback("allow"):
        found = attention(x, x, x, attn_mask=mask)[0], layer(x, src_mask=mask)
    dense = mask.to_dense()
    expected = attention(x, x, x, attn_mask=dense)[0], layer(x, src_mask=dense)
    torch.testing.assert_close(found, expected)
    for like in (torch.zeros_like, torch.empty_like):
        with sl.fallback("allow"):
            assert type(like(mask, dtype=torch.float32)) is Tensor


# --- storage --------------------------------------------------------------------------------------


def test_shared_memory(w: sl.BSRTensor) -> None:
    assert not w.is_shared()
    assert w.share_memory_() is w
    assert w.is_shared()
    assert all(t.is_shared() for t in w.inner_tensors() if t is not None)
    module = nn.Module()
    module.weight = nn.Parameter(copy.deepcopy(w))
    module.share_memory()
    assert module.weight.is_shared()
    assert w.is_set_to(w)
    assert w.is_set_to(w.detach())
    assert not w.is_set_to(w.clone())
    with pytest.raises((RuntimeError, TypeError)):
        torch.Tensor.share_memory_(w.clone())


def test_format_is_repr(w: sl.BSRTensor) -> None:
    with sl.fallback("error"):
        assert f"{w}" == repr(w)


# --- the pattern is looked at once ----------------------------------------------------------------


def test_equal_patterns_are_compared_once(w: sl.BSRTensor, monkeypatch: pytest.MonkeyPatch) -> None:
    other = sl.bsr(w.to_dense(), 16)
    assert w.same_pattern(other)
    monkeypatch.setattr(torch, "equal", lambda *_: pytest.fail("compared again"))
    assert w.same_pattern(other)
    assert w.clone().same_pattern(other.clone())
    monkeypatch.undo()
    assert not w.same_pattern(sl.bsr(torch.ones(32, 48, dtype=F64), 16))


def test_clearing_looks_at_partial_blocks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = __import__("sparse_layouts.bsr_tensor", fromlist=["x"])
    w = torch.randn(40, 40).sparse_mask(sl.causal(40, block_size=16))
    w.add_(1)
    monkeypatch.setattr(module, "entry_mask", lambda _: pytest.fail("the mask is made again"))
    for layout in (w, w.mT):
        layout.add_(1)
        monkeypatch.undo()
        layout.validate()
        monkeypatch.setattr(module, "entry_mask", lambda _: pytest.fail("made again"))
    slots, unstored = module.unstored_entries(w.block_pattern)
    assert slots.numel() == 5  # the diagonal, and the ragged row
    assert unstored.shape == (5, 16, 16)


# --- integers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, -1, None])
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_sums_of_integer_and_complex_layouts(dim: Any, dtype: torch.dtype) -> None:
    w = sl.bsr(torch.eye(32).mul(3).to(dtype), 16)
    with sl.fallback("allow"):
        found = w.sum() if dim is None else w.sum(dim)
    assert torch.equal(found, w.to_dense().sum() if dim is None else w.to_dense().sum(dim))
