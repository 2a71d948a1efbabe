"""Attention where 32-bit offsets and the current GPU do not do; both kernels and directions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import sparse_layouts as sl
from sparse_layouts.dispatch.kernel_table import KERNELS

ROWS = ("triton", "hopper", "hopper_two_passes")
TOKENS, HEADS, HEAD_DIM = 300_000, 64, 128


@contextlib.contextmanager
def kernels(name: str) -> Iterator[None]:
    """The backward by the kernel of that name, the forward by the one that goes with it; skips
    where this GPU is not theirs.
    """
    forward = name.partition("_")[0]
    if forward == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Hopper kernels need compute capability 9.0")
    chosen = {"block_attention": forward, "block_attention_backward": name}
    assert all(row in [other.name for other in KERNELS.rows[op]] for op, row in chosen.items())
    with sl.kernel_choice(**chosen):
        yield


def results(leaves: list[Tensor], dout: Tensor, mask: sl.BSRTensor) -> tuple[Tensor, ...]:
    out = sl.attention(*leaves, mask)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("heads_last", [False, True])
def test_more_than_2_to_the_31_entries(name: str, heads_last: bool) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 55 << 30:
        pytest.skip("needs 55 GB of free GPU memory")
    mask = sl.sliding_window(TOKENS, block_size=64, window=100, device="cuda")
    shape = (1, TOKENS, HEADS, HEAD_DIM) if heads_last else (1, HEADS, TOKENS, HEAD_DIM)
    given = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    assert given[0].numel() > 2**31
    if heads_last:
        given = [t.transpose(1, 2) for t in given]
    leaves, dout = [t.requires_grad_() for t in given[:3]], given[3]
    with kernels(name):
        found = results(leaves, dout, mask)
        # a head alone is a small call: the same kernel, the same order, the same bits
        for head in (0, HEADS - 1):
            own = [t[:, head : head + 1].detach().clone().requires_grad_() for t in leaves]
            expected = results(own, dout[:, head : head + 1].clone(), mask)
            for mine, its in zip(found, expected, strict=True):
                assert torch.equal(mine[:, head : head + 1], its)


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def made(device: str, block_size: int) -> tuple[list[Tensor], Tensor, sl.BSRTensor]:
    random = torch.Generator().manual_seed(1)
    q, k, v, dout = (torch.randn(2, 4, 500, 64, generator=random) for _ in range(4))
    mask = sl.sliding_window(500, block_size=block_size, window=130, device=device)
    leaves = [t.to(device, torch.bfloat16).requires_grad_() for t in (q, k, v)]
    return leaves, dout.to(device, torch.bfloat16), mask


def equal_on(device: str, found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(
        mine.device == torch.device(device) and torch.equal(mine.cpu(), its.cpu())
        for mine, its in zip(found, expected, strict=True)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ROWS)
@two_gpus
def test_a_gpu_that_is_not_the_current_one(name: str) -> None:
    assert torch.cuda.current_device() == 0
    with kernels(name):
        expected = results(*made("cuda:0", 64))
        assert equal_on("cuda:1", results(*made("cuda:1", 64)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [16, 64])  # on Hopper two passes, and one over kept scores
@two_gpus
def test_recalled_whichever_gpu_is_the_current_one(block_size: int) -> None:
    expected = results(*made("cuda:0", block_size))
    given = made("cuda:1", block_size)
    for current in (0, 1, 1, 0, 1):
        with torch.cuda.device(current):
            assert equal_on("cuda:1", results(*given), expected)
