"""Products by fragments called again give what they gave, and nothing is settled too early.

A call under `sl.kernel_choice` takes the usual way, and the same kernel: equal bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts.kernels import recalling
from sparse_layouts.kernels.nm_matmul.recall import Settled
from sparse_layouts.kernels.recalling import MOST, ONCE, known
from tests.kernels.test_recall import on_hopper

Product = Callable[[Any, Tensor], Tensor]


def linear(w: Any, x: Tensor) -> Tensor:
    return F.linear(x, w)


def from_the_left(w: Any, x: Tensor) -> Tensor:
    return w @ x.mT


products = pytest.mark.parametrize("call", [linear, from_the_left])


def weight(device: str) -> sl.NMTensor:
    """2:4 by fragments."""
    dense = torch.randn(512, 1024, device=device, dtype=torch.bfloat16)
    return sl.nm(dense, 2, 4).in_order("fragments")


def rows(device: str, vectors: int = 8) -> Tensor:
    return torch.randn(vectors, 1024, device=device, dtype=torch.bfloat16)


def usual(call: Product, w: Any, x: Tensor) -> Tensor:
    """The result by the usual way, with the same kernel."""
    with sl.kernel_choice(nm_matmul="fragments"):
        return call(w, x)


def settled(w: sl.NMTensor) -> list[Any]:
    return [each for each in (w._recalled or {}).values() if isinstance(each, Settled)]


class Layout:
    """Something that remembers."""

    _recalled: dict[Any, Any] | None = None


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a CUDA graph is said to be captured."""
    answer = [False]
    monkeypatch.setattr(recalling.torch.cuda, "is_current_stream_capturing", lambda: answer[0])
    return answer


def test_the_second_call_settles(capturing: list[bool]) -> None:
    layout, made = Layout(), iter(range(100))

    def ask(key: str = "a", holds: bool = True) -> Any:
        return known(layout, key, lambda settled: holds, lambda: next(made))

    assert [ask(), ask(), ask()] == [None, 0, 0]
    assert ask(holds=False) == 1  # settled anew
    capturing[0] = True
    assert ask() == 1
    assert ask(holds=False) is None
    assert [ask("b"), ask("b")] == [None, None]  # a capture does not count
    capturing[0] = False
    assert [ask("b"), ask("b"), ask()] == [None, 2, 1]
    for i in range(2 * MOST):
        ask(str(i))
    assert len(layout._recalled or {}) <= MOST


@pytest.mark.usefixtures("capturing")
def test_what_cannot_be_settled_is_asked_again() -> None:
    layout = Layout()
    for _ in range(3):
        assert known(layout, "a", lambda settled: True, lambda: None) is None
    assert layout._recalled == {"a": ONCE}


def test_nothing_is_recalled_on_the_cpu() -> None:
    w, x = weight("cpu"), rows("cpu")
    first = F.linear(x, w)
    assert all(torch.equal(F.linear(x, w), first) for _ in range(3))
    assert w._recalled is None


@on_hopper
@products
@pytest.mark.parametrize("vectors", [1, 8, 64])
def test_recalled_products_are_the_same_bits(call: Product, vectors: int, device: str) -> None:
    w = weight(device)
    for turn in range(4):
        x = rows(device, vectors)
        assert torch.equal(call(w, x), usual(call, w, x))
        assert len(settled(w)) == (turn > 0)
    w.mul_(2)
    assert torch.equal(call(w, x), usual(call, w, x))


@on_hopper
@products
def test_the_first_call_in_a_graph_settles_nothing(call: Product, device: str) -> None:
    call(weight(device), rows(device))  # compiles
    torch.cuda.synchronize()
    w, x = weight(device), rows(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(w, x)
        call(w, x)
    assert not w._recalled
    eager = call(w, x)
    graph.replay()
    assert torch.equal(out, eager)
    assert torch.equal(eager, usual(call, w, x))


@on_hopper
@products
def test_recalled_products_in_a_graph(call: Product, device: str) -> None:
    w, x = weight(device), rows(device)
    for _ in range(2):
        call(w, x)
    assert len(settled(w)) == 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(w, x)
    x.copy_(rows(device))
    graph.replay()
    assert torch.equal(out, usual(call, w, x))


@on_hopper
def test_layouts_made_for_one_product_settle_nothing(device: str) -> None:
    w, x = weight(device), rows(device)
    made = [w.detach() for _ in range(3)]
    for each in made:
        F.linear(x, each)
    assert not any(settled(each) for each in made)


@on_hopper
def test_nan_where_a_row_stores_nothing_harms_no_stored_entry(device: str) -> None:
    w, x = weight(device), rows(device)
    expected = F.linear(x, w)
    x[:, 0] = float("nan")
    reads = w.to_dense()[:, 0] != 0
    out = F.linear(x, w)
    assert bool(out[:, reads].isnan().all())
    assert torch.equal(out[:, ~reads], expected[:, ~reads])
