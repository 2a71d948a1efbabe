"""`sl.linear` and `F.linear` on every layout: bias and activation, fused or one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_layouts as sl
from sparse_layouts.kernels.activations import ACTIVATIONS

Check = Callable[..., None]
F64 = torch.float64
NAMES = [None, *ACTIVATIONS]


@pytest.fixture(autouse=True)
def dense_where_a_layout_has_no_kernel() -> Any:
    """A layout without products takes the fallback, as in `F.linear`."""
    with sl.fallback("allow"):
        yield


def operands(weight: Tensor, *lead: int) -> tuple[Tensor, Tensor]:
    """x (*lead, K) and a bias (M,) of a float64 weight."""
    x = torch.randn(*lead, weight.shape[-1], dtype=F64)
    return x, torch.randn(weight.shape[-2], dtype=F64)


def by_definition(x: Tensor, w: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    out = F.linear(x, w, bias)
    return out if activation is None else ACTIVATIONS[activation](out)


def gradients(call: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The result and the gradients of what needs one."""
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    out = call(*leaves)
    torch.manual_seed(1)
    return [out, *torch.autograd.grad(out, leaves, torch.randn_like(out))]


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("lead", [(), (2, 3), (0,)])
def test_every_layout(
    activation: str | None, lead: tuple[int, ...], one_layout: sl.LayoutTensor, assert_close: Check
) -> None:
    x, bias = operands(one_layout, *lead)
    w = one_layout.detach()
    scale = max(1.0, float(x.norm()) * float(w.to_dense().norm()))
    for b in (None, bias):
        expected = by_definition(x, w.to_dense(), b, activation)
        assert_close(sl.linear(x, w, b, activation=activation), expected, scale=scale)
    leaves = [x, w, bias]
    found = gradients(lambda x, w, b: sl.linear(x, w, b, activation=activation), leaves)
    leaves[1] = w.to_dense()
    wanted = gradients(lambda x, w, b: by_definition(x, w, b, activation), leaves)
    assert type(found[2]) is type(w)
    wanted[2] = wanted[2].sparse_mask(w)
    for got, exact in zip(found, wanted, strict=True):
        assert_close(got, exact, scale=scale * max(1.0, float(x.norm())))


@pytest.mark.parametrize("activation", NAMES)
def test_dense_weights_are_torchs(activation: str | None) -> None:
    w = torch.randn(6, 9)
    x, b = torch.randn(4, 9), torch.randn(6)
    found = sl.linear(x, w, b, activation=activation)
    assert torch.equal(found, by_definition(x, w, b, activation))


@pytest.mark.parametrize("activation", NAMES)
def test_gradients_by_finite_differences(activation: str | None) -> None:
    pattern = sl.bsr_mask(torch.tensor([[1, 0], [1, 1], [0, 0]], dtype=torch.bool), 2)
    dense, x, bias = (torch.randn(*s, dtype=F64).requires_grad_() for s in ((6, 4), (3, 4), (6,)))

    def layer(dense: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        return sl.linear(x, dense.sparse_mask(pattern), bias, activation=activation)

    assert torch.autograd.gradcheck(layer, (dense, x, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, (dense, x, bias), fast_mode=True)


def test_only_the_wanted_gradients(small: sl.BSRTensor) -> None:
    x, bias = operands(small, 5)
    for wanted in range(3):
        leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate((x, small, bias))]
        with sl.trace() as steps:
            sl.linear(*leaves, activation="relu").sum().backward()
        assert [t.grad is not None for t in leaves] == [i == wanted for i in range(3)]
        own = (["block_matmul"], ["sddmm"], [])[wanted]
        assert [s.what for s in steps] == ["block_matmul", *own]


def kernels_that_ran(call: Callable[[], Any]) -> list[Any]:
    """(bias is given, activation) of every run of block_matmul's kernel."""
    from sparse_layouts.kernels.block_matmul import cpu

    seen = []
    own = cpu.block_matmul

    def spy(*args: Any, bias: Any = None, activation: Any = None, **options: Any) -> Tensor:
        seen.append((bias is not None, activation))
        return own(*args, bias=bias, activation=activation, **options)

    row = sl.kernel("block_matmul", name="spy")(spy)
    call()
    row.unregister()
    return seen


def test_what_is_fused(small: sl.BSRTensor) -> None:
    x, bias = operands(small, 5)
    leaf = small.detach().requires_grad_()
    cases = [
        (lambda: F.linear(x, small, bias), (True, None)),
        (lambda: F.linear(x, leaf, bias), (True, None)),
        (lambda: sl.linear(x, small, bias, activation="gelu"), (True, "gelu")),
        (lambda: sl.linear(x, small, activation="silu"), (False, "silu")),
        (lambda: sl.linear(x, leaf, bias, activation="relu"), (True, "relu")),
        (lambda: sl.linear(x, leaf, bias, activation="gelu"), (True, None)),
        (lambda: sl.linear(x, small), (False, None)),
    ]
    for call, seen in cases:
        assert kernels_that_ran(call) == [seen]
    with torch.no_grad():
        compiled = torch.compile(sl.linear, fullgraph=True, backend="aot_eager")
        call = lambda: compiled(x, leaf, bias, activation="gelu")  # noqa: E731
        assert kernels_that_ran(call) == [(True, "gelu")]


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_as_good_as_dense(
    activation: str | None, dtype: torch.dtype, small: sl.BSRTensor
) -> None:
    x, bias = operands(small, 9)
    leaves = [t.to(dtype) for t in (x, small, bias)]
    exact = by_definition(*(t.double() for t in (leaves[0], leaves[1].to_dense(), bias.to(dtype))),
                          activation)  # fmt: skip
    found = sl.linear(*leaves, activation=activation)
    assert found.dtype == dtype
    of_dense = by_definition(leaves[0], leaves[1].to_dense(), leaves[2], activation)
    allowed = 2 * (of_dense - exact).abs().max() + 2 * torch.finfo(dtype).eps * exact.abs().max()
    assert (found - exact).abs().max() <= allowed


def test_autocast(small: sl.BSRTensor) -> None:
    x, bias = (t.float() for t in operands(small, 5))
    w = small.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = sl.linear(x, w, bias, activation="relu")
        assert found.dtype == sl.linear(x, w.to_dense(), bias, activation="relu").dtype
    assert found.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("activation", NAMES)
def test_compiled(activation: str | None, one_layout: sl.LayoutTensor, assert_close: Check) -> None:
    torch.compiler.reset()

    def layer(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return sl.linear(x, w, bias, activation=activation)

    x, bias = operands(one_layout, 5)
    leaves = [x, one_layout, bias]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(*leaves), layer(*leaves))
    for got, eager in zip(gradients(compiled, leaves), gradients(layer, leaves), strict=True):
        assert_close(got, eager)


class Layer(nn.Module):
    """A feed-forward layer."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return sl.linear(x, self.weight, self.bias, activation="gelu")


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool, one_layout: sl.LayoutTensor, assert_close: Check) -> None:
    x, bias = operands(one_layout, 5)
    model = Layer(one_layout, bias)
    program = torch.export.export(model, (x,), strict=strict)
    assert not program.constants
    assert_close(program.module()(x), model(x))


def test_explain_and_trace(small: sl.BSRTensor) -> None:
    x, bias = operands(small, 5)
    told = sl.explain(sl.linear, x, small, bias, activation="gelu")
    assert told.kernel == "cpu"
    assert "F.linear(weight=BSRTensor)" in str(told)
    with sl.trace() as steps:
        sl.linear(x, small, bias, activation="gelu")
    assert [(s.what, s.kernel) for s in steps] == [("block_matmul", "cpu")]


def test_a_users_route_of_linear_comes_first(small: sl.BSRTensor) -> None:
    class Own(sl.BSRTensor):
        """Another block layout."""

    w = Own.on_pattern(small.inner_values, small.block_pattern)
    x, bias = operands(small, 5)

    @sl.route(F.linear, weight=Own)
    def own_linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        return torch.full((5, 24), -2.0, dtype=F64)

    found = sl.linear(x, w, bias, activation="relu")
    own_linear.unregister()
    assert torch.equal(found, torch.zeros(5, 24, dtype=F64))
    assert sl.linear(x, w, bias, activation="relu").any()


def test_a_users_kernel_of_products_alone_serves_them(small: sl.BSRTensor) -> None:
    @sl.kernel("block_matmul")
    def ones(values: Tensor, pattern: Any, x: Tensor, *, transposed_output: bool) -> Tensor:
        return torch.ones(1, 1, 5, 24, dtype=F64).mT

    x, _ = operands(small, 5)
    found = sl.linear(x, small)
    ones.unregister()
    assert torch.equal(found, torch.ones(5, 24, dtype=F64))


W32 = sl.bsr(torch.eye(32), 16)
B32 = torch.ones(3, 32)
MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "activation": (
        lambda: sl.linear(B32, W32, activation="tanh"),
        ValueError,
        "expected an activation of relu, gelu, gelu_tanh, silu or None, got 'tanh'",
    ),
    "activation of a dense weight": (
        lambda: sl.linear(B32, torch.eye(32), activation="Relu"),
        ValueError,
        "got 'Relu'",
    ),
    "activation in explain": (
        lambda: sl.explain(sl.linear, B32, W32, activation="tanh"),
        ValueError,
        "got 'tanh'",
    ),
    "bias shape": (
        lambda: sl.linear(B32, W32, torch.ones(31), activation="relu"),
        ValueError,
        r"expected a bias of shape \(32,\), got \(31,\)",
    ),
    "bias of more dimensions": (
        lambda: sl.linear(B32, W32, torch.ones(1, 32)),
        ValueError,
        r"expected a bias of shape \(32,\), got \(1, 32\)",
    ),
    "bias dtype": (
        lambda: F.linear(B32, W32, torch.ones(32, dtype=F64)),
        TypeError,
        "expected a bias of torch.float32, got torch.float64",
    ),
    "bias in explain": (
        lambda: sl.explain(F.linear, B32, W32, torch.ones(31)),
        ValueError,
        "expected a bias of shape",
    ),
    "bias on another device": (
        lambda: F.linear(B32, W32, torch.ones(32, device="meta")),
        ValueError,
        "the bias is on meta, the input on cpu",
    ),
    "input of another length": (
        lambda: sl.linear(torch.ones(3, 33), W32, activation="relu"),
        ValueError,
        "32 and 33 must be equal",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    call, error, text = MISTAKES[name]
    with pytest.raises(error, match=text):
        call()
