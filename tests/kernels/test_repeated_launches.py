"""Kernels that pass buffers from warp to warp give equal bits every time, at sizes that fill a GPU.

A buffer that is refilled too early shows under load alone: small cases, and a few runs, missed one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts.kernels.block_attention import hopper_backward

pytestmark = pytest.mark.gpu
DTYPE = torch.bfloat16


def assert_all_equal(call: Callable[[], tuple[Tensor, ...]], times: int) -> None:
    """Calls that follow each other without a pause, compared with the last one."""
    results = [call() for _ in range(times)]
    last = results.pop()
    for number, result in enumerate(results):
        for one, other in zip(result, last, strict=True):
            assert torch.equal(one, other), f"call {number} of {times} differs"


@pytest.mark.parametrize("columns", [1, 16, 32, 64])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (2, 8), (1, 8)])
def test_products_by_fragments(n: int, m: int, columns: int) -> None:
    w = sl.nm(torch.randn(8192, 8192, device="cuda", dtype=DTYPE), n, m).prepack()
    x = torch.randn(columns, 8192, device="cuda", dtype=DTYPE)
    with torch.no_grad():
        exact = F.linear(x.double(), w.to_dense().double())
        assert_all_equal(lambda: (F.linear(x, w),), 300)
        error = (F.linear(x, w).double() - exact).norm() / exact.norm()
    assert error < torch.finfo(DTYPE).eps  # a result is rounded to half of it


def weights(size: int, block: int, density: float) -> sl.BSRTensor:
    blocks = torch.rand(size // block, size // block, device="cuda") < density
    mask = sl.bsr_mask(blocks, block, shape=(size, size)).to(DTYPE)
    return mask.like_self(torch.randn_like(mask.values()))


@pytest.mark.parametrize("columns", [1, 8, 16, 64, 96, 4096])
@pytest.mark.parametrize("block", [16, 64, 128])
def test_products_with_blocks(block: int, columns: int) -> None:
    w = weights(8192 if columns <= 64 else 4096, block, 0.25)
    x = torch.randn(columns, w.shape[1], device="cuda", dtype=DTYPE)
    with torch.no_grad():
        assert_all_equal(lambda: (F.linear(x, w),), 200 if columns <= 64 else 30)


@pytest.mark.parametrize("columns", [33, 64])
@pytest.mark.parametrize("block", [64, 128])
def test_products_in_pieces(block: int, columns: int) -> None:
    w = weights(8192, block, 0.25)
    x = torch.randn(columns, 8192, device="cuda", dtype=DTYPE)
    with torch.no_grad(), sl.kernel_choice(block_matmul="hopper_few_columns"):
        exact = F.linear(x.double(), w.to_dense().double())
        assert_all_equal(lambda: (F.linear(x, w),), 300)
        error = (F.linear(x, w).double() - exact).norm() / exact.norm()
    assert error < torch.finfo(DTYPE).eps  # a result is rounded to half of it


@pytest.mark.parametrize("kind", ["blocks", "2:4"])
@pytest.mark.parametrize("columns", [8, 40])
def test_products_of_products(kind: str, columns: int) -> None:
    """A launch that may begin while the one before ends reads what that one wrote."""
    if kind == "blocks":
        w: sl.LayoutTensor = weights(4096, 64, 0.25)
    else:
        w = sl.nm(torch.randn(4096, 4096, device="cuda", dtype=DTYPE), 2, 4).prepack()
    x = torch.randn(columns, 4096, device="cuda", dtype=DTYPE)

    def chain(waits: bool) -> tuple[Tensor, ...]:
        found = [x]
        for _ in range(8):
            found.append(F.linear(found[-1], w))
            if waits:
                torch.cuda.synchronize()
        return tuple(found)

    with torch.no_grad():
        expected = chain(waits=True)
        for _ in range(30):
            for one, other in zip(chain(waits=False), expected, strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("block", [16, 64, 128])
def test_sampled_products(block: int) -> None:
    w = weights(4096, block, 0.25)
    a, b = torch.randn(2, 4096, 4096, device="cuda", dtype=DTYPE)
    assert_all_equal(lambda: (sl.sddmm(a, b, w).values(),), 30)


def local_stride(length: int, block: int) -> sl.LocalStrideTensor:
    return sl.local_stride(
        length,
        block_size=block,
        local_blocks=1024 // block,
        vert_stride=8,
        num_heads=8,
        device="cuda",
    )


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("block", [16, 64, 128])
def test_attention(block: int, head_dim: int) -> None:
    length = 4096
    mask = local_stride(length, block)
    q, k, v, dout = torch.randn(4, 2, 8, length, head_dim, device="cuda", dtype=DTYPE).unbind()
    leaves = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())

    def call() -> tuple[Tensor, ...]:
        out = sl.attention(q, k, v, mask)
        return (out.detach(), *torch.autograd.grad(out, leaves, dout))

    assert_all_equal(call, 20)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="shares of a workspace are the Hopper kernel's: compute capability 9.0",
)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block", [64, 128])
def test_attention_with_shares_of_a_workspace(
    block: int, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = 4096
    q, k, v, dout = torch.randn(4, 2, 8, length, head_dim, device="cuda", dtype=DTYPE).unbind()
    leaves = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())

    def gradients(mask: sl.LocalStrideTensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sl.attention(q, k, v, mask), leaves, dout)

    at_once = gradients(local_stride(length, block))
    monkeypatch.setattr(hopper_backward, "WORKSPACE_BYTES", 50_000_000)
    monkeypatch.setattr(hopper_backward, "WORK_BESIDE", 0.0)
    mask = local_stride(length, block)
    assert_all_equal(lambda: gradients(mask), 20)
    (settled,) = (mask._recalled or {}).values()
    launches = settled.backward._plan.launches
    assert len(launches) > 3
    assert any(own["row_programs"] > 0 for _, own in launches)
    for one, other in zip(gradients(mask), at_once, strict=True):
        assert torch.equal(one, other)


def test_attention_over_sequences() -> None:
    lengths = torch.tensor([1000, 37, 2048, 5, 700, 306], device="cuda")
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    mask = local_stride(2048, 64)
    total = int(ends[-1])
    q, k, v, dout = torch.randn(4, total, 8, 128, device="cuda", dtype=DTYPE).unbind()
    leaves = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())

    def call() -> tuple[Tensor, ...]:
        out = sl.attention(q, k, v, mask, cu_seqlens_q=ends, cu_seqlens_k=ends)
        return (out.detach(), *torch.autograd.grad(out, leaves, dout))

    assert_all_equal(call, 20)
