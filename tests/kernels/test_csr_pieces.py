"""How csr_matmul's Triton kernel cuts rows into pieces: every entry once, the longest first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

triton_csr_matmul = pytest.importorskip("sparse_layouts.kernels.csr_matmul.triton_csr_matmul")

LENGTHS = {
    "empty rows": [0, 3, 0, 0, 8, 0],
    "one piece each": [8, 7, 1],
    "long": [1, 40, 8, 9, 0, 16, 17],
    "equal": [5] * 9,
    "no row": [],
    "nothing stored": [0, 0],
}


def lists(lengths: list[int], index: torch.dtype) -> tuple[Tensor, Tensor]:
    crow = torch.nn.functional.pad(torch.tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0))
    return crow.to(index), torch.zeros(sum(lengths), dtype=index)


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_pieces_hold_every_entry_once(name: str, index: torch.dtype) -> None:
    lengths, piece = LENGTHS[name], 8
    crow, col = lists(lengths, index)
    made = triton_csr_matmul.row_pieces(crow, col, piece)
    assert made.starts.dtype == made.ends.dtype == index
    sizes = made.ends - made.starts
    real = made.rows < len(lengths)
    assert (sizes >= 0).all()
    assert (sizes <= piece).all()
    assert (sizes[~real] == 0).all()
    held: list[int] = []
    for row, start, end in zip(
        made.rows[real].tolist(), made.starts[real].tolist(), made.ends[real].tolist(), strict=True
    ):
        assert crow[row] <= start <= end <= crow[row + 1]
        held.extend(range(start, end))
    assert sorted(held) == list(range(sum(lengths)))
    assert set(made.rows[real].tolist()) == set(range(len(lengths)))  # empty ones are written, too

    slots = dict(zip(made.slots[real].tolist(), made.rows[real].tolist(), strict=True))
    slots.pop(-1, None)
    assert all(slot < made.num_slots for slot in slots)
    of_long = made.long_rows < len(lengths)
    summed: dict[int, int] = {}
    for row, first, count in zip(
        made.long_rows[of_long].tolist(),
        made.first_slots[of_long].tolist(),
        made.counts[of_long].tolist(),
        strict=True,
    ):
        assert count == -(-lengths[row] // piece)
        summed |= dict.fromkeys(range(first, first + count), row)
    assert summed == slots
    assert len(summed) == sum(-(-size // piece) for size in lengths if size > piece)


def test_the_longest_come_first_and_neighbours_stay() -> None:
    crow, col = lists([1, 5, 64, 6, 200, 7, 0, 33], torch.int32)
    made = triton_csr_matmul.row_pieces(crow, col, 64)
    assert (made.ends - made.starts).tolist()[:9] == [64, 64, 64, 64, 33, 8, 5, 6, 7]
    assert made.rows.tolist()[:5] == [2, 4, 4, 4, 7]
    assert made.rows.tolist()[5:9] == [4, 1, 3, 5]


def test_pieces_that_are_none_fit_into_int32() -> None:
    rows, each = 4096, 2**9
    crow = torch.arange(rows + 1, dtype=torch.int32) * each
    piece = 2**20  # past the last row, rows * piece entries: more than int32 holds
    made = triton_csr_matmul.row_pieces(crow, torch.zeros(rows * each, dtype=torch.int32), piece)
    assert made.rows.shape[0] > rows
    assert (made.starts >= 0).all()
    assert ((made.ends - made.starts)[made.rows == rows] == 0).all()
