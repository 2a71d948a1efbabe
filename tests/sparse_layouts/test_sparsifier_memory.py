"""Sparsifiers in bounded memory: a memory-mapped tensor larger than what may be allocated."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparse_layouts as sl

ROOT = Path(__file__).resolve().parent.parent.parent
BY_ROWS = {
    "threshold": sl.Threshold(1.0),
    "random": sl.Random(0.01),
    "all": sl.KeepAll(),
    "nm": sl.NM(2, 4),
    "blocks": sl.Blockwise(sl.Threshold(60.0), 32),
    "blocks-random": sl.Blockwise(sl.Random(0.01), (32, 64)),
}


class LargestAllocation(TorchDispatchMode):
    """The most bytes that an operator makes at once, memory of its arguments apart."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        known = {storage_of(t) for t in tensors_in((args, kwargs))}
        made = [t for t in tensors_in(out) if storage_of(t) not in known]
        self.bytes = max([self.bytes, *(t.untyped_storage().nbytes() for t in made)])
        return out


def tensors_in(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if type(t) is Tensor]


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_the_measure_sees_a_copy() -> None:
    dense = torch.randn(100, 100)
    with LargestAllocation() as measured:
        dense.abs()
    assert measured.bytes == 40_000
    with LargestAllocation() as measured:
        dense.view(-1)[3:].abs_()
    assert measured.bytes == 0


@pytest.mark.parametrize("name", BY_ROWS)
def test_chunks_do_not_grow_with_the_tensor(name: str) -> None:
    def largest(rows: int) -> int:
        dense = torch.randn(rows, 512)
        with LargestAllocation() as measured:
            total = sum(kept.shape[0] for _, kept in BY_ROWS[name].chunks(dense))
        assert total == rows
        return measured.bytes

    assert largest(4096) == largest(1024) < 1 << 20  # of 8 MB and of 2 MB


@pytest.mark.parametrize("name", BY_ROWS)
def test_chunks_have_the_size_that_was_asked_for(name: str) -> None:
    dense, keep = torch.randn(1024, 512), BY_ROWS[name]
    sizes = {kept.shape[0] for _, kept in keep.chunks(dense, chunk_bytes=64 * 512 * 4)}
    assert sizes == {64}
    least = {kept.shape[0] for _, kept in keep.chunks(dense, chunk_bytes=1)}
    assert least == {keep.row_multiple}


@pytest.mark.parametrize(
    "keep", [None, *BY_ROWS.values(), sl.Magnitude(0.01), sl.Blockwise(sl.Magnitude(0.01), 64)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bsr_makes_no_copy_of_the_dense_tensor(
    keep: sl.Sparsifier | None, dtype: torch.dtype
) -> None:
    dense = torch.zeros(2048, 1024, dtype=dtype)
    dense[:64, :256] = 1
    with LargestAllocation() as measured:
        made = sl.bsr(dense, 32, keep=sl.Threshold(1.0) if keep == sl.KeepAll() else keep)
    values = made.values()
    assert measured.bytes <= max(1 << 20, 8 * values.numel())  # of 8 MB (4 MB)


@pytest.mark.parametrize("keep", [sl.Magnitude(0.1), sl.Threshold(2.0), sl.Random(0.1)], ids=repr)
def test_a_global_choice_concatenates_nothing(keep: sl.Sparsifier) -> None:
    tensors = [torch.randn(512, 1024) for _ in range(4)]
    with LargestAllocation() as measured:
        made = sl.sparsify_globally(tensors, keep)
    assert len(made) == 4
    assert measured.bytes <= 1 << 20  # a chunk or two; a mask is 512 KB, a tensor 2 MB


CHILD = """
import resource
import sys

import numpy as np
import torch

import sparse_layouts as sl

torch.set_num_threads(1)
path, edge, budget = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
mapped = torch.from_file(path, shared=True, size=edge * edge, dtype=torch.float32).view(edge, edge)
array = np.memmap(path, dtype=np.float32, mode="r", shape=(edge, edge))
with open("/proc/self/status") as status:
    now = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (now + budget, now + budget))

for keep in (sl.Threshold(1.0), sl.Random(0.001), sl.NM(1, 4), sl.Blockwise(sl.Threshold(1.0), 64)):
    print(sum(int(kept.sum()) for _, kept in keep.chunks(mapped)), flush=True)
largest_four = sl.Magnitude(4 / (edge // 64) ** 2)
for keep in (None, sl.Threshold(1.0), largest_four, sl.Blockwise(sl.NM(1, edge // 64), 64)):
    for source in (mapped, array):
        w = sl.bsr(source, 64, keep=keep)
        print(w.nnz, float(w.sum()), flush=True)
try:
    mapped.abs()
except RuntimeError as error:
    print("refused" if "allocate" in str(error) else error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's own memory as Linux does")
def test_a_memory_mapped_tensor_of_eight_times_the_memory(tmp_path: Path) -> None:
    """256 MB of zeros but for four entries, under a limit of 32 MB for what is allocated.

    RLIMIT_DATA counts memory of the process's own, not pages of a file that it maps.
    """
    edge, path = 8192, tmp_path / "dense.f32"
    with open(path, "wb") as file:
        file.truncate(4 * edge * edge)
    dense = np.memmap(path, dtype=np.float32, mode="r+", shape=(edge, edge))
    for i, (row, column) in enumerate([(0, 0), (63, 8191), (4100, 70), (8191, 8191)]):
        dense[row, column] = 3 + i
    dense.flush()
    del dense
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(edge), str(32 << 20)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    block, sum_of_all = 64 * 64, 3 + 4 + 5 + 6
    expected = [4, round(0.001 * edge * edge), edge * edge // 4, 4 * block]
    blocks = [f"{4 * block} {float(sum_of_all)}"] * 6
    blocks += [f"{edge // 64 * block} {float(4 + 5 + 6)}"] * 2  # 3 and 4 are in one block row
    lines = done.stdout.splitlines()
    assert lines[:4] == [str(number) for number in expected]
    assert lines[-1] == "refused"
    assert lines[4:-1] == blocks


def test_chunks_are_lazy() -> None:
    parts = sl.Threshold(0.5).chunks(torch.ones(4, 4), rows=1)
    assert isinstance(parts, Iterator)
    assert isinstance(next(parts)[1], Tensor)


MAKERS: dict[str, Callable[[Path], Any]] = {
    "numpy": lambda path: np.memmap(path, dtype=np.float32, mode="r", shape=(64, 64)),
    "torch": lambda path: torch.from_file(
        str(path), shared=True, size=4096, dtype=torch.float32
    ).view(64, 64),
}


@pytest.mark.parametrize("name", MAKERS)
def test_bsr_of_a_memory_map_is_that_of_its_copy(name: str, tmp_path: Path) -> None:
    dense = torch.randn(64, 64)
    dense.numpy().tofile(tmp_path / "dense.f32")
    mapped = MAKERS[name](tmp_path / "dense.f32")
    made = sl.bsr(mapped, 16, keep=sl.Magnitude(0.25))
    assert torch.equal(made.to_dense(), sl.bsr(dense, 16, keep=sl.Magnitude(0.25)).to_dense())
