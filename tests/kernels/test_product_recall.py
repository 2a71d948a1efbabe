"""Products called again give what they gave, and nothing that should change their way is missed.

A call under `sl.kernel_choice` takes the usual way, and the same kernels: equal bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sparse_layouts as sl
from sparse_layouts.kernels.block_matmul.recall import Settled
from sparse_layouts.kernels.recalling import MOST
from tests.kernels.test_public_calls import host_syncs_raise
from tests.kernels.test_recall import on_hopper

Product = Callable[[Any, Tensor], Tensor]


@contextlib.contextmanager
def precision(of_float32: str) -> Iterator[None]:
    """How torch's own products read float32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = of_float32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def linear(w: Any, x: Tensor) -> Tensor:
    return F.linear(x, w)


def from_the_left(w: Any, x: Tensor) -> Tensor:
    return w @ x


def from_the_right(w: Any, x: Tensor) -> Tensor:
    return x @ w


# x (512, 512) whichever way it is multiplied
PRODUCTS: list[Product] = [linear, from_the_left, from_the_right]
products = pytest.mark.parametrize("call", PRODUCTS)


def weight(device: str, block: int = 64, grad: bool = False) -> sl.BSRTensor:
    """512 x 512, a third of the blocks stored."""
    dense = torch.randn(512, 512, device=device, dtype=torch.bfloat16)
    return sl.bsr(dense, block, keep=sl.Random(0.34)).detach().requires_grad_(grad)


def dense(device: str, *shape: int, grad: bool = False) -> Tensor:
    x = torch.randn(*(shape or (512, 512)), device=device, dtype=torch.bfloat16)
    return x.requires_grad_(grad)


def usual(call: Product, w: Any, x: Tensor) -> Tensor:
    """The result by the usual way, with the same kernel."""
    with sl.kernel_choice(block_matmul="hopper"):
        return call(w, x)


def leaves_of(device: str) -> tuple[sl.BSRTensor, Tensor]:
    return weight(device, grad=True), dense(device, grad=True)


@on_hopper
@products
@pytest.mark.parametrize("block", [64, 128])
def test_recalled_products_give_the_same_bits(call: Product, block: int, device: str) -> None:
    w = weight(device, block)
    for _ in range(3):
        x = dense(device)
        out = call(w, x)
        assert torch.equal(out, usual(call, w, x))
        assert out.is_contiguous()
    assert len(w._recalled or {}) == 1


@on_hopper
@pytest.mark.parametrize("call", [linear, from_the_right])
def test_recalled_products_of_batches(call: Product, device: str) -> None:
    w = weight(device)
    for _ in range(2):
        x = dense(device, 3, 200, 512, grad=True)
        out, expected = call(w, x), usual(call, w, x)
        assert torch.equal(out, expected)
        dout = torch.randn_like(out)
        mine, its = (torch.autograd.grad(y, x, dout)[0] for y in (out, expected))
        assert torch.equal(mine, its)


@on_hopper
@products
def test_recalled_gradients_are_the_same_bits(call: Product, device: str) -> None:
    w, x = leaves_of(device)
    for _ in range(3):
        out, expected = call(w, x), usual(call, w, x)
        dout = torch.randn_like(out)
        mine = torch.autograd.grad(out, (w, x), dout)
        its = torch.autograd.grad(expected, (w, x), dout)
        assert isinstance(mine[0], sl.BSRTensor)
        assert torch.equal(mine[0].values(), its[0].values())
        assert torch.equal(mine[1], its[1])


@on_hopper
@pytest.mark.parametrize(
    ("tokens", "kernel"),
    [
        (1, "triton_few_columns"),
        (7, "triton_few_columns"),
        (16, "triton_few_columns"),
        (40, "hopper_few_columns"),
        (64, "hopper_few_columns"),
        (512, "hopper"),
    ],
)
def test_recalled_linear_layers_with_a_bias(tokens: int, kernel: str, device: str) -> None:
    w = weight(device, grad=True)
    bias = torch.nn.Parameter(dense(device, 512).detach())
    for _ in range(3):
        x = dense(device, tokens, 512, grad=True)
        out = F.linear(x, w, bias)
        with sl.kernel_choice(block_matmul=kernel):
            expected = F.linear(x, w, bias)
        assert torch.equal(out, expected)
        dout = torch.randn_like(out)
        mine = torch.autograd.grad(out, (w, x, bias), dout)
        its = torch.autograd.grad(expected, (w, x, bias), dout)
        assert torch.equal(mine[2], its[2])
        for a, b in ((mine[0].to_dense(), its[0].to_dense()), (mine[1], its[1])):
            assert (a - b).norm() <= torch.finfo(x.dtype).eps * b.norm()
    assert len(w._recalled or {}) == 1
    with pytest.raises(ValueError, match="bias"):
        F.linear(x, w, bias[:256])
    with pytest.raises(TypeError, match="bias"):
        F.linear(x, w, bias.float())


@on_hopper
def test_recalled_samples_give_the_same_bits(device: str) -> None:
    mask = weight(device).pattern
    for _ in range(3):
        a, b = dense(device), dense(device)
        with sl.kernel_choice(sddmm="hopper"):
            expected = sl.sddmm(a, b.mT, mask)
        assert torch.equal(sl.sddmm(a, b.mT, mask).values(), expected.values())
    assert len(mask._recalled or {}) == 1
    leaf = dense(device, grad=True)
    (sl.sddmm(leaf, b.mT, mask).values()).sum().backward()
    assert leaf.grad is not None
    with pytest.raises(ValueError, match="sddmm"):
        sl.sddmm(a[:256], b.mT, mask)


@on_hopper
@products
def test_a_gradient_with_other_strides(call: Product, device: str) -> None:
    w, x = leaves_of(device)
    call(w, x).backward(torch.ones(512, 512, device=device, dtype=x.dtype))
    for dout in (torch.randn_like(x).mT, torch.ones((), device=device, dtype=x.dtype)):
        mine = torch.autograd.grad(call(w, x), (w, x), dout.expand(512, 512))
        plain, exact = w.detach().to_dense().double(), x.detach().double()
        leaves = plain.requires_grad_(), exact.requires_grad_()
        its = torch.autograd.grad(call(*leaves), leaves, dout.expand(512, 512).double())
        stored = its[0] * w.pattern.to_dense()
        for a, b in ((mine[0].to_dense(), stored), (mine[1], its[1])):
            assert (a.double() - b).norm() <= torch.finfo(x.dtype).eps * b.norm()


@on_hopper
@products
@pytest.mark.parametrize("frozen", ["layout", "dense"])
def test_one_gradient_alone(call: Product, frozen: str, device: str) -> None:
    w, x = weight(device, grad=frozen == "dense"), dense(device, grad=frozen == "layout")
    leaf = x if frozen == "layout" else w
    dout = dense(device)
    mine, its = (torch.autograd.grad(y, leaf, dout)[0] for y in (call(w, x), usual(call, w, x)))
    if frozen == "dense":
        mine, its = mine.values(), its.values()
    assert torch.equal(mine, its)


@on_hopper
@products
def test_gradients_of_gradients(call: Product, device: str) -> None:
    w, x = leaves_of(device)
    found = []
    for way in (call, lambda w, x: usual(call, w, x)):
        dx = torch.autograd.grad(way(w, x).square().sum(), x, create_graph=True)[0]
        found.append(torch.autograd.grad(dx.square().sum(), x)[0])
    assert torch.equal(*found)


@on_hopper
def test_training_steps_are_the_same_bits(device: str) -> None:
    torch.manual_seed(0)
    w, x, goal = weight(device), dense(device), dense(device)
    ended = []
    for choice in ({}, {"block_matmul": "hopper"}):
        layer = torch.nn.Linear(512, 512, bias=False, device=device, dtype=x.dtype)
        layer.weight = torch.nn.Parameter(w.clone())
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
        with sl.kernel_choice(**choice):
            for _ in range(4):
                optimizer.zero_grad()
                (layer(x) - goal).square().mean().backward()
                optimizer.step()
        ended.append(layer.weight.detach().values())
    assert torch.equal(*ended)
    assert not torch.equal(ended[0], w.values())


@on_hopper
def test_writing_between_the_passes_is_noticed(device: str) -> None:
    w, x = leaves_of(device)
    F.linear(x, w)
    out = F.linear(x, w)
    with torch.no_grad():
        w.values().mul_(2)
    with pytest.raises(RuntimeError, match="written to"):
        out.sum().backward()


@on_hopper
def test_what_lies_otherwise_takes_the_usual_way(device: str) -> None:
    w, x = weight(device), dense(device)
    F.linear(x, w)
    for other in (x.mT, x[:, ::2].repeat(1, 2)[:, :512], x[::2], x[0], x[:0]):
        out = F.linear(other, w)
        expected = other.double() @ w.to_dense().double().mT
        error = (out.double() - expected).norm()
        assert error <= torch.finfo(x.dtype).eps * expected.norm()
    with pytest.raises(ValueError, match="do not fit"):
        F.linear(x[:, :256], w)
    with pytest.raises(TypeError, match="expected one dtype"):
        F.linear(x.float(), w)


@on_hopper
def test_settings_tables_and_autocast_are_heeded(device: str) -> None:
    w, x = weight(device), dense(device)
    F.linear(x, w)
    with sl.trace() as steps:
        F.linear(x, w)
    assert [step.kernel for step in steps] == ["hopper"]
    with sl.kernel_choice(block_matmul="triton"), sl.trace() as steps:
        F.linear(x, w)
    assert [step.kernel for step in steps] == ["triton"]
    with torch.autocast("cuda", dtype=torch.float16):
        assert F.linear(x, w).dtype == torch.float16

    @sl.kernel("block_matmul", requires=lambda facts: None)
    def nothing(values: Tensor, pattern: Any, x: Tensor, **options: Any) -> Tensor:
        return x.new_zeros(1, 1, 512, 512)

    with sl.kernel_choice(block_matmul="nothing"):
        assert not F.linear(x, w).any()
    nothing.unregister()
    assert F.linear(x, w).any()

    class Mine(sl.BSRTensor):
        pass

    @sl.route(F.linear, weight=Mine)
    def mine(input: Tensor, weight: Any, bias: Tensor | None = None) -> str:
        return "mine"

    own = Mine.on_pattern(w.values(), w.block_pattern)
    assert F.linear(x, own) == "mine"
    mine.unregister()
    assert torch.equal(F.linear(x, own), F.linear(x, w))


@on_hopper
@products
@pytest.mark.parametrize("columns", [16, 64, 512])
def test_recalled_products_in_a_graph(call: Product, columns: int, device: str) -> None:
    w, x = weight(device), dense(device)
    if columns < 512:
        x = x[:columns].contiguous() if call is not from_the_left else x[:, :columns].contiguous()
    expected = call(w, x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(w, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(w, x)
    for _ in range(2):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)


@on_hopper
def test_no_host_sync_and_no_end_of_memory(device: str) -> None:
    w, x = leaves_of(device)
    dout = dense(device)
    for _ in range(3):
        F.linear(x, w).backward(dout)
    with host_syncs_raise():
        F.linear(x, w).backward(dout)
    for tokens in range(8, 8 * (MOST + 10), 8):
        F.linear(dense(device, 256 + tokens, 512), w)
    assert len(w._recalled or {}) <= MOST


@on_hopper
@products
def test_what_hooks_put_in_the_place_of_x(call: Product, device: str) -> None:
    w, x = leaves_of(device)
    dout = dense(device)
    for _ in range(3):
        expected = torch.autograd.grad(call(w, x), w, dout)[0]

    def elsewhere(saved: Any) -> Any:
        return saved if isinstance(saved, sl.LayoutTensor) else saved.mT.contiguous().mT

    for other in (elsewhere, lambda saved: saved):
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, other):
            found = torch.autograd.grad(call(w, x), w, dout)[0]
        error = (found.values().double() - expected.values().double()).norm()
        assert error <= torch.finfo(x.dtype).eps * expected.values().double().norm()


@on_hopper
@products
def test_a_layout_that_is_swapped_between_the_passes(call: Product, device: str) -> None:
    w, x = leaves_of(device)
    dout = dense(device)
    for _ in range(3):
        call(w, x).backward(dout)
    other = sl.bsr(dense(device), 64, keep=sl.Random(0.1))
    out = call(w, x)
    w.data = other
    dx = torch.autograd.grad(out, x, dout)[0]
    plain = other.to_dense().double()
    exact = dout.double() @ plain.mT if call is from_the_right else dout.double() @ plain
    if call is from_the_left:
        exact = plain.mT @ dout.double()
    assert (dx.double() - exact).norm() <= torch.finfo(x.dtype).eps * exact.norm()


# x @ w has no such promise: the usual way is a product with the transpose, which saves more
@on_hopper
@pytest.mark.parametrize("call", [linear, from_the_left])
def test_checkpoints_recompute_a_recalled_call(call: Product, device: str) -> None:
    w = weight(device, grad=True)
    for columns in (512, 200):
        x = dense(device, columns, 512, grad=True)
        if call is from_the_left:
            x = dense(device, 512, columns, grad=True)
        for _ in range(3):
            call(w, x)
        with sl.trace():  # takes the usual way
            out = checkpoint(lambda x, w=w: call(w, x).relu(), x, use_reentrant=False)
        out.sum().backward()
        assert x.grad is not None


@on_hopper
def test_how_float32_is_read_is_heeded(device: str) -> None:
    w = sl.bsr(torch.randn(512, 512, device=device), 64)
    x = torch.randn(16, 512, device=device)
    with precision("ieee"):
        exact = F.linear(x, w)
        assert all(torch.equal(F.linear(x, w), exact) for _ in range(2))
    with precision("tf32"):
        rounded = F.linear(x, w)
        assert all(torch.equal(F.linear(x, w), rounded) for _ in range(2))
    with precision("ieee"):
        again = F.linear(x, w)
    assert torch.equal(exact, again)
    assert not torch.equal(exact, rounded)


@on_hopper
@products
def test_the_first_call_in_a_graph_settles_nothing(call: Product, device: str) -> None:
    call(weight(device), dense(device))  # compiles
    torch.cuda.synchronize()
    w, x = weight(device), dense(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(w, x)
    assert not w._recalled
    eager = call(w, x)
    graph.replay()
    assert torch.equal(out, eager)
    assert torch.equal(eager, usual(call, w, x))


@on_hopper
def test_layouts_made_for_one_product_settle_nothing(device: str) -> None:
    w, x = weight(device), dense(device)
    before = w.mT
    for flipped in (before, w.mT, w.mT):
        flipped @ x
    assert len(before._recalled or {}) == 1
    assert not any(isinstance(v, Settled) for v in (before._recalled or {}).values())


@on_hopper
@pytest.mark.parametrize("tokens", [1000, 1001])
def test_explain_and_trace_name_the_kernels_of_a_plain_call(tokens: int, device: str) -> None:
    w = sl.bsr(dense(device), 64, keep=sl.Random(0.6)).requires_grad_()  # copies pay from 0.5 on
    y = dense(device, tokens, 512, grad=True)
    for function, args in ((F.linear, (y, w)), (torch.matmul, (w, y.mT)), (torch.matmul, (y, w))):
        told = {
            (plan.op, verdict.kernel.name)
            for plan in sl.explain(function, *args).ops
            for verdict in plan.verdicts
            if verdict.chosen
        }
        with sl.trace() as steps:
            out = function(*args)
            out.backward(torch.randn_like(out))
        assert {(step.what, step.kernel) for step in steps} == told


@pytest.mark.parametrize("which", ["bias", "input"])
def test_torch_func_differentiates_a_linear_layer(which: str) -> None:
    w = sl.bsr(torch.eye(64), 16)
    x, bias = torch.randn(8, 64), torch.randn(64)
    if which == "bias":
        found = torch.func.grad(lambda b: F.linear(x, w, b).sum())(bias)
        assert torch.equal(found, torch.full((64,), 8.0))
    else:
        found = torch.func.grad(lambda y: F.linear(y, w, bias).sum())(x)
        assert torch.equal(found, torch.ones(8, 64))


def test_nothing_is_recalled_on_the_cpu() -> None:
    w, x = weight("cpu"), dense("cpu")
    F.linear(x, w)
    assert w._recalled is None
