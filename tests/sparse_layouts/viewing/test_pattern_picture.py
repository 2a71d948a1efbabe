"""The SVG of a pattern: its cells are right, it is capped, well-formed and safe in a page."""

from __future__ import annotations

import time
import xml.etree.ElementTree as ET
from collections.abc import Callable

import numpy as np
import pytest
import torch

import sparse_layouts as sl
from sparse_layouts.entry_lists import lead_of
from sparse_layouts.viewing import cells as cells_module
from sparse_layouts.viewing.cells import MAX_CELLS, Cells, cells_of, corner_of
from sparse_layouts.viewing.entry_cells import pattern_of_heads
from sparse_layouts.viewing.pattern_picture import svg

Make = Callable[[], sl.LayoutTensor]

PATTERNS: dict[str, Make] = {
    "causal": lambda: sl.causal(4096, block_size=64),
    "entries": lambda: sl.causal(40, block_size=16),
    "ragged": lambda: sl.sliding_window(100, block_size=32, window=40),
    "ragged, grouped": lambda: sl.sliding_window(1111, block_size=16, window=300, causal=False),
    "rectangular": lambda: sl.bsr_mask(torch.rand(3, 100) > 0.7, (16, 32)),
    "heads": lambda: sl.local_stride(
        2048, block_size=16, local_blocks=2, vert_stride=4, num_heads=8
    ),
    "samples": lambda: sl.document([[0, 30, 100, 100], [0, 50, 60, 100]], block_size=16),
    "counts": lambda: sl.bsr_mask(torch.randint(0, 3, (10, 10)), 16),
    "values": lambda: sl.bsr(torch.randn(512, 256), 16, keep=sl.Magnitude(density=0.1)),
    "transposed": lambda: sl.bsr(torch.randn(512, 256), 16, keep=sl.Magnitude(density=0.1)).mT,
    "transposed, partial": lambda: sl.sliding_window(1111, block_size=16, window=30).mT,
    "nothing stored": lambda: sl.bsr(torch.zeros(128, 128), 16),
    "no entries": lambda: sl.bsr_mask(torch.zeros(0, 3, dtype=torch.bool), 16),
    "no token": lambda: sl.causal(0, block_size=8),
    "reordered": lambda: sl.reorder(sl.bsr(torch.randn(512, 256), 16, keep=sl.Magnitude(0.1)), 64),
    "reordered, transposed": lambda: sl.reorder(sl.bsr(torch.randn(64, 30), (1, 5)), 16).mT,
    "csr": lambda: sl.csr(torch.randn(300, 130), keep=sl.Magnitude(0.05)),
    "csr, small": lambda: sl.csr(torch.randn(30, 20), keep=sl.Magnitude(0.2)).pattern,
    "csr, empty": lambda: sl.csr(torch.zeros(300, 130)),
    "csc": lambda: sl.csc(torch.randn(300, 130), keep=sl.Magnitude(0.05)),
    "n:m": lambda: sl.nm(torch.randn(200, 390), 2, 5),
    "n:m, small": lambda: sl.nm(torch.randn(20, 40), 2, 4),
    "n:m, narrow": lambda: sl.nm(torch.randn(200, 40), 1, 4).mT,
    "n:m, heads": lambda: sl.nm(torch.randn(3, 200, 400), 2, 4),
    "grouped n:m": lambda: sl.grouped_nm(torch.randn(201, 130), 2, 4, 4),
    "grouped n:m, whole": lambda: sl.grouped_nm(torch.randn(256, 130), 1, 4, 4),
    "grouped n:m, few rows": lambda: sl.grouped_nm(torch.randn(21, 130), 2, 4, 2),
    "grouped n:m, transposed": lambda: sl.grouped_nm(torch.randn(201, 130), 2, 3, 2).mT,
}


def matrices(layout: sl.LayoutTensor) -> list[torch.Tensor]:
    """The stored entries of each different head as a dense bool matrix."""
    pattern = layout.pattern.to_dense()
    if isinstance(layout, sl.ReorderedTensor):  # drawn as it is stored
        pattern = pattern.index_select(layout.axis, layout.row_order())
    pattern = pattern.flatten(0, -3) if pattern.dim() > 2 else pattern[None]
    own = pattern_of_heads(layout)
    first = {which: head for head, which in reversed(list(enumerate(own)))}
    return [pattern[first[which]] for which in dict.fromkeys(own)]


def order_of_lines(layout: sl.LayoutTensor) -> str:
    """What a picture says of lines that are not in the matrix's own order."""
    if not isinstance(layout, sl.ReorderedTensor):
        return ""
    return f"{'rows' if layout.axis == -2 else 'columns'} in the order in which they are stored"


def cell_size(found: Cells, layout: sl.LayoutTensor) -> tuple[int, int]:
    """How many entries a cell has."""
    if found.of == "entry":
        return found.size
    block = layout.block_size
    if isinstance(layout, sl.ReorderedTensor) and layout.axis == -1:
        block = block[::-1]
    return found.size[0] * block[0], found.size[1] * block[1]


def pooled(stored: torch.Tensor, cell: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Stored and all entries in each cell of `cell` entries, the slow way."""
    rows, columns = (-(-s // c) for s, c in zip(stored.shape, cell, strict=True))
    out = np.zeros((2, rows, columns), np.int64)
    for r in range(rows):
        for c in range(columns):
            part = stored[r * cell[0] : (r + 1) * cell[0], c * cell[1] : (c + 1) * cell[1]]
            out[:, r, c] = int(part.sum()), part.numel()
    return out[0], out[1]


@pytest.mark.parametrize("name", PATTERNS)
def test_cells_hold_what_is_stored(name: str) -> None:
    layout = PATTERNS[name]()
    found = cells_of(layout, 100)
    assert not found.left_out
    assert found.note == order_of_lines(layout)
    expected = matrices(layout)
    panels = [p for p in found.panels if not p.label.startswith("upper left")]
    assert len(panels) == len(expected)
    for panel, stored in zip(panels, expected, strict=True):
        assert max(panel.stored.shape) <= MAX_CELLS
        own, entries = pooled(stored, cell_size(found, layout))
        np.testing.assert_array_equal(panel.stored, own)
        np.testing.assert_array_equal(panel.entries, entries)
    assert bool(lead_of(layout)) == all(panel.label for panel in panels)


@pytest.mark.parametrize("name", PATTERNS)
def test_coarser_cells_hold_the_same(name: str) -> None:
    layout = PATTERNS[name]()
    found = cells_of(layout, 100).coarser()
    for panel, stored in zip(found.panels, matrices(layout), strict=False):
        own, entries = pooled(stored, cell_size(found, layout))
        np.testing.assert_array_equal(panel.stored, own)
        np.testing.assert_array_equal(panel.entries, entries)


@pytest.mark.parametrize("name", [name for name in PATTERNS if "n:m" in name])
def test_the_corner_of_an_nm_layout(name: str) -> None:
    layout = PATTERNS[name]()
    corner = corner_of(layout)
    assert max(corner.shape) <= 32
    stored = matrices(layout)[0][: corner.shape[0], : corner.shape[1]]
    np.testing.assert_array_equal(corner, stored.numpy())
    along = 1 if layout.axis == -1 else 0
    assert corner.shape[along] % layout.m == 0 or corner.shape[along] == layout.shape[-2 + along]


@pytest.mark.parametrize(
    "make",
    [
        lambda: sl.local_stride(4096, block_size=16, local_blocks=2, vert_stride=4, num_heads=2),
        lambda: sl.csr(torch.randn(900, 400), keep=sl.Magnitude(0.2)),
        lambda: sl.sliding_window(4000, block_size=16, window=500),
    ],
)
def test_a_huge_pattern_is_read_in_part_and_says_so(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = make()
    whole = cells_of(layout, 8)
    monkeypatch.setattr(cells_module, "MOST_READ", 1)
    part = cells_of(layout, 8)
    assert "drawn from 1 of the " in part.note
    assert part.note in svg(layout)
    for all_of_it, one_row in zip(whole.panels, part.panels, strict=True):
        assert one_row.entries.sum() < all_of_it.entries.sum()
        assert ((one_row.stored > 0) <= (all_of_it.stored > 0)).all()
        # a row of blocks in the middle of each cell: what is stored there is
        error = abs(one_row.density - all_of_it.density).mean()
        assert error < abs(one_row.density - all_of_it.density[::-1]).mean()


@pytest.mark.parametrize("name", PATTERNS)
def test_picture_is_well_formed_and_takes_the_page_colours(name: str) -> None:
    picture = svg(PATTERNS[name]())
    root = ET.fromstring(picture)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    colours = {e.get(a) for e in root.iter() for a in ("fill", "stroke")} - {None}
    assert colours <= {"currentColor", "none"}


def drawn_cells(picture: str) -> int:
    """How many cells all drawn runs cover."""
    paths = ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}path")
    runs = [run for path in paths for run in path.get("d", "").split("M") if run]
    return sum(int(run.partition("h")[2]) for run in runs)


def test_every_cell_that_stores_something_is_drawn() -> None:
    mask = sl.causal(1024, block_size=16)
    assert drawn_cells(svg(mask)) == 64 * 65 // 2


def test_a_fuller_cell_is_drawn_stronger() -> None:
    blocks = torch.zeros(128, 128, dtype=torch.bool)
    blocks[0, 0] = True  # a quarter of the first cell
    blocks[2:4, 2:4] = True  # all of the second
    paths = list(
        ET.fromstring(svg(sl.bsr_mask(blocks, 16))).iter("{http://www.w3.org/2000/svg}path")
    )
    assert [path.get("d") for path in paths] == ["M0 0h1", "M1 1h1"]
    light, strong = (float(path.get("stroke-opacity", "")) for path in paths)
    assert light < strong == 1


def test_equal_heads_share_a_panel_and_more_than_asked_for_are_counted() -> None:
    mask = sl.local_stride(1024, block_size=16, local_blocks=2, vert_stride=4, num_heads=32)
    found = cells_of(mask, 3)
    assert [p.label for p in found.panels] == [
        "heads 0, 4, 8, 12, ... (8)",
        "heads 1, 5, 9, 13, ... (8)",
        "heads 2, 6, 10, 14, ... (8)",
    ]
    assert found.left_out == 1
    assert "1 more pattern not drawn" in svg(mask, max_panels=3)


def test_caption_is_escaped() -> None:
    picture = svg(sl.causal(64, block_size=16), caption="<script>alert('a & b')</script>")
    assert "<script" not in picture
    assert "a &amp; b" in picture
    ET.fromstring(picture)


def test_a_long_sequence_costs_no_more_than_its_blocks() -> None:
    mask = sl.sliding_window(2**22, block_size=64, window=256)  # 2^44 entries, 2^16 block rows
    start = time.perf_counter()
    picture = svg(mask)
    assert time.perf_counter() - start < 20  # the dense matrix of blocks alone has 2^32 cells
    assert len(picture) < 20_000


@pytest.mark.parametrize("heads", [1, 8])
def test_the_worst_pattern_is_drawn_coarser(heads: int) -> None:
    draw = torch.rand(heads, 640, 640)
    # every cell another shade than its neighbours, in every head
    picture = svg(sl.bsr_mask(draw < torch.rand(heads, 640, 640) ** 2, 16))
    assert len(picture) < 50_000
    assert ("20 x 20 blocks" in picture) == (heads == 8)
    assert len(svg(sl.bsr_mask(draw < 0.3, 16), max_bytes=10_000)) < 12_000


class Diagonal(sl.LayoutTensor):
    """A layout that is known by its dense matrix alone."""

    fields = ("entries",)

    def to_dense_entries(self) -> torch.Tensor:
        return torch.diag(self.inner_entries)


def test_another_layout_is_drawn_by_way_of_its_dense_matrix() -> None:
    layout = Diagonal(torch.ones(100), shape=(100, 100))
    found = cells_of(layout, 8)
    assert found.unit == "a cell is 2 x 2 entries"
    np.testing.assert_array_equal(found.panels[0].density, 0.5 * np.eye(50))
    assert drawn_cells(svg(layout)) == 50


def test_errors_say_what_was_expected() -> None:
    with pytest.raises(TypeError, match="expected a layout, got Tensor"):
        svg(torch.eye(4))  # type: ignore[arg-type]
    large = Diagonal(torch.ones(4096), shape=(4096, 4096))
    with pytest.raises(ValueError, match="up to 4194304 entries; this one has 16777216"):
        svg(large)
    with pytest.raises(ValueError, match="on the meta device has no pattern"):
        svg(sl.causal(64, block_size=16).to("meta"))
