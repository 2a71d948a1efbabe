"""What all figures share: making one, colours that colour-blind readers tell apart, axes in tokens.

matplotlib is imported when a figure is first made.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparse_layouts.viewing.extras import needed

# Okabe and Ito's colours, https://jfly.uni-koeln.de/color/, without its yellow, too pale for a line
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
EDGE = "#D55E00"
VALUE_MAP = "cividis"
PANEL_INCHES = 2.6
WRITES_FILES = ("agg", "cairo", "pdf", "pgf", "ps", "svg", "template")


def pattern_map() -> Any:
    """Blues that begin at one that is seen: what stores nothing stays white."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["Blues"](np.linspace(0.2, 1, 256)), "stored")


def new_figure(what: str, width: float, height: float) -> Any:
    """An empty figure of so many inches; `what` needs matplotlib, or raises
    `ModuleNotFoundError` with the pip command.
    """
    pyplot = needed("matplotlib.pyplot", what)
    figure = pyplot.figure(figsize=(width, height), layout="constrained")
    backend = needed("matplotlib", what).get_backend().lower()
    if backend in WRITES_FILES or "inline" in backend:
        pyplot.close(figure)  # returned, and so shown once; nothing is kept open
    return figure


def panels(figure: Any, count: int, in_a_row: int) -> list[Any]:
    """`count` axes, `in_a_row` of them beside each other."""
    columns = min(count, in_a_row)
    grid = figure.subplots(-(-count // columns), columns, squeeze=False).flatten()
    for left_over in grid[count:]:
        left_over.set_axis_off()
    return list(grid[:count])


def draw_matrix(
    axes: Any, cells: np.ndarray, shape: tuple[int, int], names: tuple[str, str], **how: Any
) -> Any:
    """Cells (rows, columns) as an image whose axes count the matrix's rows and columns; `names` are
    those of the vertical and the horizontal axis.
    """
    from matplotlib.ticker import MaxNLocator

    m, n = shape
    image = axes.imshow(
        np.ma.masked_invalid(cells),
        extent=(0, max(n, 1), max(m, 1), 0),
        interpolation="nearest",
        aspect="equal" if 0.2 < m / max(n, 1) < 5 else "auto",
        **how,
    )
    axes.set_ylabel(names[0])
    axes.set_xlabel(names[1])
    for axis, is_short in ((axes.xaxis, m > 2 * n), (axes.yaxis, n > 4 * m)):
        axis.set_major_locator(MaxNLocator(2 if is_short else 4, integer=True))
    return image


def draw_causal_edge(axes: Any, shape: tuple[int, int]) -> Any:
    """The line on and below which a causal mask stores."""
    end = min(shape)
    (line,) = axes.plot([0, end], [0, end], color=EDGE, linewidth=1.2, label="causal edge")
    axes.set_xlim(0, max(shape[1], 1))
    axes.set_ylim(max(shape[0], 1), 0)
    return line


def draw_group_lines(axes: Any, shape: tuple[int, int], every: tuple[int, int]) -> None:
    """A thin line after every so many rows and columns; 0: none."""
    m, n = shape
    if every[0]:
        axes.hlines(np.arange(0, m + 1, every[0]), 0, n, color="0.6", linewidth=0.5)
    if every[1]:
        axes.vlines(np.arange(0, n + 1, every[1]), 0, m, color="0.6", linewidth=0.5)


def note(figure: Any, text: str) -> None:
    """A small line below everything else."""
    if text:
        figure.supxlabel(text, fontsize="small", color="0.35")
