"""`sl.trace()`: what eager calls really took, forward and backward."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F

import sparse_layouts as sl


@pytest.fixture
def w() -> sl.BSRTensor:
    return sl.bsr(torch.eye(64), block_size=16)


def test_forward_and_backward(w: sl.BSRTensor) -> None:
    x = torch.ones(64, 2, requires_grad=True)
    with sl.trace() as steps:
        out = w.requires_grad_() @ x
        assert [s.what for s in steps] == ["block_matmul"]
        out.sum().backward()
    assert [(s.what, s.kernel) for s in steps] == [
        ("block_matmul", "cpu"),
        ("sddmm", "cpu"),
        ("block_matmul", "cpu"),
    ]
    assert {(s.device, s.dtype, s.dense_bytes) for s in steps} == {("cpu", "float32", 0)}


def test_attention_and_softmax(w: sl.BSRTensor) -> None:
    q = torch.randn(1, 2, 64, 16, dtype=torch.float64, requires_grad=True)
    with sl.trace() as steps:
        F.scaled_dot_product_attention(q, q, q, sl.causal(64, block_size=16)).sum().backward()
        torch.softmax(w.requires_grad_(), -1).sum().backward()
    assert [s.what for s in steps] == [
        "block_attention",
        "block_attention_backward",
        "block_softmax",
        "block_softmax_backward",
    ]
    assert [s.dtype for s in steps] == ["float64"] * 2 + ["float32"] * 2


def test_fallbacks_are_recorded_with_their_bytes(w: sl.BSRTensor) -> None:
    with sl.trace() as steps, sl.fallback("allow"):
        torch.cumsum(w, 0)
    assert [tuple(s) for s in steps] == [
        ("torch.cumsum", "dense fallback", "cpu", "float32", 64 * 64 * 4)
    ]
    assert len(steps) == 1
    assert steps[0] is next(iter(steps))


def test_a_trace_ends_with_its_block_and_the_inner_one_records(w: sl.BSRTensor) -> None:
    with sl.trace() as outer:
        with sl.trace() as inner:
            w @ torch.ones(64, 2)
        w @ torch.ones(64, 2)
    w @ torch.ones(64, 2)
    assert (len(outer), len(inner)) == (1, 1)


def test_a_backward_after_the_block_is_recorded(w: sl.BSRTensor) -> None:
    x = torch.ones(64, 2, requires_grad=True)
    with sl.trace() as steps:
        total = (w @ x).sum()
    thread = threading.Thread(target=total.backward)
    thread.start()
    thread.join()
    assert [s.what for s in steps] == ["block_matmul", "block_matmul"]


def test_other_threads_are_not_recorded(w: sl.BSRTensor) -> None:
    with sl.trace() as steps:
        thread = threading.Thread(target=lambda: w @ torch.ones(64, 2))
        thread.start()
        thread.join()
    assert list(steps) == []


def test_it_prints_itself(w: sl.BSRTensor) -> None:
    with sl.trace() as steps:
        assert repr(steps) == "nothing ran"
        assert steps._repr_html_() == "nothing ran"
        with sl.fallback("allow"):
            torch.cumsum(w, 0)
    for text in (repr(steps), steps._repr_html_()):
        for part in ("torch.cumsum", "dense fallback", "cpu", "float32", "16,384"):
            assert part in text
    assert steps._repr_html_().startswith("<table>")
