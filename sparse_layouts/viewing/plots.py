"""`layout.plot()`: patterns, magnitudes, n:m groups and counts, drawn with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from sparse_layouts.bsr_tensor import BSRTensor
from sparse_layouts.entry_lists import entries_of, lead_of
from sparse_layouts.layout_tensor import LayoutTensor
from sparse_layouts.viewing import entry_cells, figures
from sparse_layouts.viewing.causality import is_causal
from sparse_layouts.viewing.cells import cells_of, corner_of, group_of
from sparse_layouts.viewing.extras import needed
from sparse_layouts.viewing.head_names import head_names

SHOWS = ("pattern", "magnitude", "count", "groups")
PANELS_IN_A_ROW = 4


class Drawing(NamedTuple):
    """What is drawn: a name and cells for each panel, their colours, what has to be said."""

    names: list[str]
    cells: list[np.ndarray]
    shape: tuple[int, int]
    how: dict[str, Any]
    bar: str
    note: str
    groups: tuple[int, int] = (0, 0)  # a line after so many rows and columns; 0: none


def plot(
    layout: LayoutTensor,
    *,
    show: str | None = None,
    heads: int | Sequence[int] | None = None,
    max_panels: int = 8,
    max_cells: int = 256,
    causal_edge: bool | None = None,
    title: str | None = None,
) -> Any:
    """Draws a layout with matplotlib (extra `viz`) and returns the figure.

    `show` is what colours mean: `"pattern"`, the stored share of a cell; `"magnitude"`, the mean
    magnitude of its stored entries (over a batch, too); `"count"`, how often a block counts in a
    softmax; `"groups"`, the entries of an n:m layout by their place in the group. The default is
    "count" where a block counts more than once, "groups" for n:m layouts, else "pattern".
    A panel is a different head, `max_panels` of them, or those that `heads` names, counted along
    the flattened leading dimensions. Cells are entries where there are up to `max_cells` rows and
    columns, else several of them; what stores more than four million entries is drawn in whole
    blocks, a huge pattern from part of its rows, and a line below the panels says so. Axes count
    tokens (of a mask) or rows and columns. `causal_edge` draws the line that a causal mask ends at;
    the default is to draw it for causal masks.

    Raises `ModuleNotFoundError` that names the pip command without matplotlib, `TypeError` for what
    is no layout, `ValueError` for an unknown `show` or one that the layout has nothing for, heads
    out of range, and magnitudes of more than four million single entries.

    >>> import torch, sparse_layouts as sl
    >>> from sparse_layouts.viewing.plots import plot
    >>> figure = plot(sl.bigbird(512, block_size=32, source="hf-eval"), show="count")
    >>> figure.axes[0].get_xlabel()
    'key token'
    """
    if not isinstance(layout, LayoutTensor):
        raise TypeError(f"plot: expected a layout, got {type(layout).__name__}")
    for name, least in (("max_panels", max_panels), ("max_cells", max_cells)):
        if least < 1:
            raise ValueError(f"plot: expected {name} of at least 1, got {least}")
    needed("matplotlib", "plot")
    show = _checked_show(layout, show)
    chosen = _checked_heads(layout, heads)
    if show == "groups":
        drawing = _drawing_of_groups(layout)
    else:
        drawing = _drawing(layout, show, chosen, max_panels, max_cells)
    wanted = causal_edge
    if wanted is None:
        wanted = show != "groups" and _is_mask(layout) and bool(drawing.cells) and is_causal(layout)
    return _figure(layout, drawing, wanted, title)


def _is_mask(layout: LayoutTensor) -> bool:
    return layout.dtype == torch.bool


def _checked_show(layout: LayoutTensor, show: str | None) -> str:
    counted = isinstance(layout, BSRTensor) and layout.block_pattern.block_counts is not None
    grouped = hasattr(layout, "n") and hasattr(layout, "m")
    if show is None:
        return "count" if counted else "groups" if grouped else "pattern"
    if show not in SHOWS:
        raise ValueError(f"plot: expected show to be one of {', '.join(SHOWS)}, got {show!r}")
    kind = type(layout).__name__
    if show == "magnitude" and _is_mask(layout):
        raise ValueError(f"plot: show='magnitude' is for values, and this {kind} is a mask")
    if show == "count" and not counted:
        raise ValueError(f"plot: show='count' is for counted blocks; this {kind} counts each once")
    if show == "groups" and not grouped:
        raise ValueError(f"plot: show='groups' is for n:m layouts, not for a {kind}")
    return show


def _checked_heads(layout: LayoutTensor, heads: int | Sequence[int] | None) -> list[int] | None:
    if heads is None:
        return None
    chosen = [heads] if isinstance(heads, int) else list(heads)
    count = math.prod(lead_of(layout))
    for head in chosen:
        if not isinstance(head, int) or isinstance(head, bool) or not 0 <= head < count:
            raise ValueError(f"plot: expected heads from 0 to {count - 1}, got {head!r}")
    return chosen


def _panels_of(
    layout: LayoutTensor, heads: list[int] | None, max_panels: int
) -> tuple[list[str], list[int], str]:
    """The names of the panels, the pattern of each, and what is left out, in words."""
    own, lead = entry_cells.pattern_of_heads(layout), lead_of(layout)
    if heads is not None:
        named = [(head_names([h], lead), own[h]) for h in heads]
    else:
        different = dict.fromkeys(own)
        named = [(head_names([h for h, w in enumerate(own) if w == d], lead), d) for d in different]
    more = len(named) - max_panels
    said = f"{more} more pattern{'s' if more > 1 else ''} not drawn" if more > 0 else ""
    named = named[:max_panels]
    return [name for name, _ in named], [which for _, which in named], said


def _drawing(
    layout: LayoutTensor, show: str, heads: list[int] | None, max_panels: int, max_cells: int
) -> Drawing:
    listed = entry_cells.listed_entries(layout)
    many = listed > entry_cells.MOST_ENTRIES
    if many and not isinstance(layout, BSRTensor) and show != "pattern":
        raise ValueError(
            f"plot: {show}s of up to {entry_cells.MOST_ENTRIES} stored entries of a "
            f"{type(layout).__name__} can be drawn, here are {listed}; draw a slice, such as "
            "w[:4096, :4096], or show='pattern'"
        )
    if many and show == "pattern" and heads is None:
        return _drawing_of_many(layout, max_panels, max_cells)
    names, patterns, left_out = _panels_of(layout, heads, max_panels)
    m, n = layout.matrix_shape
    if many:
        assert isinstance(layout, BSRTensor)
        grid, of = layout.block_pattern.grid, "blocks"
        cell = (group_of(grid[0], max_cells), group_of(grid[1], max_cells))
        made = entry_cells.block_grids(layout, patterns, cell, show)
    else:
        entries, weight, of = entries_of(layout), None, "entries"
        cell = (group_of(m, max_cells), group_of(n, max_cells))
        if show == "magnitude":
            weight = entry_cells.magnitudes(layout, entries)
        elif show == "count":
            assert isinstance(layout, BSRTensor)
            weight = entry_cells.counts(layout, entries)
        made = entry_cells.grids(entries, patterns, cell, weight)
    unit = "" if (cell, of) == ((1, 1), "entries") else f"a cell is {cell[0]} x {cell[1]} {of}"
    said = "; ".join(each for each in (unit, left_out) if each)
    if show == "pattern":
        cells = [_shares(each.stored, each.entries) for each in made]
        return Drawing(names, cells, (m, n), _shade(cells), "stored share of a cell", said)
    cells = [each.mean_weight for each in made]
    finite = [c for c in cells if np.isfinite(c).any()]
    most = max((float(np.nanmax(c)) for c in finite), default=1.0)
    if show == "magnitude":
        how = {"cmap": figures.VALUE_MAP, "vmin": 0.0, "vmax": most or 1.0}
        return Drawing(names, cells, (m, n), how, "mean magnitude of stored entries", said)
    how = _numbered(1, math.ceil(most))
    return Drawing(names, cells, (m, n), how, "times a block counts", said)


def _drawing_of_groups(layout: Any) -> Drawing:
    """The first entries of an n:m layout, each coloured by its place in its group."""
    stored = corner_of(layout) if math.prod(layout.shape) else np.zeros((0, 0), bool)
    along_columns = layout.axis == -1  # groups run along a row
    place = np.arange(stored.shape[along_columns]) % layout.m
    place = place if along_columns else place[:, None]
    cells = np.where(stored, place, np.nan)
    rows, columns = stored.shape
    return Drawing(
        [f"upper left {rows} x {columns} entries"],
        [cells],
        (rows, columns),
        _numbered(0, layout.m - 1),
        "place in the group",
        f"lines between groups of {layout.m}, of each of which {layout.n} are stored",
        (0, layout.m) if along_columns else (layout.m, 0),
    )


def _drawing_of_many(layout: LayoutTensor, max_panels: int, max_cells: int) -> Drawing:
    """The pattern alone, in whole blocks, without listing its entries."""
    found = cells_of(layout, max_panels, max_cells)
    said = [found.unit, found.note]
    if found.left_out:
        said.insert(1, f"{found.left_out} more patterns not drawn")
    cells = [_shares(panel.stored, panel.entries) for panel in found.panels]
    return Drawing(
        [panel.label for panel in found.panels],
        cells,
        layout.matrix_shape,
        _shade(cells),
        "stored share of a cell",
        "; ".join(each for each in said if each),
    )


def _shares(stored: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """The stored share of every cell, NaN where nothing is stored."""
    return np.where(stored > 0, stored / np.maximum(entries, 1), np.nan)


def _shade(cells: list[np.ndarray]) -> dict[str, Any]:
    top = max((float(np.nanmax(c)) for c in cells if np.isfinite(c).any()), default=1.0)
    return {"cmap": figures.pattern_map(), "vmin": 0.0, "vmax": top}


def _numbered(low: int, high: int) -> dict[str, Any]:
    """One colour for each number from `low` to `high`."""
    from matplotlib.colors import BoundaryNorm

    return {
        "cmap": figures.VALUE_MAP,
        "norm": BoundaryNorm(np.arange(low - 0.5, high + 1), 256),
    }


def _figure(layout: LayoutTensor, drawing: Drawing, causal_edge: bool, title: str | None) -> Any:
    count = max(1, len(drawing.cells))
    columns = min(count, PANELS_IN_A_ROW)
    rows = -(-count // columns)
    size = figures.PANEL_INCHES
    figure = figures.new_figure(
        "plot", max(4.2, columns * size + 1.2), max(3.6, rows * (size + 0.4) + 0.9)
    )
    names = ("query token", "key token") if _is_mask(layout) else ("row", "column")
    axes = figures.panels(figure, count, PANELS_IN_A_ROW)
    image = edge = None
    for place, (name, cells) in enumerate(zip(drawing.names, drawing.cells, strict=True)):
        if cells.size:
            image = figures.draw_matrix(axes[place], cells, drawing.shape, names, **drawing.how)
        if causal_edge:
            edge = figures.draw_causal_edge(axes[place], drawing.shape)
        figures.draw_group_lines(axes[place], drawing.shape, drawing.groups)
        axes[place].set_title(name, fontsize="medium")
        axes[place].label_outer()
    if image is not None:
        bar = figure.colorbar(image, ax=axes, label=drawing.bar, shrink=0.8)
        if "norm" in drawing.how:
            bar.set_ticks(drawing.how["norm"].boundaries[:-1] + 0.5)
    if edge is not None:
        figure.legend(handles=[edge], loc="outside lower right", frameon=False, fontsize="small")
    if title is None:
        shape = " x ".join(map(str, layout.shape))
        title = f"{type(layout).__name__} {shape}, density {layout.density:.2%}"
    figure.suptitle(title)
    figures.note(figure, drawing.note)
    return figure
