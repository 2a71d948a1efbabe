"""The copy of matrices of any strides to contiguous rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import laid_out

on_both = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.interpreter),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
DTYPES = (torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)
LYING: dict[str, Callable[[Tensor], Tensor]] = {
    "by rows": lambda x: x,
    "by columns": lambda x: x.mT.contiguous().mT,
    "gaps in rows": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "gaps in columns": lambda x: x.mT.repeat_interleave(3, -1)[..., ::3].mT,
    "rows apart": lambda x: x.repeat(1, 1, 1, 2)[..., : x.shape[-1]],
    "odd address": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "heads last": lambda x: laid_out(x, "heads_last"),
    "expanded samples": lambda x: x[:1].expand_as(x),
    "one row": lambda x: x[:, :, :1].expand_as(x),
    "one column": lambda x: x[..., :1].expand_as(x),
    "one number": lambda x: x[:1, :1, :1, :1].expand_as(x),
}


def numbers(dtype: torch.dtype, *shape: int, device: str = "cpu") -> Tensor:
    """Random, of any dtype."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (x > 0 if dtype == torch.bool else x.to(dtype)).to(device)


def copied(x: Tensor, gap: int = 0) -> Tensor:
    """x by the kernel, in rows `gap` entries apart; checks that nothing else is written."""
    from sparse_layouts.kernels.triton_strided_copy import copy_rows

    columns = x.shape[-1]
    whole = torch.ones(*x.shape[:-1], columns + gap, dtype=x.dtype, device=x.device)
    copy_rows(whole[..., :columns], x)
    assert bool((whole[..., columns:] == 1).all())
    return whole[..., :columns]


@on_both
@pytest.mark.parametrize("how", LYING)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_any_strides_and_entries(dtype: torch.dtype, how: str, device: str) -> None:
    x = LYING[how](numbers(dtype, 2, 3, 70, 132, device=device))
    assert torch.equal(copied(x), x)


@on_both
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "size", [(1, 1), (64, 64), (128, 64), (65, 1), (1, 129), (63, 64), (64, 65), (200, 7)]
)
def test_sizes_off_the_tile(size: tuple[int, int], turned: bool, device: str) -> None:
    x = numbers(torch.bfloat16, 1, 2, *(size[::-1] if turned else size), device=device)
    x = x.mT if turned else x
    assert torch.equal(copied(x, gap=5), x)


@on_both
@pytest.mark.parametrize("shape", [(0, 1, 4, 4), (1, 0, 4, 4), (1, 1, 0, 4), (1, 1, 4, 0)])
def test_nothing_to_copy(shape: tuple[int, ...], device: str) -> None:
    x = torch.empty(shape, device=device)
    assert copied(x).shape == shape


@pytest.mark.gpu
@pytest.mark.parametrize("turned", [False, True])
def test_more_than_31_bits_of_entries(turned: bool) -> None:
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    rows = torch.arange(46_400, dtype=torch.int16, device="cuda")
    x = (rows[:, None] + rows * 7)[None, None]  # 2.15e9 entries
    assert x.numel() > 2**31
    x = x.mT if turned else x
    assert torch.equal(copied(x), x)


@pytest.mark.gpu
def test_a_captured_copy_reads_what_is_there_when_replayed() -> None:
    x = torch.randn(1, 1, 200, 300, device="cuda").mT
    out = torch.empty(x.shape, device="cuda")
    copied(x)
    from sparse_layouts.kernels.triton_strided_copy import copy_rows

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        copy_rows(out, x)
    x.add_(1.0)
    graph.replay()
    assert torch.equal(out, x)
