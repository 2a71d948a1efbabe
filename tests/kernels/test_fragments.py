"""Products by fragments without a GPU: the order of entries and positions, and the kernel's own
blocks of PTX, run by an emulated warp as the kernel runs them.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_layouts.nm_fragments import (
    AXES,
    by_fragments,
    by_rows,
    has_fragments,
    pack_fragments,
    unit_columns,
    unpack_fragments,
    words_per_unit,
)
from sparse_layouts.nm_packing import scatter_entries
from tests.conftest import HAS_TRITON
from tests.kernels import warp_emulation
from tests.kernels.cases_nm import random_indices, random_positions

RATIOS = sorted(AXES)
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton, which is for Linux only")


def positions_of(patterns: int, rows: int, units: int, n: int, m: int) -> Tensor:
    groups = units * unit_columns(n, m) // m
    return random_positions(patterns, rows, groups, n, m, torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("n", "m"), RATIOS)
def test_entries_and_positions_come_back(n: int, m: int) -> None:
    positions = positions_of(2, 48, 3, n, m)
    words = pack_fragments(positions, n, m)
    assert words.shape == (2, 3, 3 * words_per_unit(m))
    columns = 3 * unit_columns(n, m)
    assert torch.equal(unpack_fragments(words, n, m, columns), positions.to(torch.uint8))
    values = torch.randn(4, *positions.shape)
    moved = by_fragments(values, n, m)
    assert not torch.equal(moved, values)
    assert torch.equal(by_rows(moved, n, m), values)


@pytest.mark.parametrize(("n", "m"), RATIOS)
def test_no_bit_is_left_out(n: int, m: int) -> None:
    all_set = torch.full((1, 16, 32), m - 1)
    assert bool((pack_fragments(all_set, n, m) == -1).all())


@pytest.mark.parametrize(("n", "m"), RATIOS)
def test_a_position_is_in_the_words_once(n: int, m: int) -> None:
    bits = {}
    for row in range(16):
        for entry in range(32):
            one = torch.zeros(1, 16, 32, dtype=torch.uint8)
            one[0, row, entry] = m - 1
            words = pack_fragments(one, n, m)[0, 0].numpy().view(np.uint32)
            found = [(w, b) for w, word in enumerate(words) for b in range(32) if word >> b & 1]
            assert len(found) == (m - 1).bit_length()
            bits.update(dict.fromkeys(found, (row, entry)))
    assert len(bits) == 512 * (m - 1).bit_length()


def test_which_matrices_have_fragments() -> None:
    assert has_fragments(2, 4, 16, 64)
    assert not has_fragments(2, 4, 8, 64)
    assert not has_fragments(2, 4, 16, 96)
    assert not has_fragments(4, 8, 16, 64)


class Warp:
    """What one warp of the kernel does with a unit of a tile."""

    def __init__(self, values: Tensor, words: Tensor, n: int, m: int) -> None:
        self.group = 2 if (n, m) == (2, 4) else m  # as in the kernel: 2 means 2:4
        self.span, self.places = m // 4, 2 if (n, m) == (2, 8) else 1
        memory = values.contiguous().view(torch.int32).numpy().view(np.uint32).reshape(2, 32, 4)
        self.entries = memory.transpose(1, 0, 2).reshape(32, 8)
        flat = words.numpy().view(np.uint32).reshape(-1)
        self.positions = metadata = flat[:32]
        if m == 8:
            metadata = flat[32:].repeat(2) >> np.tile([0, 1], 16).astype(np.uint32)
        if self.group != 2:
            metadata = metadata & np.uint32(0x55555555) | np.uint32(0x88888888)
        self.metadata = np.repeat(metadata[:, None], 8, 1)

    def x_words(self, x: Tensor) -> np.ndarray:
        """x (8, 64) as `_x_words` of the kernel."""
        read = x.contiguous().view(torch.int32).numpy().view(np.uint32)
        if self.group == 2:
            return read.reshape(8, 8, 4).transpose(0, 2, 1).reshape(32, 8)
        return read.reshape(32, 8)

    def multiply(self, chunk: int, xs: list[np.ndarray], sums: np.ndarray, kind: str) -> np.ndarray:
        """What the kernel does with `span` times 64 columns, the chunk-th; xs: of every 8 columns
        of the output so many.
        """
        from sparse_layouts.kernels.nm_matmul import fragment_assembly as assembly

        width = len(xs) // self.span
        for place in range(chunk, chunk + self.places):
            left = [self.entries]
            if self.group != 2:
                words = np.repeat(self.positions[:, None], 8, 1)
                text = assembly.expansion(self.group, place)
                left = warp_emulation.run(text, self.span, [self.entries, words])
            text = assembly.products(self.group, place, width, kind)
            sums = warp_emulation.run(text, 1, [*left, self.metadata, *xs, sums])[0]
        return sums


def summed(sums: np.ndarray, width: int) -> np.ndarray:
    """(16, 8 * width) of the sums of every lane, as the kernel writes them out."""
    lanes = np.arange(32)
    if width == 1:
        sums = sums[:, :4] + sums[:, 4:]
    out = np.zeros((16, 8 * width))
    for j in range(4 * width):
        row, column = lanes // 4 + j // 2 % 2 * 8, lanes % 4 * 2 + j % 2 + j // 4 * 8
        out[row, column] = sums[:, j]
    return out


@needs_triton
@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize(("n", "m"), RATIOS)
def test_an_emulated_warp_multiplies(n: int, m: int, width: int, kind: str) -> None:
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    columns = unit_columns(n, m)
    positions = positions_of(1, 16, 1, n, m)
    # whole numbers of both signs, every one another: sums are exact, a mix-up is seen
    values = torch.randperm(512).view(16, 32).sub(256).to(dtype)
    x = torch.randint(-8, 9, (8 * width, columns)).to(dtype)
    warp = Warp(by_fragments(values, n, m), pack_fragments(positions, n, m)[0], n, m)
    sums = np.zeros((32, 8), np.float32)
    for chunk in range(columns // 64 // warp.span):
        xs = []
        for j in range(width):
            for c in range(warp.span * chunk, warp.span * (chunk + 1)):
                xs.append(warp.x_words(x[8 * j : 8 * j + 8, 64 * c : 64 * c + 64]))
        sums = warp.multiply(chunk, xs, sums, kind)
    indices = random_indices(1, 16, columns // m, n, m, torch.Generator().manual_seed(3))
    dense = scatter_entries(values[None], indices, n, m, columns)[0]
    expected = dense.double() @ x.double().mT
    np.testing.assert_array_equal(summed(sums, width), expected.numpy())


@needs_triton
def test_x_is_given_to_the_copy_engine_in_steps_of_16_bytes() -> None:
    from sparse_layouts.kernels.nm_matmul import hopper_fragments

    wide = torch.randn(7, 257, dtype=torch.bfloat16)
    even = torch.randn(7, 264, dtype=torch.bfloat16)
    for x in (
        wide[:, :256],
        wide[:1, :256],
        even[:, :256],
        even[:1, 1:257],
        even[0, :256].expand(5, 256),
        even[:, :256].mT.contiguous().mT,
    ):
        rows = hopper_fragments._rows(x)
        assert torch.equal(rows, x)
        assert rows.data_ptr() % 16 == 0
        assert rows.stride(1) == 1
        assert rows.stride(0) >= 256
        assert rows.stride(0) % 8 == 0
        rows.view(torch.int32)
