"""What CSR and CSC layouts compute: products under every face, sampled products, softmax, chains,
and their gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_layouts as sl

Make = Callable[..., Any]
Check = Callable[..., None]

BOTH = pytest.mark.parametrize("make", [sl.csr, sl.csc])
F64 = torch.float64


@pytest.fixture
def dense() -> Tensor:
    """float64 (6, 9) with an empty row and an empty column."""
    made = torch.randn(6, 9, dtype=F64) * (torch.rand(6, 9) < 0.5)
    made[3] = made[:, 4] = 0
    return made


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


# --- products under every face --------------------------------------------------------------------

FACES: dict[str, tuple[Callable[[Any, Any], Any], tuple[int, ...]]] = {
    "w @ x": (lambda w, x: w @ x, (9, 4)),
    "torch.mm": (torch.mm, (9, 4)),
    "w.matmul": (lambda w, x: w.matmul(x), (2, 3, 9, 4)),
    "mv": (torch.mv, (9,)),
    "x @ w": (lambda w, x: x @ w, (4, 6)),
    "vector @ w": (lambda w, x: x @ w, (6,)),
    "batch @ w": (lambda w, x: x @ w, (2, 5, 6)),
    "w.mT @ x": (lambda w, x: w.mT @ x, (6, 4)),
    "x @ w.T": (lambda w, x: x @ w.T, (4, 9)),
    "F.linear": (lambda w, x: F.linear(x, w), (2, 5, 9)),
    "F.linear bias": (lambda w, x: F.linear(x, w, torch.arange(6.0, dtype=F64)), (5, 9)),
    "addmm": (lambda w, x: torch.addmm(torch.ones(6, 4, dtype=F64), w, x, beta=0.5), (9, 4)),
    "einsum ij,jk": (lambda w, x: torch.einsum("ij,jk->ik", w, x), (9, 4)),
    "einsum transposed": (lambda w, x: torch.einsum("ij,ki->kj", w, x), (4, 6)),
    "strided": (lambda w, x: w @ x[:, ::2], (9, 8)),
    "transposed operand": (lambda w, x: w @ x.mT, (4, 9)),
    "many columns": (lambda w, x: w @ x, (9, 300)),
    "no column": (lambda w, x: w @ x, (9, 0)),
    "sum of rows": (lambda w, x: w.sum(-1) + 0 * x.sum(), (1,)),
    "sum of columns": (lambda w, x: w.sum(0, keepdim=True) + 0 * x.sum(), (1,)),
}


@BOTH
@pytest.mark.parametrize("face", FACES)
def test_faces_and_their_gradients(
    face: str, make: Make, dense: Tensor, assert_close: Check
) -> None:
    call, shape = FACES[face]
    w, x = make(dense).requires_grad_(), normal(*shape).requires_grad_()
    plain, y = dense.clone().requires_grad_(), x.detach().clone().requires_grad_()
    with sl.fallback("error"):
        out, expected = call(w, x), call(plain, y)
        assert_close(out, expected)
        weight = torch.randn_like(expected)
        out.backward(weight)
        expected.backward(weight)
    assert_close(x.grad, y.grad)
    assert type(w.grad) is type(w)
    assert w.grad.same_pattern(w)
    assert_close(w.grad, plain.grad * (dense != 0), scale=float(plain.grad.norm()))


@BOTH
def test_bmm_of_values_for_every_sample(make: Make, dense: Tensor, assert_close: Check) -> None:
    mask = make(dense).pattern
    w = normal(3, 6, 9).sparse_mask(mask).requires_grad_()
    x = normal(3, 9, 4).requires_grad_()
    plain, y = w.detach().to_dense().requires_grad_(), x.detach().clone().requires_grad_()
    weight = normal(3, 6, 4)
    with sl.fallback("error"):
        torch.bmm(w, x).backward(weight)
        torch.bmm(plain, y).backward(weight)
        assert_close(x.grad, y.grad)
        assert_close(w.grad, plain.grad * mask.to_dense())
        assert_close(w @ x[0], plain @ x[0])
        assert_close(x.mT @ w.mT, x.mT @ plain.mT)
        assert_close(torch.baddbmm(weight, w, x), torch.baddbmm(weight, plain, x))
        one = w[:1]
        assert_close(one @ x, plain[:1] @ x)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [3, 300])
def test_low_precision_adds_up_in_float32(make: Make, dtype: torch.dtype, columns: int) -> None:
    dense = torch.full((2, 4096), 1.0, dtype=dtype)
    x = torch.full((4096, columns), 1.0, dtype=dtype)
    out = make(dense) @ x
    assert out.dtype == dtype
    assert (out == 4096).all()  # a sum in float16 or bfloat16 stops growing before that


@BOTH
def test_gradcheck_of_first_and_second_order(make: Make, dense: Tensor) -> None:
    w = make(dense)
    values = w.values().clone().requires_grad_()

    def left(values: Tensor, x: Tensor) -> Tensor:
        return make(*w.lists, values, shape=(6, 9)) @ x

    def right(values: Tensor, x: Tensor) -> Tensor:
        return x @ make(*w.lists, values, shape=(6, 9))

    for function, shape in ((left, (2, 9, 2)), (right, (3, 6))):
        x = normal(*shape).requires_grad_()
        assert torch.autograd.gradcheck(function, (values, x))
        assert torch.autograd.gradgradcheck(function, (values, x))


@BOTH
def test_integers_are_dense_and_say_so(make: Make) -> None:
    w = make(torch.eye(3).long())
    with pytest.warns(sl.DenseFallbackWarning):
        out = w @ torch.ones(3, 2).long()
    assert torch.equal(out, torch.ones(3, 2).long())


@BOTH
def test_nan_spreads_only_where_it_is_read(make: Make, dense: Tensor) -> None:
    x = normal(9, 3)
    x[4] = math.nan  # the empty column
    assert make(dense).matmul(x).isfinite().all()
    x[0] = math.nan
    assert torch.equal((make(dense) @ x).isnan().any(1), dense[:, 0] != 0)


@BOTH
def test_autocast(make: Make, dense: Tensor) -> None:
    w, x = make(dense.float()), torch.randn(9, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (w @ x).dtype == torch.bfloat16


# --- which kernel ---------------------------------------------------------------------------------


def chosen(call: Callable[[], Any]) -> list[str]:
    with sl.trace() as trace:
        call()
    return [f"{step.what}/{step.kernel}" for step in trace]


@BOTH
def test_the_table_chooses_by_columns(make: Make) -> None:
    w = make(torch.eye(128))
    few = "mkl" if torch.backends.mkl.is_available() else "cpu"
    assert chosen(lambda: w @ torch.ones(128, 64)) == [f"csr_matmul/{few}"]
    assert chosen(lambda: w @ torch.ones(128, 65)) == ["csr_matmul/cpu"]
    assert chosen(lambda: w.double() @ torch.ones(128, 64).double()) == ["csr_matmul/cpu"]
    assert chosen(lambda: torch.ones(64, 128) @ w) == [f"csr_matmul/{few}"]
    text = sl.explain(F.linear, torch.ones(4, 20, 128), w).text()
    assert "takes up to 64 columns of the dense operand, not 128" in text


def test_explain_names_the_ops_of_the_gradients() -> None:
    w = sl.csr(torch.eye(8)).requires_grad_()
    text = str(sl.explain(torch.matmul, w, torch.ones(8, 2, requires_grad=True)))
    for part in ("csr_matmul", "gradient of the dense operand", "csr_sddmm", "triton", "cusparse"):
        assert part in text
    assert "csr_sddmm" in str(sl.explain(sl.sddmm, torch.ones(8, 2), torch.ones(2, 8), w))
    assert "csr_softmax_backward" in str(sl.explain(torch.softmax, w, -1))


# --- sampled products and softmax -----------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)], ids=str)
def test_sddmm(lead: tuple[int, ...], make: Make, dense: Tensor, assert_close: Check) -> None:
    mask = make(dense).pattern
    a, b = normal(*lead, 6, 5).requires_grad_(), normal(9, 5).requires_grad_()
    c, d = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
    weight = normal(*lead, 6, 9)
    with sl.fallback("error"):
        out = sl.sddmm(a, b.mT, mask)
        (out * weight).sum().backward()
    expected = (c @ d.mT) * mask.to_dense()
    (expected * weight).sum().backward()
    assert type(out) is type(mask)
    assert_close(out.to_dense(), expected)
    assert_close(a.grad, c.grad)
    assert_close(b.grad, d.grad)


@BOTH
def test_sampled_addmm(make: Make, dense: Tensor, assert_close: Check) -> None:
    w, a, b = make(dense), normal(6, 5), normal(5, 9)
    out = torch.sparse.sampled_addmm(w, a, b, beta=0.5, alpha=2.0)
    assert_close(out, (0.5 * dense + 2.0 * (a @ b)) * (dense != 0))
    out = torch.sparse.sampled_addmm(w.pattern, a, b)
    assert_close(out, (a @ b) * (dense != 0))


def masked_softmax(x: Tensor, stored: Tensor, dim: int, log: bool) -> Tensor:
    scores = x.masked_fill(~stored, -math.inf)
    out = torch.log_softmax(scores, dim) if log else torch.softmax(scores, dim)
    return out.masked_fill(~stored, 0.0)


@BOTH
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dim", [-1, -2, 2, 1])
def test_softmax(log: bool, dim: int, make: Make, dense: Tensor, assert_close: Check) -> None:
    stored = dense != 0
    w = normal(2, 6, 9).sparse_mask(make(dense).pattern).requires_grad_()
    x = w.detach().to_dense().requires_grad_()
    weight = normal(2, 6, 9)
    with sl.fallback("error"):
        out = (torch.log_softmax if log else torch.softmax)(w, dim)
        (out * weight).sum().backward()
    expected = masked_softmax(x, stored, dim, log)
    (expected * weight).sum().backward()
    assert type(out) is type(w)
    assert_close(out.to_dense(), expected)
    assert_close(w.grad.to_dense(), x.grad.nan_to_num(0.0))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_softmax_of_large_and_infinite_scores(make: Make, dtype: torch.dtype) -> None:
    dense = torch.tensor([[500.0, 499, 1], [-math.inf, 2, 2], [-math.inf] * 3, [7.0, 0, 0]])
    stored = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 0, 0]]).bool()
    w = dense.to(dtype).sparse_mask(make(stored.float()).pattern)
    out = torch.softmax(w, -1)
    assert out.dtype == dtype
    expected = masked_softmax(dense.to(dtype), stored, -1, False)
    expected[2] = 0  # a row that attends to nothing
    torch.testing.assert_close(out.to_dense(), expected)
    log = torch.log_softmax(w, -1).to_dense()
    assert log[2].isneginf().all()
    assert log[1].tolist() == [-math.inf, *[pytest.approx(-math.log(2), rel=1e-2)] * 2]
    assert torch.softmax(w, -1, dtype=torch.float64).dtype == torch.float64


@BOTH
@pytest.mark.parametrize("heads", [(), (2, 3)], ids=str)
def test_attention_by_hand_equals_masked_attention(
    heads: tuple[int, ...], make: Make, assert_close: Check
) -> None:
    stored = torch.rand(20, 30) < 0.3
    stored[:, 0] = True  # torch gives NaN for a row that attends to nothing
    mask = make(stored.double()).pattern
    operands = [normal(*heads, n, 8).requires_grad_() for n in (20, 30, 30)]
    twins = [t.detach().clone().requires_grad_() for t in operands]
    q, k, v = operands
    with sl.fallback("error"):
        out = torch.softmax(sl.sddmm(q, k.mT, mask) / math.sqrt(8), -1) @ v
    expected = F.scaled_dot_product_attention(*twins, attn_mask=stored)
    assert_close(out, expected)
    weight = torch.randn_like(expected)
    out.backward(weight)
    expected.backward(weight)
    for one, twin in zip(operands, twins, strict=True):
        assert_close(one.grad, twin.grad)


@BOTH
def test_masks_multiply_and_convert(make: Make, dense: Tensor) -> None:
    mask, x = make(dense).pattern, normal(2, 6, 9)
    with sl.fallback("error"):
        assert torch.equal((mask * x).to_dense(), x * (dense != 0))
        assert torch.equal((x * mask).to_dense(), x * (dense != 0))
        assert torch.equal(mask.to(torch.float32).to_dense(), (dense != 0).float())
        w = make(dense)
        assert torch.equal((w * x[0]).to_dense(), dense * x[0])
        assert torch.equal((w + w * 2).to_dense(), dense * 3)
