"""Routes from outside the library: a step of the trace, and never a gradient lost in silence."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts.layout_autograd import with_values


class Diagonal(sl.LayoutTensor):
    fields = ("entries",)

    def to_dense(self) -> Tensor:
        return torch.diag(self.inner_entries)


def scaled_by_numpy(input: Diagonal, mat2: Tensor) -> Tensor:
    """A handler that leaves torch: autograd does not see what it does."""
    return torch.from_numpy(input.inner_entries.detach().numpy()[:, None] * mat2.detach().numpy())


Route = Callable[..., object]


@pytest.fixture
def register() -> Iterator[Callable[..., Route]]:
    """`sl.route`, undone after the test."""
    made: list[Route] = []

    def register(function: Route, handler: Route, **operands: type) -> Route:
        made.append(sl.route(function, **operands)(handler))
        return made[-1]

    yield register
    for handler in made:
        handler.unregister()


@pytest.fixture
def w() -> Diagonal:
    return Diagonal(torch.randn(3, dtype=torch.float64), shape=(3, 3)).requires_grad_()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 2, dtype=torch.float64, requires_grad=True)


def test_a_handler_without_gradient_gets_torchs(
    w: Diagonal, x: Tensor, register: Callable[..., Route]
) -> None:
    register(torch.mm, scaled_by_numpy, input=Diagonal)
    seed = torch.randn(3, 2, dtype=torch.float64)
    with sl.trace() as steps:
        out = w @ x
        with pytest.warns(sl.DenseFallbackWarning, match=r"gradient of torch\.mm.*Diagonal"):
            out.backward(seed)
    assert [(s.what, s.kernel) for s in steps] == [
        ("torch.mm", "scaled_by_numpy"),
        ("gradient of torch.mm", "dense fallback"),
    ]
    assert type(w.grad) is Diagonal
    torch.testing.assert_close(w.grad.inner_entries, (seed * x.detach()).sum(1))
    torch.testing.assert_close(x.grad, w.detach().inner_entries[:, None] * seed)


@pytest.mark.parametrize("wanted", ["layout", "dense"])
def test_only_the_wanted_gradient(
    wanted: str, w: Diagonal, x: Tensor, register: Callable[..., Route]
) -> None:
    register(torch.mm, scaled_by_numpy, input=Diagonal)
    (x if wanted == "layout" else w).requires_grad_(False)
    with sl.fallback("allow"):
        (w @ x).sum().backward()
    assert (w.grad is None) == (wanted == "dense")
    assert (x.grad is None) == (wanted == "layout")


def test_gradients_twice(w: Diagonal, register: Callable[..., Route]) -> None:
    register(torch.mm, scaled_by_numpy, input=Diagonal)
    register(torch.bmm, lambda input, mat2: input, input=Diagonal)  # another one changes nothing
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    with sl.fallback("allow"):
        assert torch.autograd.gradcheck(lambda v: w.detach() @ v, x)
        assert torch.autograd.gradgradcheck(lambda v: w.detach() @ v.square(), x)


def test_gradients_twice_of_the_layout(register: Callable[..., Route]) -> None:
    def exponential(input: Diagonal) -> Tensor:
        return torch.from_numpy(np.exp(input.detach().to_dense().numpy()))

    register(torch.exp, exponential, input=Diagonal)
    w = Diagonal(torch.zeros(3, dtype=torch.float64), shape=(3, 3))
    values = torch.randn(3, dtype=torch.float64, requires_grad=True)
    with sl.fallback("allow"):
        assert torch.autograd.gradgradcheck(lambda v: torch.exp(with_values(w, v)), values)


def test_the_policy_of_the_forward_holds_in_the_backward(
    w: Diagonal, x: Tensor, register: Callable[..., Route]
) -> None:
    register(torch.mm, scaled_by_numpy, input=Diagonal)
    with sl.fallback("error"):
        out = w @ x
    with pytest.raises(
        sl.DenseFallbackError, match=r"route for Diagonal computes none(.|\n)*autograd\.Function"
    ):
        out.sum().backward()


def test_a_handler_with_a_gradient_keeps_its_own(
    w: Diagonal, x: Tensor, register: Callable[..., Route]
) -> None:
    class Seven(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, layout: Diagonal, dense: Tensor) -> Tensor:
            return scaled_by_numpy(layout, dense)

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> tuple[None, Tensor]:
            return None, torch.full_like(grad, 7.0)

    register(torch.mm, lambda input, mat2: Seven.apply(input, mat2), input=Diagonal)
    with sl.fallback("error"):
        (w @ x).sum().backward()
    assert bool((x.grad == 7).all())


def test_several_results(w: Diagonal, register: Callable[..., Route]) -> None:
    def std_and_mean(input: Diagonal, dim: int) -> tuple[Tensor, Tensor]:
        dense = input.detach().to_dense()
        return torch.std_mean(dense, dim)

    register(torch.std_mean, std_and_mean, input=Diagonal)
    with sl.fallback("allow"):
        std, mean = torch.std_mean(w, 1)
        (2 * mean).sum().backward()
    torch.testing.assert_close(w.grad.inner_entries, torch.full((3,), 2 / 3).double())
    dense = w.detach().to_dense().requires_grad_()
    again = torch.std_mean(dense, 1)
    assert torch.equal(std, again[0])
    assert torch.equal(mean, again[1])


def test_a_layout_as_result(w: Diagonal, register: Callable[..., Route]) -> None:
    def inverted(input: Diagonal) -> Diagonal:
        made = 1 / input.inner_entries.detach().numpy()
        return Diagonal(torch.from_numpy(made), shape=input.shape)

    register(torch.linalg.inv, inverted, input=Diagonal)
    with sl.fallback("allow"):
        out = torch.linalg.inv(w)
        assert type(out) is Diagonal
        out.sum().backward()
    torch.testing.assert_close(w.grad.inner_entries, -1 / w.detach().inner_entries.square())


@pytest.mark.parametrize(
    "handler",
    [
        lambda input: torch.tensor(3),  # an integer
        lambda input: "text",
        lambda input: None,
        lambda input: [1, 2.0],
    ],
)
def test_what_has_no_gradient_stays_as_it_is(
    handler: Route, w: Diagonal, register: Callable[..., Route]
) -> None:
    register(torch.trace, handler, input=Diagonal)
    result = torch.trace(w)
    assert not getattr(result, "requires_grad", False)
    assert type(result) is type(handler(w))


def test_without_gradients_the_result_is_the_handlers(
    w: Diagonal, x: Tensor, register: Callable[..., Route]
) -> None:
    made = torch.ones(3, 2)
    register(torch.mm, lambda input, mat2: made, input=Diagonal)
    with torch.no_grad():
        assert (w @ x) is made
    assert (w.detach() @ x.detach()) is made
    assert (w @ x).requires_grad


def test_the_trace_names_a_handler_before_what_it_calls(
    w: Diagonal, x: Tensor, register: Callable[..., Route]
) -> None:
    def by_blocks(input: Diagonal, mat2: Tensor) -> Tensor:
        return sl.bsr(input.to_dense(), block_size=1) @ mat2

    register(torch.mm, by_blocks, input=Diagonal)
    with sl.trace() as steps, torch.no_grad():
        w @ x
        torch.mm(w, x)
    assert [s.kernel.rpartition(".")[2] for s in steps] == ["by_blocks", "cpu"] * 2
    assert steps[0].what == "torch.mm"
    assert (steps[0].device, steps[0].dtype, steps[0].dense_bytes) == ("cpu", "float64", 0)


def test_a_declined_call_is_no_step(w: Diagonal, x: Tensor, register: Callable[..., Route]) -> None:
    register(torch.mm, lambda input, mat2: NotImplemented, input=Diagonal)
    with sl.trace() as steps, sl.fallback("allow"):
        w @ x
    assert [s.kernel for s in steps] == ["dense fallback"]


def test_a_handler_without_a_name(w: Diagonal, x: Tensor, register: Callable[..., Route]) -> None:
    register(torch.mm, functools.partial(scaled_by_numpy), input=Diagonal)
    with sl.trace() as steps, torch.no_grad():
        w @ x
    assert "scaled_by_numpy" in steps[0].kernel


def test_compiled_code_is_differentiable_too(
    w: Diagonal, x: Tensor, register: Callable[..., Route]
) -> None:
    def without_gradient(input: Diagonal, mat2: Tensor) -> Tensor:
        return input.inner_entries.detach()[:, None] * mat2.detach()

    register(torch.mm, without_gradient, input=Diagonal)
    compiled = torch.compile(
        lambda w, x: torch.mm(w, x).square(), fullgraph=True, backend="aot_eager"
    )
    compiled(w, x).sum().backward()
    entries = w.detach().inner_entries
    expected = 2 * entries[:, None].square() * x.detach()
    torch.testing.assert_close(x.grad, expected)
    torch.testing.assert_close(w.grad.inner_entries, 2 * entries * x.detach().square().sum(1))
