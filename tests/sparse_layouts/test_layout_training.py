"""Training a layout: optimizers, clipping, autocast, checkpoints, transforms, compiled code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparse_layouts as sl

Check = Callable[..., None]
F64 = torch.float64

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "Nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "AMSGrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}
FORMS: dict[str, dict[str, bool]] = {
    "plain": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def quadratic(weight: Tensor) -> Tensor:
    """A loss whose gradient is the same on stored entries for a layout and its dense form."""
    return (weight * weight / 2 + weight * 3).sum()


def trained(weight: nn.Parameter, name: str, form: str) -> Tensor:
    make, options = OPTIMIZERS[name]
    # a dense parameter beside it: foreach and fused forms get a mixed list
    beside = nn.Parameter(torch.ones(3, dtype=F64))
    optimizer = make([weight, beside], **options, **FORMS[form])
    for _ in range(10):
        optimizer.zero_grad()
        (quadratic(weight) + quadratic(beside)).backward()
        optimizer.step()
    return beside


def forms() -> list[object]:
    return [(name, form) for name in OPTIMIZERS for form in FORMS]


@pytest.mark.parametrize(("name", "form"), forms())
def test_ten_steps(name: str, form: str, small: sl.BSRTensor, assert_close: Check) -> None:
    check_ten_steps(name, form, small, assert_close)


@pytest.mark.contract("optimizers")
@pytest.mark.parametrize(
    ("name", "form"), [("SGD", "plain"), ("Adam", "foreach"), ("AdamW", "fused")]
)
def test_ten_steps_of_every_layout(
    name: str, form: str, layout: sl.LayoutTensor, assert_close: Check
) -> None:
    check_ten_steps(name, form, layout, assert_close)


def check_ten_steps(name: str, form: str, layout: sl.LayoutTensor, assert_close: Check) -> None:
    stored = torch.ones(layout.shape, dtype=F64).sparse_mask(layout).to_dense()
    # contiguous: torch's fused kernels take no dense parameter that is a cut of a larger one
    dense = nn.Parameter(layout.to_dense().contiguous())
    sparse = nn.Parameter(layout.clone())
    hook = dense.register_hook(lambda grad: grad * stored)
    with sl.fallback("error"):
        beside = trained(sparse, name, form)
    trained(dense, name, form)
    hook.remove()
    assert isinstance(sparse, nn.Parameter)
    assert sparse.same_pattern(layout)
    sparse.validate()
    scale = max(dense.norm().item(), layout.to_dense().norm().item()) * 10  # ten steps round
    assert_close(sparse.detach(), dense.detach(), scale=scale)
    assert beside.isfinite().all()
    if layout.nnz:
        assert not torch.equal(sparse.detach().to_dense(), layout.to_dense())


def test_a_scheduler_and_a_closure(small: sl.BSRTensor) -> None:
    weight = nn.Parameter(small)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight * weight).sum()
        loss.backward()
        return loss

    losses = []
    for _ in range(3):
        losses.append(optimizer.step(closure).item())
        schedule.step()
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("order", [2.0, float("inf")])
def test_clip_grad_norm(
    order: float, foreach: bool, small: sl.BSRTensor, assert_close: Check
) -> None:
    dense, sparse = nn.Parameter(small.to_dense()), nn.Parameter(small)
    beside = [nn.Parameter(torch.ones(3, dtype=F64)) for _ in range(2)]
    for weight, other in zip((dense, sparse), beside, strict=True):
        (weight * weight).sum().backward()
        other.grad = torch.full((3,), 2.0, dtype=F64)
    norms = [
        nn.utils.clip_grad_norm_([weight, other], 1.0, norm_type=order, foreach=foreach)
        for weight, other in zip((dense, sparse), beside, strict=True)
    ]
    assert_close(norms[1], norms[0])
    assert_close(sparse.grad, dense.grad)
    assert_close(beside[1].grad, beside[0].grad)


def test_clip_grad_value(small: sl.BSRTensor) -> None:
    weight = nn.Parameter(small)
    (weight * weight).sum().backward()
    nn.utils.clip_grad_value_([weight], 0.5)
    assert weight.grad.to_dense().abs().max() == 0.5
    weight.grad.validate()


@pytest.mark.contract("accumulation")
def test_gradients_accumulate(layout: sl.LayoutTensor, assert_close: Check) -> None:
    layout.requires_grad_()
    quadratic(layout).backward()
    first = layout.grad.clone()
    quadratic(layout).backward()
    assert type(layout.grad) is type(layout)
    assert_close(layout.grad, first * 2)
    # and where one tensor is used twice in one graph
    layout.grad = None
    (quadratic(layout) + quadratic(layout)).backward()
    assert_close(layout.grad, first * 2)


def test_gradients_of_a_product_and_of_arithmetic_add_up(
    small: sl.BSRTensor, assert_close: Check
) -> None:
    x = torch.randn(40, 3, dtype=F64)
    dense = small.to_dense().requires_grad_()
    ((dense @ x).sum() + (dense * 2).sum()).backward()
    leaf = small.requires_grad_()
    with sl.fallback("error"):
        ((leaf @ x).sum() + (leaf * 2).sum()).backward()
    assert_close(leaf.grad, dense.grad.sparse_mask(small.detach()))


def test_a_dense_gradient_is_taken_by_its_stored_entries(small: sl.BSRTensor) -> None:
    leaf = small.requires_grad_()
    leaf.to_dense().backward(torch.ones(24, 40, dtype=F64))
    assert type(leaf.grad) is sl.BSRTensor
    assert torch.equal(leaf.grad.to_dense(), small.pattern.to_dense().double())


def test_hooks_and_retain_grad(small: sl.BSRTensor) -> None:
    seen = []
    leaf = small.requires_grad_()
    leaf.register_post_accumulate_grad_hook(lambda w: seen.append(type(w.grad)))
    middle = leaf * 2
    middle.retain_grad()
    middle.register_hook(lambda grad: grad * 3)
    middle.sum().backward()
    assert seen == [sl.BSRTensor]
    assert middle.grad.to_dense().max() == 3
    assert leaf.grad.to_dense().max() == 6


def test_autograd_grad(small: sl.BSRTensor) -> None:
    x = torch.randn(40, 3, dtype=F64, requires_grad=True)
    leaf = small.requires_grad_()
    with sl.fallback("error"):
        for_layout, for_x = torch.autograd.grad((leaf @ x).square().sum(), [leaf, x])
    assert type(for_layout) is sl.BSRTensor
    assert for_layout.same_pattern(leaf)
    assert for_x.shape == x.shape
    assert leaf.grad is None


# --- autocast, checkpoint, functional calls -------------------------------------------------------


def test_autocast(small: sl.BSRTensor) -> None:
    layer = nn.Linear(40, 24)
    layer.weight = nn.Parameter(small.float())
    x = torch.randn(5, 40)
    with torch.autocast("cpu", torch.bfloat16), sl.fallback("error"):
        out = layer(x)
        product = layer.weight @ x.mT
    assert out.dtype == product.dtype == torch.bfloat16
    exact = x.double() @ small.mT.to_dense() + layer.bias.double()
    of_dense = x.bfloat16() @ small.to_dense().bfloat16().mT + layer.bias.bfloat16()
    allowed = (
        2 * (of_dense - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    )
    assert (out - exact).abs().max() <= allowed
    out.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert type(layer.weight.grad) is sl.BSRTensor


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool, small: sl.BSRTensor) -> None:
    x = torch.randn(40, 3, dtype=F64, requires_grad=True)
    leaf = small.requires_grad_()

    def run(x: Tensor) -> Tensor:
        return torch.tanh(leaf @ x)

    run(x).sum().backward()
    expected, leaf.grad, x.grad = (leaf.grad, x.grad), None, None
    checkpoint(run, x, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(leaf.grad.to_dense(), expected[0].to_dense())
    assert torch.equal(x.grad, expected[1])


def test_functional_call(small: sl.BSRTensor) -> None:
    layer = nn.Linear(40, 24, bias=False, dtype=F64)
    x = torch.randn(5, 40, dtype=F64)
    leaf = small.requires_grad_()
    with sl.fallback("error"):
        out = torch.func.functional_call(layer, {"weight": leaf}, (x,))
        out.sum().backward()
    assert torch.equal(out, torch.nn.functional.linear(x, leaf))
    assert type(leaf.grad) is sl.BSRTensor


def test_func_grad_of_dense_operands(small: sl.BSRTensor, assert_close: Check) -> None:
    x = torch.randn(40, 3, dtype=F64)
    with sl.fallback("error"):
        grad = torch.func.grad(lambda x: (small @ x).square().sum())(x)
    dense = torch.func.grad(lambda x: (small.to_dense() @ x).square().sum())(x)
    assert_close(grad, dense)


@pytest.mark.parametrize(
    "function", [lambda w: (w @ torch.ones(40, 2, dtype=F64)).sum(), lambda w: torch.exp(w).sum()]
)
def test_func_grad_of_a_layout_raises(
    function: Callable[[Tensor], Tensor], small: sl.BSRTensor
) -> None:
    with (
        sl.fallback("allow"),
        pytest.raises(
            NotImplementedError, match=r"torch\.func.*differentiate with respect to dense"
        ),
    ):
        torch.func.grad(function)(small)


# --- compiled code --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def step(w: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(torch.nn.functional.linear(x, w)).square().sum()


def attend(q: Tensor, mask: sl.BSRTensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)


# inductor imports parts of torch that use torch.jit
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compile(backend: str, small: sl.BSRTensor, assert_close: Check) -> None:
    x = torch.randn(5, 40, dtype=F64, requires_grad=True)
    leaf = small.requires_grad_()
    step(leaf, x).backward()
    expected, leaf.grad, x.grad = (leaf.grad, x.grad), None, None
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    out = compiled(leaf, x)
    out.backward()
    assert_close(out, step(leaf, x))
    assert type(leaf.grad) is sl.BSRTensor
    assert_close(leaf.grad, expected[0])
    assert_close(x.grad, expected[1])


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: w @ x,
        lambda w, x: (x.mT @ w.mT).mT,
        lambda w, x: torch.softmax(w * 2, -1) @ x,
        lambda w, x: (w + w) @ x - w.sum(),
    ],
    ids=["matmul", "mT", "softmax", "arithmetic"],
)
def test_compile_functions(
    function: Callable[[Tensor, Tensor], Tensor], small: sl.BSRTensor, assert_close: Check
) -> None:
    x = torch.randn(40, 3, dtype=F64, requires_grad=True)
    leaf = small.requires_grad_()
    expected = function(leaf, x)
    grads = torch.autograd.grad(expected.sum(), [leaf, x])
    out = torch.compile(function, fullgraph=True, backend="aot_eager")(leaf, x)
    assert_close(out, expected, scale=max(1.0, expected.norm().item()))
    out.sum().backward()
    assert_close(leaf.grad, grads[0], scale=max(1.0, grads[0].norm().item()))
    assert_close(x.grad, grads[1], scale=max(1.0, grads[1].norm().item()))


def test_compile_of_attention(assert_close: Check) -> None:
    mask = sl.local_stride(32, block_size=8, local_blocks=1, vert_stride=2, num_heads=2)
    q = torch.randn(1, 2, 32, 4, dtype=F64, requires_grad=True)
    expected = attend(q, mask)
    (grad,) = torch.autograd.grad(expected.square().sum(), q)
    out = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, mask)
    assert_close(out, expected)
    out.square().sum().backward()
    assert_close(q.grad, grad)


def test_compile_densifies_what_has_no_kernel(small: sl.BSRTensor) -> None:
    compiled = torch.compile(lambda w: w + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(small), small.to_dense() + 1)


def test_compiled_code_does_not_mix_up_layouts(small: sl.BSRTensor) -> None:
    x = torch.ones(40, 2, dtype=F64)
    compiled = torch.compile(lambda w, x: w @ x, fullgraph=True, backend="aot_eager")
    for w in (small, sl.bsr(small.to_dense() * 2, (8, 8)), small.clone(), small.mT.mT):
        assert torch.equal(compiled(w, x), w @ x)
