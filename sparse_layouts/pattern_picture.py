"""A picture of a pattern as SVG: at most 64 x 64 shaded cells a head, whatever the size."""

from __future__ import annotations

import html
import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_layouts.block_pattern import BlockPattern, tile_table
from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.layout_tensor import LayoutTensor

MAX_CELLS = 64
SHADES = 8
PANEL_PX = 192
LABEL_PX = 16
GAP_PX = 16
PANELS_IN_A_ROW = 4
# What a layout that is no block layout may have at most: it is drawn by way of its dense matrix.
MAX_DENSE_ENTRIES = 2**22


class Panel(NamedTuple):
    """One matrix of the picture: what stands above it, how full each cell is (0 to 1)."""

    label: str
    density: Tensor


def svg(layout: LayoutTensor, *, caption: str | None = None, max_panels: int = 8) -> str:
    """The pattern as an inline `<svg>`: the fuller a cell, the stronger; a panel a different head.

    A cell is one block, several where there are more than 64 block rows or columns, one entry where
    there are at most 64 entries. Shades are relative to the fullest cell, which the caption (by
    default the layout's sizes) names. Lines and text take the text colour of the page around it, so
    that it fits a light and a dark one. Heads with the same pattern share a panel; `max_panels` are
    drawn. Costs O(stored blocks of these).

    Raises `TypeError` for what is no layout and `ValueError` for a layout without blocks that is
    too large to be drawn densely.

    >>> import sparse_layouts as sl
    >>> from sparse_layouts.pattern_picture import svg
    >>> svg(sl.causal(4096, block_size=64))[:4]
    '<svg'
    """
    if not isinstance(layout, LayoutTensor):
        raise TypeError(f"svg: expected a layout, got {type(layout).__name__}")
    panels, more, unit = panels_of(layout, max(1, max_panels))
    fullest = max((float(p.density.max()) for p in panels if p.density.numel()), default=0.0)
    if caption is None:
        shades = f"the fullest one {fullest:.0%} stored" if fullest else "nothing is stored"
        caption = f"{_title(layout)}; {unit}, {shades}"
    if more:
        caption += f"; {more} more patterns not drawn"
    return _draw(panels, fullest, caption)


def _title(layout: LayoutTensor) -> str:
    shape = " x ".join(map(str, layout.shape))
    return f"{type(layout).__name__} {shape}, density {layout.density:.2%}"


def panels_of(layout: LayoutTensor, max_panels: int) -> tuple[list[Panel], int, str]:
    """The panels, how many patterns are left out, and what one cell is, in words."""
    if not isinstance(layout, BSRTensor):
        return _dense_panels(layout, max_panels)
    p = layout.block_pattern
    which = list(range(p.num_patterns)) if p.head_map is None else p.head_map.tolist()
    shown = list(dict.fromkeys(which))
    labels = [_label([i for i, w in enumerate(which) if w == each], p.lead) for each in shown]
    shown, labels, more = shown[:max_panels], labels[:max_panels], max(0, len(shown) - max_panels)
    if max(p.shape) <= MAX_CELLS:
        cells = [_entries(p, each) for each in shown]
        unit = "a cell is an entry"
    else:
        group = (_group(p.grid[0]), _group(p.grid[1]))
        cells = [_binned(p, each, group) for each in shown]
        unit = "a cell is a block"
        if group != (1, 1):
            unit = f"a cell is {group[0]} x {group[1]} blocks"
    return [Panel(n, c) for n, c in zip(labels, cells, strict=True)], more, unit


def _dense_panels(layout: LayoutTensor, max_panels: int) -> tuple[list[Panel], int, str]:
    if layout.shape.numel() > MAX_DENSE_ENTRIES:
        raise ValueError(
            f"svg: a {type(layout).__name__} is drawn by way of its dense matrix, which may have "
            f"up to {MAX_DENSE_ENTRIES} entries; this one has {layout.shape.numel()}"
        )
    dense = (layout.detach().to_dense() != 0).float()
    lead = tuple(dense.shape[:-2])
    m, n = dense.shape[-2:]
    (rows, a), (columns, b) = ((math.ceil(s / _group(s)), _group(s)) for s in (m, n))
    padded = torch.nn.functional.pad(dense, (0, columns * b - n, 0, rows * a - m))
    sums = padded.reshape(-1, rows, a, columns, b).sum((2, 4)).double()
    cells = sums / (_sizes(m, a, rows)[:, None] * _sizes(n, b, columns)).to(sums.device)
    panels = [Panel(_label([i], lead), c.cpu()) for i, c in enumerate(cells[:max_panels])]
    unit = "a cell is an entry" if (a, b) == (1, 1) else f"a cell is {a} x {b} entries"
    return panels, max(0, len(cells) - max_panels), unit


def _label(indices: list[int], lead: tuple[int, ...]) -> str:
    """ "head 3", "heads 0, 4, 8, ... (32)"; "" for a single matrix."""
    if not lead:
        return ""
    if len(lead) == 1:
        names = [str(i) for i in indices]
    else:
        names = [str(tuple(int(x) for x in _unravel(i, lead))) for i in indices]
    word = "head" if len(lead) == 1 else "index"
    if len(names) == 1:
        return f"{word} {names[0]}"
    plural = "heads" if len(lead) == 1 else "indices"
    few = 4 if len(lead) == 1 else 2
    text = ", ".join(names[:few])
    return f"{plural} {text}" + (f", ... ({len(names)})" if len(names) > few else "")


def _unravel(index: int, lead: tuple[int, ...]) -> list[int]:
    out: list[int] = []
    for size in reversed(lead):
        out.insert(0, index % size)
        index //= size
    return out


def _group(count: int) -> int:
    """How many rows share a cell, so that there are at most `MAX_CELLS` cells."""
    return max(1, -(-count // MAX_CELLS))


def _sizes(total: int, step: int, parts: int) -> Tensor:
    """float64 (parts,): the lengths of pieces of `total` cut into steps, the last one shorter."""
    at = torch.arange(parts, dtype=torch.float64) * step
    return (total - at).clamp(max=step)


def _blocks_of(p: BlockPattern, which: int) -> tuple[Tensor, Tensor, Tensor]:
    """Block row, block column and bit tile (0: full) of the blocks of one pattern, int64."""
    crow = p.crow_indices[which].long()
    first, last = int(crow[0]), int(crow[-1])
    rows = torch.arange(p.grid[0], device=p.device).repeat_interleave(crow.diff())
    columns = p.col_indices[first:last].long()
    if p.block_tiles is None:
        return rows, columns, torch.zeros_like(rows)
    slots = torch.arange(first, last, device=p.device)
    if p.row_slots is not None:
        slots = p.row_slots[first:last].long()
    return rows, columns, p.block_tiles[slots].long()


def _binned(p: BlockPattern, which: int, group: tuple[int, int]) -> Tensor:
    """(rows, columns) of one pattern's cells of `group` blocks: stored entries over all entries."""
    (m, n), (bm, bn), (mb, nb) = p.shape, p.block_size, p.grid
    rows, columns, tile = _blocks_of(p, which)
    # a block over the edge stores what its tile has inside: (at the bottom?, at the right?, tile)
    table = tile_table(p)
    inside = torch.stack(
        [
            torch.stack([table[:, :h, :w].sum((1, 2)) for w in (bn, n - (nb - 1) * bn)])
            for h in (bm, m - (mb - 1) * bm)
        ]
    )
    entries = inside[(rows == mb - 1).long(), (columns == nb - 1).long(), tile].double()
    cells_m, cells_n = -(-mb // group[0]), -(-nb // group[1])
    cells = torch.zeros(cells_m * cells_n, dtype=torch.float64, device=p.device)
    cells.index_add_(0, (rows // group[0]) * cells_n + columns // group[1], entries)
    area = _sizes(m, group[0] * bm, cells_m)[:, None] * _sizes(n, group[1] * bn, cells_n)
    return cells.view(cells_m, cells_n).cpu() / area


def _entries(p: BlockPattern, which: int) -> Tensor:
    """(M, N) of a small matrix: 1 where an entry is stored."""
    (m, n), (bm, bn), (mb, nb) = p.shape, p.block_size, p.grid
    rows, columns, tile = _blocks_of(p, which)
    out = torch.zeros(mb, nb, bm, bn, dtype=torch.float64, device=p.device)
    out[rows, columns] = tile_table(p)[tile].double()
    return out.transpose(1, 2).reshape(mb * bm, nb * bn)[:m, :n].cpu()


def _draw(panels: list[Panel], fullest: float, caption: str) -> str:
    labelled = any(p.label for p in panels)
    top = LABEL_PX if labelled else 0
    sizes = [_panel_px(p.density) for p in panels]
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
        rows, columns = panel.density.shape
        if rows and columns:
            parts.append(
                f'<g transform="translate(0,{top}) scale({w / columns:.4g},{h / rows:.4g})">'
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


def _panel_px(density: Tensor) -> tuple[int, int]:
    """Width and height: the longer side is `PANEL_PX`, the other in proportion, never a hair."""
    rows, columns = density.shape
    longer = max(rows, columns, 1)
    return tuple(max(4, round(PANEL_PX * s / longer)) for s in (columns, rows))  # type: ignore[return-value]


def _wrapped(text: str, width: int) -> list[str]:
    lines: list[str] = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines


def _paths(density: Tensor, fullest: float) -> list[str]:
    """One path for each shade; equal cells side by side in a row are one rectangle."""
    if fullest <= 0:
        return []
    shades = torch.ceil(density / fullest * SHADES - 1e-9).clamp(0, SHADES).int().tolist()
    runs: dict[int, list[str]] = {}
    for r, row in enumerate(shades):
        start = 0
        while start < len(row):
            stop = start + 1
            while stop < len(row) and row[stop] == row[start]:
                stop += 1
            if row[start]:
                length = stop - start
                runs.setdefault(row[start], []).append(f"M{start} {r}h{length}v1h-{length}z")
            start = stop
    return [
        f'<path fill-opacity="{0.12 + 0.88 * shade / SHADES:.2f}" d="{"".join(each)}"/>'
        for shade, each in sorted(runs.items())
    ]
