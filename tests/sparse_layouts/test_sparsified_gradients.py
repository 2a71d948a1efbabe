"""`sl.sparsified`: the layouts of gradients, and where they go on to."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_layouts as sl
from tests.sparse_layouts.sparsified_forms import F64, blocks, largest, largest_blocks, pattern_of
from tests.sparse_layouts.user_csc import CscTensor

Check = Callable[..., None]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(24, 40, dtype=F64, requires_grad=True)


@pytest.fixture
def y() -> Tensor:
    return torch.randn(24, 40, dtype=F64, requires_grad=True)


# --- gradients ------------------------------------------------------------------------------------

CALLS: dict[str, Callable[..., tuple[Callable[..., Tensor], list[Tensor], dict[str, object]]]] = {
    "mm": lambda: (torch.mm, [(24, 16), (16, 40)], {}),
    "matmul": lambda: (torch.matmul, [(24, 16), (16, 40)], {}),
    "Tensor.matmul": lambda: (Tensor.matmul, [(24, 16), (16, 40)], {}),
    "bmm": lambda: (torch.bmm, [(2, 24, 16), (2, 16, 40)], {}),
    "linear": lambda: (F.linear, [(24, 16), (40, 16)], {}),
    "linear with bias": lambda: (F.linear, [(24, 16), (40, 16), (40,)], {}),
    "add": lambda: (torch.add, [(24, 40), (24, 40)], {}),
    "add scaled": lambda: (torch.add, [(24, 40), (24, 40)], {"alpha": 3}),
    "sub": lambda: (torch.sub, [(24, 40), (24, 40)], {}),
    "sub scaled": lambda: (torch.sub, [(24, 40), (24, 40)], {"alpha": 3}),
    "neg": lambda: (torch.neg, [(24, 40)], {}),
    "positive": lambda: (torch.positive, [(24, 40)], {}),
}
OTHERS = {
    "mul": lambda: (torch.mul, [(24, 40), (24, 40)], {}),
    "broadcast add": lambda: (torch.add, [(24, 40), (40,)], {}),
    "broadcast matmul": lambda: (torch.matmul, [(2, 24, 16), (16, 40)], {}),
    "vector": lambda: (lambda a, b: torch.matmul(a, b)[None].expand(8, 24), [(24, 16), (16,)], {}),
    "linear batch": lambda: (F.linear, [(2, 24, 16), (40, 16)], {}),
    "relu": lambda: (F.relu, [(24, 40)], {}),
}


def gradients(
    call: Callable[..., Tensor], operands: list[Tensor], seed: Tensor, options: dict[str, object]
) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in operands]
    call(*leaves, **options).backward(seed)
    return [t.grad for t in leaves]


@pytest.mark.parametrize("name", [*CALLS, *OTHERS])
def test_gradients_take_their_form(name: str, assert_close: Check) -> None:
    function, shapes, options = {**CALLS, **OTHERS}[name]()
    operands = [torch.randn(shape, dtype=F64) for shape in shapes]
    seed = torch.randn_like(function(*operands, **options))
    expected = gradients(function, operands, largest_blocks(seed, 0.25), options)
    call = sl.sparsified(function, grad=(sl.Magnitude(0.25), blocks))
    with sl.fallback("error" if name in CALLS else "allow"), sl.trace() as steps:
        found = gradients(call, operands, seed, options)
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, wanted)
    taken = {"mm", "matmul", "bmm", "linear"} & {name.split()[0].split(".")[-1]}
    if name in CALLS:  # products by the layout's kernel; the others are passed on
        assert {s.kernel for s in steps} == ({"cpu"} if taken else set())
        assert all((type(g) is sl.BSRTensor) == (not taken) for g in found)
    else:
        assert [s.kernel for s in steps][-1:] == ["dense fallback"]
        assert all(type(g) is Tensor for g in found)


@pytest.mark.parametrize("name", [*CALLS, *OTHERS])
def test_gradients_chosen_and_dense(name: str, assert_close: Check) -> None:
    function, shapes, options = {**CALLS, **OTHERS}[name]()
    operands = [torch.randn(shape, dtype=F64) for shape in shapes]
    seed = torch.randn_like(function(*operands, **options))
    expected = gradients(function, operands, largest(seed, 0.25), options)
    call = sl.sparsified(function, grad=(sl.Magnitude(0.25), None))
    with sl.fallback("error"), sl.trace() as steps:
        found = gradients(call, operands, seed, options)
    assert not len(steps)
    for actual, wanted in zip(found, expected, strict=True):
        assert type(actual) is Tensor
        assert_close(actual, wanted)


@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_gradients(name: str) -> None:
    function, shapes, options = CALLS[name]()
    small = {24: 4, 40: 8, 16: 3, 2: 2}
    operands = [
        torch.randn([small[n] for n in shape], dtype=F64, requires_grad=True) for shape in shapes
    ]
    call = sl.sparsified(function, grad=(None, blocks))  # all is kept: the true gradient
    with sl.fallback("allow"):

        def squared(*operands: Tensor) -> Tensor:
            # a leaf's gradient may be a layout; these are results
            return call(*(t.clone() for t in operands), **options).square()

        assert torch.autograd.gradcheck(squared, operands, fast_mode=True)
        assert torch.autograd.gradgradcheck(squared, operands, fast_mode=True)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_one_gradient_of_linear(wanted: int, assert_close: Check) -> None:
    operands = [torch.randn(shape, dtype=F64) for shape in ((24, 16), (40, 16), (40,))]
    operands[wanted].requires_grad_()
    seed = torch.randn(24, 40, dtype=F64)
    sl.sparsified(F.linear, grad=(sl.Magnitude(0.25), blocks))(*operands).backward(seed)
    expected = gradients(F.linear, [t.detach() for t in operands], largest_blocks(seed, 0.25), {})
    for i, operand in enumerate(operands):
        assert (operand.grad is not None) == (i == wanted)
    assert_close(operands[wanted].grad, expected[wanted])


def test_a_layout_among_the_operands(x: Tensor, assert_close: Check) -> None:
    w = blocks(x.detach(), keep=sl.Magnitude(0.5)).requires_grad_()
    dense = torch.randn(40, 16, dtype=F64, requires_grad=True)
    pair = (sl.Magnitude(0.25), functools.partial(sl.bsr, block_size=8))
    seed = torch.randn(24, 16, dtype=F64)
    with sl.fallback("allow"), sl.trace() as steps:
        sl.sparsified(torch.mm, grad=pair)(w, dense).backward(seed)
    assert [s.kernel for s in steps] == ["cpu", "dense fallback", "cpu", "cpu"]
    kept = sl.bsr(seed, 8, keep=sl.Magnitude(0.25)).to_dense()
    assert type(w.grad) is sl.BSRTensor
    assert w.grad.same_pattern(w)
    assert_close(w.grad, (kept @ dense.detach().mT).sparse_mask(w))
    assert_close(dense.grad, w.detach().to_dense().mT @ kept)


def test_the_gradient_of_a_layout_comes_in_that_layout(x: Tensor, y: Tensor) -> None:
    w = blocks(x.detach(), keep=sl.Magnitude(0.5)).requires_grad_()
    seed = torch.randn(24, 40, dtype=F64)
    with sl.fallback("allow"):
        sl.sparsified(torch.add, grad=(sl.Magnitude(0.25), CscTensor))(w, y).backward(seed)
    assert w.grad.same_pattern(w)
    assert torch.equal(w.grad.to_dense(), torch.where(w.pattern.to_dense(), largest(seed, 0.25), 0))
    assert type(y.grad) is CscTensor
    assert torch.equal(y.grad.to_dense(), largest(seed, 0.25))


def test_the_gradient_of_a_layout_as_result(x: Tensor) -> None:
    w = blocks(x.detach(), keep=sl.Magnitude(0.5)).requires_grad_()
    twice = sl.sparsified(torch.mul, grad=(sl.Magnitude(0.1), blocks))
    out = twice(w, 2.0)
    assert type(out) is sl.BSRTensor
    seed = torch.randn(24, 40, dtype=F64).sparse_mask(w)
    out.backward(seed)
    assert w.grad.same_pattern(w)
    assert torch.equal(w.grad.to_dense(), 2 * largest_blocks(seed.to_dense(), 0.1))


def test_output_and_gradient(x: Tensor, y: Tensor) -> None:
    out_pair, grad_pair = (sl.Magnitude(0.5), blocks), (sl.Magnitude(0.25), blocks)
    out = sl.sparsified(torch.add, out=out_pair, grad=grad_pair)(x, y)
    seed = torch.randn(24, 40, dtype=F64)
    (out * seed).sum().backward()
    # of what the output stores, the form chooses
    arrived = torch.where(out.pattern.to_dense(), seed, 0)
    assert type(x.grad) is sl.BSRTensor
    assert torch.equal(x.grad.to_dense(), largest_blocks(arrived, 0.25))


# --- leaves ---------------------------------------------------------------------------------------

in_blocks = sl.sparsified(torch.positive, grad=(sl.Magnitude(0.25), blocks))


def test_what_is_no_leaf_gets_its_gradient_dense(x: Tensor) -> None:
    """What made it may be any function of torch, which takes no layout."""
    seed = torch.randn(24, 40, dtype=F64)
    with pytest.warns(sl.DenseFallbackWarning, match="gradient of torch.positive goes on dense"):
        (in_blocks(x.exp()) * seed).sum().backward()
    assert type(x.grad) is Tensor
    torch.testing.assert_close(x.grad, largest_blocks(seed, 0.25) * x.detach().exp())


def test_a_leaf_of_two_gradients_is_dense(x: Tensor) -> None:
    seed = torch.randn(24, 40, dtype=F64)
    (in_blocks(x) * seed + 3 * x).sum().backward()
    assert type(x.grad) is Tensor
    assert torch.equal(x.grad, largest_blocks(seed, 0.25) + 3)


def test_two_choices_of_a_leafs_gradient(x: Tensor) -> None:
    first, second = torch.randn(2, 24, 40, dtype=F64)
    with pytest.warns(sl.DenseFallbackWarning, match="store different entries"):
        (in_blocks(x) * first + in_blocks(x) * second).sum().backward()
    assert torch.equal(x.grad, largest_blocks(first, 0.25) + largest_blocks(second, 0.25))
    (in_blocks(y := x.detach().requires_grad_()) * first + in_blocks(y) * first).sum().backward()
    assert type(y.grad) is sl.BSRTensor


def test_accumulation_of_one_pattern(x: Tensor) -> None:
    seed = torch.randn(24, 40, dtype=F64)
    for _ in range(3):
        (in_blocks(x) * seed).sum().backward()
    assert type(x.grad) is sl.BSRTensor
    torch.testing.assert_close(x.grad.to_dense(), 3 * largest_blocks(seed, 0.25))
    x.grad = None
    (in_blocks(x) * -seed.flip(0)).sum().backward()


def test_accumulation_of_another_pattern_raises(x: Tensor) -> None:
    first, second = torch.randn(2, 24, 40, dtype=F64)
    (in_blocks(x) * first).sum().backward()
    with pytest.raises(TypeError, match="store different entries"):
        (in_blocks(x) * second).sum().backward()
    like = x.grad.pattern
    x.grad = None
    fixed = sl.sparsified(torch.positive, grad=(None, like))
    (fixed(x) * first).sum().backward()
    (fixed(x) * second).sum().backward()
    assert torch.equal(x.grad.to_dense(), torch.where(like.to_dense(), first + second, 0))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_takes_a_dense_leaf_with_such_a_gradient(
    optimizer: type[torch.optim.Optimizer], x: Tensor, assert_close: Check
) -> None:
    dense = x.detach().clone().requires_grad_()
    steps = [optimizer([t], lr=0.1) for t in (x, dense)]
    seed = torch.randn(24, 40, dtype=F64)
    with sl.fallback("allow"):
        for _ in range(3):
            (in_blocks(x) * seed).sum().backward()
            dense.grad = largest_blocks(seed, 0.25)
            for step in steps:
                step.step()
                step.zero_grad()
    assert type(x) is Tensor
    assert_close(x, dense)


# --- modules --------------------------------------------------------------------------------------


def test_modules(x: Tensor) -> None:
    inner = nn.Linear(40, 16, dtype=F64)
    pair = (sl.Magnitude(0.5), functools.partial(sl.bsr, block_size=8))
    model = nn.Sequential(sl.sparsified(inner, out=pair, grad=pair), nn.Tanh())
    assert [name for name, _ in model.named_parameters()] == ["0.module.weight", "0.module.bias"]
    assert "Magnitude(density=0.5)" in repr(model)
    with sl.fallback("allow"):
        out = model[0](x)
    assert type(out) is sl.BSRTensor
    again = copy.deepcopy(model)
    assert again[0].module.weight is not inner.weight
    assert torch.equal(again[0](x).to_dense(), out.to_dense())
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again[0](x).to_dense(), out.to_dense())
    out.sum().backward()
    assert inner.weight.grad is not None
    assert not torch.equal(inner.weight.grad, torch.zeros_like(inner.weight))


# --- policies, errors, sampled entries ------------------------------------------------------------


def test_an_error_of_a_gradients_form_comes_in_the_backward(x: Tensor) -> None:
    out = sl.sparsified(torch.neg, grad=(None, functools.partial(sl.bsr, block_size=7)))(x)
    with pytest.raises(ValueError, match="does not divide"):
        out.sum().backward()


def test_a_gradient_that_nothing_takes_in_its_layout(x: Tensor) -> None:
    relu = sl.sparsified(F.relu, grad=(None, blocks))
    with pytest.warns(sl.DenseFallbackWarning, match=r"gradient of .*relu goes on dense.*None"):
        relu(x).sum().backward()
    with sl.fallback("error"):
        out = relu(x)
    with pytest.raises(sl.DenseFallbackError, match="goes on dense"):
        out.sum().backward()


def test_the_policy_of_the_forward_holds_where_the_gradient_is_multiplied() -> None:
    a, b = (torch.randn(24, 24, dtype=F64, requires_grad=True) for _ in range(2))
    multiply = sl.sparsified(torch.mm, grad=(sl.Magnitude(0.5), CscTensor))  # without a route
    with sl.fallback("error"):
        out = multiply(a, b)
    with pytest.raises(sl.DenseFallbackError, match="no sparse implementation for input=CscTensor"):
        out.sum().backward()
    with sl.fallback("allow"), sl.trace() as steps:
        out = multiply(a, b)
    out.sum().backward()
    assert {s.kernel for s in steps} == {"dense fallback"}


@pytest.mark.parametrize("like", ["layout", "mask"])
def test_a_dense_gradient_to_sampled_entries(like: str, x: Tensor) -> None:
    """Entries that were not taken get none, whatever arrives."""
    pattern = pattern_of(x)
    given = pattern if like == "mask" else pattern.to(F64)
    seed = torch.randn(24, 40, dtype=F64)
    expected = torch.where(pattern.to_dense(), seed, 0)
    x.sparse_mask(given).backward(seed)
    assert torch.equal(x.grad, expected)
    x.grad = None
    x.sparse_mask(given).backward(seed.sparse_mask(pattern))
    assert torch.equal(x.grad, expected)
    x.grad = None
    blocks(x, keep=sl.SamePattern(pattern)).backward(seed)
    assert torch.equal(x.grad, expected)


def test_a_gradient_in_another_layout_to_sampled_entries(x: Tensor) -> None:
    pattern, seed = pattern_of(x), torch.randn(24, 40, dtype=F64)
    x.sparse_mask(pattern.to(F64)).backward(blocks(seed))
    assert torch.equal(x.grad, torch.where(pattern.to_dense(), seed, 0))


def test_layouts_may_be_written_to_before_the_backward(x: Tensor) -> None:
    """Only their patterns are needed: an optimizer's step in between is no error."""
    seed = torch.randn(24, 40, dtype=F64)
    like = blocks(x.detach(), keep=sl.Magnitude(0.25))
    expected = torch.where(like.pattern.to_dense(), seed, 0)
    pair = (sl.Magnitude(0.25), blocks)
    for make in (
        lambda: x.sparse_mask(like),
        lambda: sl.sparsified(torch.positive, out=pair)(x),
        lambda: sl.sparsified(lambda x: x.sparse_mask(like), grad=(sl.KeepAll(), blocks))(x),
    ):
        made = make()
        with torch.no_grad():
            like.mul_(2)
            made.mul_(2)
        x.grad = None
        made.backward(seed)
        assert torch.equal(x.grad, expected)
