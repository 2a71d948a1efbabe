"""The workspace of the Hopper backward is bounded, and what it cannot bound goes elsewhere."""

from __future__ import annotations

import pytest
import torch

import sparse_layouts as sl
from sparse_layouts.dispatch import Facts
from sparse_layouts.kernels import requirements
from sparse_layouts.kernels.block_attention import facts
from sparse_layouts.kernels.block_attention.unit_schedule import gradient_schedules
from tests.conftest import HAS_TRITON

PROGRAMS = 132
ON_HOPPER = Facts(
    "cuda",
    torch.bfloat16,
    (9, 0),
    (3, 6, 0),
    block_size=(64, 64),
    head_dim=128,
    tma=True,
)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton, which is for Linux only")
@pytest.mark.parametrize("tokens", [1024, 8192, 32768])
@pytest.mark.parametrize("key_heads", [1, 3, 64])
@pytest.mark.parametrize("group", [1, 4])
def test_shares(tokens: int, key_heads: int, group: int) -> None:
    from sparse_layouts.kernels.block_attention import hopper_backward as hopper

    mask = sl.sliding_window(tokens, block_size=64, window=tokens // 2)
    schedules = gradient_schedules(mask.block_pattern, 2, pair_by_length=True)
    share = hopper.workspace_share(schedules, group, key_heads, 2, PROGRAMS)
    each = schedules.num_places * group * 64 * 64 * 2
    assert each >= 2 * group * mask.nnz
    assert 1 <= share <= key_heads
    if share == key_heads:
        return
    assert 2 * share * each <= requirements.HOPPER_WORKSPACE_BYTES or share == 1
    launches = -(-key_heads // share)
    assert share * (launches - 1) < key_heads  # none is empty
    most = requirements.HOPPER_WORKSPACE_BYTES // 2 // each
    beside = share * schedules.mean_tiles / PROGRAMS / schedules.longest
    assert beside >= hopper.WORK_BESIDE / 2 or share >= most // 2


def test_heads_too_large_for_it_are_refused() -> None:
    assert requirements.hopper_attention_backward(ON_HOPPER) is None
    large = ON_HOPPER._replace(head_bytes=requirements.HOPPER_WORKSPACE_BYTES // 2 + 1)
    reason = requirements.hopper_attention_backward(large)
    assert reason is not None
    assert "workspace" in reason
    assert requirements.hopper_attention(large) is None  # the forward takes none


def test_head_bytes_count_the_longest_list(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_layouts.kernels import block_attention

    monkeypatch.setattr(block_attention, "capability_of", lambda device: (9, 0))
    q = torch.zeros(1, 4, 512, 64, dtype=torch.bfloat16)
    k = v = q[:, :2]
    p = sl.local_stride(
        512, block_size=64, local_blocks=2, vert_stride=2, num_heads=4
    ).block_pattern

    def head_bytes() -> int:
        return facts(q, k, v, p, bias=False, lengths=False).head_bytes

    assert head_bytes() == 0  # all of it is little
    monkeypatch.setattr(requirements, "HOPPER_WORKSPACE_BYTES", 1)
    blocks = (p.crow_indices[:, -1] - p.crow_indices[:, 0]).max()
    assert head_bytes() == 2 * int(blocks) * 64 * 64 * 2


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton, which is for Linux only")
def test_a_gradient_at_any_address_is_readied() -> None:
    from sparse_layouts.kernels.block_attention.triton_common import readied, tma_ready

    plain = torch.randn(2, 3, 8, 16, dtype=torch.bfloat16)
    at_odd = torch.empty(plain.numel() + 1, dtype=plain.dtype)[1:].view(plain.shape).copy_(plain)
    assert at_odd.is_contiguous()
    assert not tma_ready(at_odd)
    for lying in (at_odd, plain.mT.contiguous().mT, plain[:, :, :1].expand_as(plain)):
        ready = readied(lying)
        assert tma_ready(ready)
        assert torch.equal(ready, lying)
    assert readied(plain) is plain
