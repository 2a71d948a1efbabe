"""Compiled code on every layout: forward, backward and the optimizer's step without a graph break,
batches of any size, and two layouts in one function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_layouts as sl

Check = Callable[..., None]
F64 = torch.float64
RATE = 0.01
# Compiled optimizers count steps in float32: 1 - 0.999 ** step is off by eps of float32 over 0.001,
# and so are two updates, each of which is about the learning rate.
STEP = 2 * RATE * torch.finfo(torch.float32).eps / torch.finfo(F64).eps / (1 - 0.999)

# inductor imports parts of torch that use torch.jit
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    """Nothing compiled before, and dense where a layout has no kernel."""
    torch.compiler.reset()
    with sl.fallback("allow"):
        yield


def loss_of(weight: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(F.linear(x, weight)).square().sum()


def bare_step(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """`optimizer.step()` without the profiler's and the hooks' wrappers, which dynamo breaks at."""
    step = inspect.unwrap(type(optimizer).step)

    def run() -> None:
        with torch.no_grad():
            step(optimizer)

    return run


def train(
    weight: nn.Parameter, optimizer: torch.optim.Optimizer, backend: str | None, steps: int
) -> None:
    """Steps of forward, backward and update; with a backend both halves are one graph each."""
    loss, step = loss_of, bare_step(optimizer)
    if backend is not None:
        loss = torch.compile(loss, fullgraph=True, backend=backend)
        step = torch.compile(step, fullgraph=True, backend=backend)
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(weight, torch.randn(5, weight.shape[-1], dtype=weight.dtype)).backward()
        step()


@pytest.mark.contract("compiled step")
def test_a_training_step(one_layout: sl.LayoutTensor, assert_close: Check) -> None:
    """By inductor, forward, backward and AdamW."""
    compiled, eager = (nn.Parameter(one_layout.clone()) for _ in range(2))
    for weight, backend in ((compiled, "inductor"), (eager, None)):
        optimizer = torch.optim.AdamW([weight], lr=RATE, eps=0.1)
        train(weight, optimizer, backend, 2)
        assert type(weight.grad) is type(one_layout)
        weight.validate()
        assert not torch.equal(weight.detach().to_dense(), one_layout.to_dense())
    assert_close(compiled.detach(), eager.detach(), scale=STEP)


# compiled backward runs on a thread of its own, where the policy is the default
@pytest.mark.filterwarnings("ignore::sparse_layouts.DenseFallbackWarning")
@pytest.mark.gpu
@pytest.mark.contract("compiled step")
def test_a_training_step_on_a_gpu(one_layout: sl.LayoutTensor, assert_close: Check) -> None:
    compiled, eager = (nn.Parameter(one_layout.clone().cuda()) for _ in range(2))
    torch.set_default_device("cuda")
    try:
        for weight, backend in ((compiled, "inductor"), (eager, None)):
            train(weight, torch.optim.AdamW([weight], lr=RATE, eps=0.1), backend, 2)
    finally:
        torch.set_default_device(None)
    compiled.validate()
    assert_close(compiled.detach(), eager.detach(), scale=STEP)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop", "Adagrad", "Adadelta", "NAdam"])
def test_compiled_optimizers(
    name: str, foreach: bool, small: sl.BSRTensor, assert_close: Check
) -> None:
    compiled, eager = (nn.Parameter(small.clone()) for _ in range(2))
    for weight, backend in ((compiled, "aot_eager"), (eager, None)):
        optimizer = (
            getattr(torch.optim, name)([weight], lr=RATE, eps=0.1, foreach=foreach)
            if (name != "SGD")
            else torch.optim.SGD([weight], lr=RATE, momentum=0.9, foreach=foreach)
        )
        train(weight, optimizer, backend, 2)
    assert_close(compiled.detach(), eager.detach(), scale=STEP)


@pytest.mark.contract("compiled step")
def test_gradients(one_layout: sl.LayoutTensor, assert_close: Check) -> None:
    x = torch.randn(5, one_layout.shape[-1], dtype=F64, requires_grad=True)
    leaf = one_layout.requires_grad_()
    expected = torch.autograd.grad(loss_of(leaf, x), [leaf, x])
    torch.compile(loss_of, fullgraph=True, backend="aot_eager")(leaf, x).backward()
    assert type(leaf.grad) is type(one_layout)
    assert_close(leaf.grad, expected[0])
    assert_close(x.grad, expected[1])


def test_compiled_gradients_are_of_the_same_pattern_by_memory(
    small: sl.BSRTensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled code hands index tensors back as other objects: comparing contents would be a host
    sync at every optimizer step.
    """
    leaf = small.requires_grad_()
    x = torch.randn(5, 40, dtype=F64)
    torch.compile(loss_of, fullgraph=True, backend="aot_eager")(leaf, x).backward()
    monkeypatch.setattr(torch, "equal", lambda *_: pytest.fail("contents were compared"))
    assert leaf.grad.same_pattern(leaf)


@pytest.mark.contract("dynamic batch")
def test_batches_of_any_size(one_layout: sl.LayoutTensor, assert_close: Check) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_of, fullgraph=True, backend=counter)
    leaf = one_layout.requires_grad_()
    for rows in (3, 4, 7, 16, 33, 5):
        x = torch.randn(rows, leaf.shape[-1], dtype=F64)
        leaf.grad = None
        out = compiled(leaf, x)
        out.backward()
        (grad,) = torch.autograd.grad(loss_of(leaf, x), [leaf])
        assert_close(out, loss_of(leaf, x))
        assert_close(leaf.grad, grad)
    assert counter.frame_count <= 2  # one size, then any


# --- two layouts in one function ------------------------------------------------------------------

TWO: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda w, v: w + v,
    "mul": lambda w, v: w * v,
    "add_": lambda w, v: w.clone().add_(v),
}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TWO)
def test_two_layouts_of_one_pattern(name: str, backend: str, small: sl.BSRTensor) -> None:
    compiled = torch.compile(TWO[name], fullgraph=True, backend=backend)
    copied = sl.bsr(small.to_dense(), (4, 8))  # equal lists, of its own
    for other in (small * 2, copied):
        found = compiled(small, other)
        assert type(found) is sl.BSRTensor
        assert torch.equal(found.to_dense(), TWO[name](small, other).to_dense())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_two_patterns_of_equal_sizes_are_told_apart(backend: str) -> None:
    """Compiled code cannot compare lists while it is traced: it does when it runs."""
    first, second = torch.zeros(2, 6, 5, dtype=torch.bool).unbind(0)
    first[0], second[3] = True, True
    w, v = (torch.ones(24, 40).sparse_mask(sl.bsr_mask(m, (4, 8))) for m in (first, second))
    compiled = torch.compile(TWO["add"], fullgraph=True, backend=backend)
    assert torch.equal(compiled(w, w * 2).to_dense(), w.to_dense() * 3)
    with pytest.raises(ValueError, match=r"layouts of one pattern, and these are not"):
        compiled(w, v)


def test_a_dense_source_of_a_copy_says_what_to_do(small: sl.BSRTensor) -> None:
    compiled = torch.compile(lambda w, x: w.copy_(x), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"w\.copy_\(x\.sparse_mask\(w\)\)"):
        compiled(small, small.to_dense())


def test_compiled_code_on_disk_is_of_this_library(small: sl.BSRTensor) -> None:
    """torch's cache of compiled code must not outlive a change of this library's."""
    from sparse_layouts.layout_tensor import library_stamp

    assert library_stamp() in small._stable_hash_for_caching()
    assert len(library_stamp()) == 64


# --- export ---------------------------------------------------------------------------------------


class Product(nn.Module):
    """tanh(x @ weight.mT)"""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.weight))


@pytest.mark.contract("export")
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool, one_layout: sl.LayoutTensor, assert_close: Check) -> None:
    model = Product(one_layout)
    few, many = (torch.randn(rows, one_layout.shape[-1], dtype=F64) for rows in (5, 9))
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(model, (few,), strict=strict, dynamic_shapes=({0: rows},))
    assert type(program.state_dict["weight"]) is type(one_layout)
    assert not program.constants
    run = program.module()
    for x in (few, many):
        found = run(x)
        assert type(found) is Tensor
        assert_close(found, model(x))
    twice = torch.tanh(F.linear(few, one_layout.to_dense() * 2))
    with torch.no_grad():  # the program reads the weight, it has not kept its values
        run.weight.mul_(2.0)
    assert_close(run(few), twice)


class Attention(nn.Module):
    """SDPA under a mask that is a buffer."""

    def __init__(self, mask: Any) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=self.mask)


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_attention(strict: bool, assert_close: Check) -> None:
    mask = sl.local_stride(32, block_size=8, local_blocks=1, vert_stride=2, num_heads=2)
    model, q = Attention(mask), torch.randn(1, 2, 32, 4)
    batch = torch.export.Dim("batch", min=1, max=8)
    example = (q.expand(2, -1, -1, -1),)
    program = torch.export.export(model, example, strict=strict, dynamic_shapes=({0: batch},))
    assert any("block_attention" in str(node.target) for node in program.graph.nodes)
    more = torch.randn(3, 2, 32, 4)
    assert_close(program.module()(more), model(more))
