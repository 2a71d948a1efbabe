"""The SVG of a pattern: its cells are right, it is capped, well-formed and safe in a page."""

from __future__ import annotations

import time
import xml.etree.ElementTree as ET
from collections.abc import Callable

import pytest
import torch

import sparse_layouts as sl
from sparse_layouts.pattern_picture import MAX_CELLS, panels_of, svg

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
    "nothing stored": lambda: sl.bsr(torch.zeros(128, 128), 16),
    "no entries": lambda: sl.bsr_mask(torch.zeros(0, 3, dtype=torch.bool), 16),
}


def pooled(stored: torch.Tensor, rows: int, columns: int, cell: tuple[int, int]) -> torch.Tensor:
    """The share of stored entries in each cell of `cell` entries, the slow way."""
    out = torch.zeros(rows, columns, dtype=torch.float64)
    for r in range(rows):
        for c in range(columns):
            part = stored[r * cell[0] : (r + 1) * cell[0], c * cell[1] : (c + 1) * cell[1]]
            out[r, c] = part.double().mean()
    return out


@pytest.mark.parametrize("name", PATTERNS)
def test_cells_hold_the_share_of_stored_entries(name: str) -> None:
    layout = PATTERNS[name]()
    panels, more, unit = panels_of(layout, 100)
    assert not more
    pattern = (
        layout.pattern.to_dense().flatten(0, -3)
        if layout.dim() > 2
        else layout.pattern.to_dense()[None]
    )
    lead = layout.block_pattern.lead
    which = layout.block_pattern.head_map
    first = list(dict.fromkeys(range(len(pattern)) if which is None else which.tolist()))
    assert len(panels) == len(first)
    own = list(range(len(pattern))) if which is None else which.tolist()
    for panel, each in zip(panels, first, strict=True):
        rows, columns = panel.density.shape
        assert max(rows, columns) <= MAX_CELLS
        if not rows or not columns:
            continue
        m, n = layout.shape[-2:]
        if unit == "a cell is an entry":
            cell = (1, 1)
        else:
            grid, block = layout.block_pattern.grid, layout.block_size
            cell = tuple(b * -(-g // MAX_CELLS) for g, b in zip(grid, block, strict=True))
        assert (rows, columns) == (-(-m // cell[0]), -(-n // cell[1]))
        expected = pooled(pattern[own.index(each)], rows, columns, cell)
        torch.testing.assert_close(panel.density, expected)
    assert bool(lead) == all(panel.label for panel in panels)


@pytest.mark.parametrize("name", PATTERNS)
def test_picture_is_well_formed_and_takes_the_page_colours(name: str) -> None:
    picture = svg(PATTERNS[name]())
    root = ET.fromstring(picture)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    colours = {e.get(a) for e in root.iter() for a in ("fill", "stroke")} - {None}
    assert colours <= {"currentColor", "none"}


def rectangles(picture: str) -> float:
    """The area of all drawn runs, in cells."""
    paths = ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}path")
    runs = [run for path in paths for run in path.get("d", "").split("z") if run]
    return sum(float(run.partition("h")[2].partition("v")[0]) for run in runs)


def test_every_cell_that_stores_something_is_drawn() -> None:
    mask = sl.causal(1024, block_size=16)
    assert rectangles(svg(mask)) == 64 * 65 // 2


def test_equal_heads_share_a_panel_and_more_than_asked_for_are_counted() -> None:
    mask = sl.local_stride(1024, block_size=16, local_blocks=2, vert_stride=4, num_heads=32)
    panels, more, _ = panels_of(mask, 3)
    assert [p.label for p in panels] == [
        "heads 0, 4, 8, 12, ... (8)",
        "heads 1, 5, 9, 13, ... (8)",
        "heads 2, 6, 10, 14, ... (8)",
    ]
    assert more == 1
    assert "1 more patterns not drawn" in svg(mask, max_panels=3)


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


def test_the_worst_pattern_stays_small() -> None:
    chequered = (torch.arange(64)[:, None] + torch.arange(64)) % 2 == 0
    assert len(svg(sl.bsr_mask(chequered, 16))) < 64 * 64 * 16


class Diagonal(sl.LayoutTensor):
    """A layout that is no block layout."""

    fields = ("entries",)

    def to_dense_entries(self) -> torch.Tensor:
        return torch.diag(self.inner_entries)


def test_another_layout_is_drawn_by_way_of_its_dense_matrix() -> None:
    layout = Diagonal(torch.ones(100), shape=(100, 100))
    panels, _, unit = panels_of(layout, 8)
    assert unit == "a cell is 2 x 2 entries"
    torch.testing.assert_close(panels[0].density, 0.5 * torch.eye(50, dtype=torch.float64))
    assert rectangles(svg(layout)) == 50


def test_errors_say_what_was_expected() -> None:
    with pytest.raises(TypeError, match="expected a layout, got Tensor"):
        svg(torch.eye(4))  # type: ignore[arg-type]
    large = Diagonal(torch.ones(4096), shape=(4096, 4096))
    with pytest.raises(ValueError, match="up to 4194304 entries; this one has 16777216"):
        svg(large)
