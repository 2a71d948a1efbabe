"""Attention called again gives what it gave, and nothing that should change its way is missed.

A call under `sl.kernel_choice` takes the usual way, and the same kernels: equal bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sparse_layouts as sl
from sparse_layouts.dispatch.kernel_table import KERNELS
from sparse_layouts.kernels.block_attention import (
    hopper_two_passes,
    reference,
    triton_backward,
    triton_forward,
)
from sparse_layouts.kernels.block_attention.recall import prepared
from tests.kernels.test_public_calls import host_syncs_raise

on_gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
ON_HOPPER = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and not HOPPER,
        reason="the kernels recalled here are for compute capability 9.0",
    ),
]
on_hopper = pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_HOPPER)])


def mask_on(device: str, tokens: int = 512) -> sl.BSRTensor:
    """Sliding window, 4 heads."""
    return sl.sliding_window(tokens, block_size=64, window=150, device=device)


def operands(device: str, tokens: int = 512, grad: bool = False, last: bool = True) -> list[Tensor]:
    """q, k, v (2, 4, tokens, 64) in bf16, heads last in memory or before the tokens."""
    found = []
    for _ in range(3):
        x = torch.randn(2, tokens, 4, 64, device=device, dtype=torch.bfloat16)
        x = x.transpose(1, 2)
        found.append((x if last else x.contiguous()).detach().requires_grad_(grad))
    return found


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """torch's call."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


CALLS: list[Callable[..., Tensor]] = [sdpa, sl.attention]


def usual(call: Callable[..., Tensor], *args: Any) -> Tensor:
    """The result by the usual way, with the same kernel."""
    with sl.kernel_choice(block_attention="hopper"):
        return call(*args)


def gradients(out: Tensor, dout: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, leaves, dout)


@on_hopper
@pytest.mark.parametrize("call", CALLS)
def test_recalled_calls_give_the_same_bits(call: Callable[..., Tensor], device: str) -> None:
    mask = mask_on(device)
    for last in (True, True, False, True):
        q, k, v = operands(device, last=last)
        assert torch.equal(call(q, k, v, mask), usual(call, q, k, v, mask))
    assert len(mask._recalled or {}) == 2  # one by strides


@on_hopper
@pytest.mark.parametrize("call", CALLS)
def test_recalled_gradients_are_the_same_bits(call: Callable[..., Tensor], device: str) -> None:
    mask = mask_on(device)
    for _ in range(3):
        leaves = operands(device, grad=True)
        out, expected = call(*leaves, mask), usual(call, *leaves, mask)
        dout = torch.randn_like(out)
        assert torch.equal(out, expected)
        pairs = zip(gradients(out, dout, leaves), gradients(expected, dout, leaves), strict=True)
        assert all(torch.equal(mine, its) for mine, its in pairs)
        assert out.stride() == expected.stride()


@on_hopper
@pytest.mark.parametrize(
    ("block", "head_dim", "queries"),
    [(16, 64, 512), (32, 128, 512), (64, 192, 512), (64, 256, 512), (16, 64, 200), (64, 256, 200)],
)
def test_recalled_gradients_of_two_passes(
    block: int, head_dim: int, queries: int, device: str
) -> None:
    mask = sl.sliding_window(512, block_size=block, window=150, device=device)
    for _ in range(3):
        leaves = [
            torch.randn(2, 4, n, head_dim, device=device, dtype=torch.bfloat16, requires_grad=True)
            for n in (queries, 512, 512)
        ]
        out, expected = sl.attention(*leaves, mask), usual(sl.attention, *leaves, mask)
        dout = torch.randn_like(out)
        mine, its = gradients(out, dout, leaves), gradients(expected, dout, leaves)
        assert torch.equal(out, expected)
        assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))
    (settled,) = (mask._recalled or {}).values()
    assert isinstance(settled.backward, hopper_two_passes.PreparedBackward)


ROWS = {op: list(KERNELS.rows[op]) for op in ("block_attention", "block_attention_backward")}


@on_gpu
@pytest.mark.parametrize(
    ("dtype", "block", "head_dim", "queries", "heads_last"),
    [
        (torch.bfloat16, 64, 64, 512, True),
        (torch.bfloat16, 128, 128, 512, False),
        (torch.float16, 16, 64, 300, True),
        (torch.bfloat16, 64, 36, 512, False),  # rows that the copy engine cannot read
        (torch.float32, 64, 64, 512, True),
        (torch.float32, 32, 128, 300, False),
        (torch.bfloat16, 64, 256, 509, True),
    ],
)
def test_recalled_calls_of_triton_give_the_same_bits(
    dtype: torch.dtype,
    block: int,
    head_dim: int,
    queries: int,
    heads_last: bool,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for op, rows in ROWS.items():
        monkeypatch.setitem(KERNELS.rows, op, [row for row in rows if row.name == "triton"])
    monkeypatch.setattr(KERNELS, "chosen", {})
    mask = sl.local_stride(
        512, block_size=block, local_blocks=2, vert_stride=3, num_heads=4, device=device
    )

    def operand(heads: int, tokens: int) -> Tensor:
        shape = (2, tokens, heads, head_dim) if heads_last else (2, heads, tokens, head_dim)
        x = torch.randn(shape, device=device, dtype=dtype)
        return (x.transpose(1, 2) if heads_last else x).requires_grad_()

    kept = []
    for _ in range(3):
        leaves = [operand(4, queries), operand(2, 512), operand(2, 512)]
        with sl.kernel_choice(block_attention="triton"):  # the usual way
            expected = sl.attention(*leaves, mask)
        out = sl.attention(*leaves, mask)
        with torch.no_grad():
            assert torch.equal(sl.attention(*leaves, mask), expected)
        dout = torch.randn_like(out)
        mine, its = gradients(out, dout, leaves), gradients(expected, dout, leaves)
        assert torch.equal(out, expected)
        assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))
        kept.append((leaves, out, mine))  # so that every round has other addresses
    (settled,) = (mask._recalled or {}).values()
    assert isinstance(settled.forward, triton_forward.PreparedForward)
    assert isinstance(settled.backward, triton_backward.PreparedBackward)


@on_hopper
def test_a_captured_backward_outlives_what_the_mask_remembers(device: str) -> None:
    mask = sl.sliding_window(512, block_size=16, window=150, device=device)
    leaves = [
        torch.randn(2, 4, n, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        for n in (200, 512, 512)  # fewer queries than rows: a table of the samples is kept
    ]
    dout = torch.randn_like(leaves[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = gradients(sl.attention(*leaves, mask), dout, leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(sl.attention(*leaves, mask), dout, leaves)
    mask._recalled = None
    other = [torch.full((n,), -1, device=device, dtype=torch.int32) for n in (24, 64, 256)]
    for gradient in found:
        gradient.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(mine, its) for mine, its in zip(found, expected, strict=True))
    del other


@on_hopper
def test_a_gradient_with_other_strides(device: str) -> None:
    mask, leaves = mask_on(device), operands(device, grad=True)
    sdpa(*leaves, mask)
    out, expected = sdpa(*leaves, mask), usual(sdpa, *leaves, mask)
    for mine, its in zip(
        torch.autograd.grad(out.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        assert torch.equal(mine, its)


@on_hopper
def test_operands_that_lie_otherwise_take_the_usual_way(device: str) -> None:
    mask = mask_on(device)
    q, k, v = operands(device, last=False)
    before = sdpa(q, k, v, mask)
    off = torch.empty(q.numel() + 1, device=device, dtype=q.dtype)[1:].view(q.shape).copy_(q)
    assert off.data_ptr() % 16 != 0
    assert off.stride() == q.stride()
    out = sdpa(off, k, v, mask)  # by the Triton kernel, which rounds otherwise
    wrong = (out.double() - before.double()).norm()
    assert wrong <= torch.finfo(torch.bfloat16).eps * before.double().norm()


@on_hopper
def test_settings_are_heeded(device: str) -> None:
    mask, (q, k, v) = mask_on(device), operands(device)
    sdpa(q, k, v, mask)
    with sl.trace() as steps:
        sdpa(q, k, v, mask)
    assert [step.kernel for step in steps] == ["hopper"]
    with sl.kernel_choice(block_attention="triton"), sl.trace() as steps:
        sdpa(q, k, v, mask)
    assert [step.kernel for step in steps] == ["triton"]


@on_hopper
def test_a_new_kernel_and_a_new_route_are_heeded(device: str) -> None:
    mask = sl.local_stride(512, block_size=64, local_blocks=2, vert_stride=3, device=device)
    q, k, v = operands(device)
    first = sdpa(q, k, v, mask)

    @sl.kernel("block_attention")
    def zeros(q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(q), torch.zeros(q.shape[:-1], device=q.device)

    try:
        assert sdpa(q, k, v, mask).count_nonzero() == 0
        assert sl.attention(q, k, v, mask).count_nonzero() == 0
    finally:
        zeros.unregister()  # type: ignore[attr-defined]
    assert torch.equal(sdpa(q, k, v, mask), first)

    @sl.route(F.scaled_dot_product_attention, attn_mask=type(mask))
    def ones(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> Tensor:
        return torch.ones_like(query)

    try:
        assert (sdpa(q, k, v, mask) == 1).all()
    finally:
        ones.unregister()  # type: ignore[attr-defined]
    assert torch.equal(sdpa(q, k, v, mask), first)


@on_hopper
def test_a_mask_with_another_pattern_is_another_mask(device: str) -> None:
    mask, (q, k, v) = mask_on(device), operands(device)
    other = sl.sliding_window(512, block_size=64, window=60, device=device)
    sdpa(q, k, v, mask)
    mask.data = other
    assert torch.equal(sdpa(q, k, v, mask), usual(sdpa, q, k, v, other))


@on_hopper
def test_what_one_call_allows_another_still_refuses(device: str) -> None:
    mask, (q, k, v) = mask_on(device), operands(device)
    few = q[:, :, -100:]
    for _ in range(2):
        sl.attention(few, k, v, mask)
        with pytest.raises(ValueError, match="rows"):
            sdpa(few, k, v, mask)
    grouped = k[:, :2], v[:, :2]
    for _ in range(2):
        F.scaled_dot_product_attention(q, *grouped, attn_mask=mask, enable_gqa=True)
        with pytest.raises(ValueError, match="enable_gqa"):
            sdpa(q, *grouped, mask)
    with pytest.raises(ValueError, match="is_causal"):
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=True)
    with pytest.raises(TypeError):
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, windows=1)  # type: ignore[call-arg]


@on_hopper
def test_scales_are_told_apart(device: str) -> None:
    mask, (q, k, v) = mask_on(device), operands(device)
    for scale in (None, 0.5, 0.25, 1, 0.5):
        expected = usual(
            lambda *a, s=scale: F.scaled_dot_product_attention(*a[:3], attn_mask=a[3], scale=s),
            *(q, k, v, mask),
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        assert torch.equal(out, expected)


@on_hopper
def test_autocast(device: str) -> None:
    mask, (q, k, v) = mask_on(device), operands(device)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        for _ in range(2):
            assert torch.equal(sdpa(q, k, v, mask), usual(sdpa, q, k, v, mask))
            out = sdpa(q.float(), k.float(), v.float(), mask)
            assert out.dtype == torch.bfloat16
            assert torch.equal(out, usual(sdpa, q, k, v, mask))
    with torch.autocast("cuda", dtype=torch.float16):
        assert sdpa(q, k, v, mask).dtype == torch.float16


@on_hopper
def test_saved_tensors_may_come_back_otherwise(device: str) -> None:
    mask, leaves = mask_on(device), operands(device, grad=True)
    dout = torch.randn_like(leaves[0])
    expected = gradients(usual(sdpa, *leaves, mask), dout, leaves)
    sdpa(*leaves, mask)

    def pack(t: Any) -> Any:
        return t if isinstance(t, sl.LayoutTensor) else t.detach().cpu()

    def unpack(t: Any) -> Any:
        return t if isinstance(t, sl.LayoutTensor) else t.to(device).contiguous()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out = sdpa(*leaves, mask)
    for mine, its in zip(gradients(out, dout, leaves), expected, strict=True):
        assert torch.equal(mine, its)


@on_hopper
@pytest.mark.parametrize("traced", [False, True])
def test_checkpointing_recomputes_either_way_by_the_other(traced: bool, device: str) -> None:
    mask, leaves = mask_on(device), operands(device, grad=True)
    dout = torch.randn_like(leaves[0])
    expected = gradients(usual(sdpa, *leaves, mask), dout, leaves)
    for _ in range(2):
        if traced:
            with sl.trace():
                out = checkpoint(sdpa, *leaves, mask, use_reentrant=False)
        else:
            out = checkpoint(sdpa, *leaves, mask, use_reentrant=False)
        for mine, its in zip(gradients(out, dout, leaves), expected, strict=True):
            assert torch.equal(mine, its)


@on_hopper
def test_second_gradients_are_refused(device: str) -> None:
    mask, leaves = mask_on(device), operands(device, grad=True)
    dout = torch.randn_like(leaves[0])
    dout.requires_grad_()  # of a constant gradient there is no second one
    for _ in range(2):
        (grad,) = torch.autograd.grad(sdpa(*leaves, mask), leaves[:1], dout, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


@on_hopper
def test_many_lengths_compile_nothing_new(device: str) -> None:
    from sparse_layouts.kernels.block_attention.hopper_backward_kernel import (
        hopper_attention_backward,
    )
    from sparse_layouts.kernels.block_attention.hopper_forward_kernel import (
        hopper_attention_forward,
    )

    def compiled() -> int:
        kernels = (hopper_attention_forward, hopper_attention_backward)
        return sum(len(caches[0]) for k in kernels for caches in k.device_caches.values())

    known = 0
    for number, tokens in enumerate(range(640, 640 + 20 * 64, 64)):
        leaves = operands(device, tokens, grad=True)
        out = sdpa(*leaves, mask_on(device, tokens))
        gradients(out, torch.randn_like(out), leaves)
        if number == 0:
            known = compiled()
    assert compiled() == known


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
@on_hopper
def test_captured_in_a_graph(device: str) -> None:
    mask, leaves = mask_on(device), operands(device, grad=True)
    dout = torch.randn_like(leaves[0])

    def work() -> tuple[Tensor, ...]:
        out = sdpa(*leaves, mask)
        return out, *gradients(out, dout, leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for _ in range(2):
        with torch.no_grad():
            for t in leaves:
                t.copy_(torch.randn_like(t))
        graph.replay()
        for mine, its in zip(captured, work(), strict=True):
            assert torch.equal(mine, its)


@on_hopper
def test_no_call_waits_for_the_gpu(device: str) -> None:
    mask, leaves = mask_on(device), operands(device, grad=True)
    dout = torch.randn_like(leaves[0])
    gradients(sdpa(*leaves, mask), dout, leaves)
    with host_syncs_raise():
        gradients(sdpa(*leaves, mask), dout, leaves)
        with torch.no_grad():
            sdpa(*leaves, mask)


@on_hopper
def test_masks_forget_when_shapes_are_many(device: str) -> None:
    from sparse_layouts.kernels.block_attention.recall import MOST

    mask = mask_on(device)
    q, k, v = operands(device)
    for number in range(MOST + 3):
        sl.attention(q, k, v, mask, scale=1.0 / (number + 1))
    assert len(mask._recalled or {}) <= MOST


def test_kernels_of_others_are_not_recalled(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(*args: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr("sparse_layouts.kernels.block_attention.recall.can_pack", lambda: True)
    row = KERNELS.rows["block_attention"][0]
    for module in ("no.such.module", triton_forward.__name__):  # the latter by functools.wraps
        monkeypatch.setattr(mine, "__module__", module)
        assert prepared(dataclasses.replace(row, implementation=mine), "PreparedForward") is None
    assert prepared(None, "PreparedForward") is None


def test_nothing_is_recalled_on_the_cpu() -> None:
    mask, (q, k, v) = mask_on("cpu"), operands("cpu")
    for call in CALLS:
        assert torch.equal(call(q, k, v, mask), call(q, k, v, mask))
    assert mask._recalled is None


def test_changes_of_the_tables_are_counted() -> None:
    before = KERNELS.changes

    @sl.kernel("block_attention")
    def mine(*args: Any, **options: Any) -> Any:
        return reference.block_attention(*args, **options)

    between = KERNELS.changes
    mine.unregister()  # type: ignore[attr-defined]
    assert before < between < KERNELS.changes
