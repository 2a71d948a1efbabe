"""A picture of a pattern as SVG: at most 64 x 64 shaded cells a head, whatever the size."""

from __future__ import annotations

import html
import itertools

import numpy as np

from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.viewing.cells import MAX_CELLS, Cells, Panel, cells_of

SHADES = 8
PANEL_PX = 192
LABEL_PX = 16
GAP_PX = 16
PANELS_IN_A_ROW = 4
FEWEST_CELLS = 16
RUN_BYTES = 8  # of "M12 34h5"
# What is larger is drawn with coarser cells: a notebook keeps every picture it shows.
MAX_BYTES = 40_000


def svg(
    layout: LayoutTensor,
    *,
    caption: str | None = None,
    max_panels: int = 8,
    max_cells: int = MAX_CELLS,
    max_bytes: int = MAX_BYTES,
) -> str:
    """The pattern as an inline `<svg>`: the fuller a cell, the stronger; a panel a different head.

    A cell is one block, several where there are more than `max_cells` block rows or columns, one
    entry where there are at most so many entries, and larger still where the picture would be
    longer than `max_bytes`. Shades are relative to the fullest cell; that, what a cell is and what
    is left out stand below, after `caption` (by default the layout's sizes). Lines and text take
    the text colour of the page around it, so that it fits a light and a dark one. Heads with the
    same pattern share a panel; `max_panels` are drawn. Costs O(stored blocks of these), of at most
    a million.

    Raises `TypeError` for what is no layout and `ValueError` for a layout without lists that is too
    large to be drawn densely.

    >>> import sparse_layouts as sl
    >>> from sparse_layouts.viewing.pattern_picture import svg
    >>> svg(sl.causal(4096, block_size=64))[:4]
    '<svg'
    """
    if not isinstance(layout, LayoutTensor):
        raise TypeError(f"svg: expected a layout, got {type(layout).__name__}")
    cells = cells_of(layout, max(1, max_panels), max_cells)
    while _length(cells) > max_bytes and _widest(cells) > FEWEST_CELLS:
        cells = cells.coarser()
    return _draw(cells, _caption(layout, cells, caption))


def _length(cells: Cells) -> int:
    """About as many bytes as the picture will have."""
    fullest = _fullest(cells)
    return sum(RUN_BYTES * len(_runs(p.density, fullest)[0]) for p in cells.panels) + 2000


def _widest(cells: Cells) -> int:
    return max((max(p.stored.shape) for p in cells.panels), default=0)


def _fullest(cells: Cells) -> float:
    return max((float(p.density.max()) for p in cells.panels if p.stored.size), default=0.0)


def _caption(layout: LayoutTensor, cells: Cells, caption: str | None) -> str:
    if caption is None:
        shape = " x ".join(map(str, layout.shape))
        caption = f"{type(layout).__name__} {shape}, density {layout.density:.2%}"
    fullest = _fullest(cells)
    shades = f"the fullest one {fullest:.0%} stored" if fullest else "nothing is stored"
    said = [caption, f"{cells.unit}, {shades}"]
    if cells.left_out:
        plural = "s" if cells.left_out > 1 else ""
        said.append(f"{cells.left_out} more pattern{plural} not drawn")
    return "; ".join(each for each in (*said, cells.note) if each)


def _draw(cells: Cells, caption: str) -> str:
    panels, fullest = cells.panels, _fullest(cells)
    labelled = any(p.label for p in panels)
    top = LABEL_PX if labelled else 0
    sizes = [_panel_px(p) for p in panels]
    per_row = min(PANELS_IN_A_ROW, max(1, len(panels)))
    step_x = max((w for w, _ in sizes), default=0) + GAP_PX
    step_y = max((h for _, h in sizes), default=0) + GAP_PX + top
    lines = _wrapped(caption, max(48, per_row * step_x // 6))
    grid_height = -(-len(panels) // per_row) * step_y
    width = max(per_row * step_x - GAP_PX, 6 * max(map(len, lines), default=0)) + 2
    height = grid_height + LABEL_PX * len(lines)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width}" height="{height}" '
        f'viewBox="-1 -1 {width} {height}" fill="currentColor" font-family="sans-serif" '
        f'font-size="11" style="max-width:100%;height:auto"><title>{html.escape(caption)}</title>'
    ]
    for i, (panel, (w, h)) in enumerate(zip(panels, sizes, strict=True)):
        x, y = i % per_row * step_x, i // per_row * step_y
        parts.append(f'<g transform="translate({x},{y})">')
        if labelled:
            parts.append(f'<text y="{LABEL_PX - 5}">{html.escape(panel.label)}</text>')
        rows, columns = panel.stored.shape
        if rows and columns:
            parts.append(
                f'<g transform="translate(0,{top}) scale({w / columns:.5g},{h / rows:.5g}) '
                'translate(0,.5)" fill="none" stroke="currentColor" shape-rendering="crispEdges">'
            )
            parts += _paths(panel.density, fullest)
            parts.append("</g>")
        parts.append(
            f'<rect y="{top}" width="{w}" height="{h}" fill="none" stroke="currentColor" '
            'stroke-opacity=".5"/></g>'
        )
    for i, line in enumerate(lines):
        parts.append(f'<text y="{grid_height + LABEL_PX * i}">{html.escape(line)}</text>')
    return "".join(parts) + "</svg>"


def _panel_px(panel: Panel) -> tuple[int, int]:
    """Width and height: the longer side is `PANEL_PX`, the other in proportion, never a hair."""
    rows, columns = panel.stored.shape
    longer = max(rows, columns, 1)
    return max(4, round(PANEL_PX * columns / longer)), max(4, round(PANEL_PX * rows / longer))


def _wrapped(text: str, width: int) -> list[str]:
    lines: list[str] = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines


def _runs(density: np.ndarray, fullest: float) -> tuple[np.ndarray, ...]:
    """Shade (1 to `SHADES`), row, first column and length of every run of equal cells in a row that
    store something, by shade.
    """
    shades = np.ceil(density / max(fullest, 1e-300) * SHADES - 1e-9).clip(0, SHADES).astype(int)
    rows, columns = shades.shape
    begins = np.ones((rows, columns + 1), bool)  # the last column: where the last run has ended
    begins[:, 1:-1] = shades[:, 1:] != shades[:, :-1]
    row, column = begins.nonzero()
    length = np.diff(column, append=0)
    inside = column < columns
    row, column, length = row[inside], column[inside], length[inside]
    shade = shades[row, column]
    order = np.argsort(shade, kind="stable")
    order = order[shade[order] > 0]
    return shade[order], row[order], column[order], length[order]


def _paths(density: np.ndarray, fullest: float) -> list[str]:
    """One path for each shade; a run of equal cells is one line, as thick as a cell."""
    shade, *places = _runs(density, fullest)
    lines = [f"M{c} {r}h{n}" for r, c, n in zip(*(each.tolist() for each in places), strict=True)]
    edges = np.searchsorted(shade, np.arange(1, SHADES + 2))
    return [
        f'<path stroke-opacity="{0.12 + 0.88 * (i + 1) / SHADES:.2f}" '
        f'd="{"".join(lines[start:stop])}"/>'
        for i, (start, stop) in enumerate(itertools.pairwise(edges.tolist()))
        if start < stop
    ]
