"""`sl.bsr(..., keep=...)`: the blocks that a sparsifier keeps; choices on a GPU."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

import sparse_layouts as sl
from tests.sparse_layouts.sparsifier_cases import (
    ALL,
    FLOATS,
    numbers,
)


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("blocks-of-blocks", "nm")])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bsr_stores_the_blocks_that_are_kept(name: str, dtype: torch.dtype) -> None:
    dense, sparsifier = numbers(3, 12, 16, dtype=dtype), ALL[name]()
    block = getattr(sparsifier, "block_size", (3, 4))
    torch.manual_seed(1)
    blocks = ALL[name]().keep_blocks(dense, block)
    torch.manual_seed(1)
    made = sl.bsr(dense, block, keep=ALL[name]())
    made.validate()
    whole = blocks.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    assert torch.equal(made.to_dense(), dense.where(whole, 0))
    assert made.nnz == whole.sum()
    torch.manual_seed(1)
    apart = dense.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(sl.bsr(apart, block, keep=ALL[name]()).to_dense(), made.to_dense())


def test_bsr_without_a_sparsifier_keeps_what_is_not_zero() -> None:
    dense = torch.zeros(4, 8, dtype=torch.float64)
    dense[0, 0], dense[1, 6], dense[3, 3] = math.nan, -5e-324, -0.0
    made = sl.bsr(dense, 2)
    assert made.crow_indices().tolist() == [0, 2, 2]
    assert made.col_indices().tolist() == [0, 3]


@pytest.mark.parametrize("keep", [None, sl.Magnitude(0.4), sl.NM(1, 2)], ids=repr)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32, torch.complex64], ids=str)
def test_strides_do_not_matter(keep: sl.Sparsifier | None, dtype: torch.dtype) -> None:
    kept = torch.rand(16, 8, 1) < 0.5
    whole = torch.randn(16, 8, 16).where(kept, 0)
    for view in (
        lambda x: x.mT,
        lambda x: x[::2, :, ::2],
        lambda x: x.transpose(0, 1),
        lambda x: x[0].expand(3, 8, 16),
    ):
        dense = view(whole.to(dtype))
        assert not dense.is_contiguous()
        expected = sl.bsr(dense.contiguous(), 4, keep=keep)
        assert torch.equal(sl.bsr(dense, 4, keep=keep).to_dense(), expected.to_dense())


@pytest.mark.parametrize("keep", [None, sl.Magnitude(0.4), sl.Blockwise(sl.NM(1, 2), 2, norm=1)])
def test_bsr_is_differentiable_in_the_values(keep: sl.Sparsifier | None) -> None:
    dense = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 4, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: sl.bsr(x, 2, keep=keep).to_dense() * weight, dense)
    made = sl.bsr(dense, 2, keep=keep)
    (made * 2).sum().backward()
    assert dense.grad is not None
    assert torch.equal(dense.grad, 2.0 * (made.detach().to_dense() != 0))


@pytest.mark.parametrize("writable", [True, False])
def test_bsr_of_a_numpy_array_does_not_share_it(writable: bool) -> None:
    array = np.eye(8, dtype=np.float32)
    array.flags.writeable = writable
    made = sl.bsr(array, 4, keep=sl.Magnitude(0.5))
    assert torch.equal(made.to_dense(), torch.eye(8))
    made.mul_(2)
    assert (array == np.eye(8)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_gpu_chooses_as_the_cpu_does(name: str, dtype: torch.dtype) -> None:
    dense = numbers(3, 12, 16, dtype=dtype)
    uses = [
        lambda keep, x: keep.keep(x),
        lambda keep, x: keep.choose(x.abs()),
        lambda keep, x: keep.keep_blocks(x, getattr(keep, "block_size", (3, 4))),
        lambda keep, x: sl.bsr(x, getattr(keep, "block_size", (3, 4)), keep=keep).to_dense(),
        lambda keep, x: torch.stack(sl.sparsify_globally([x, -x.flip(0)], keep)),
    ]
    for use in uses:
        torch.manual_seed(1)
        expected = use(ALL[name](), dense)
        torch.manual_seed(1)
        assert torch.equal(use(ALL[name](), dense.cuda()).cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["magnitude", "threshold", "random", "all", "nm"])
def test_choose_does_not_wait_for_a_gpu(name: str) -> None:
    magnitudes = torch.rand(64, 64, device="cuda")
    sparsifier = ALL[name]()
    sparsifier.choose(magnitudes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        kept = sparsifier.choose(magnitudes)  # raises where it waits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (kept.shape, kept.dtype, kept.device) == ((64, 64), torch.bool, magnitudes.device)
