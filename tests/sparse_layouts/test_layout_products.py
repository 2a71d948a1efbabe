"""Products of a layout and a dense operand, under every name of torch's, with gradients."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_layouts as sl

Check = Callable[..., None]
F64 = torch.float64


def rand(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=F64, requires_grad=grad)


def bound(*factors: Tensor) -> float:
    """How large the sums inside a product can be: the rounding errors are a few eps of this."""
    scale = 1.0
    for factor in factors:
        scale *= max(1.0, factor.detach().norm().item())
    return scale


# name -> (the call, shape of the dense operand); of a (24, 40) matrix
FACES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "w @ x": (operator.matmul, (40, 3)),
    "w @ vector": (operator.matmul, (40,)),
    "w @ batch": (operator.matmul, (2, 5, 40, 3)),
    "w @ no sample": (operator.matmul, (0, 40, 3)),
    "w @ no column": (operator.matmul, (40, 0)),
    "x @ w": (lambda w, x: x @ w, (3, 24)),
    "vector @ w": (lambda w, x: x @ w, (24,)),
    "batch @ w": (lambda w, x: x @ w, (2, 5, 3, 24)),
    "rmatmul": (lambda w, x: w.__rmatmul__(x), (3, 24)),
    "torch.matmul": (torch.matmul, (40, 3)),
    "linalg.matmul": (torch.linalg.matmul, (40, 3)),
    "Tensor.matmul": (lambda w, x: w.matmul(x), (40, 3)),
    "torch.mm": (torch.mm, (40, 3)),
    "Tensor.mm": (lambda w, x: w.mm(x), (40, 3)),
    "x.mm(w)": (lambda w, x: x.mm(w), (3, 24)),
    "torch.mv": (torch.mv, (40,)),
    "w.mT @ x": (lambda w, x: w.mT @ x, (24, 3)),
    "x @ w.mT": (lambda w, x: x @ w.mT, (3, 40)),
    "w @ x.mT": (lambda w, x: w @ x.mT, (3, 40)),
    "w @ x[:, ::2]": (lambda w, x: w @ x[:, ::2], (40, 6)),
    "addmm": (lambda w, x: torch.addmm(torch.ones(24, 3, dtype=F64), w, x), (40, 3)),
    "addmm scaled": (
        lambda w, x: torch.addmm(torch.ones(3, dtype=F64), w, x, beta=0.5, alpha=2),
        (40, 3),
    ),
    "addmm right": (lambda w, x: torch.ones(40, dtype=F64).addmm(x, w), (3, 24)),
    "addmm beta 0": (
        lambda w, x: torch.addmm(torch.full((24, 3), float("nan"), dtype=F64), w, x, beta=0),
        (40, 3),
    ),
    "F.linear": (lambda w, x: F.linear(x, w), (3, 40)),
    "F.linear vector": (lambda w, x: F.linear(x, w), (40,)),
    "F.linear batch": (lambda w, x: F.linear(x, w), (2, 5, 40)),
    "F.linear bias": (lambda w, x: F.linear(x, w, torch.arange(24, dtype=F64)), (2, 5, 40)),
    "F.linear of a layout": (lambda w, x: F.linear(w, x), (3, 40)),
    "einsum ij,jk": (lambda w, x: torch.einsum("ij,jk->ik", w, x), (40, 3)),
    "einsum ij,jk->ki": (lambda w, x: torch.einsum("ij,jk->ki", w, x), (40, 3)),
    "einsum implicit": (lambda w, x: torch.einsum("ij,jk", w, x), (40, 3)),
    "einsum transposed": (lambda w, x: torch.einsum("ij,ik->jk", w, x), (24, 3)),
    "einsum right": (lambda w, x: torch.einsum("bi,ij->bj", x, w), (3, 24)),
    "einsum batch": (lambda w, x: torch.einsum("ij,bcj->bci", w, x), (2, 3, 40)),
    "einsum vector": (lambda w, x: torch.einsum("ij,j->i", w, x), (40,)),
    "einsum sublist": (lambda w, x: torch.einsum("ij,jk->ik", [w, x]), (40, 3)),
}


def check_product(
    call: Callable[[Tensor, Tensor], Tensor],
    layout: sl.BSRTensor,
    x: Tensor,
    assert_close: Check,
) -> None:
    """The result and both gradients, against dense, without any fallback."""
    dense, own_x = layout.to_dense().requires_grad_(), x.detach().clone().requires_grad_()
    expected = call(dense, own_x)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    leaf = layout.detach().requires_grad_()
    x = x.detach().requires_grad_()
    with sl.fallback("error"):
        result = call(leaf, x)
        result.backward(upstream)
        without_gradient = call(layout.detach(), x.detach())
    assert type(result) is Tensor
    assert torch.equal(without_gradient, result)
    assert_close(result, expected, scale=bound(dense, own_x))
    assert_close(x.grad, own_x.grad, scale=bound(dense, upstream))
    assert type(leaf.grad) is type(layout)
    assert leaf.grad.same_pattern(layout)
    leaf.grad.validate()
    wanted = dense.grad.sparse_mask(layout.detach())
    assert_close(leaf.grad, wanted, scale=bound(own_x, upstream))


@pytest.mark.parametrize("name", FACES)
def test_faces(name: str, small: sl.BSRTensor, assert_close: Check) -> None:
    call, shape = FACES[name]
    check_product(call, small, rand(*shape), assert_close)


BATCHED_FACES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "w @ x": (operator.matmul, (3, 40, 2)),
    "w @ shared": (operator.matmul, (40, 2)),
    "w @ batch": (operator.matmul, (2, 3, 40, 2)),
    "w @ one": (operator.matmul, (2, 1, 40, 2)),
    "w @ vector": (operator.matmul, (40,)),
    "x @ w": (lambda w, x: x @ w, (3, 2, 24)),
    "vector @ w": (lambda w, x: x @ w, (24,)),
    "bmm": (torch.bmm, (3, 40, 2)),
    "Tensor.bmm": (lambda w, x: w.bmm(x), (3, 40, 2)),
    "bmm right": (torch.Tensor.bmm, (3, 40, 2)),
    "x.bmm(w)": (lambda w, x: torch.bmm(x, w), (3, 2, 24)),
    "baddbmm": (
        lambda w, x: torch.baddbmm(torch.ones(3, 24, 2, dtype=F64), w, x, alpha=2, beta=3),
        (3, 40, 2),
    ),
    "einsum hij,hjk": (lambda w, x: torch.einsum("hij,hjk->hik", w, x), (3, 40, 2)),
    "einsum shared": (lambda w, x: torch.einsum("hij,jk->hik", w, x), (40, 2)),
    "einsum bhjk": (lambda w, x: torch.einsum("hij,bhjk->bhik", w, x), (2, 3, 40, 2)),
    "einsum transposed": (lambda w, x: torch.einsum("hij,hik->hjk", w, x), (3, 24, 2)),
    "einsum heads last": (lambda w, x: torch.einsum("hij,jhk->ihk", w, x), (40, 3, 2)),
}


@pytest.mark.parametrize("name", BATCHED_FACES)
def test_faces_with_a_pattern_per_head(
    name: str, random_blocks: Callable[..., Tensor], assert_close: Check
) -> None:
    call, shape = BATCHED_FACES[name]
    check_product(call, sl.bsr(random_blocks(3), (4, 8)), rand(*shape), assert_close)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("strided", [False, True])
def test_every_layout(
    side: str, strided: bool, block_layout: sl.BSRTensor, assert_close: Check
) -> None:
    m, n = block_layout.shape[-2:]
    lead = block_layout.shape[:-2]
    if side == "left":
        x = rand(*lead, 6, n).mT[..., ::2] if strided else rand(*lead, n, 3)
        check_product(operator.matmul, block_layout, x, assert_close)
    else:
        x = rand(*lead, m, 3).mT if strided else rand(*lead, 3, m)
        check_product(lambda w, x: x @ w, block_layout, x, assert_close)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_module(bias: bool, small: sl.BSRTensor, assert_close: Check) -> None:
    dense = torch.nn.Linear(40, 24, bias=bias, dtype=F64)
    dense.weight = torch.nn.Parameter(small.to_dense())
    sparse = torch.nn.Linear(40, 24, bias=bias, dtype=F64)
    sparse.load_state_dict(dense.state_dict())
    sparse.weight = torch.nn.Parameter(small)
    x = rand(2, 5, 40)
    dense(x).square().sum().backward()
    with sl.fallback("error"):
        sparse(x).square().sum().backward()
    scale = bound(x, dense(x))
    assert_close(sparse(x), dense(x), scale=bound(x, dense.weight))
    assert_close(sparse.weight.grad, dense.weight.grad.sparse_mask(small), scale=scale)
    if bias:
        assert_close(sparse.bias.grad, dense.bias.grad, scale=scale)


def test_layout_times_layout_falls_back(
    small: sl.BSRTensor, random_blocks: Callable[..., Tensor]
) -> None:
    other = sl.bsr(random_blocks(), (4, 8)).mT
    with pytest.warns(sl.DenseFallbackWarning, match=r"input=BSRTensor, other=BSRTensor"):
        result = small @ other
    assert torch.equal(result, small.to_dense() @ other.to_dense())


def test_a_product_without_a_kernel_falls_back(layout: sl.LayoutTensor) -> None:
    x = rand(layout.shape[-1], 3)
    if sl.explain(torch.matmul, layout, x).kernel != "dense fallback":
        pytest.skip("has kernels of its own")
    with pytest.warns(sl.DenseFallbackWarning):
        assert torch.equal(layout @ x, layout.to_dense() @ x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_as_good_as_dense(dtype: torch.dtype, small: sl.BSRTensor) -> None:
    w, x = small.to(dtype), rand(40, 16).to(dtype)
    exact = w.to_dense().double() @ x.double()
    with sl.fallback("error"):
        result = w @ x
    assert result.dtype == dtype
    of_dense = (w.to_dense() @ x - exact).abs().max()
    tiny = 2 * torch.finfo(dtype).eps * exact.abs().max()
    assert (result - exact).abs().max() <= 2 * of_dense + tiny


def test_the_same_inputs_give_the_same_bits(small: sl.BSRTensor) -> None:
    x = rand(2, 40, 3)

    def run() -> list[Tensor]:
        w, own = small.detach().requires_grad_(), x.clone().requires_grad_()
        out = w @ own
        out.square().sum().backward()
        return [out, own.grad, w.grad.stored_values]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_infinities_stay_in_their_rows(small: sl.BSRTensor) -> None:
    # a stored 0 times inf is NaN as in dense; an entry that is not stored takes no part
    x = torch.ones(40, 1, dtype=F64)
    x[0] = float("inf")
    result = small @ x
    touched = small.pattern.to_dense()[:, 0]
    assert bool((~result[touched].isfinite()).all())
    assert bool(result[~touched].isfinite().all())


# --- derivatives by finite differences ------------------------------------------------------------


def test_gradcheck_through_the_dense_leaf(block_layout: sl.BSRTensor) -> None:
    if block_layout.numel() > 2000 or block_layout.numel() == 0:
        pytest.skip("finite differences of a large matrix take long")
    pattern, n = block_layout.detach(), block_layout.shape[-1]
    x = rand(*block_layout.shape[:-2], n, 2, grad=True)
    leaf = block_layout.to_dense().requires_grad_()

    def product(dense: Tensor, x: Tensor) -> Tensor:
        return dense.sparse_mask(pattern) @ x

    assert torch.autograd.gradcheck(product, (leaf, x), fast_mode=True)


@pytest.mark.parametrize(
    "function",
    [
        lambda w: torch.softmax(w, -1).to_dense(),
        lambda w: torch.log_softmax(w, -1).to_dense(),
        lambda w: torch.softmax(w, -2).to_dense(),
        lambda w: (w * w + w / 2).to_dense(),
        lambda w: torch.tanh(w).mT.to_dense(),
        lambda w: w[4:12, 8:].to_dense(),
        lambda w: w.sum(-1),
        lambda w: w.norm(),
        lambda w: w.values(),
        lambda w: w.mT.values(),
    ],
    ids=[
        "softmax",
        "log_softmax",
        "columns",
        "arith",
        "mT",
        "slice",
        "sum",
        "norm",
        "values",
        "flip",
    ],
)
def test_gradcheck_of_functions(
    function: Callable[[sl.BSRTensor], Tensor], small: sl.BSRTensor
) -> None:
    leaf = (small.to_dense() + 0.1).requires_grad_()
    pattern = small.detach()
    assert torch.autograd.gradcheck(
        lambda dense: function(dense.sparse_mask(pattern)), (leaf,), fast_mode=True
    )


def test_gradcheck_of_bsr_and_sddmm() -> None:
    mask = sl.causal(11, block_size=4)
    a, b = rand(11, 3, grad=True), rand(3, 11, grad=True)
    assert torch.autograd.gradcheck(lambda a, b: sl.sddmm(a, b, mask).to_dense(), (a, b))
    dense = rand(8, 8, grad=True)
    assert torch.autograd.gradcheck(lambda x: sl.bsr(x, 4).to_dense(), (dense,))


@pytest.mark.parametrize("side", ["left", "right"])
def test_double_backward_of_a_product(side: str) -> None:
    pattern = sl.bsr_mask(torch.tensor([[1, 0], [1, 1], [0, 0]], dtype=torch.bool), 2)
    dense, x = (
        rand(6, 4, grad=True),
        rand(4, 3, grad=True) if side == "left" else rand(3, 6, grad=True),
    )

    def product(dense: Tensor, x: Tensor) -> Tensor:
        w = dense.sparse_mask(pattern)
        return w @ x if side == "left" else x @ w

    assert torch.autograd.gradgradcheck(product, (dense, x))


def test_gradient_penalty_of_a_layout(small: sl.BSRTensor, assert_close: Check) -> None:
    x = rand(40, 3)

    def penalty(w: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad((w @ x).square().sum(), w, create_graph=True)
        return grad.square().sum()

    leaf, dense = small.detach().requires_grad_(), small.to_dense().requires_grad_()
    (grad,) = torch.autograd.grad((dense @ x).square().sum(), dense, create_graph=True)
    (grad * small.pattern.to_dense()).square().sum().backward()
    penalty(leaf).backward()
    scale = bound(dense.grad, x, x)
    assert_close(leaf.grad, dense.grad.sparse_mask(small), scale=scale)
